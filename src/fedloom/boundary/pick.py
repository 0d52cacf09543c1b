"""Which replies of a call the server takes: those in time, the first of too many, none of clients that went off."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedloom.engines import Call, Outcome
    from fedloom.world import Trip, World

Timed = tuple["Outcome", "Trip", str]


def wanted(world: World, call: Call, asked: int) -> int:
    """How many replies the server waits for, where a round asked so many clients (0: the method chose them)."""
    if world.overselect == 1 or world.cohort is None or asked <= world.cohort:
        return len(call.clients)
    return math.ceil(len(call.clients) * world.cohort / asked - 1e-9)


def picked(world: World, call: Call, asked: int, began: float, timed: Iterable[Timed]) -> Iterator[Timed]:
    """The outcomes with their fate: arrived, lost, late (after the deadline), surplus, or broken off."""
    judged = (_judged(world, one, began) for one in timed)
    enough = wanted(world, call, asked)
    if enough == len(call.clients):
        yield from judged
        return
    known = list(judged)
    ends = sorted(
        (trip.seconds, outcome.client) for outcome, trip, fate in known if fate == "arrived" and not outcome.fault
    )
    last = ends[min(enough, len(ends)) - 1] if ends else (math.inf, 0)
    for outcome, trip, fate in known:
        late = fate == "arrived" and (trip.seconds, outcome.client) > last
        yield outcome, trip, "surplus" if late else fate


def _judged(world: World, one: Timed, began: float) -> Timed:
    outcome, trip, fate = one
    broken = world.broken(outcome.client, began, trip)
    if broken is not None:
        return outcome, broken, "broken"
    if fate == "arrived" and world.deadline is not None and trip.seconds > world.deadline:
        return outcome, trip, "late"
    return outcome, trip, fate
