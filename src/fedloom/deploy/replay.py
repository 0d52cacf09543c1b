"""A run that was carried out between machines, carried out again on one."""

from __future__ import annotations

from pathlib import Path

from fedloom.deploy.journal import Replayed
from fedloom.runs.experiment import Experiment
from fedloom.runs.record import Run
from fedloom.task import Task


def replayed(path: Path, out: Path | None = None, task: Task | None = None) -> Experiment:
    """The experiment that hears whom the run at `path` heard; `task` where its data were none that a spec names."""
    return Experiment(Run(path).spec, task, None, Replayed(path)).begin(out)
