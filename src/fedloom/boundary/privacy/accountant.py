"""Epsilon of Gaussian releases, by `dp-accounting`: `pip install "fedloom[dp]"`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from fedloom.errors import UsageError

# Renyi orders; very low ones do not converge, and never give the best bound.
ORDERS = (*(1 + x / 10 for x in range(6, 100)), *range(11, 64), 80, 128, 256, 512, 1024)


def library() -> Any:
    """dp_accounting, or one line that says how to get it."""
    try:
        import dp_accounting
    except ImportError:
        raise UsageError("dp=... needs the extra: pip install 'fedloom[dp]'") from None
    logging.getLogger("absl").setLevel(logging.ERROR)  # orders that do not converge are left out
    return dp_accounting


def event(noise: float, calls: int, sampling: str, size: int, population: int) -> Any:
    """A round: `calls` sums with Gaussian noise of `noise` times their sensitivity, over one and the same sample."""
    dp = library()
    one = dp.GaussianDpEvent(noise)
    inner = one if calls == 1 else dp.SelfComposedDpEvent(one, calls)
    if size >= population or sampling == "none":
        return inner
    if sampling == "poisson":
        return dp.PoissonSampledDpEvent(size / population, inner)
    return dp.SampledWithoutReplacementDpEvent(population, size, inner)


def replacing(sampling: str) -> bool:
    """Whether neighbours differ by a replaced party (samples of a fixed size), not by an added or removed one."""
    return sampling == "fixed"


def epsilon(noise: float, rounds: Mapping[int, int], delta: float, sampling: str, size: int, population: int) -> float:
    """Epsilon at `delta` after so many rounds with so many sums each (sums: rounds)."""
    some = {calls: count for calls, count in rounds.items() if calls and count}
    if not some:
        return 0.0
    if noise <= 0:
        return float("inf")
    # Renyi divergences of rounds add up, so that a round is looked at once only.
    total = sum(count * curve(noise, calls, sampling, size, population) for calls, count in some.items())
    return float(library().rdp.compute_epsilon(np.array(ORDERS), total, delta)[0])


def most(cost: Callable[[int], float], budget: float) -> int:
    """How many releases stay within a budget, where `cost` of more is never less."""
    low, high = 0, 1
    while cost(high) <= budget:
        low, high = high, 2 * high
        if high > 2**40:
            return low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


@lru_cache(maxsize=4096)
def curve(noise: float, calls: int, sampling: str, size: int, population: int) -> Any:
    """The Renyi divergence of one round at every one of ORDERS, [orders]."""
    dp = library()
    relation = dp.NeighboringRelation.REPLACE_ONE if replacing(sampling) else dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = dp.rdp.RdpAccountant(list(ORDERS), relation)
    return accountant.compose(event(noise, calls, sampling, size, population)).rdp


def calibrated(target: float, delta: float, rounds: int, sampling: str, size: int, population: int) -> float:
    """The least noise with which `rounds` rounds of one sum each stay within epsilon `target`."""
    low, high = 1e-2, 1.0
    while epsilon(high, {1: rounds}, delta, sampling, size, population) > target:
        high *= 2
        if high > 1e6:
            raise UsageError(f"dp: no noise keeps {rounds} rounds within epsilon {target}")
    while high / low > 1.0005:
        middle = (low * high) ** 0.5
        if epsilon(middle, {1: rounds}, delta, sampling, size, population) > target:
            low = middle
        else:
            high = middle
    return high
