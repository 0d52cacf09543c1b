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

from typing import TYPE_CHECKING, Any

from fedloom.calls import SILENT
from fedloom.errors import UsageError, unknown
from fedloom.parsing import Term, called

if TYPE_CHECKING:
    from fedloom.boundary.privacy.base import Privacy
    from fedloom.method import Method
    from fedloom.runs.spec import Spec
    from fedloom.task import Task

LEVELS = ("client", "sample", "local")
DELTA = 1e-5


def build(text: str, spec: Spec, method: Method, task: Task) -> Privacy:
    """The privacy that a run's settings ask for; raises UsageError where it makes no sense."""
    from fedloom.boundary.privacy.client_level import ClientLevel
    from fedloom.boundary.privacy.local import Local
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
    asked = [call for call in method.plan if call.kind != "evaluate" and call.verb not in SILENT]
    bare = [call for call in asked if not made.covers(call)]
    if term.name == "client" and any(call.verb == "means" for call in bare):
        raise UsageError(
            f"dp={text} protects sums of the whole cohort, and {method.name()} takes a mean a group: how many clients "
            "a group has would need noise as well; take dp=local or dp=sample"
        )
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
    return made
