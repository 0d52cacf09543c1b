"""The circumstances of an experiment: who takes part and who fails to, and how long everything takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedloom.errors import UsageError, unknown
from fedloom.random import seed_of
from fedloom.world import availability, participation, speed

if TYPE_CHECKING:
    from fedloom.runs.spec import Spec
    from fedloom.world.availability.base import Availability
    from fedloom.world.participation import Array, Participation
    from fedloom.world.speed import Draw

MBIT = 125_000  # bytes


class Trip(NamedTuple):
    """What a client's part in a call takes, in seconds: the message to it, its work, and the reply's way back."""

    down: float
    work: float
    up: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.down + self.work + self.up


@dataclass(frozen=True)
class World:
    """Who takes part in a round, what happens to them on the way, and how long it takes.

    `cohort`: clients asked in a round (None: everybody that can be reached).
    `participation`: how they are chosen, see `fedloom.world.participation`.
    Clients fail in training rounds only: who enrols in `setup` is there, and measuring is not disturbed.
    `dropout`: the share of clients that are silent in a call: they do no work and their state stays as it was.
    `lost`: the share of replies that get lost: the work is done, the server hears nothing, and so the client goes on
    from the state before, as if it had not been asked.
    `availability`: who can be reached when, see `fedloom.world.availability`.

    Time: a gradient step takes `step_seconds` at speed 1, a message `latency` seconds and its bytes over the
    client's bandwidth, in Mbit/s (None: no time). `speed` and `bandwidth` are distributions, see
    `fedloom.world.speed`; `UP/DOWN` gives two bandwidths. `server_speed` (None: its steps take no time) is the
    server's. `deadline`: seconds that a call waits for its replies. `overselect`: so many times the cohort is asked,
    and the first replies are taken. `clock`: `virtual`, or `real` for the wall's.

    Examples:
        >>> world = fedloom.World(population=100, cohort=10, dropout=0.2, seed=1)
        >>> len(world.choose(round=1)), world.choose(1) == world.choose(1)
        (10, True)
    """

    population: int
    cohort: int | None = None
    dropout: float = 0.0
    lost: float = 0.0
    seed: int = 0
    participation: str = "uniform"
    speed: str | float = "constant"
    bandwidth: str | float | None = None
    latency: float = 0.0
    step_seconds: float = 0.01
    server_speed: float | None = None
    availability: str = "always"
    deadline: float | None = None
    overselect: float = 1.0
    clock: str = "virtual"

    def __post_init__(self) -> None:
        if self.cohort is not None and not 1 <= self.cohort <= self.population:
            raise UsageError(f"cohort is {self.cohort}; there are {self.population} clients to choose from")
        for name in ("dropout", "lost"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it is a share between 0 and 1")
        for name in ("latency", "step_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}; it is in seconds, at least 0")
        for name in ("deadline", "server_speed"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} is {value}; it must be greater than 0")
        if self.participation not in participation.FORMS:
            raise unknown("participation", self.participation, participation.FORMS)
        if not 1 <= self.overselect < math.inf:
            raise UsageError(f"overselect is {self.overselect}; it is a factor, at least 1")
        if self.overselect > 1 and (self.cohort is None or self.participation == "poisson"):
            raise UsageError(
                "overselect asks more clients than a round needs: it wants a cohort of fixed size; set cohort"
            )
        if self.clock not in ("virtual", "real"):
            raise unknown("clock", self.clock, ("virtual", "real"))
        simulated = [name for name in SIMULATED if getattr(self, name) != DEFAULTS[name]]
        if self.clock == "real" and (simulated or (self.reachable and self.reachable.timed)):
            name = (*simulated, "availability")[0]
            raise UsageError(f"clock is real, and {name}={getattr(self, name)} is simulated; take clock=virtual")
        _ = self._trip, self.reachable  # what makes no sense is told now

    @staticmethod
    def of(spec: Spec, population: int) -> World:
        """The world that a run's settings ask for."""
        named = {field.name: getattr(spec, field.name) for field in fields(World) if field.name != "population"}
        return World(population, **named)

    # Who takes part

    @cached_property
    def reachable(self) -> Availability | None:
        """Who can be reached when; None: everybody, always."""
        return availability.build(self.availability, self.population, self.seed)

    @cached_property
    def chooser(self) -> Participation:
        """How the clients of a round are chosen."""
        return participation.FORMS[self.participation](self.seed, self.population)

    def mask(self, round: int, now: float) -> Array | None:
        """Who can be reached, bool [population]; None: everybody."""
        return self.reachable.mask(round, now) if self.reachable else None

    def present(self, round: int, now: float = 0.0) -> Sequence[int]:
        """The ids of all that can be reached, ascending."""
        return self.chooser.everybody(self.mask(round, now))

    def choose(self, round: int, now: float = 0.0, knowledge: Mapping[str, Any] | None = None) -> Sequence[int]:
        """The clients asked in a round: with over-selection more than the cohort."""
        return self.chooser.choose(round, self.mask(round, now), self._asked, knowledge or {})

    @property
    def _asked(self) -> int | None:
        if self.cohort is None:
            return None
        return min(self.population, math.ceil(self.cohort * self.overselect - 1e-9))

    def silent(self, round: int, nth: int, client: int) -> bool:
        """Whether a client does not react to the `nth` call of a round."""
        return self._happens(self.dropout, "dropout", round, nth, client)

    def loses(self, round: int, nth: int, client: int) -> bool:
        """Whether a client's reply to the `nth` call of a round gets lost."""
        return self._happens(self.lost, "lost", round, nth, client)

    def _happens(self, share: float, *key: int | str) -> bool:
        return share > 0 and seed_of(self.seed, "world", *key) < share * 2**63

    # How long it takes

    def trip(self, client: int, down: int, steps: int, up: int) -> Trip:
        """What a client's part in a call takes: bytes of the message to it, gradient steps, bytes of the reply."""
        speed, down_bytes, up_bytes = self._trip
        return Trip(
            self.latency + (down / down_bytes(client) if down_bytes else 0.0),
            steps * self.step_seconds / speed(client),
            self.latency + (up / up_bytes(client) if up_bytes else 0.0),
        )

    def upload(self, client: int, sent: int) -> float:
        """Seconds in which so many bytes leave a client."""
        return self.trip(client, 0, 0, sent).up

    def broken(self, client: int, began: float, trip: Trip) -> Trip | None:
        """What is left of a trip if the client goes off on the way; None if it does not."""
        moment = self.reachable.leaves(client, began, began + trip.seconds) if self.reachable else None
        if moment is None:
            return None
        left = max(0.0, moment - began)
        down = min(trip.down, left)
        work = min(trip.work, left - down)
        return Trip(down, work, left - down - work)

    @cached_property
    def interrupts(self) -> bool:
        """Whether a client may go off in the middle of its work."""
        return self.reachable is not None and self.reachable.timed

    @cached_property
    def has_failures(self) -> bool:
        """Whether a client that was asked may stay silent, or its reply may get lost."""
        return self.reachable is not None or self.dropout > 0 or self.lost > 0

    @cached_property
    def selects_replies(self) -> bool:
        """Whether the server goes on without some of the replies, so that it must know who is late."""
        return self.deadline is not None or self.overselect > 1 or self.interrupts

    @cached_property
    def has_timing(self) -> bool:
        """Whether time is more than a count of steps."""
        settings = ("speed", "bandwidth", "latency", "deadline", "overselect", "availability", "clock")
        return any(getattr(self, name) != DEFAULTS[name] for name in settings)

    @cached_property
    def outcome_kinds(self) -> tuple[str, ...]:
        """What may become of a client's part in a round, beside arriving: counted in the round's record."""
        may = {
            "late": self.deadline is not None,
            "surplus": self.overselect > 1,
            "absent": self.reachable is not None,
            "broken": self.interrupts,
        }
        return tuple(name for name, holds in may.items() if holds)

    def profile(self, client: int) -> dict[str, float]:
        """What a client registers of its device, where clients differ."""
        return {name: draw(client) for name, draw in self._registered.items()}

    @cached_property
    def _drawn(self) -> dict[str, Array | float]:
        """The clients' numbers by name, float64 [population], or one number for all."""
        drawn = {"speed": speed.draw("speed", self.speed, self.population, self.seed)}
        if self.bandwidth is not None:
            up, slash, down = str(self.bandwidth).partition("/")
            drawn["bandwidth_up"] = speed.draw("bandwidth", up, self.population, self.seed)
            # One setting is one line in both directions; two are drawn apart.
            drawn["bandwidth_down"] = (
                speed.draw("bandwidth down", down, self.population, self.seed) if slash else drawn["bandwidth_up"]
            )
        return drawn

    @cached_property
    def _registered(self) -> dict[str, Draw]:
        return {name: speed.reader(drawn) for name, drawn in self._drawn.items() if isinstance(drawn, np.ndarray)}

    @cached_property
    def _trip(self) -> tuple[Draw, Draw | None, Draw | None]:
        """Speed, and bytes a second down and up (None: no limit), by client."""
        rates = {name: drawn * MBIT for name, drawn in self._drawn.items() if name != "speed"}
        down, up = (speed.reader(rates[name]) if rates else None for name in ("bandwidth_down", "bandwidth_up"))
        return speed.reader(self._drawn["speed"]), down, up


SIMULATED = ("speed", "bandwidth", "latency", "server_speed", "deadline", "overselect")
DEFAULTS = {field.name: field.default for field in fields(World)}
