"""What one sees of a run while it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fedloom.cli.tables import console, print_columns
from fedloom.runs.telling import Telling

if TYPE_CHECKING:
    from rich.console import Console

    from fedloom.runs.experiment import Experiment

LINES = 10  # that a run prints, about, where there is no terminal


class Watch:
    """Shows the rounds of a run as they end: a bar on a terminal, else a line now and then.

    `quiet` keeps standard output free for a program: the bar goes to standard error, and there are no lines.
    """

    def __init__(self, quiet: bool) -> None:
        self.console = console(stderr=quiet)
        self.quiet = quiet
        self.prints = not quiet and not self.console.is_interactive
        self.bar = bar(self.console)
        self.telling = Telling(0)
        self.waited = ""

    def __enter__(self) -> Watch:
        self.bar.start()
        self.task = self.bar.add_task("loading", total=None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()

    def says(self, line: str) -> None:
        """A line for people."""
        if not self.quiet:
            self.console.print(line, soft_wrap=True, highlight=False, markup=False)

    def waits(self, what: str) -> None:
        """What there is to wait for before the first round; printed once where there is no terminal."""
        if self.prints and what != self.waited:
            self.says(what)
        self.waited = what
        self.bar.update(self.task, description=what)

    def begin(self, experiment: Experiment) -> None:
        """The experiment is put together, and perhaps some of its rounds are done."""
        self.telling = Telling(experiment.spec.rounds, experiment.record.metrics)
        if not self.quiet:
            print_columns(self.console, experiment.record.partition)
        if experiment.why is not None:
            self.console.print(f"engine {experiment.why}", soft_wrap=True, style="dim")
        self.bar.update(self.task, total=self.telling.rounds, completed=experiment.done, description="first round")

    def __call__(self, row: Mapping[str, Any]) -> None:
        rounds, line = self.telling.rounds, self.telling.line(row)
        self.bar.update(self.task, completed=row["round"], description=line)
        if self.prints and (row["round"] % max(1, rounds // LINES) == 0 or row["round"] == rounds):
            self.console.print(line, soft_wrap=True)


def bar(console: Console) -> Progress:
    """A bar with what is under way before it and the time that is left behind it; on a terminal only."""
    text = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), text, BarColumn(None), TaskProgressColumn(), TimeRemainingColumn(True))
    return Progress(*columns, console=console, transient=True, disable=not console.is_interactive)


class Doing:
    """Shows what a client between machines is doing: a line that changes on a terminal, else one for each round."""

    def __init__(self) -> None:
        self.console = console()
        self.bar = bar(self.console)
        self.said = ""

    def __enter__(self) -> Doing:
        self.bar.start()
        self.task = self.bar.add_task("starting", total=None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()

    def __call__(self, what: str, round: int | None = None, rounds: int | None = None) -> None:
        if round is None:
            self.bar.update(self.task, description=what)
            line = "" if what in ("waiting", "sending") else what
        else:
            self.bar.update(self.task, total=rounds, completed=round, description=f"round {round} of {rounds}: {what}")
            line = f"round {round} of {rounds}"
        if line and line != self.said and not self.console.is_interactive:
            self.console.print(line, soft_wrap=True, highlight=False, markup=False)
        self.said = line or self.said
