"""Who can be reached when.

    always
    bernoulli:0.8           each client on its own, anew in every slot; two numbers: a share of its own for each client
    markov:0.3              on and off by chance: on for this share of the time, `cycle=10` slots from on to on again
    cyclic:0.5              on for this share of every `period=86400` seconds, each client at a time of its own
    trace:FILE.csv          what a file says: lines of client, start, stop in seconds (see `availability.trace`)

A slot is a round; with `period=60` it is so many seconds of the clock, and who goes off in the middle of its work loses
it. `correlation=0.5` (bernoulli, markov): clients come and go together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedloom.errors import UsageError, unknown
from fedloom.parsing import Term, called
from fedloom.random import numpy_stream
from fedloom.world.availability.base import Array, Availability
from fedloom.world.availability.chain import Chain
from fedloom.world.availability.cyclic import Cyclic
from fedloom.world.availability.trace import Trace


def build(text: str, population: int, seed: int) -> Availability | None:
    """The availability that a setting asks for; None: everybody is always there."""
    term = Term(text)
    if term.name not in FORMS:
        raise unknown("availability", term.name, FORMS)
    where, form = f"availability is {text!r}", SHAPES[term.name]
    try:
        return called(term, FORMS[term.name], population, seed, where=where, form=form)
    except UsageError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UsageError(f"{where}; {term.name} is written as {form}") from error


def located(text: str) -> str:
    """The setting with the path of a trace's file as it holds in every working folder."""
    term = Term(text)
    if term.name != "trace" or term.rest is None:
        return text
    file, comma, options = term.rest.partition(",")
    return f"trace:{Path(file).resolve()}{comma}{options}"


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


def _trace(population: int, seed: int, file: str | float, repeat: bool = False) -> Availability:
    return Trace.read(str(file), population, repeat)


FORMS: dict[str, Callable[..., Availability | None]] = {
    "bernoulli": _bernoulli,
    "markov": _markov,
    "cyclic": _cyclic,
    "trace": _trace,
    "always": lambda population, seed: None,
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
