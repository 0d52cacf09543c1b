"""Who can be reached when.

    always
    bernoulli:0.8           each client on its own, anew in every slot; two numbers: a share of its own for each client
    markov:0.3              on and off by chance: on for this share of the time, `cycle=10` slots from on to on again
    cyclic:0.5              on for this share of every `period=86400` seconds, each client at a time of its own
    trace:FILE.csv          what a file says: lines of client, start, stop in seconds (see `fedloom.world.trace`)

A slot is a round; with `period=60` it is so many seconds of the clock, and who goes off in the middle of its work loses
it. `correlation=0.5` (bernoulli, markov): clients come and go together.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedloom.errors import UsageError, unknown
from fedloom.fields import named
from fedloom.message import Packed
from fedloom.random import numpy_stream

Array = np.ndarray[Any, np.dtype[Any]]
PATIENCE = 100_000  # slots in a row without anybody, until the run gives up


class Availability(ABC):
    """Who is there, as a function of the round and of the time alone."""

    timed = True  # it changes with the clock, and may break off work; False: with rounds only

    @abstractmethod
    def mask(self, round: int, now: float) -> Array:
        """Who is there, bool [population]."""

    def leaves(self, client: int, began: float, end: float) -> float | None:
        """When a client that is there at `began` goes off, if that is before `end`."""
        return None

    def next(self, now: float) -> float | None:
        """The first moment after `now` at which somebody may be there; None: never again."""
        return now

    def memory(self) -> dict[str, Any]:
        """What a checkpoint keeps: a message."""
        return {}

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Takes up what `memory` gave."""


class Chain(Availability):
    """In every slot a client stays on, or comes on, with given probabilities; if these are one, slots are independent.

    Client i is on in slot t if a standard normal number, sqrt(c) z_t + sqrt(1 - c) e_ti, is below the quantile of the
    probability that holds for it: each client alone is exactly the chain, and the common z_t makes them move together.
    """

    def __init__(
        self, seed: int, stay: Array, come: Array, share: Array, correlation: float, period: float | None
    ) -> None:
        self.seed, self.period, self.timed = seed, period, period is not None
        # The quantile of probability 1 is infinite: `stay` of 1 is a client that never goes off.
        self.stay, self.come, self.share = (_quantile(p) for p in (stay, come, share))
        self.independent = np.array_equal(stay, come)
        self.common, self.own = math.sqrt(correlation), math.sqrt(1 - correlation)
        self.states: dict[int, Array] = {}  # by slot: from the present one on

    def mask(self, round: int, now: float) -> Array:
        slot = self._slot(round, now)
        mask = self._state(slot)
        for past in [known for known in self.states if known < slot]:
            del self.states[past]
        return mask

    def leaves(self, client: int, began: float, end: float) -> float | None:
        if self.period is None:
            return None
        slot = self._slot(0, began) + 1
        while slot * self.period < end:
            if not self._state(slot)[client]:
                return slot * self.period
            slot += 1
        return None

    def next(self, now: float) -> float | None:
        if self.period is None:
            return now
        slot = self._slot(0, now) + 1
        if not (self.come > -math.inf).any():
            return None
        for later in range(slot, slot + PATIENCE):
            if self.mask(0, later * self.period).any():
                return later * self.period
        return None

    def memory(self) -> dict[str, Any]:
        if self.independent or not self.states:
            return {}
        slot = min(self.states)
        return {"slot": slot, "on": Packed(torch.from_numpy(self.states[slot].copy()), 1)}

    def remember(self, memory: Mapping[str, Any]) -> None:
        self.states = {memory["slot"]: memory["on"].values.cpu().numpy()} if memory else {}

    def _slot(self, round: int, now: float) -> int:
        if self.period is None:
            return round
        slot = math.floor(now / self.period)
        return slot + ((slot + 1) * self.period <= now)  # a slot's first moment, as `next` gives it, belongs to it

    def _state(self, slot: int) -> Array:
        if slot not in self.states:
            if self.independent:
                self.states[slot] = self._drawn(slot) < self.share
            else:
                # From the nearest slot that is known: the chain has no shorter way.
                known = max((s for s in self.states if s < slot), default=None)
                state = self._drawn(-1) < self.share if known is None else self.states[known]
                for each in range(0 if known is None else known + 1, slot + 1):
                    state = self._drawn(each) < np.where(state, self.stay, self.come)
                self.states[slot] = state
        return self.states[slot]

    def _drawn(self, slot: int) -> Array:
        generator = numpy_stream(self.seed, "world", "availability", slot)
        common = generator.standard_normal()
        return self.common * common + self.own * generator.standard_normal(len(self.share))


class Cyclic(Availability):
    """On for a share of every period, in which each client has a phase of its own."""

    def __init__(self, phase: Array, share: float, period: float) -> None:
        self.phase, self.share, self.period = phase, share, period

    def mask(self, round: int, now: float) -> Array:
        return (now / self.period + self.phase) % 1.0 < self.share

    def leaves(self, client: int, began: float, end: float) -> float | None:
        at = (began / self.period + self.phase[client]) % 1.0
        moment = began + (self.share - at) * self.period if self.share < 1 else math.inf
        return float(moment) if moment < end else None

    def next(self, now: float) -> float | None:
        if self.share >= 1:
            return now
        wait = (-(now / self.period + self.phase)) % 1.0
        moment = now + float(wait.min()) * self.period
        while not self.mask(0, moment).any():  # rounding may leave it a hair too early
            moment = np.nextafter(moment, math.inf) + 1e-9 * self.period
        return float(moment)


def build(text: str, population: int, seed: int) -> Availability | None:
    """The availability that a setting asks for; None: everybody is always there."""
    name, values, options = named(text)
    if name == "always" and not values and not options:
        return None
    if name not in FORMS:
        raise unknown("availability", name, FORMS)
    try:
        return FORMS[name](population, seed, *values, **options)
    except UsageError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UsageError(f"availability is {text!r}; {name} is written as {SHAPES[name]}") from error


def located(text: str) -> str:
    """The setting with the path of a trace's file as it holds in every working folder."""
    name, colon, rest = text.partition(":")
    if name.strip() != "trace" or not colon:
        return text
    file, comma, options = rest.partition(",")
    return f"{name}:{Path(file).resolve()}{comma}{options}"


def _bernoulli(
    population: int,
    seed: int,
    low: float,
    high: float | None = None,
    correlation: float = 0.0,
    period: float | None = None,
) -> Availability:
    share = _shares("bernoulli", population, seed, low, high)
    _check("bernoulli", correlation, period)
    return Chain(seed, share, share, share, correlation, period)


def _markov(
    population: int,
    seed: int,
    low: float,
    high: float | None = None,
    cycle: float = 10.0,
    correlation: float = 0.0,
    period: float | None = None,
) -> Availability:
    share = _shares("markov", population, seed, low, high)
    _check("markov", correlation, period)
    least = 1 / max(1e-12, min(share.min(), (1 - share[share < 1]).min(initial=1.0)))
    if not least <= cycle * (1 + 1e-9):  # a share of 0.9 leaves a hair less than a slot of ten
        raise UsageError(
            f"availability is markov with cycle={cycle}; every share of a cycle must last a slot at least: take a "
            f"cycle of {math.ceil(least * (1 - 1e-9))} or more"
        )
    off, come = 1 / (cycle * np.maximum(share, 1e-12)), 1 / (cycle * np.maximum(1 - share, 1e-12))
    stay = np.where(share < 1, np.maximum(1 - off, 0.0), 1.0)
    return Chain(seed, stay, np.minimum(come, 1.0), share, correlation, period)


def _cyclic(population: int, seed: int, share: float, period: float = 86400.0, spread: float = 1.0) -> Availability:
    """`spread`: the part of the period over which the clients' phases lie; 0: all at the same time."""
    _check("cyclic", 0.0, period)
    if not 0 < share <= 1 or not 0 <= spread <= 1:
        raise UsageError(f"availability is cyclic:{share},spread={spread}; both are shares, the first greater than 0")
    return Cyclic(spread * numpy_stream(seed, "world", "phase").random(population), share, period)


def _trace(population: int, seed: int, file: str, repeat: bool = False) -> Availability:
    from fedloom.world.trace import Trace

    return Trace.read(str(file), population, repeat)


FORMS: dict[str, Callable[..., Availability]] = {
    "bernoulli": _bernoulli,
    "markov": _markov,
    "cyclic": _cyclic,
    "trace": _trace,
    "always": lambda population, seed: None,  # type: ignore[dict-item, return-value]
}
SHAPES = {
    "always": "always",
    "bernoulli": "bernoulli:SHARE or bernoulli:LOW,HIGH, and correlation=0.5,period=60",
    "markov": "markov:SHARE or markov:LOW,HIGH, and cycle=10,correlation=0.5,period=60",
    "cyclic": "cyclic:SHARE,period=86400,spread=1",
    "trace": "trace:FILE.csv or trace:FILE.csv,repeat=true",
}


def _shares(name: str, population: int, seed: int, low: float, high: float | None) -> Array:
    high = low if high is None else high
    if not 0 <= low <= high <= 1:
        raise UsageError(f"availability is {name}:{low},{high}; a share is between 0 and 1, the lower one first")
    return low + (high - low) * numpy_stream(seed, "world", "share").random(population)


def _check(name: str, correlation: float, period: float | None) -> None:
    if not 0 <= correlation <= 1:
        raise UsageError(f"availability is {name} with correlation={correlation}; it is between 0 and 1")
    if period is not None and not 0 < period < math.inf:
        raise UsageError(f"availability is {name} with period={period}; it is in seconds, greater than 0")


def _quantile(probability: Array) -> Array:
    """Of the standard normal distribution, [population]."""
    out: Array = torch.special.ndtri(torch.from_numpy(np.asarray(probability, dtype=np.float64))).numpy()
    return out
