"""Which round of a run is its result: validation chooses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fedloom.quality import chooser_of

Row = TypeVar("Row", bound=Mapping[str, Any])


def chosen(rows: Sequence[Row]) -> Row | None:
    """The row that validation chooses: the first of equals."""
    by = chooser_of(rows)
    return max(comparable(rows), key=lambda row: by.score(row[f"validation_{by.name}"]), default=None)


def comparable(rows: Sequence[Row]) -> list[Row]:
    """The rows whose validation measure is one of the same thing as the last one's (`Task.stage`)."""
    column = f"validation_{chooser_of(rows).name}"
    judged = [row for row in rows if row.get(column) is not None]
    return [row for row in judged if row.get("stage") == judged[-1].get("stage")]


def stale(rows: Sequence[Mapping[str, Any]], patience: int, min_delta: float) -> int | None:
    """The round since which validation is not better by more than `min_delta`, if that is `patience` rounds ago."""
    by = chooser_of(rows)
    best, since = -math.inf, 0
    judged = comparable(rows)
    for row in judged:
        score = by.score(row[f"validation_{by.name}"])
        if not since or score > best + min_delta:
            best, since = score, row["round"]
    return since if judged and judged[-1]["round"] - since >= patience else None
