"""What is said of a run while it goes on: a line for each of its rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedloom.quality import ACCURACY, evaluated, main_of
from fedloom.report.words import single, size


class Telling:
    """Puts rounds into words; it knows the bytes of all rounds so far, and the last value of the main measure.

    Examples:
        >>> telling = Telling(2)
        >>> telling.line({"round": 1, "train_loss": 0.5, "up_bytes": 1500, "down_bytes": 500, "peer_bytes": 0})
        'round 1 of 2, loss 0.5000, 2.0 kB'
    """

    def __init__(self, rounds: int, before: Iterable[Mapping[str, Any]] = ()) -> None:
        self.rounds, self.bytes = rounds, 0
        self.main = ACCURACY
        self.value: float | None = None
        self.each = ""  # that of every judged model and test by itself
        for row in before:
            self._count(row)

    def line(self, row: Mapping[str, Any]) -> str:
        """A round that has ended."""
        self._count(row)
        parts = [f"loss {row['train_loss']:.4f}"] if "train_loss" in row else []
        parts += [f"{self.main.words} {_short(self.value)}{self.each}"] if self.value is not None else []
        return ", ".join([f"round {row['round']} of {self.rounds}", *parts, size(self.bytes)])

    def _count(self, row: Mapping[str, Any]) -> None:
        self.bytes += row["up_bytes"] + row["down_bytes"] + row["peer_bytes"]
        if evaluated(row):
            self.main = main_of(row)
            of_global = f"global_test_{self.main.name}"  # null where a method has no global model
            shown = f"personal_test_{self.main.name}" if row[of_global] is None else of_global
            self.value = row[shown]
            each = [f"{name.partition('@')[2]} {_short(row[name])}" for name in single(shown, [row])]
            self.each = f" ({', '.join(each)})" if each else ""


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.5g}"
