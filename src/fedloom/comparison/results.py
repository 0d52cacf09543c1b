"""What a comparison came to, cell by cell, read from its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.comparison import trials
from fedloom.comparison.grid import Comparison
from fedloom.comparison.layout import SPEC, cell_folder, error_file
from fedloom.errors import UsageError
from fedloom.quality import Quality, chooser_of, main_of
from fedloom.runs.frame import frame
from fedloom.runs.reading import damaged
from fedloom.runs.record import Run


@dataclass(frozen=True)
class Cell:
    """One method under one setting at one seed: an ordinary run's folder.

    `run` is there once it is finished, `error` (one line) if it failed; neither while it is still to be done.
    """

    setting: str
    method: str  # its label
    seed: int
    path: Path
    run: Run | None
    error: str | None

    @property
    def name(self) -> str:
        """As it stands in messages."""
        return f"{self.setting}/{self.method}/seed-{self.seed}"


@dataclass(frozen=True)
class Results:
    """A comparison's folder: what was asked (`spec`) and every cell, by setting, then method, then seed.

    Examples:
        >>> from fedloom.tasks.toy import Toy
        >>> results = fedloom.compare(["fedavg", "fedprox"], Toy(), seeds=1, rounds=1, report=False)
        >>> results.methods, results.seeds, results.unfinished
        (('fedavg', 'fedprox'), (0,), [])
        >>> results.frame()[["method", "seed"]].values.tolist()
        [['fedavg', 0], ['fedprox', 0]]
    """

    path: Path
    spec: Comparison
    cells: tuple[Cell, ...]

    @staticmethod
    def read(out: str | Path) -> Results:
        """The state of the folder now. Raises UsageError if it is not a comparison's."""
        path = Path(out)
        if not (path / SPEC).is_file():
            raise UsageError(f"{path} is not a comparison's folder: it has no {SPEC}")
        spec = Comparison.read(path / SPEC)
        return Results(path, spec, tuple(cell_of(path, *key) for key in spec.grid()))

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings' names, in order."""
        return tuple(self.spec.settings)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods' labels, in order."""
        return tuple(self.spec.methods)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, in order."""
        return self.spec.seeds

    def of(self, setting: str, method: str) -> list[Cell]:
        """The cells of a method under a setting, one a seed, in the order of the seeds."""
        return [cell for cell in self.cells if (cell.setting, cell.method) == (setting, method)]

    def validated(self, setting: str) -> dict[str, float]:
        """By method: the validation measure of the chosen rounds, averaged over the finished seeds."""
        found = {}
        for method in self.methods:
            rows = [cell.run.selected for cell in self.of(setting, method) if cell.run is not None]
            judged = [row[f"validation_{main_of(row).name}"] for row in rows]
            scores = [score for score in judged if score is not None]
            if scores:
                found[method] = sum(scores) / len(scores)
        return found

    def chosen(self, setting: str) -> tuple[str, float, Quality] | None:
        """The method that validation finds best under a setting, the mean of what it goes by, and what that is."""
        means: dict[str, float] = {}
        by = None
        for method in self.methods:
            rows = [cell.run.selected for cell in self.of(setting, method) if cell.run is not None]
            by = chooser_of(rows) if rows else by
            values = [row[f"validation_{by.name}"] for row in rows] if by else []
            if values and None not in values:
                means[method] = sum(values) / len(values)
        if by is None or not means:
            return None
        score = by.score
        best = max(means, key=lambda method: score(means[method]))
        return best, means[best], by

    @property
    def mains(self) -> list[Quality]:
        """The measures by which validation chose the rounds of the finished runs, each once."""
        return list(dict.fromkeys(main_of(cell.run.metrics) for cell in self.cells if cell.run is not None))

    @property
    def failed(self) -> list[Cell]:
        """The cells that ended with an error."""
        return [cell for cell in self.cells if cell.error is not None]

    @property
    def unfinished(self) -> list[Cell]:
        """The cells that are still to be done: not begun, stopped, or killed."""
        return [cell for cell in self.cells if cell.run is None and cell.error is None]

    def tuned(self, setting: str, method: str) -> dict[str, Any]:
        """The fields that tuning chose for a method under a setting; empty if nothing was tuned."""
        return trials.best_fields(self.path, setting, method)

    def trials(self, setting: str, method: str) -> list[dict[str, Any]]:
        """What tuning tried, in order: number, fields, validation_accuracy (or what else is the main measure), round,
        seed, seconds, error."""
        return trials.finished_trials(self.path, setting, method)

    def frame(self) -> Any:
        """A DataFrame with a row for each finished cell: `setting`, `method`, `seed`, and the round that was chosen.

        UsageError where pandas is not installed.
        """
        done = ((cell, cell.run.selected) for cell in self.cells if cell.run is not None)
        return frame([{"setting": c.setting, "method": c.method, "seed": c.seed} | row for c, row in done])

    def __repr__(self) -> str:
        finished = sum(cell.run is not None for cell in self.cells)
        return f"Results({str(self.path)!r}: {finished} of {len(self.cells)} runs finished)"

    @property
    def capped(self) -> list[Cell]:
        """Finished cells that came to the last of `rounds` with some of the budget (bytes, steps, ...) left."""
        budgets = self.spec.budgets
        return [c for c in self.cells if c.run is not None and budgets and "stopped_because" not in c.run.manifest]


def cell_of(out: Path, setting: str, method: str, seed: int) -> Cell:
    """A cell as it stands on the disk."""
    path = cell_folder(out, setting, method, seed)
    told = error_file(path)
    if told.exists():
        try:
            error = str(json.loads(told.read_text(encoding="utf-8"))["error"])
        except (ValueError, LookupError, TypeError, RecursionError) as wrong:
            raise damaged(told, wrong) from wrong
        return Cell(setting, method, seed, path, None, error)
    done = (path / "spec.yaml").is_file() and Run(path).manifest.get("status") == "finished"
    return Cell(setting, method, seed, path, Run(path) if done else None, None)
