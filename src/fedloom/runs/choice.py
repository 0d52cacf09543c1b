"""Which round of a run is its result: validation chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def chosen(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row that validation chooses: the first of equals."""
    return max(comparable(rows), key=lambda row: row["validation_accuracy"], default=None)


def comparable(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose validation accuracy is one of the same thing as the last one's (`Task.stage`)."""
    judged = [row for row in rows if row.get("validation_accuracy") is not None]
    return [row for row in judged if row.get("stage") == judged[-1].get("stage")]
