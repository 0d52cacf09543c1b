"""Carries out a comparison: checks every cell, then runs what is not finished yet."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.comparison import tuning
from fedloom.comparison.conductor import Conductor, Nobody, Watcher
from fedloom.comparison.grid import Comparison
from fedloom.comparison.reading import mapping
from fedloom.comparison.results import Results
from fedloom.errors import UsageError
from fedloom.record import remove

if TYPE_CHECKING:
    from fedloom.method import Method
    from fedloom.task import Task


def compare(
    methods: str | Method | Iterable[str | Method | Mapping[str, Any]] | Mapping[str, Any] | Path,
    task: str | Task | None = None,
    *,
    out: str | Path | None = None,
    jobs: int = 0,
    watcher: Watcher | None = None,
    report: bool = True,
    trust: bool = False,
    **settings: Any,
) -> Results:
    """Runs every method at every seed under every setting, and returns what came out.

    `methods`: names, files, Methods, or mappings with fields (`{"name": "fedprox", "mu": 0.1, "label": "strong"}`); or
    the YAML file of a comparison. `task` as in `run`. `settings` are those of `Comparison` (`seeds=5`, `tune=20`,
    `fields={"lr": 0.1}` for all methods, `settings={"iid": {"partition": "iid"}, ...}`) and of `Spec`. With `out=None`
    the folder is temporary and lives as long as the returned object; in one that is there, finished cells are kept and
    the others are run, with `trust` also if a method's file changed since. `jobs`: runs at once (0: one a core). A task
    or a method that only Python has is run in this process. A cell that fails is told in the results; what cannot be
    carried out raises UsageError before it starts.
    """
    from fedloom.experiment import placed

    if isinstance(methods, Path) or (isinstance(methods, str) and methods.endswith((".yaml", ".yml"))):
        settings = mapping(methods) | settings
    else:
        settings["methods"] = methods
    placed(task, settings)
    given = None if isinstance(task, str) else task
    return conduct(Comparison.of(settings), out, given, jobs, watcher or Nobody(), report, trust)


def conduct(
    comparison: Comparison,
    out: str | Path | None,
    task: Task | None = None,
    jobs: int = 0,
    watcher: Watcher | None = None,
    report: bool = True,
    trust: bool = False,
) -> Results:
    """Runs what is not finished of a comparison, in a new folder or in its own."""
    if jobs < 0:
        raise UsageError(f"jobs is {jobs}; it is a number of runs at once, at least 1, or 0: one a core")
    comparison.check()
    if comparison.tune:
        tuning.require()
        for method in comparison.methods:
            tuning.space(comparison, method)
    temporary = Path(tempfile.mkdtemp(prefix="fedloom-")) if out is None else None
    path = Path(out) if out is not None else Path(str(temporary)) / "comparison"
    made = Conductor(comparison, path, task, jobs, watcher or Nobody(), trust)
    try:
        results = made.go()
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if temporary is not None:
        weakref.finalize(results, remove, temporary, os.getpid())
    elif report:
        from fedloom.report.comparison import write

        write(results)
    return results
