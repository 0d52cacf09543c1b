"""How good a model is: the measures that problems have beside their loss, what they count, and which way is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.errors import UsageError, unknown


@dataclass(frozen=True)
class Quality:
    """A measure that `Task.judge` gives under `name`; the first of a task's is the main one, which chooses rounds.

    `unit`: share (of 1, said in percent), index (a plain number), or amount (in the unit of the target). `pooled` is
    how the measures of several clients make one: their mean over samples, the root of the mean of their squares, or
    not at all ("alone").

    Examples:
        >>> from fedloom.quality import RMSE
        >>> RMSE.better, RMSE.best([71.5, 54.2, 60.0]), RMSE.pool([(1, 3.0), (1, 4.0)]) == 12.5**0.5
        ('low', 54.2, True)
    """

    name: str
    words: str
    unit: str = "share"
    better: str = "high"
    pooled: str = "mean"

    def score(self, value: float) -> float:
        """A number that is larger where the value is better; of no finite value, the least."""
        if not math.isfinite(value):
            return -math.inf
        return -value if self.better == "low" else value

    def best(self, values: Iterable[float]) -> float:
        """The best of some values."""
        return max(values, key=self.score)

    def worst(self, values: Iterable[float]) -> float:
        """The worst of some values."""
        return min(values, key=self.score)

    def pool(self, found: Sequence[tuple[float, float]]) -> float:
        """What values make together, of (samples, value) pairs."""
        power = 2 if self.pooled == "root" else 1
        mean = sum(value**power * n for n, value in found) / sum(n for n, _ in found)
        return float(mean ** (1 / power))


ACCURACY = Quality("accuracy", "accuracy")
RMSE = Quality("rmse", "RMSE", "amount", "low", "root")
MAE = Quality("mae", "MAE", "amount", "low")
R2 = Quality("r2", "R²", "index", "high", "alone")
MACRO_F1 = Quality("macro_f1", "macro F1", "share", "high")
AVERAGE_PRECISION = Quality("average_precision", "mean average precision", "share", "high", "alone")
EXACT_MATCH = Quality("exact_match", "exact match", "share", "high")
SHD = Quality("shd", "structural Hamming distance", "index", "low")
SKELETON_F1 = Quality("skeleton_f1", "F1 of edges", "share", "high")
DIRECTION_F1 = Quality("direction_f1", "F1 of directions", "share", "high")
SCORE = Quality("score", "score", "index", "high")
ERROR = Quality("error", "error", "index", "low")

# Those that a record may have; a task in Python whose measure is none of them calls it score or error.
OF_LABELS = (ACCURACY, RMSE, MAE, R2, MACRO_F1, AVERAGE_PRECISION, EXACT_MATCH)
KNOWN = {one.name: one for one in (*OF_LABELS, SHD, SKELETON_F1, DIRECTION_F1, SCORE, ERROR)}
MEAN = Quality("", "")  # of a measure that nobody declares, only how those of clients make one


def main_of(rows: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Quality:
    """The measure by which the rounds of a record compare: the one that their validation data were judged by."""
    rows = [rows] if isinstance(rows, Mapping) else rows
    return next((one for row in rows for one in KNOWN.values() if f"validation_{one.name}" in row), ACCURACY)


def evaluated(row: Mapping[str, Any]) -> bool:
    """Whether a row of a record is of a round that was evaluated."""
    return any(name.startswith("global_test_") for name in row)


def known(name: str, qualities: Sequence[Quality]) -> Sequence[Quality]:
    """A task's qualities; raises UsageError unless each is one that a record may have."""
    if not qualities:
        raise UsageError(f"{name}.qualities is empty; it needs the measure that chooses rounds, as in (ACCURACY,)")
    for one in qualities:
        if KNOWN.get(one.name) != one:
            raise unknown(f"measure of {name}", one.name, KNOWN)
    return qualities
