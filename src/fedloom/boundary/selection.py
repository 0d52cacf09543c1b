"""Which replies of a call the server takes: those in time, the first of too many, none of clients that went off."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from fedloom.calls import SILENT

if TYPE_CHECKING:
    from fedloom.calls import Call, Outcome
    from fedloom.world import Trip, World


class Arrival(NamedTuple):
    """An outcome, how long it took, and what became of it: arrived, lost, late, surplus or broken."""

    outcome: Outcome
    trip: Trip
    fate: str

    @property
    def counts(self) -> bool:
        """Whether it is a reply that the server takes."""
        return self.fate == "arrived" and not self.outcome.fault


def replies_needed(world: World, call: Call, asked: int) -> int:
    """How many replies the server waits for, where a round asked so many clients (0: the method chose them)."""
    if world.overselect == 1 or world.cohort is None or asked <= world.cohort or call.verb in SILENT:
        return len(call.clients)
    return math.ceil(len(call.clients) * world.cohort / asked - 1e-9)


def select_replies(world: World, call: Call, asked: int, began: float, timed: Iterable[Arrival]) -> Iterator[Arrival]:
    """The outcomes with their fate: arrived, lost, late (after the deadline), surplus, or broken off."""
    judged = (_judged(world, call, one, began) for one in timed)
    enough = replies_needed(world, call, asked)
    if enough == len(call.clients):
        yield from judged
        return
    known = list(judged)
    ends = sorted((one.trip.seconds, one.outcome.client) for one in known if one.counts)
    last = ends[min(enough, len(ends)) - 1] if ends else (math.inf, 0)
    for outcome, trip, fate in known:
        late = fate == "arrived" and (trip.seconds, outcome.client) > last
        yield Arrival(outcome, trip, "surplus" if late else fate)


def _judged(world: World, call: Call, one: Arrival, began: float) -> Arrival:
    broken = None if call.verb == "work" else world.broken(one.outcome.client, began, one.trip)
    if broken is not None:
        return one._replace(trip=broken, fate="broken")
    awaited = one.fate == "arrived" and call.verb not in SILENT
    if awaited and world.deadline is not None and one.trip.seconds > world.deadline:
        return one._replace(fate="late")
    return one
