"""How fast clients are: one number a client, drawn once from the distribution that a setting names.

constant:2               everybody the same (a number alone is short for it)
uniform:0.5,2            evenly between two numbers
lognormal:1.0            median 1, the logarithm's standard deviation; `median=`; `within=10` bounds the largest to
                         so many times the smallest, around the median
classes:1x0.5,4x0.3,10x0.2   kinds of devices: value x share of the clients, dealt in exactly these shares
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fedloom.errors import UsageError, unknown
from fedloom.parsing import Term, called
from fedloom.random import numpy_stream

Array = np.ndarray[Any, np.dtype[Any]]
Draw = Callable[[int], float]  # a client's number


def draw(setting: str, text: str | float, population: int, seed: int) -> Array | float:
    """The number of every client, float64 [population]; one float where all are alike. All are greater than 0."""
    if isinstance(text, float):
        return _positive(setting, text, text)
    term = Term(text)
    if isinstance(number := _number(term.name), float):
        term = Term(",".join([f"constant:{number!r}", *([term.rest] if term.rest else [])]))
    if term.name not in FORMS:
        raise unknown(f"distribution of {setting}", term.name, FORMS)
    where, form = f"{setting} is {text!r}", SHAPES[term.name]
    generator = numpy_stream(seed, "world", setting)
    try:
        drawn = called(term, FORMS[term.name], generator, population, where=where, form=form)
    except UsageError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UsageError(f"{where}; {term.name} is written as {form}") from error
    for number in (drawn,) if isinstance(drawn, float) else (float(drawn.min()), float(drawn.max())):
        _positive(setting, text, number)
    return drawn


def reader(drawn: Array | float) -> Draw:
    """Reads a client's number as a Python float, fast."""
    if isinstance(drawn, float):
        return lambda client: drawn
    return drawn.data.__getitem__


def _constant(generator: np.random.Generator, population: int, value: float = 1.0) -> float:
    return float(value)


def _uniform(generator: np.random.Generator, population: int, low: float, high: float) -> Array:
    return low + (high - low) * generator.random(population)


def _lognormal(
    generator: np.random.Generator, population: int, sigma: float, median: float = 1.0, within: float = math.inf
) -> Array:
    if not within >= 1:
        raise UsageError(f"lognormal with within={within}: the largest is at least once the smallest")
    away = np.clip(sigma * generator.standard_normal(population), -0.5 * math.log(within), 0.5 * math.log(within))
    return median * np.exp(away)


def _classes(generator: np.random.Generator, population: int, *kinds: str | float) -> Array:
    pairs = [str(kind).partition("x") for kind in kinds]
    values, shares = np.array([(float(value), float(share)) for value, _, share in pairs if share]).reshape(-1, 2).T
    if len(shares) != len(kinds) or not math.isclose(shares.sum(), 1.0, abs_tol=1e-6) or shares.min() < 0:
        raise UsageError(f"classes:{','.join(map(str, kinds))} needs VALUExSHARE,..., and shares that add up to 1")
    ends = np.rint(population * shares.cumsum()).astype(int)
    return generator.permutation(np.repeat(values, np.diff(ends, prepend=0)))


FORMS: dict[str, Callable[..., Array | float]] = {
    "constant": _constant,
    "uniform": _uniform,
    "lognormal": _lognormal,
    "classes": _classes,
}
SHAPES = {
    "constant": "constant:VALUE",
    "uniform": "uniform:LOW,HIGH",
    "lognormal": "lognormal:SIGMA,median=1,within=10",
    "classes": "classes:VALUExSHARE,VALUExSHARE",
}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _positive(setting: str, text: object, number: float) -> float:
    if not 0 < number < math.inf:
        raise UsageError(f"{setting} is {text!r}; every client's must be a number greater than 0")
    return number
