"""Privacy of samples: DP-SGD inside the clients, with Opacus' gradients sample by sample.

Abadi et al.: Deep Learning with Differential Privacy, CCS 2016, arXiv 1607.00133.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from fedloom.boundary.privacy import accountant
from fedloom.boundary.privacy.base import LEFT, OVER, PUBLIC, SEEDED, WEIGHT, Memory, Privacy, Unprotected, number
from fedloom.boundary.privacy.per_sample import per_sample
from fedloom.calls import Fields, Layer
from fedloom.cohort import Each
from fedloom.errors import UsageError
from fedloom.task import Batch, Data

if TYPE_CHECKING:
    from fedloom.boundary.books import Books
    from fedloom.calls import Call, Outcome
    from fedloom.descent import Loss
    from fedloom.method import Method
    from fedloom.node import Client, Node
    from fedloom.runs.spec import Spec
    from fedloom.site import Site
    from fedloom.task import Task

MANY = 64  # numbers of samples that are accounted for one by one
REFUSED = (
    "dp at the level of samples accounts for gradients of the batches that client.batches and client.descend draw, and "
    "this method reads {}: what it makes of that could leave the client, and nothing would protect it"
)


class Exhausted(Exception):
    """A client has no step left of its budget."""


class Sealed:
    """A batch that a method may hand to `client.grad`, and not look into: how many were drawn is a secret as well."""

    def __init__(self, inside: Batch, expected: int) -> None:
        self._inside, self._expected = inside, expected

    def __len__(self) -> int:
        return self._expected

    def opened(self) -> Batch:
        """For the guard alone."""
        return self._inside

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Unprotected(REFUSED.format(f"batch.{name}"))

    def __iter__(self) -> Iterator[Tensor]:
        raise Unprotected(REFUSED.format("x, y = batch"))

    def __getitem__(self, name: str) -> Tensor:
        raise Unprotected(REFUSED.format(f"batch[{name!r}]"))


class Closed:
    """A task without what it knows of anybody's data."""

    OPEN = frozenset(
        {
            *("loss", "criterion", "head_loss", "loss_above", "maximised", "network", "build", "shape"),
            *("classes", "offers", "population", "info", "public", "shared_data"),
        }
    )

    def __init__(self, task: Task) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self.OPEN:
            raise Unprotected(REFUSED.format(f"client.task.{name}"))
        return getattr(self._task, name)


@dataclass
class Guard:
    """How a client under DP-SGD draws batches and takes gradients: `Node` asks it in place of doing so itself.

    The accountant takes each gradient for one of a fresh Poisson sample; whatever else a method asks for is refused.
    """

    noise: float
    clip: float
    share: float = 1.0  # of its samples that a batch has on average, at most: what is accounted for
    left: float = math.inf  # gradients that the budget still pays for
    drawn: Sealed | None = None  # a batch whose gradient was not taken yet
    seen: tuple[nn.Module, Loss] | None = None  # a network and a loss that are known to keep samples apart

    def read(self, what: str) -> NoReturn:
        """A method looks at data beside the batches: raises Unprotected."""
        raise Unprotected(REFUSED.format(what))

    def batches(
        self, node: Node, batch: int | None, epochs: int | None, steps: int | None, given: Data | None
    ) -> Iterator[Sealed]:
        """Poisson samples: every sample is in a batch with probability batch / n, on its own; empty ones included."""
        if given is not None:
            self.read("batches of `data=`")
        data = node.own
        n = len(data)
        size = min(batch or n, n)
        if not n or size > self.share * n * (1 + 1e-9):
            raise Unprotected(
                f"dp at the level of samples accounts for batches of {self.share:.3g} of a client's samples, and this "
                f"method takes {size} of {n}"
            )
        an_epoch = -(-n // size)
        count = steps if steps is not None else an_epoch * (1 if epochs is None else epochs)
        draw = node.rng("privacy batches")
        rows = data.taken(None)
        for _ in range(count):
            chosen = (
                torch.ones(n, dtype=torch.bool)
                if size == n
                else torch.rand(n, generator=draw, dtype=torch.float64) < size / n
            )
            here = rows[chosen.nonzero().squeeze(1).to(rows.device, non_blocking=True)]
            self.drawn = Sealed(data.at(here), size)
            yield self.drawn

    def gradient(
        self, node: Node, net: nn.Module, params: Sequence[Tensor], loss: Loss, batch: Batch | Sealed
    ) -> tuple[Tensor, list[Tensor]]:
        """The batch's mean loss and its noised gradient: clipped by sample, summed, noised, over the expected size."""
        if not isinstance(batch, Sealed) or batch is not self.drawn:
            raise Unprotected(
                "dp at the level of samples accounts for one gradient of every batch that client.batches or "
                "client.descend has just drawn; this method takes another"
            )
        if self.left < 1:
            raise Exhausted
        self.drawn, self.left, expected = None, self.left - 1, len(batch)
        batch = batch.opened()
        draw = node.rng("privacy noise")
        value, sums = params[0].new_zeros(()), [torch.zeros_like(p) for p in params]
        if len(batch):
            known = self.seen is not None and self.seen[0] is net and self.seen[1] == loss
            if not known:
                self.check_network(net, loss, batch)
            value, each = per_sample(net, params, loss, batch, whole=not known)
            lengths = torch.stack([g.flatten(1).square().sum(1) for g in each]).sum(0).sqrt()
            scale = (self.clip / lengths.clamp(min=1e-12)).clamp(max=1.0)
            # Neither clipping nor noise would cover such a sample. To ask an accelerator would make it wait.
            if lengths.device.type != "cpu" or not lengths.isfinite().all():
                each = [torch.where(lengths.isfinite().view(-1, *[1] * (g.dim() - 1)), g, 0.0) for g in each]
                scale = scale.nan_to_num(0.0)
            sums = [torch.einsum("b,b...->...", scale, g) for g in each]
        deviation = self.noise * self.clip
        noised = [s + deviation * torch.randn(s.shape, generator=draw).to(s, non_blocking=True) for s in sums]
        return value, [s / expected for s in noised]

    def check_network(self, net: nn.Module, loss: Loss, batch: Batch) -> None:
        """Refuses layers and losses in which one sample changes another's part: clipping would not bound it."""
        validated(net)
        if len(batch) < 2:
            return
        training = net.training
        net.eval()  # without the draws of dropout
        with torch.no_grad():
            whole = loss(net, batch)
            one, rest = (loss(net, batch.part(part)) for part in (slice(1), slice(1, None)))
        net.train(training)
        if not whole.isfinite():
            return
        if not torch.isclose(whole, (one + (len(batch) - 1) * rest) / len(batch), rtol=1e-3, atol=1e-5):
            raise Unprotected(
                "dp at the level of samples needs a loss that is the mean of a loss of every sample by itself; "
                "this one mixes the samples of a batch"
            )
        self.seen = net, loss


def validated(net: nn.Module) -> None:
    """Raises Unprotected for layers in which one sample changes another's part."""
    from opacus.validators import ModuleValidator

    if problems := ModuleValidator.validate(net):
        raise Unprotected(f"dp at the level of samples: {problems[0]}".replace("\n", " "))


@dataclass(frozen=True)
class Guarding(Layer):
    """At a client: every gradient that it takes is private."""

    noise: float
    clip: float
    batch: int  # the method's batch size; 0: all samples at once
    sizes: tuple[int, ...]  # training samples of every client
    guards = True

    def around(self, client: Client, call: Call, message: Mapping[str, Any], inner: Callable[[], Fields]) -> Fields:
        n = self.sizes[client.id]
        left = float(message.get(LEFT, math.inf))
        client.guard = Guard(self.noise, self.clip, min(self.batch or n, n) / n if n else 0.0, left)
        task, client.task = client.task, Closed(client.task)  # type: ignore[assignment]
        try:
            return inner()
        except Exhausted:
            return {OVER: 1.0, WEIGHT: float(n)}
        finally:
            client.guard, client.task = None, task


@dataclass(frozen=True)
class SampleLevel(Privacy):
    """Privacy of single samples, also from the server: what leaves a client depends on them through gradients."""

    noise: float
    clip: float
    batch: int  # the method's batch size; 0: all samples at once
    epochs: int  # of a client in a round, as far as is known beforehand
    sizes: tuple[int, ...]  # training samples of every client

    @staticmethod
    def made(
        spec: Spec, method: Method, task: Task, delta: float, noise: Any = 1.0, clip: Any = 1.0, epsilon: Any = None
    ) -> SampleLevel:
        """From the options of the setting."""
        accountant.library()
        try:
            import opacus  # noqa: F401
        except ImportError:
            raise UsageError("dp=sample:... needs the extra: pip install 'fedloom[dp]'") from None
        if "several" in task.offers:
            raise UsageError(
                "dp=sample:... does not go with several problems at once: one size of a client's data is known"
            )
        if "graph" in task.offers:
            raise UsageError("dp=sample:... does not go with a graph: a node's neighbours are in its gradient too")
        sizes = tuple(int(task.info(k).get("n", 0)) for k in range(task.population))
        batch, epochs = (int(method.of_training(name) or 0) for name in ("batch", "epochs"))
        return SampleLevel(
            tuple(method.private),
            delta,
            None if epsilon is None else number("epsilon", epsilon),
            (
                "Batches are Poisson samples of a client's data; neighbours differ by one sample more or less.",
                "Epsilon is that of the client that spent most.",
                PUBLIC,
                "Clients are trusted to train as told, and the server need not be. A method sees the data in gradients "
                "of fresh batches alone.",
                SEEDED,
            ),
            0.0 if noise == 0 else number("noise", noise),
            number("clip", clip),
            batch,
            epochs,
            sizes,
        )

    def check_network(self, site: Site) -> None:
        validated(site.bench.net)

    def on(self, task: Task) -> SampleLevel:
        return replace(self, epsilon=None, sizes=tuple(len(task.data(k, "train")) for k in range(task.population)))

    def hidden_fields(self, books: Books, clients: Sequence[int]) -> dict[str, Any]:
        if self.epsilon is None:
            return {}
        taken, many = self.memory(books).get("steps", {}), len({*self.sizes}) > MANY
        left = {}
        for client in clients:
            n = self.sizes[client]
            paid = self.most(down(n) if many else n, self.epsilon) if n else 0  # as they are accounted for
            left[client] = paid - taken.get(str(client), 0)
        return {LEFT: Each(left)}

    def most(self, n: int, budget: float) -> int:
        """How many steps on n samples stay within the budget."""
        return most(self.noise, self.delta, min(self.batch or n, n), n, budget)

    def at_clients(self) -> Sequence[Layer]:
        return [Guarding(self.noise, self.clip, self.batch, self.sizes)]

    def weighted_by(self, call: Call, weight: str | None) -> str | None:
        return weight

    def protects(self, call: Call, field: str) -> bool:
        return super().protects(call, field) or (call.kind == "train" and field == WEIGHT)

    def reply_seen(self, books: Books, call: Call, outcome: Outcome) -> None:
        super().reply_seen(books, call, outcome)
        if call.kind == "setup":
            self.record_leak(books, f"what {call.function} learns in setup")
        memory = self.memory(books)
        if memory.get("round") != call.round:
            memory["round"], memory["now"] = call.round, {}
        key, n = str(outcome.client), str(self.sizes[outcome.client])
        for name in ("steps", "now"):
            taken = memory.setdefault(name, {})
            taken[key] = taken.get(key, 0) + outcome.steps
        most = memory.setdefault("most", {})  # steps of a client of so many samples in a round
        most[n] = max(most.get(n, 0), memory["now"][key])

    def spending(self, memory: Memory, more: int = 0) -> float:
        worst: dict[int, int] = {}  # most steps of clients of a size
        steps = memory.get("steps", {})
        for client, n in enumerate(self.sizes):
            ahead = more * memory.get("most", {}).get(str(n), self.guess(n)) if more and n else 0
            if n and (taken := steps.get(str(client), 0) + ahead):
                worst[n] = max(worst.get(n, 0), taken)
        found = [self.cost(n, steps) for n, steps in rounded(worst).items()]
        return max(found, default=0.0)

    def cost(self, n: int, steps: int) -> float:
        """Epsilon after so many steps on n samples."""
        return accountant.epsilon(self.noise, {1: steps}, self.delta, "poisson", min(self.batch or n, n), n)

    def guess(self, n: int) -> int:
        """Steps of a client of n samples in its first round."""
        return self.epochs * -(-n // min(self.batch or n, n)) or 1


@lru_cache(maxsize=4096)
def most(noise: float, delta: float, size: int, n: int, budget: float) -> int:
    """How many steps with batches of `size` of n samples stay within the budget."""
    return accountant.most(lambda k: accountant.epsilon(noise, {1: k}, delta, "poisson", size, n), budget)


def down(n: int) -> int:
    """A number of samples rounded down by 2 % at most."""
    return max(1, min(n, math.ceil(1.02 ** math.floor(math.log(n, 1.02)))))


def rounded(worst: Mapping[int, int]) -> dict[int, int]:
    """Many numbers of samples with their steps, as fewer: rounded down by 2 % at most, on the safe side."""
    if len(worst) <= MANY:
        return dict(worst)
    found: dict[int, int] = {}
    for n, steps in worst.items():
        found[down(n)] = max(found.get(down(n), 0), steps)
    return found
