"""The time that passes in a run: simulated, or the wall's."""

from __future__ import annotations

import time


class Clock:
    """Virtual seconds since the run began; it moves when the server has waited for something."""

    real = False

    def __init__(self) -> None:
        self.now = 0.0

    def reach(self, moment: float) -> None:
        """Moves on to a moment, if that is not past."""
        self.now = max(self.now, moment)


class RealClock(Clock):
    """Seconds of the wall since the run began, those before a resumption included; nobody moves it."""

    real = True

    @property
    def now(self) -> float:
        return time.monotonic() - self.zero

    @now.setter
    def now(self, seconds: float) -> None:
        self.zero = time.monotonic() - seconds

    def reach(self, moment: float) -> None:
        pass


def build(name: str) -> Clock:
    """`virtual` or `real`."""
    return RealClock() if name == "real" else Clock()
