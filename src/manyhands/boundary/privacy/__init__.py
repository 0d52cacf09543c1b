"""Differential privacy (`--dp ...`), of one of three levels, with `dp-accounting` keeping the budget.

    client:noise=1.0,clip=1.0     of clients: replies are clipped together, noise goes onto their sum
    sample:noise=1.0,clip=1.0     of samples: every gradient that a client takes is clipped sample by sample and noised
    local:laplace,epsilon=1       of what a client sends: it clips and noises before anybody sees it; or local:gaussian

Only reply fields that a method declares `private` are protected. Whatever else leaves a client in training, setup or
finish voids the guarantee, which the record then says, with the field's name, in place of an epsilon.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manyhands.boundary.layer import Layer
from manyhands.errors import RunError, UsageError, unknown
from manyhands.fields import named

if TYPE_CHECKING:
    from manyhands.boundary import Boundary
    from manyhands.cohort import Mean
    from manyhands.engines import Call
    from manyhands.method import Method
    from manyhands.node import Server
    from manyhands.spec import Spec
    from manyhands.task import Task

LEVELS = ("client", "sample", "local")
WEIGHT = "n"  # the field by which methods weight their means; a number of samples is no secret at the level of samples
DELTA = 1e-5


@dataclass(frozen=True)
class Privacy(ABC):
    """One level of privacy of a run. What it keeps from round to round lies in `boundary.memory["privacy"]`."""

    private: tuple[str, ...]  # reply fields that the method declares
    delta: float
    epsilon: float | None  # the budget: the run ends before the round that would exceed it; None: no end
    assumptions: tuple[str, ...]  # in words, for the record

    @staticmethod
    def of(text: str, spec: Spec, method: Method, task: Task) -> Privacy:
        """The privacy that a run's settings ask for; raises UsageError where it makes no sense."""
        from manyhands.boundary.privacy.client_level import ClientLevel
        from manyhands.boundary.privacy.local import Local
        from manyhands.boundary.privacy.sample_level import SampleLevel

        level, positional, options = named(text)
        if level not in LEVELS:
            raise unknown("level of privacy", level, LEVELS)
        if not method.private:
            raise UsageError(
                f"dp={text}: {method.name()} declares no reply field as private, so that nothing can be "
                "clipped; take a method that does, such as fedavg"
            )
        kinds: dict[str, Any] = {"client": ClientLevel, "sample": SampleLevel, "local": Local}
        delta = options.pop("delta", DELTA)
        if not isinstance(delta, int | float) or not 0 < delta < 1:
            raise UsageError(f"dp={text}: delta is {delta}; expected a probability, far below one over the clients")
        try:
            made: Privacy = kinds[level].made(spec, method, task, float(delta), *positional, **options)
        except TypeError as error:
            raise UsageError(f"dp={text}: {error}; see docs/privacy.md") from None
        return made

    @abstractmethod
    def layers(self) -> Sequence[Layer]:
        """What acts at the clients."""

    @abstractmethod
    def spending(self, boundary: Boundary, more: int = 0) -> float:
        """Epsilon after what has happened, and after as many more rounds like the last."""

    def begin(self, boundary: Boundary) -> dict[str, Any]:
        """What the clients' layers need to know in a call: goes along with its message."""
        return {}

    def weight(self, call: Call, weight: str | None) -> str | None:
        """The field by which a mean is weighted under this privacy."""
        return weight

    def released(self, boundary: Boundary, call: Call, mean: Mean) -> Mean:
        """A mean as it leaves the sum."""
        return mean

    def saw(self, boundary: Boundary, call: Call, client: int, fields: Sequence[str], steps: int) -> None:
        """A reply has arrived: whether something in it is not protected."""
        memory = boundary.memory.setdefault("privacy", {"leaks": []})
        for field in fields:
            if not self.protects(call, field) and (leak := f"{call.function}.{field}") not in memory["leaks"]:
                memory["leaks"] = [*memory["leaks"], leak]
                if self.epsilon is not None:
                    raise RunError(
                        f"dp: epsilon={self.epsilon:g} was asked for, but {leak} leaves the clients unprotected; leave "
                        "epsilon out for a run without a guarantee, or take a method that sends no such field"
                    )

    def protects(self, call: Call, field: str) -> bool:
        """Whether a field of a call's replies is protected."""
        return call.kind == "train" and field in (*self.private, "envelope")

    def spent(self, boundary: Boundary) -> str | None:
        """Why the run ends now, if the next round would exceed the budget."""
        if self.epsilon is None:
            return None
        now, then = self.spending(boundary), self.spending(boundary, more=1)
        if then <= self.epsilon:
            return None
        return f"the privacy budget: epsilon is {now:.3g} of {self.epsilon:g}, and after another round {then:.3g}"

    def statement(self, boundary: Boundary) -> list[str]:
        """What can be promised, in sentences."""
        leaks = boundary.memory.get("privacy", {}).get("leaks", [])
        if leaks:
            return [f"No differential privacy: no guarantee, since {', '.join(leaks)} leaves the clients unprotected."]
        level = type(self).__name__.removesuffix("Level").lower()
        spent = f"epsilon {self.spending(boundary):.3g} at delta {self.delta:g}"
        first = f"Differential privacy at the level of {LEVEL_OF[level]}: {spent}."
        return [first, *self.assumptions, "Evaluation is not covered: what clients tell of validation and test data."]

    def leakage(self, boundary: Boundary, server: Server) -> dict[str, float]:
        """What a membership attack finds out about the trained model, and what no attack can exceed."""
        from manyhands.boundary.privacy.membership import bound, leakage

        found = leakage(server, boundary.task, boundary.site.seed)
        epsilon = float("inf") if boundary.memory.get("privacy", {}).get("leaks") else self.spending(boundary)
        return {"auc": found.auc, "advantage": found.advantage, "hits": found.hits, "bound": bound(epsilon, self.delta)}


LEVEL_OF = {"client": "clients", "sample": "samples", "local": "single replies"}


def tensors(fields: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The flat tensors of the protected fields of a reply: vectors and floating tensors, else an error."""
    from torch import Tensor

    from manyhands.vector import Vector

    found = {}
    for name in names:
        if name not in fields:
            continue
        value = fields[name].flat if isinstance(fields[name], Vector) else fields[name]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise RunError(
                f"dp clips vectors and floating tensors; the private field {name!r} is a {type(value).__name__}"
            )
        found[name] = value
    return found


def put(fields: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with the tensors of `flat` in place of their own."""
    from manyhands.vector import Vector

    return {
        name: value
        if name not in flat
        else Vector(flat[name], value.layout)
        if isinstance(value, Vector)
        else flat[name]
        for name, value in fields.items()
    }


def number(where: str, value: Any, low: float = 0.0) -> float:
    """A finite number above `low`, or an error."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not low < value < float("inf"):
        raise UsageError(f"dp: {where} is {value!r}; expected a number above {low:g}")
    return float(value)
