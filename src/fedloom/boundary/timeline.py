"""Who worked when, in the first rounds of a run: the lines of `events.jsonl`."""

from __future__ import annotations

from typing import Any

from fedloom.world import Trip

ROUNDS = 20  # that are recorded
EVENTS = 400  # of a round, at most: those that began first


class Timeline:
    """Events of the current round; `close` hands them over, so memory does not grow."""

    def __init__(self) -> None:
        self.events: list[tuple[float, int, str, float, float, float, str]] = []

    def note(self, round: int, function: str, client: int, began: float, trip: Trip, fate: str) -> None:
        """A client's part in a call: when it began, and the seconds of its message down, its work and its reply up."""
        if round <= ROUNDS:
            self.events.append((began, client, function, *trip, fate))
            if len(self.events) > 10 * EVENTS:
                self._cut()

    def close(self, round: int) -> list[dict[str, Any]]:
        """The round's lines; the order in which an engine served the clients leaves no trace."""
        if not self.events:
            return []
        self._cut()
        names = ("began", "client", "function", "down", "work", "up", "fate")
        lines = [{"round": round} | dict(zip(names, event, strict=True)) for event in self.events]
        self.events = []
        return lines

    def _cut(self) -> None:
        self.events.sort()
        del self.events[EVENTS:]
