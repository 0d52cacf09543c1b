"""Carries out a comparison: checks every cell, then runs what is not finished yet."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.comparison import tuning
from fedloom.comparison.grid import Comparison
from fedloom.comparison.results import Results
from fedloom.comparison.scheduler import NoWatcher, Scheduler, Watcher
from fedloom.errors import UsageError
from fedloom.runs.writing import remove

if TYPE_CHECKING:
    from fedloom.data.given import Given
    from fedloom.task import Task


def execute(
    comparison: Comparison,
    out: str | Path | None,
    task: Task | Given | None = None,
    jobs: int = 0,
    watcher: Watcher | None = None,
    trust: bool = False,
) -> Results:
    """Runs what is not finished of a comparison, in a new folder or in its own; without `out` in a temporary one.

    Parameters are those of `fedloom.compare`. Raises UsageError before any run begins if something cannot be run.
    """
    if jobs < 0:
        raise UsageError(f"jobs is {jobs}; it is a number of runs at once, at least 1, or 0: one a core")
    comparison.check(task)
    if comparison.tune:
        tuning.require()
        for method in comparison.methods:
            tuning.space(comparison, method)
    temporary = Path(tempfile.mkdtemp(prefix="fedloom-")) if out is None else None
    path = Path(out) if out is not None else Path(str(temporary)) / "comparison"
    scheduler = Scheduler(comparison, path, task, jobs, watcher or NoWatcher(), trust)
    try:
        results = scheduler.run()
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if temporary is not None:
        weakref.finalize(results, remove, temporary, os.getpid())
    return results
