"""Which round of a run is its result: validation chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedloom.quality import chooser_of


def chosen(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row that validation chooses: the first of equals."""
    by = chooser_of(rows)
    return max(comparable(rows), key=lambda row: by.score(row[f"validation_{by.name}"]), default=None)


def comparable(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose validation measure is one of the same thing as the last one's (`Task.stage`)."""
    column = f"validation_{chooser_of(rows).name}"
    judged = [row for row in rows if row.get(column) is not None]
    return [row for row in judged if row.get("stage") == judged[-1].get("stage")]
