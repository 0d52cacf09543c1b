"""What one sees of a comparison while it goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedloom.cli.progress import bar
from fedloom.cli.tables import console
from fedloom.comparison.tally import Tally
from fedloom.quality import main_of

if TYPE_CHECKING:
    from fedloom.comparison.grid import Comparison
    from fedloom.comparison.job import Failure, Job
    from fedloom.comparison.results import Cell

QUIET = 60.0  # seconds without a line, at most, where there is no terminal
ROWS = 40  # lines of the live table, at most


class Board:
    """A table on a terminal, a row for each method and setting; elsewhere a line for each run that ends, or a minute.

    It shows validation measures only: test data are for the report. `quiet` keeps standard output free for a program.
    """

    def __init__(self, quiet: bool) -> None:
        self.console = console(stderr=quiet)
        self.prints = not quiet and not self.console.is_interactive
        self.lock = threading.RLock()  # the table is drawn by a thread of its own
        self.said = time.monotonic()
        self.cells: dict[str, Cell] = {}
        self.scores: dict[str, float | None] = {}  # of cells that are done
        self.failed: dict[str, str] = {}
        self.now: dict[str, str] = {}  # what is going on: how far it is
        self.tally = Tally()
        self.bar = bar(self.console)
        self.task = self.bar.add_task("checking every cell", total=None)
        self.live = Live(get_renderable=self.whole, console=self.console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Board:
        if self.console.is_interactive:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.live.stop()

    def planned(self, comparison: Comparison, cells: Iterable[Cell]) -> None:
        """Takes the cells, of which some may have finished before."""
        cells = list(cells)
        with self.lock:
            self.tally.planned(comparison, cells)
            self.cells = {cell.name: cell for cell in cells}
            self.scores = {name: _score(cell) for name, cell in self.cells.items() if cell.run is not None}
        if self.prints:
            before = f", {len(self.scores)} of them are done" if self.scores else ""
            tuned = f"; first {comparison.tune} trials of each method" if comparison.tune else ""
            self.console.print(f"{len(self.cells)} cells{before}{tuned}", soft_wrap=True)

    def begins(self, job: Job) -> None:
        """A cell's or a trial's run begins, or goes on: `loading` until its first round."""
        with self.lock:
            self.tally.begins(job)
            self.now[job.name] = "loading"

    def row(self, job: Job, row: Mapping[str, Any]) -> None:
        """A run did a round: how far it is and its validation measure are shown."""
        with self.lock:
            self.tally.row(job, row)
            self.now[job.name] = f"round {row['round']} of {job.spec.rounds}"
            if (value := _validated(row)) is not None:
                self.now[job.name] += f", {value:.4f}"
        if self.prints and time.monotonic() - self.said > QUIET:
            self._say("; ".join(f"{name}: {at}" for name, at in self.now.items()))

    def ends(self, job: Job, failure: Failure | None) -> None:
        """A run finished or failed: it counts as done, or its error is shown."""
        with self.lock:
            self.tally.ends(job, failure)
            last = self.now.pop(job.name, "")
            if failure is not None:
                self.failed[job.name] = failure.error
            elif job.name in self.cells:
                from fedloom.runs.record import Run

                assert job.path is not None
                self.scores[job.name] = _validated(Run(job.path).selected)
        if self.prints:
            said = f"failed: {failure.error}" if failure else last
            self._say(f"{job.name}: {said}")

    def _say(self, line: str) -> None:
        self.said = time.monotonic()
        self.console.print(f"[{self.tally.ended}/{self.tally.total}] {line}", soft_wrap=True)

    def whole(self) -> Group:
        """The live table with a bar below it, over all cells and trials."""
        with self.lock:
            if self.cells:
                share, said = self.tally.share, str(self.tally)
                self.bar.update(self.task, total=1.0, completed=share, description=said)
        return Group(self.table(), self.bar.get_renderable())

    def table(self) -> Table:
        """The live table: a row for each method and setting, with the cells done, their mean and what runs now."""
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("", "done", "validation", "now"):
            table.add_column(name)
        with self.lock:
            groups: dict[str, list[str]] = {}
            for cell in self.cells.values():
                groups.setdefault(f"{cell.setting}/{cell.method}", []).append(cell.name)
            for group, names in list(groups.items())[:ROWS]:
                scores = [s for s in map(self.scores.get, names) if s is not None]
                mean = f"{sum(scores) / len(scores):.4f}" if scores else ""
                done = f"{sum(name in self.scores for name in names)}/{len(names)}"
                doing = [f"{name.rpartition('/')[2]}: {at}" for name, at in self.now.items() if _of(name, group)]
                failed = sum(name in self.failed for name in names)
                doing += [f"{failed} failed"] if failed else []
                table.add_row(Text(group, "bold"), done, mean, "; ".join(doing))
            if len(groups) > ROWS:
                table.add_row(f"and {len(groups) - ROWS} more", "", "", "")
        return table


def _of(name: str, group: str) -> bool:
    return name.rpartition("/")[0] == group


def _validated(row: Mapping[str, Any]) -> float | None:
    return row.get(f"validation_{main_of(row).name}")


def _score(cell: Cell) -> float | None:
    return _validated(cell.run.selected) if cell.run is not None else None
