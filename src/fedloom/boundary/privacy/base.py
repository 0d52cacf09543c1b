"""What every level of privacy is: a stage that says what it protects, what that costs, and what can be promised."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import ROUND_CEILING, Context
from typing import TYPE_CHECKING, Any

from fedloom.boundary.stage import Stage
from fedloom.calls import SUMMED
from fedloom.errors import NobodyReplied, Refused, RunError, UsageError

if TYPE_CHECKING:
    from fedloom.boundary.books import Books
    from fedloom.calls import Call, Layer, Outcome
    from fedloom.mean import Sum
    from fedloom.method import Planned
    from fedloom.node import Server
    from fedloom.site import Site
    from fedloom.task import Task

WEIGHT = "n"  # the field by which methods weight their means
LEFT = "_left"  # how much more a client may release, as it goes along with a message
OVER = "overdrawn"  # the field in which it says that this was not enough, in place of a reply
Memory = Mapping[str, Any]


class Unprotected(Refused):
    """What a method does at a client is covered by no noise."""


class Overdrawn(NobodyReplied):
    """What was asked for would have cost more than the budget, and was not released: the round is given up."""


@dataclass(frozen=True)
class Privacy(Stage):
    """One level of privacy of a run. What it keeps from round to round lies in `books.memory["privacy"]`."""

    private: tuple[str, ...]  # reply fields that the method declares
    delta: float
    epsilon: float | None  # the budget: the run ends before the round that would exceed it; None: no end
    assumptions: tuple[str, ...]  # in words, for the record
    known: tuple[str, ...] = field(default=(), kw_only=True)  # what a rehearsal found unprotected

    setting = "dp"

    def on(self, task: Task) -> Privacy:
        """The same on another problem where everybody takes part, without a budget."""
        return replace(self, epsilon=None)

    def after_rehearsal(self, books: Books, whole: bool) -> Privacy:
        leaks = tuple(books.memory.get("privacy", {}).get("leaks", ()))
        if leaks and self.epsilon is not None:
            raise UsageError(refusal(self.epsilon, leaks[0]))
        return replace(self, known=leaks)

    def check_network(self, site: Site) -> None:
        layout = site.initial.layout
        if layout.parameters < len(layout.names) and site.buffers == "average":
            name = layout.names[layout.parameters]
            raise UsageError(
                f"dp: this network has running statistics ({name}, ...), which no noise can protect; set "
                "buffers=ignore or buffers=local, so that none leaves a client, or take a network without BatchNorm"
            )

    @abstractmethod
    def at_clients(self) -> Sequence[Layer]:
        """What clips there, or adds noise."""

    @abstractmethod
    def spending(self, memory: Memory, more: int = 0) -> float:
        """Epsilon after what is in the memory, and after as many more rounds like the last."""

    def memory(self, books: Books) -> dict[str, Any]:
        """What is kept from round to round: `leaks`, the unprotected fields that were sent, and a level's own."""
        return books.memory.setdefault("privacy", {"leaks": list(self.known)})

    def weighted_by(self, call: Call, weight: str | None) -> str | None:
        if weight not in (None, WEIGHT):
            raise UsageError(f"dp lets all clients count alike; {call.function} weights them by {weight!r}")
        return None

    def total(self, books: Books, call: Call, total: Sum | None) -> Sum | None:
        self.raise_if_overdrawn(books)
        return total

    def reply_seen(self, books: Books, call: Call, outcome: Outcome) -> None:
        if OVER in outcome.sizes:
            self.memory(books)["over"] = f"client {outcome.client} would have to release more in {call.function}"
            if call.verb not in SUMMED:  # there it is seen to once all have arrived
                self.raise_if_overdrawn(books)
            return
        for name in outcome.sizes:
            if not self.protects(call, name):
                self.record_leak(books, f"{call.function}.{name}")

    def observe(self, books: Books, server: Server, observe: Callable[[], Any]) -> Any:
        # What `observe` leaves at the server has seen evaluation, which nothing protects.
        before = dict(server.values)
        found = observe()
        for name, value in server.values.items():
            if name not in before or before[name] is not value:
                self.record_leak(books, f"server.{name}, set in evaluation,")
        return found

    def raise_if_overdrawn(self, books: Books) -> None:
        """Raises Overdrawn if something was not released because it would have exceeded the budget."""
        if why := self.memory(books).get("over"):
            raise Overdrawn(f"the privacy budget: {why} than is left")

    def record_leak(self, books: Books, what: str) -> None:
        """Something left the clients unprotected. Raises RunError where an epsilon was asked for."""
        memory = self.memory(books)
        if what in memory["leaks"]:
            return
        memory["leaks"] = [*memory["leaks"], what]
        if self.epsilon is not None:
            raise RunError(refusal(self.epsilon, what))

    def covers(self, call: Call | Planned) -> bool:
        """Whether private fields of a call's replies are protected."""
        return call.kind == "train"

    def protects(self, call: Call, field: str) -> bool:
        """Whether a field of a call's replies is protected."""
        return self.covers(call) and field in (*self.private, "envelope")

    def round_row(self, books: Books, server: Server) -> dict[str, float | None]:
        return dict(self.epsilon_so_far(books))

    def epsilon_so_far(self, books: Books) -> dict[str, float]:
        """Epsilon so far, where there is one."""
        memory = self.memory(books)
        spent = math.inf if memory["leaks"] else self.spending(memory)
        return {"dp/epsilon": spent} if spent < math.inf else {}

    def stop_reason(self, books: Books) -> str | None:
        if self.epsilon is None:
            return None
        memory = self.memory(books)
        now, then = self.spending(memory), self.spending(memory, more=1)
        if why := memory.get("over"):
            return f"the privacy budget: epsilon is {now:.3g} of {self.epsilon:g}, and {why} than is left"
        if then <= self.epsilon:
            return None
        return f"the privacy budget: epsilon is {now:.3g} of {self.epsilon:g}, and after another round {then:.3g}"

    def manifest(self, books: Books) -> dict[str, Any]:
        return {"dp": self.statement(books)}

    def statement(self, books: Books) -> list[str]:
        """What can be promised, in sentences."""
        memory = self.memory(books)
        if memory["leaks"]:
            sent = ", ".join(memory["leaks"])
            return [f"No differential privacy: no guarantee, since {sent} leaves the clients unprotected."]
        spent = self.spending(memory)
        if spent == math.inf:
            return ["No differential privacy: no guarantee, since there is no noise."]
        level = LEVEL_OF[type(self).__name__.removesuffix("Level").lower()]
        first = f"Differential privacy at the level of {level}: epsilon {rounded_up(spent)} at delta {self.delta:g}."
        return [first, *self.assumptions, NOT_COVERED]

    def final_manifest(self, books: Books, server: Server) -> dict[str, Any]:
        """What a membership attack finds out about the trained model, and what no attack can exceed."""
        from fedloom.boundary.privacy.membership import bound, leakage

        found = leakage(server, books.site.task, books.site.seed)
        most = bound(*self.of_sample(self.epsilon_so_far(books).get("dp/epsilon", math.inf)))
        return {"membership": {"auc": found.auc, "advantage": found.advantage, "hits": found.hits, "bound": most}}

    def of_sample(self, epsilon: float) -> tuple[float, float]:
        """The epsilon and delta that hold for one sample more or less at some client."""
        return epsilon, self.delta


PUBLIC = "How many samples a client has is taken to be public: it registers that number, and the server may use it."
SEEDED = "Noise comes from the run's seed, for repetition; a deployment has to draw it from the system."
NOT_COVERED = "Not covered: evaluation, the losses that clients log, and this record's counts of replies and bytes."
LEVEL_OF = {"client": "clients", "sample": "samples", "local": "single replies"}


def rounded_up(spent: float) -> str:
    """A number to three digits, rounded up: a promise of less than was spent would not hold."""
    noise = 1e-12  # of floating-point sums: three times 0.1 are 0.3
    return f"{float(Context(prec=3, rounding=ROUND_CEILING).create_decimal_from_float(spent * (1 - noise))):.3g}"


def refusal(epsilon: float, what: str) -> str:
    """Why a run with a budget goes no further."""
    return (
        f"dp: epsilon={epsilon:g} was asked for, but {what} leaves the clients unprotected; leave epsilon out for a "
        "run without a guarantee, or take a method that sends no such field"
    )


def tensors(fields: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The flat tensors of the protected fields of a reply: vectors' parameters and floating tensors, else an error."""
    from torch import Tensor

    from fedloom.vector import Vector

    found = {}
    for name in names:
        if name not in fields:
            continue
        value = fields[name].params.flat if isinstance(fields[name], Vector) else fields[name]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise RunError(
                f"dp clips vectors and floating tensors; the private field {name!r} is a {type(value).__name__}"
            )
        found[name] = value
    return found


def put(fields: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with the tensors of `flat` in place of their own; a vector's running statistics stay behind, as 0.

    Neither a bound on a length nor noise means anything for a mean or a variance, so that none leaves a client.
    """
    from fedloom.vector import Vector

    return {
        name: value
        if name not in flat
        else value.zeros_like().merge(Vector(flat[name], value.params.layout))
        if isinstance(value, Vector)
        else flat[name]
        for name, value in fields.items()
    }


def number(where: str, value: Any, low: float = 0.0) -> float:
    """A finite number above `low`, or an error."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not low < value < float("inf"):
        raise UsageError(f"dp: {where} is {value!r}; expected a number above {low:g}")
    return float(value)
