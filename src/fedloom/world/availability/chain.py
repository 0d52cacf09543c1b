"""Clients that go on and off by chance, from slot to slot: `bernoulli` and `markov`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fedloom.message import Packed
from fedloom.random import numpy_stream
from fedloom.world.availability.base import Array, Availability

PATIENCE = 100_000  # slots in a row without anybody, until the run gives up


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

    def state(self) -> dict[str, Any]:
        if self.independent or not self.states:
            return {}
        slot = min(self.states)
        return {"slot": slot, "on": Packed(torch.from_numpy(self.states[slot].copy()), 1)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.states = {state["slot"]: state["on"].values.cpu().numpy()} if state else {}

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


def _quantile(probability: Array) -> Array:
    """Of the standard normal distribution, [population]."""
    out: Array = torch.special.ndtri(torch.from_numpy(np.asarray(probability, dtype=np.float64))).numpy()
    return out
