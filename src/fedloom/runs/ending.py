"""When a run is over before its last round, and why: a budget, validation, what a stage says, nobody left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedloom.runs.budget import Spent
from fedloom.runs.choice import stale
from fedloom.runs.parts import Parts


class Ending:
    """Looks at the rounds of a run as they come; `rows` are those that are over already."""

    def __init__(self, parts: Parts, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.parts, self.spent = parts, Spent(parts.spec)
        self.rows: list[Mapping[str, Any]] = []  # by which validation decides, where it does
        for row in rows:
            self.spent.add(row)
            self.judge(row)

    def judge(self, row: Mapping[str, Any]) -> str | None:
        """Takes in what a round was worth; why validation ends the run with it, if it does."""
        patience, delta = self.parts.spec.patience, self.parts.spec.min_delta
        if patience is None:
            return None
        self.rows.append(row)
        return self._stale(patience, delta)

    def why(self) -> str | None:
        """Why there is no other round, if there is none."""
        spec, parts = self.parts.spec, self.parts
        by_validation = self._stale(spec.patience, spec.min_delta) if spec.patience else None
        by_stage = parts.pipeline.stop_reason(parts.boundary.books)
        return by_validation or self.spent.over() or by_stage or parts.deserted

    def _stale(self, patience: int, delta: float) -> str | None:
        since = stale(self.rows, patience, delta)
        if since is None:
            return None
        more = f" by more than min_delta={delta:g}" if delta else ""
        return f"patience={patience}: validation has not become better{more} since round {since}"
