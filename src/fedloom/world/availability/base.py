"""What every kind of availability answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


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

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: a message."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave."""
