"""Which classes a model takes for which, and what follows from that class by class."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from fedloom.letters import printable
from fedloom.runs.frame import frame
from fedloom.runs.reading import understood
from fedloom.runs.shown import Shown

FILE = "confusion.json"


@dataclass(frozen=True, eq=False)
class Confusion:
    """How many rows of each class were taken for which: `matrix` int64 [C, C], a row for what is true, by `classes`.

    Where targets are masks it counts pixels, without those that have no class.

    `np.asarray` of it is the matrix, `frame()` has the names, and `per_class()` what follows for each class.

    Examples:
        >>> import numpy as np
        >>> found = Confusion(np.array([[8, 2], [1, 9]]), ("ham", "spam"))
        >>> [(one["class"], one["recall"], round(one["precision"], 2)) for one in found.per_class()]
        [('ham', 0.8, 0.89), ('spam', 0.9, 0.82)]
    """

    matrix: np.ndarray
    classes: tuple[str, ...]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.matrix, dtype=dtype)

    def __len__(self) -> int:
        return int(self.matrix.sum())

    def per_class(self) -> list[dict[str, Any]]:
        """Recall, precision, F1 (shares of 1) and support (rows, or pixels) of each class; None where it has none."""
        right, true, said = self.matrix.diagonal(), self.matrix.sum(1), self.matrix.sum(0)
        return [
            {
                "class": name,
                "recall": _share(right[c], true[c]),
                "precision": _share(right[c], said[c]),
                "f1": _share(2 * right[c], true[c] + said[c]),
                "support": int(true[c]),
            }
            for c, name in enumerate(self.classes)
        ]

    def frame(self) -> Any:
        """The matrix as a DataFrame: a row for what is true, a column for what is said."""
        lines = [dict(zip(self.classes, line, strict=True)) for line in self.matrix.tolist()]
        return frame(lines, self.classes).rename_axis(index="true", columns="said")

    def _repr_html_(self) -> str:
        heads = "".join(f"<th>{escape(printable(name))}</th>" for name in self.classes)
        lines = "".join(
            f"<tr><th>{escape(printable(name))}</th>{''.join(f'<td>{count}</td>' for count in line)}</tr>"
            for name, line in zip(self.classes, self.matrix.tolist(), strict=True)
        )
        return f"<table><tr><th>true \\ said</th>{heads}</tr>{lines}</table>"

    def stored(self) -> list[list[int]]:
        """What is not zero of the matrix: what is true, what is said, how many."""
        return [[int(true), int(said), int(self.matrix[true, said])] for true, said in np.argwhere(self.matrix)]

    @staticmethod
    def restored(stored: list[list[int]], classes: list[str]) -> Confusion:
        """What `stored` gave."""
        matrix = np.zeros((len(classes), len(classes)), dtype=np.int64)
        for true, said, count in stored:
            matrix[true, said] = count
        return Confusion(matrix, tuple(classes))


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def kept(run: Shown, whose: str) -> Confusion | None:
    """What a run's folder has of the `global` model, or of `personal` ones together; None where it has nothing."""
    with understood(run.path):
        found = run.read_json(FILE)
        return Confusion.restored(found[whose], found["classes"]) if found.get(whose) is not None else None
