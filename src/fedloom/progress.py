"""How far a run, or a comparison, is: a bar in a notebook, HTML that is drawn anew in its place, or in a terminal."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fedloom.comparison.tally import Tally
from fedloom.letters import printable
from fedloom.report.words import duration
from fedloom.runs.telling import Telling

if TYPE_CHECKING:
    from fedloom.comparison.grid import Comparison
    from fedloom.comparison.job import Failure, Job
    from fedloom.comparison.results import Cell
    from fedloom.comparison.scheduler import Watcher
    from fedloom.runs.experiment import Experiment

QUICK = 0.1  # seconds, at least, between two drawings


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook; IPython is not imported for it."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


class Bar:
    """A bar in the output of a notebook's cell: how far something is, what it is at, and the time that is left."""

    def __init__(self) -> None:
        self.place: Any = None  # what IPython gives to draw anew
        self.began = self.drawn = time.monotonic()

    def show(self, share: float, line: str, whatever: bool = False) -> None:
        """Draws the bar at a share from 0 to 1; too soon after the last time it does nothing, unless `whatever`."""
        now = time.monotonic()
        if self.place is not None and now - self.drawn < QUICK and not whatever:
            return
        self.drawn = now
        shows: Any = importlib.import_module("IPython.display")
        drawn = shows.HTML(self.html(share, line, now - self.began))
        if self.place is None:
            self.place = shows.display(drawn, display_id=True)
        else:
            self.place.update(drawn)

    @staticmethod
    def html(share: float, line: str, seconds: float) -> str:
        """The bar, and beside it the line with how long it took and about how long it will take yet."""
        left = f", about {duration(seconds * (1 - share) / share)} left" if 0 < share < 1 else ""
        said = escape(printable(f"{line}; {duration(seconds)}{left}"))
        return f'<progress max="1" value="{share:.4f}" aria-label="{said}" style="width:14em"></progress> {said}'


class RunBar:
    """The rounds of a run."""

    def __init__(self) -> None:
        self.bar = Bar()
        self.telling = Telling(0)
        self.at = 0.0, "loading"

    def __enter__(self) -> RunBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        share, line = self.at
        self.bar.show(share, f"{line} (stopped)" if error is not None else line, whatever=True)

    def begin(self, experiment: Experiment) -> None:
        """The experiment is put together, and perhaps some of its rounds are done."""
        self.telling = Telling(experiment.spec.rounds, experiment.record.metrics)
        self.at = experiment.done / experiment.spec.rounds, "first round"
        self.bar.show(*self.at)

    def __call__(self, row: Mapping[str, Any]) -> None:
        self.at = row["round"] / self.telling.rounds, self.telling.line(row)
        self.bar.show(*self.at)


class ComparisonBar:
    """The runs of a comparison, trials of tuning included: a watcher."""

    def __init__(self) -> None:
        self.bar, self.tally = Bar(), Tally()

    def planned(self, comparison: Comparison, cells: Iterable[Cell]) -> None:
        """Takes the cells, of which some may have finished before."""
        self.tally.planned(comparison, cells)
        self._show()

    def begins(self, job: Job) -> None:
        """A run begins, or goes on."""
        self.tally.begins(job)

    def row(self, job: Job, row: Mapping[str, Any]) -> None:
        """A run did a round."""
        self.tally.row(job, row)
        self._show()

    def ends(self, job: Job, failure: Failure | None) -> None:
        """A run is over, or failed, which is not to be overlooked."""
        self.tally.ends(job, failure)
        self._show(whatever=failure is not None or self.tally.ended == self.tally.total)

    def _show(self, whatever: bool = False) -> None:
        self.bar.show(self.tally.share, str(self.tally), whatever)


@contextmanager
def shown(made: Experiment, progress: bool | None) -> Iterator[Callable[[Mapping[str, Any]], object]]:
    """What shows each round's row of a run that begins, in a bar: in a notebook, or in a terminal if asked for."""
    bar: Any = None
    if progress is not False and in_notebook():
        bar = RunBar()
    elif progress:
        from fedloom.cli.progress import Watch

        bar = Watch(quiet=True)
    if bar is None:
        yield lambda row: None
        return
    with bar:
        bar.begin(made)
        yield bar


@contextmanager
def watching(watcher: Watcher | None, progress: bool | None) -> Iterator[Watcher | None]:
    """Who watches a comparison: whom the caller gave, else a bar as in `watched`, or nobody."""
    if watcher is None and progress is not False and in_notebook():
        yield ComparisonBar()
    elif watcher is None and progress:
        from fedloom.cli.board import Board

        with Board(quiet=True) as board:
            yield board
    else:
        yield watcher
