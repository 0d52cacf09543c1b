"""Local privacy: a client clips and adds noise before its reply is seen by anybody.

Laplace noise for a bound on the sum of sizes [Dwork, McSherry, Nissim, Smith 2006], Gaussian for one on the length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedloom.boundary.privacy import accountant
from fedloom.boundary.privacy.base import LEFT, OVER, PUBLIC, SEEDED, Memory, Privacy, number, put, tensors
from fedloom.boundary.privacy.clip import limited, protected, unweighted
from fedloom.calls import Fields, Layer
from fedloom.cohort import Each
from fedloom.errors import UsageError, unknown

if TYPE_CHECKING:
    from fedloom.boundary.books import Books
    from fedloom.calls import Call, Outcome
    from fedloom.method import Method
    from fedloom.node import Client
    from fedloom.runs.spec import Spec
    from fedloom.task import Task

MECHANISMS = ("laplace", "gaussian")


@dataclass(frozen=True)
class Noising(Layer):
    """At a client: the private fields, taken together, get at most the bound, and then noise."""

    private: tuple[str, ...]
    mechanism: str
    clip: float
    scale: float  # of the noise, in numbers

    def around(self, client: Client, call: Call, message: Mapping[str, Any], inner: Callable[[], Fields]) -> Fields:
        reply = unweighted(call, inner())
        if protected(self.private, list(reply)) and message.get(LEFT, 1) < 1:
            return {OVER: 1.0}
        flat, _ = limited(tensors(reply, self.private), self.clip, 1 if self.mechanism == "laplace" else 2)
        generator = client.rng("privacy")
        noised = {}
        for name, t in flat.items():
            if self.mechanism == "laplace":
                u = torch.rand(t.shape, generator=generator, dtype=torch.float64) - 0.5
                drawn = -u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.5 - 2**-53))
            else:
                drawn = torch.randn(t.shape, generator=generator, dtype=torch.float64)
            noised[name] = (t.double() + self.scale * drawn.to(t.device)).to(t.dtype)
        return put(reply, noised)


@dataclass(frozen=True)
class Local(Privacy):
    """Every reply is private by itself: the server need not be trusted."""

    mechanism: str
    each: float  # epsilon of one reply
    clip: float
    scale: float

    @staticmethod
    def made(
        spec: Spec,
        method: Method,
        task: Task,
        delta: float,
        mechanism: str = "gaussian",
        epsilon: Any = None,
        clip: Any = 1.0,
        budget: Any = None,
    ) -> Local:
        """From the options of the setting: `epsilon` is of one reply, `budget` of all that a client ever sends."""
        if mechanism not in MECHANISMS:
            raise unknown("mechanism", mechanism, MECHANISMS)
        if epsilon is None:
            raise UsageError("dp: local privacy needs epsilon=..., that of one reply")
        each, bound = number("epsilon", epsilon), number("clip", clip)
        accountant.library()
        exact = " and no delta" if mechanism == "laplace" else f" at delta {delta:g}"
        if mechanism == "laplace":
            scale = 2 * bound / each  # one client's data replaced moves a clipped reply by twice the bound
        else:
            scale = 2 * bound * accountant.calibrated(each, delta, 1, "none", 1, 1)
        return Local(
            tuple(method.private),
            delta,
            None if budget is None else number("budget", budget),
            (
                f"Each reply by itself has epsilon {each:g}{exact}; neighbours differ by all of one client's data.",
                "Epsilon is that of the client that replied most often.",
                PUBLIC,
                SEEDED,
            ),
            mechanism,
            each,
            bound,
            scale,
        )

    def at_clients(self) -> Sequence[Layer]:
        return [Noising(self.private, self.mechanism, self.clip, self.scale)]

    def reply_seen(self, books: Books, call: Call, outcome: Outcome) -> None:
        super().reply_seen(books, call, outcome)
        if OVER in outcome.sizes or call.kind != "train" or not protected(self.private, list(outcome.sizes)):
            return
        memory, key = self.memory(books), str(outcome.client)
        if memory.get("round") != books.round:
            memory["round"], memory["now"] = books.round, {}
        for name in ("replies", "now"):
            counts = memory.setdefault(name, {})
            counts[key] = counts.get(key, 0) + 1

    def hidden_fields(self, books: Books, clients: Sequence[int]) -> dict[str, Any]:
        if self.epsilon is None:
            return {}
        most, sent = accountant.most(self.cost, self.epsilon), self.memory(books).get("replies", {})
        return {LEFT: Each({client: most - sent.get(str(client), 0) for client in clients})}

    def spending(self, memory: Memory, more: int = 0) -> float:
        sent = max(memory.get("replies", {}).values(), default=0)
        return self.cost(sent + more * max(memory.get("now", {}).values(), default=1))

    def cost(self, calls: int) -> float:
        """Epsilon of a client that has sent so many replies."""
        if self.mechanism == "laplace":
            return float(calls * self.each)
        return accountant.epsilon(self.scale / (2 * self.clip), {1: calls}, self.delta, "none", 1, 1)
