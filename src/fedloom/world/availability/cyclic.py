"""Clients that are on for a part of every period, as day and night have it."""

from __future__ import annotations

import math

import numpy as np

from fedloom.world.availability.base import Array, Availability


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
