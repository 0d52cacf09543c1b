"""How many rounds a run is planned for, and the phases into which a method divides them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.errors import UsageError

Phases = Sequence[tuple[str, int | None]]  # names and rounds, in their order; the last has None: to the end


@dataclass(frozen=True)
class Phase:
    """Where a run stands: in the phase `name`, in its `round` (from 1) of as many `rounds`.

    `rounds` is None in the last phase of a run whose end is open: that of a method that is not `scheduled`.
    """

    name: str
    round: int
    rounds: int | None


@dataclass(frozen=True)
class Span:
    """The rounds of a phase: from `first` on, so many; None: to the end."""

    name: str
    first: int
    rounds: int | None


def spans(phases: Phases, planned: int | None = None) -> list[Span]:
    """The phases that have rounds, with their rounds; the last one's are what is left of those `planned`, if known.

    Raises UsageError unless the last, and only that, goes to the end.
    """
    found, first = list[Span](), 1
    names = [name for name, _ in phases]
    if len({*names}) < len(names):
        raise UsageError(f"phases: {', '.join(names)}; every phase needs a name of its own")
    for place, (name, rounds) in enumerate(phases):
        last = place == len(phases) - 1
        if last != (rounds is None) or not (last or (type(rounds) is int and rounds >= 0)):
            raise UsageError(
                f"phases: {name} has {rounds!r} rounds; every phase has a whole number of them but the last, which "
                "goes to the end and has None"
            )
        if rounds is None and planned is not None:
            rounds = max(0, planned - first + 1)
        if rounds != 0:
            found.append(Span(name, first, rounds))
        first += rounds or 0
    return found


def missed(phases: Phases, rounds: int) -> list[str]:
    """In words, the phases to which a run of so many rounds does not come."""
    return [
        f"rounds={rounds} end before the phase {span.name}, which begins with round {span.first}"
        for span in spans(phases)
        if span.first > rounds
    ]


def one_of_each(phases: Phases) -> list[int]:
    """Rounds in which every phase is seen: its first, and its second if it has one. Without phases the first two."""
    if not phases:
        return [1, 2]
    return [span.first + more for span in spans(phases) for more in range(min(2, span.rounds or 2))]


class Scheduled:
    """Somebody that knows how long a run is planned to be, and where in it it stands."""

    _planned: int | None = None
    _phase: Phase | None = None

    @property
    def planned(self) -> int:
        """How many rounds the run is planned for. A method that reads it declares `scheduled = True`."""
        if self._planned is None:
            raise UsageError(
                "server.planned is the rounds of a run, which may go on for more when it is resumed; a method that "
                "goes by it declares scheduled = True, and they are fixed when its run begins"
            )
        return self._planned

    @property
    def phase(self) -> Phase:
        """The phase of the round, for a method that gives `phases`."""
        if self._phase is None:
            raise UsageError("server.phase is there in rounds and after them, of a method that gives phases(server)")
        return self._phase

    def plan_rounds(self, rounds: int | None) -> None:
        """Takes down how many rounds there will be; None: nobody may go by it."""
        self.__dict__["_planned"] = rounds

    def enter(self, phases: Phases, round: int) -> None:
        """Takes down the phase of a round."""
        there = (span for span in reversed(spans(phases, self._planned)) if span.first <= round)
        span = next(there, None)
        self.__dict__["_phase"] = None if span is None else Phase(span.name, round - span.first + 1, span.rounds)
