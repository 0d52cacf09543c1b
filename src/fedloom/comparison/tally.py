"""How far a comparison is: a watcher that counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fedloom.comparison import tuning

if TYPE_CHECKING:
    from fedloom.comparison.grid import Comparison
    from fedloom.comparison.job import Failure, Job
    from fedloom.comparison.results import Cell


class Tally:
    """Counts the runs of a comparison: its cells, and before them the trials of tuning.

    A run under way counts by its rounds; of trials that a kill left finished it learns when the next one begins.
    """

    def __init__(self) -> None:
        self.cells: set[str] = set()
        self.over: set[str] = set()  # cells that are done, or failed
        self.wanted: dict[str, int] = {}  # setting and method -> how many trials there are to be
        self.tried: dict[str, int] = {}  # of these, how many ended
        self.failed = 0
        self.under_way: dict[str, float] = {}  # by the name of a job: the share of its rounds that are over

    def planned(self, comparison: Comparison, cells: Iterable[Cell]) -> None:
        """Takes the cells, of which some may have finished before."""
        cells = list(cells)
        self.cells = {cell.name for cell in cells}
        self.over = {cell.name for cell in cells if cell.run is not None}
        open_ = dict.fromkeys((cell.setting, cell.method) for cell in cells if cell.run is None)
        searched = {method for method in comparison.methods if comparison.tune and tuning.space(comparison, method)}
        self.wanted = {f"{setting}/{method}": comparison.tune for setting, method in open_ if method in searched}
        self.tried = dict.fromkeys(self.wanted, 0)

    def begins(self, job: Job) -> None:
        """A run begins, or goes on."""
        self.under_way[job.name] = 0.0
        group, _, last = job.name.rpartition("/")
        if job.name not in self.cells and group in self.tried:
            self.tried[group] = int(last.removeprefix("trial-"))

    def row(self, job: Job, row: Mapping[str, Any]) -> None:
        """A run did a round."""
        self.under_way[job.name] = row["round"] / max(1, job.spec.rounds)

    def ends(self, job: Job, failure: Failure | None) -> None:
        """A run is over, or failed."""
        self.under_way.pop(job.name, None)
        self.failed += failure is not None
        group = job.name.rpartition("/")[0]
        if job.name in self.cells:
            self.over.add(job.name)
            if group in self.wanted:  # all of its trials are over, also those that will never be
                self.tried[group] = self.wanted[group]
        elif group in self.tried:
            self.tried[group] += 1

    @property
    def total(self) -> int:
        """How many runs there are in all."""
        return len(self.cells) + sum(self.wanted.values())

    @property
    def ended(self) -> int:
        """How many of them are over."""
        return len(self.over) + sum(self.tried.values())

    @property
    def share(self) -> float:
        """The share of the runs that is over, those under way by their rounds: from 0 to 1."""
        done = self.ended + sum(self.under_way.values())
        return min(1.0, done / self.total) if self.total else 0.0

    def __str__(self) -> str:
        return f"{self.ended} of {self.total} runs" + (f", {self.failed} failed" if self.failed else "")
