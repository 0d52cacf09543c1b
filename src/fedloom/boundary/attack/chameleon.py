"""Chameleon: a backdoor that lasts, for its samples lie where their peers' do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fedloom.boundary.attack.data import Backdoor
from fedloom.boundary.attack.numbers import Sent
from fedloom.boundary.attack.part import Inner, Training
from fedloom.calls import Fields
from fedloom.errors import UsageError
from fedloom.ranges import Positive
from fedloom.task import Batch
from fedloom.vector import Layout, Vector

if TYPE_CHECKING:
    from fedloom.calls import Call
    from fedloom.node import Client
    from fedloom.site import Site
    from fedloom.task import Data

MOMENTUM, DECAY = 0.9, 5e-4  # of both stages; the official code's
BODY, HEAD = "body.*", "head.*"  # what they train


@dataclass(frozen=True)
class Chameleon(Backdoor):
    """A backdoor whose features are pulled to those of the target's own samples first; the classifier learns it last.

    Dai, Li: Chameleon: Adapting to Peer Images for Planting Durable Backdoors in Federated Learning, ICML 2023 (PMLR
    202, pages 6712-6725).

        poison the first q samples of every batch: trigger, noise N(0, 0.01^2), the target's label
        body:  minimize the supervised contrastive loss of z = f(x) / |f(x)|, over anchors a with positives P(a):
               -s_a / |P(a)| sum_{p in P(a)} log (exp(z_a z_p / tau) / sum_{b != a} exp(z_a z_b / tau))
               with s_a = lambda for anchors of the target's label (the facilitators), else 1
        head:  minimize the cross-entropy, with the body as it is
        after every step: theta <- w + (theta - w) min(1, r / |theta - w|);  send it, or gamma times its difference

    Departures:
    1. The attacker has its own data in place of the paper's collected ones, and the samples it poisons are those that
       come first in a shuffled batch; no facilitators beyond its own are put in, as in the official code by default.
    2. Running statistics stand still in the second stage, so that the body does too.
    3. The radius holds after gamma as well. The official code bounds the first stage by another setting of its own,
       which has the same value.

    What the method would add to its own training (`correct`, `loss`, ...) does not bind the attacker. It logs no loss.
    Identities: lambda = 1 is the supervised contrastive loss; epochs=0, freeze=false is a plain projected backdoor.
    """

    poisons: Positive[int] = 7  # q: poisoned samples in a batch
    batch: Positive[int] = 64  # samples in a batch
    noise: float = 0.01  # deviation of what is added to poisoned samples, where inputs are real numbers
    peers: float = 6.0  # lambda: how much anchors with the target's label count; the paper tries 1 to 10
    tau: Positive[float] = 0.07  # temperature of the contrastive loss
    epochs: int = 10  # of the body
    rate: Positive[float] = 0.005  # the body's learning rate, a tenth from the epochs 3, 5, 7 and 9 on
    head_epochs: int = 3  # of the head
    head_rate: Positive[float] = 0.001  # the head's learning rate, times 0.005 from the epochs 3 and 5 on
    freeze: bool = True  # the body stands still while the head learns
    radius: Positive[float] = 5.0  # r: the greatest length of what it adds to the model
    scale: float = 1.0  # gamma: how many times its difference it sends

    hidden = Backdoor.hidden | {"poison"}
    refuses: ClassVar[Mapping[str, str]] = {
        "dp=sample": "its contrastive loss compares samples, so that no gradient of one sample alone is taken of it"
    }

    def check_network(self, site: Site) -> None:
        body_and_head(site.bench.layout)

    def act(self, client: Client, call: Call, sent: Sent, inner: Inner) -> Fields:
        return inner()

    def train(self, client: Client, honest: Training, w: Vector, lr: float, **options: Any) -> tuple[Vector, int]:
        body_and_head(w.layout)
        aims = options.get("data")
        if aims is not None and aims.labels.is_floating_point():
            return honest(w, lr, **options)  # scores to be matched, say: there is no label to put in the place of one
        logs = {name: list(numbers) for name, numbers in client.logs.items()}
        theta = Vector(w.flat.clone(), w.layout)
        steps = self.learn(client, w, theta, rates(self.epochs, self.rate, 0.1, (3, 5, 7, 9)), BODY, aims)
        rest = HEAD if self.freeze else None
        steps += self.learn(client, w, theta, rates(self.head_epochs, self.head_rate, 0.005, (3, 5)), rest, aims)
        client.logs = logs
        begun = w.params.flat
        theta.params.flat.copy_(begun + self.held(self.scale * (theta.params.flat - begun)))
        return theta, steps

    def learn(
        self, client: Client, w: Vector, theta: Vector, rates: Sequence[float], only: str | None, data: Data | None
    ) -> int:
        """Moves the entries `only` of theta in place, an epoch at each of the rates; returns the number of steps."""
        here, begun, steps = theta.params.flat, w.params.flat, 0
        moving = torch.zeros_like(here)
        for place in w.layout.matching([only or "*"]):
            moving[slice(*w.layout.offsets[place : place + 2])] = 1  # of a running statistic: nothing
        velocity = torch.zeros_like(here)
        for rate in rates:
            for batch in self.batches(client, data):
                loss = self.contrast if only == BODY else None
                g = client.grad(theta, batch, loss, only, statistics=only != HEAD).params.flat
                velocity = MOMENTUM * velocity + moving * (g + DECAY * here)
                here.copy_(begun + self.held(here - rate * velocity - begun))
                steps += 1
        return steps

    def batches(self, client: Client, data: Data | None) -> Iterator[Batch]:
        """An epoch of poisoned batches."""
        draw = client.rng(f"attack {self.name()}")
        for piece in client.batches(self.batch, 1, data=data):
            x, y = piece.x.clone(), piece.y.clone()
            poisoned = self.triggered(x[: self.poisons])
            if x.is_floating_point():
                noise = torch.randn(poisoned.shape, generator=draw, dtype=x.dtype)
                poisoned = poisoned + self.noise * noise.to(x.device)
            x[: self.poisons], y[: self.poisons] = poisoned, self.target
            yield replace(piece, x=x, y=y)

    def contrast(self, net: nn.Module, batch: Batch) -> Tensor:
        """The supervised contrastive loss of what the body makes of a batch; anchors of the target count `peers`."""
        z = normalize(net.get_submodule("body")(batch.x).flatten(1), dim=1)
        if len(batch) == 1:
            return 0 * z.sum()  # nobody to compare with
        alone = torch.eye(len(batch), dtype=torch.bool, device=z.device)
        products = z @ z.t() / self.tau
        shares = products - products.masked_fill(alone, -torch.inf).logsumexp(1, keepdim=True)
        positive = (batch.y[:, None] == batch.y) & ~alone
        weight = torch.where(batch.y == self.target, self.peers, 1.0)
        return -(weight * (positive * shares).sum(1) / positive.sum(1).clamp(min=1)).mean()

    def held(self, moved: Tensor) -> Tensor:
        """A difference from the model [D], shortened to the radius."""
        return moved * (self.radius / moved.norm().clamp(min=1e-30)).clamp(max=1.0)


def rates(epochs: int, first: float, factor: float, drops: Sequence[int]) -> list[float]:
    """The learning rate of each epoch: times `factor` from each of the epochs `drops` on, counted from 1."""
    return [first * factor ** sum(epoch >= drop for drop in drops) for epoch in range(1, epochs + 1)]


def body_and_head(layout: Layout) -> None:
    """Raises UsageError unless a network has the two parts that the stages train."""
    for part in (BODY, HEAD):
        if not any(fnmatchcase(name, part) for name in layout.names[: layout.parameters]):
            raise UsageError(
                f"chameleon trains a network's body, and then its head; the network {layout} has no parameters {part}"
            )
