"""What one sees of a run while it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fedloom.cli.tables import console, print_columns
from fedloom.quality import ACCURACY, evaluated, main_of
from fedloom.report.words import single, size

if TYPE_CHECKING:
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
        text = TextColumn("{task.description}", markup=False)
        columns = (SpinnerColumn(), text, BarColumn(None), TaskProgressColumn(), TimeRemainingColumn(True))
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_interactive)
        self.accuracy: float | None = None  # or what else is the main measure
        self.main = ACCURACY
        self.each = ""  # that of every judged model and test by itself
        self.rounds = self.bytes = 0

    def __enter__(self) -> Watch:
        self.bar.start()
        self.task = self.bar.add_task("loading", total=None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()

    def begin(self, experiment: Experiment) -> None:
        """The experiment is put together, and perhaps some of its rounds are done."""
        self.rounds = experiment.spec.rounds
        for row in experiment.record.metrics:
            self._count(row)
        if not self.quiet:
            print_columns(self.console, experiment.record.partition)
        if experiment.why is not None:
            self.console.print(f"engine {experiment.why}", soft_wrap=True, style="dim")
        self.bar.update(self.task, total=self.rounds, completed=experiment.done, description="first round")

    def __call__(self, row: Mapping[str, Any]) -> None:
        self._count(row)
        parts = [f"loss {row['train_loss']:.4f}"] if "train_loss" in row else []
        parts += [f"{self.main.words} {_short(self.accuracy)}{self.each}"] if self.accuracy is not None else []
        line = ", ".join([f"round {row['round']} of {self.rounds}", *parts, size(self.bytes)])
        self.bar.update(self.task, completed=row["round"], description=line)
        if self.prints and (row["round"] % max(1, self.rounds // LINES) == 0 or row["round"] == self.rounds):
            self.console.print(line, soft_wrap=True)

    def _count(self, row: Mapping[str, Any]) -> None:
        self.bytes += row["up_bytes"] + row["down_bytes"] + row["peer_bytes"]
        if evaluated(row):
            self.main = main_of(row)
            of_global = f"global_test_{self.main.name}"  # null where a method has no global model
            shown = f"personal_test_{self.main.name}" if row[of_global] is None else of_global
            self.accuracy = row[shown]
            each = [f"{name.partition('@')[2]} {_short(row[name])}" for name in single(shown, [row])]
            self.each = f" ({', '.join(each)})" if each else ""


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.5g}"
