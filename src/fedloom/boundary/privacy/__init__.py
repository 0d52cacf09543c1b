"""Differential privacy (`--dp ...`), of one of three levels, with `dp-accounting` keeping the budget.

    client:noise=1.0,clip=1.0     of clients: replies are clipped together, noise goes onto their sum
    sample:noise=1.0,clip=1.0     of samples: every gradient that a client takes is clipped sample by sample and noised
    local:laplace,epsilon=1       of what a client sends: it clips and noises before anybody sees it; or local:gaussian

Only reply fields that a method declares `private` are protected. Whatever else leaves a client in training, setup or
finish voids the guarantee, which the record then says, with the field's name, in place of an epsilon; a `rehearsal` on
a small problem finds most of it before the first round. A weight by
samples is neither sent nor used where a client's whole data are protected: its replies count like any other's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import ROUND_CEILING, Context
from typing import TYPE_CHECKING, Any

from fedloom.boundary.layer import Layer
from fedloom.cohort import NobodyReplied
from fedloom.errors import RunError, UsageError, unknown
from fedloom.parsing import Term, called

if TYPE_CHECKING:
    from fedloom.boundary import Boundary
    from fedloom.cohort import Mean
    from fedloom.engines import Call
    from fedloom.mean import Sum
    from fedloom.method import Method, Planned
    from fedloom.node import Server
    from fedloom.site import Site
    from fedloom.spec import Spec
    from fedloom.task import Task

LEVELS = ("client", "sample", "local")
WEIGHT = "n"  # the field by which methods weight their means
LEFT = "_left"  # how much more a client may release, as it goes along with a message
OVER = "overdrawn"  # the field in which it says that this was not enough, in place of a reply
DELTA = 1e-5
Memory = Mapping[str, Any]


class Unprotected(UsageError):
    """What a method does at a client is covered by no noise."""


class Overdrawn(NobodyReplied):
    """What was asked for would have cost more than the budget, and was not released: the round is given up."""


@dataclass(frozen=True)
class Privacy(ABC):
    """One level of privacy of a run. What it keeps from round to round lies in `boundary.memory["privacy"]`."""

    private: tuple[str, ...]  # reply fields that the method declares
    delta: float
    epsilon: float | None  # the budget: the run ends before the round that would exceed it; None: no end
    assumptions: tuple[str, ...]  # in words, for the record
    known: tuple[str, ...] = field(default=(), kw_only=True)  # what a rehearsal found unprotected

    @staticmethod
    def of(text: str, spec: Spec, method: Method, task: Task) -> Privacy:
        """The privacy that a run's settings ask for; raises UsageError where it makes no sense."""
        from fedloom.boundary.privacy.client_level import ClientLevel
        from fedloom.boundary.privacy.local import Local
        from fedloom.boundary.privacy.rehearsal import rehearsed
        from fedloom.boundary.privacy.sample_level import SampleLevel

        term = Term(text)
        if term.name not in LEVELS:
            raise unknown("level of privacy", term.name, LEVELS)
        if not method.private:
            raise UsageError(
                f"dp={text}: {method.name()} declares no reply field as private, so that nothing can be "
                "clipped; take a method that does, such as fedavg"
            )
        kinds: dict[str, Any] = {"client": ClientLevel, "sample": SampleLevel, "local": Local}
        delta = term.options.pop("delta", DELTA)
        if not isinstance(delta, int | float) or not 0 < delta < 1:
            raise UsageError(f"dp={text}: delta is {delta}; expected a probability, far below one over the clients")
        made: Privacy = called(term, kinds[term.name].made, spec, method, task, float(delta), where=f"dp={text}")
        asked = [call for call in method.plan if call.kind != "evaluate"]
        bare = [call for call in asked if not made.covers(call)]
        if bare and not any(made.covers(call) for call in asked):
            raise UsageError(
                f"dp={text} protects the means of clients' replies, and {method.name()} asks for each reply of "
                f"{bare[0].function} by {bare[0].verb}; take dp=local or dp=sample, or a method that takes means"
            )
        if made.epsilon is not None and bare:
            raise UsageError(
                f"dp={text}: {method.name()} asks clients for {bare[0].function} by {bare[0].verb} in {bare[0].kind}, "
                "which this mechanism does not protect; leave epsilon out for a run without a guarantee"
            )
        first = made.spending({}, more=1)
        if made.epsilon is not None and first > made.epsilon:
            raise UsageError(
                f"dp={text}: the first round alone costs epsilon {first:.3g}, over the budget of {made.epsilon:g}; "
                "take more noise"
            )
        leaks = rehearsed(method, made)
        if leaks and made.epsilon is not None:
            raise UsageError(refusal(made.epsilon, leaks[0]))
        return replace(made, known=leaks)

    def on(self, task: Task) -> Privacy:
        """The same on another problem where everybody takes part, without a budget."""
        return replace(self, epsilon=None)

    def vet(self, site: Site) -> None:
        """Raises UsageError for a network whose training this privacy cannot cover."""
        layout = site.initial.layout
        if layout.parameters < len(layout.names) and site.buffers == "average":
            name = layout.names[layout.parameters]
            raise UsageError(
                f"dp: this network has running statistics ({name}, ...), which no noise can protect; set "
                "buffers=ignore or buffers=local, so that none leaves a client, or take a network without BatchNorm"
            )

    @abstractmethod
    def layers(self) -> Sequence[Layer]:
        """What acts at the clients."""

    @abstractmethod
    def spending(self, memory: Memory, more: int = 0) -> float:
        """Epsilon after what is in the memory, and after as many more rounds like the last."""

    def memory(self, boundary: Boundary) -> dict[str, Any]:
        """What is kept from round to round: `leaks`, the unprotected fields that were sent, and a level's own."""
        return boundary.memory.setdefault("privacy", {"leaks": list(self.known)})

    def begin(self, boundary: Boundary, clients: Sequence[int]) -> dict[str, Any]:
        """What the clients' layers need to know in a call: goes along with its message."""
        return {}

    def weight(self, call: Call, weight: str | None) -> str | None:
        """The field by which a mean is weighted under this privacy: none."""
        if weight not in (None, WEIGHT):
            raise UsageError(f"dp lets all clients count alike; {call.function} weights them by {weight!r}")
        return None

    def summed(self, boundary: Boundary, call: Call, total: Sum | None) -> Sum | None:
        """The sum of a call's replies, before it is divided; None: there was none."""
        self.vetoed(boundary)
        return total

    def released(self, boundary: Boundary, call: Call, mean: Mean) -> Mean:
        """A mean as it leaves the sum."""
        return mean

    def saw(self, boundary: Boundary, call: Call, client: int, fields: Sequence[str], steps: int) -> None:
        """A reply has arrived: whether something in it is not protected."""
        if OVER in fields:
            self.memory(boundary)["over"] = f"client {client} would have to release more in {call.function}"
            if call.verb != "mean":  # there it is seen to once all have arrived
                self.vetoed(boundary)
            return
        for name in fields:
            if not self.protects(call, name):
                self.leaked(boundary, f"{call.function}.{name}")

    def observed(self, boundary: Boundary, server: Server, observe: Callable[[], Any]) -> Any:
        """What a method's `observe` gives. What it leaves at the server has seen evaluation, which nothing protects."""
        before = dict(server.values)
        found = observe()
        for name, value in server.values.items():
            if name not in before or before[name] is not value:
                self.leaked(boundary, f"server.{name}, set in evaluation,")
        return found

    def vetoed(self, boundary: Boundary) -> None:
        """Raises Overdrawn if something was not released because it would have exceeded the budget."""
        if why := self.memory(boundary).get("over"):
            raise Overdrawn(f"the privacy budget: {why} than is left")

    def leaked(self, boundary: Boundary, what: str) -> None:
        """Something left the clients unprotected. Raises RunError where an epsilon was asked for."""
        memory = self.memory(boundary)
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

    def told(self, boundary: Boundary) -> dict[str, float]:
        """For a round's record: epsilon so far, where there is one."""
        memory = self.memory(boundary)
        spent = math.inf if memory["leaks"] else self.spending(memory)
        return {"dp/epsilon": spent} if spent < math.inf else {}

    def spent(self, boundary: Boundary) -> str | None:
        """Why the run ends now, if the next round would exceed the budget."""
        if self.epsilon is None:
            return None
        memory = self.memory(boundary)
        now, then = self.spending(memory), self.spending(memory, more=1)
        if why := memory.get("over"):
            return f"the privacy budget: epsilon is {now:.3g} of {self.epsilon:g}, and {why} than is left"
        if then <= self.epsilon:
            return None
        return f"the privacy budget: epsilon is {now:.3g} of {self.epsilon:g}, and after another round {then:.3g}"

    def statement(self, boundary: Boundary) -> list[str]:
        """What can be promised, in sentences."""
        memory = self.memory(boundary)
        if memory["leaks"]:
            sent = ", ".join(memory["leaks"])
            return [f"No differential privacy: no guarantee, since {sent} leaves the clients unprotected."]
        spent = self.spending(memory)
        if spent == math.inf:
            return ["No differential privacy: no guarantee, since there is no noise."]
        level = LEVEL_OF[type(self).__name__.removesuffix("Level").lower()]
        first = f"Differential privacy at the level of {level}: epsilon {upward(spent)} at delta {self.delta:g}."
        return [first, *self.assumptions, NOT_COVERED]

    def leakage(self, boundary: Boundary, server: Server) -> dict[str, float]:
        """What a membership attack finds out about the trained model, and what no attack can exceed."""
        from fedloom.boundary.privacy.membership import bound, leakage

        found = leakage(server, boundary.task, boundary.site.seed)
        most = bound(*self.of_sample(self.told(boundary).get("dp/epsilon", math.inf)))
        return {"auc": found.auc, "advantage": found.advantage, "hits": found.hits, "bound": most}

    def of_sample(self, epsilon: float) -> tuple[float, float]:
        """The epsilon and delta that hold for one sample more or less at some client."""
        return epsilon, self.delta


PUBLIC = "How many samples a client has is taken to be public: it registers that number, and the server may use it."
SEEDED = "Noise comes from the run's seed, for repetition; a deployment has to draw it from the system."
NOT_COVERED = "Not covered: evaluation, the losses that clients log, and this record's counts of replies and bytes."
LEVEL_OF = {"client": "clients", "sample": "samples", "local": "single replies"}


def upward(spent: float) -> str:
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
