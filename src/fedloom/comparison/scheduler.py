"""In which order a comparison is carried out: checks, then trials of tuning and cells, as they become ready."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedloom import inputs
from fedloom.comparison import forks, trials, tuning
from fedloom.comparison.executors import Executor, InProcess, WorkerProcesses
from fedloom.comparison.grid import Comparison
from fedloom.comparison.job import Failure, Job, JobRunner
from fedloom.comparison.layout import SPEC, error_file, put, trial_folder
from fedloom.comparison.reading import value_at
from fedloom.comparison.results import Cell, Results, cell_of
from fedloom.errors import RunError, UsageError
from fedloom.runs.record import Run
from fedloom.runs.writing import disk, hold
from fedloom.user_networks import only_in_python

if TYPE_CHECKING:
    from fedloom.data.given import Given
    from fedloom.runs.spec import Spec
    from fedloom.task import Task


class Watcher(Protocol):
    """Is called as a comparison goes on, such as to show its progress."""

    def planned(self, comparison: Comparison, cells: Iterable[Cell]) -> None:
        """Called once every cell is checked and before any begins; finished cells come with their runs."""

    def begins(self, job: Job) -> None:
        """Called when a cell's or a trial's run begins, or goes on from its checkpoint."""

    def row(self, job: Job, row: Mapping[str, Any]) -> None:
        """Called after each round of a run, with its measures (from a process of its own, those in `worker.SHOWN`)."""

    def ends(self, job: Job, failure: Failure | None) -> None:
        """Called when a run is finished, or failed."""


class NoWatcher:
    """Ignores every call: a comparison that nobody follows."""

    def planned(self, comparison: Comparison, cells: Iterable[Cell]) -> None: ...

    def begins(self, job: Job) -> None: ...

    def row(self, job: Job, row: Mapping[str, Any]) -> None: ...

    def ends(self, job: Job, failure: Failure | None) -> None: ...


class Scheduler:
    """Carries out one comparison in its folder `path`, `jobs` runs at a time (0: as many as the cores take)."""

    def __init__(
        self,
        comparison: Comparison,
        path: Path,
        task: Task | Given | None,
        jobs: int,
        watcher: Watcher,
        trust: bool = False,
    ) -> None:
        self.comparison, self.path, self.watcher, self.trust = comparison, path, watcher, trust
        specs = [comparison.spec(setting, method, seed) for setting, method, seed in comparison.grid()]
        self.lacking = [spec.data for spec in specs if spec.in_python and task is None]
        own = any(only_in_python(text) for spec in specs for text in (spec.model, spec.loss))
        self.in_process = task is not None or bool(comparison.objects) or own
        self.runner = JobRunner(task)
        on_gpu = _on_gpu(specs)
        self.jobs = jobs or (1 if on_gpu else _at_once(specs))
        self.forks = not on_gpu and forks.possible()
        self.cells: dict[str, tuple[str, str, int]] = {}  # by the name of a job: setting, method, and seed or -1

    def run(self) -> Results:
        """Checks every cell, then runs what is not finished; gives the folder's results.

        Raises UsageError before any run begins if the folder is of another comparison, its inputs changed, or a cell
        cannot be carried out as it stands; RunError if putting a cell together fails otherwise.
        """
        before = self._before()
        unfinished = any(cell_of(self.path, *key).run is None for key in self.comparison.grid())
        if self.lacking and unfinished:
            raise UsageError(f"the data are {self.lacking[0]}; go on in Python: fedloom.compare(..., task, out=...)")
        if before is not None and unfinished:
            self._compare_inputs()
        with self._executor() as executor:
            if before is None or before.text() != self.comparison.text():
                self._check(executor)
            with disk(self.path, "compare"):
                self.path.mkdir(parents=True, exist_ok=True)
            with hold(self.path):
                with disk(self.path, "compare"):
                    put(self.path / SPEC, self.comparison.text())
                cells = [cell_of(self.path, *key) for key in self.comparison.grid()]
                self.watcher.planned(self.comparison, cells)
                self._run_jobs(executor, self._ready(cells))
        if executor.printed:
            with disk(self.path, "compare"):
                log = self.path / "log.txt"
                before_now = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
                put(log, before_now + executor.printed)
        return Results.read(self.path)

    def _before(self) -> Comparison | None:
        """The comparison whose folder this is already, if one is; raises UsageError if this would not go on with it."""
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return None
        if not (self.path / SPEC).is_file():
            raise UsageError(f"{self.path} exists and is not a comparison's folder; choose another --out")
        before = Comparison.read(self.path / SPEC)
        clash = self.comparison.clashes(before)
        if clash:
            raise UsageError(f"{self.path} is of another comparison ({clash}); choose another --out")
        return before

    def _compare_inputs(self) -> None:
        """Raises UsageError if what the cells of before read is not what the next ones would."""
        paths = [cell_of(self.path, *key).path for key in self.comparison.grid()]
        begun: dict[str, Any] = {}
        for path in paths:
            if (path / "manifest.json").is_file() and isinstance(one := Run(path).manifest.get("inputs"), dict):
                begun = one | begun
        begun_on = next((told for path in paths if (told := _told(path))), None)
        if begun_on is not None:
            from fedloom.data.given import require_same

            require_same(self.runner.told, begun_on, "which are those of the cells before")
        if begun:
            methods = {method["name"]: method for method in self.comparison.code}
            mine = [method for name, method in methods.items() if name in begun]
            anew = f"fedloom compare {self.path / SPEC} --out NEW_FOLDER"
            inputs.checked(mine, begun, self.path, anew, self.trust)

    def _check(self, executor: Executor) -> None:
        """Puts the parts of every cell together, at its first seed, so that what cannot run is told before any does."""
        keys = [key for key in self.comparison.grid() if key[2] == self.comparison.seeds[0]]
        ready = [Job(f"{s}/{m}", m, None, self.comparison.spec(s, m, seed)) for s, m, seed in keys]
        failed = {job.name: failure for job, failure in _done(executor, ready) if failure is not None}
        for setting, method, _ in keys:
            if f"{setting}/{method}" in failed:
                failure = failed[f"{setting}/{method}"]
                kind = UsageError if failure.asked else RunError
                raise kind(f"cell {setting}/{method}: {failure.error}")

    def _executor(self) -> Executor:
        if self.in_process:
            return InProcess(self.runner, self.watcher.row, self.comparison.objects)
        return WorkerProcesses(self.jobs, self.watcher.row, self.forks)

    def _ready(self, cells: Iterable[Cell]) -> list[Job]:
        """The jobs that can be done now: of a method under a setting its next trial, or its cells."""
        ready = []
        wanted = {(cell.setting, cell.method) for cell in cells if cell.run is None}
        for setting in self.comparison.settings:
            for method in self.comparison.methods:
                if (setting, method) in wanted:
                    ready += self._next(setting, method)
        return sorted(ready, key=lambda job: self._place(job.name))

    def _place(self, name: str) -> tuple[int, ...]:
        """Where a job stands in the order: trials first, whose cells wait; then seeds together, which share data."""
        setting, method, seed = self.cells[name]
        settings, methods = list(self.comparison.settings), list(self.comparison.methods)
        return (int(seed >= 0), settings.index(setting), seed, methods.index(method))

    def _next(self, setting: str, method: str) -> list[Job]:
        """A method's next trial; its unfinished cells, where there were enough."""
        trial = tuning.trial(self.comparison, self.path, setting, method)
        if trial is not None:
            number, spec = trial
            folder = trial_folder(self.path, setting, method, number)
            return [self._job(f"{setting}/{method}/trial-{number}", folder, spec, (setting, method, -1))]
        found = []
        for seed in self.comparison.seeds:
            cell = cell_of(self.path, setting, method, seed)
            if cell.run is not None:
                continue
            try:
                tuned = trials.best_fields(self.path, setting, method) if self.comparison.tune else {}
            except RunError as error:
                spec = self.comparison.spec(setting, method, seed)
                self._fail(self._job(cell.name, cell.path, spec, (setting, method, seed)), Failure.of(error))
                continue
            spec = self.comparison.spec(setting, method, seed, tuned)
            found.append(self._job(cell.name, cell.path, spec, (setting, method, seed)))
        return found

    def _job(self, name: str, path: Path, spec: Any, cell: tuple[str, str, int]) -> Job:
        self.cells[name] = cell
        return Job(name, cell[1], path, spec)

    def _run_jobs(self, executor: Executor, ready: list[Job]) -> None:
        """Carries out the jobs, and those that they make ready; writes down what each came to."""
        for job, failure in _done(executor, ready, self.watcher):
            setting, method, seed = self.cells[job.name]
            assert job.path is not None
            if seed >= 0:
                if failure is not None:
                    self._fail(job, failure)
                    continue
                error_file(job.path).unlink(missing_ok=True)
            else:
                fields = {name: value_at(job.spec.method, name) for name in tuning.space(self.comparison, method)}
                run = Run(job.path) if failure is None else None
                with disk(self.path, "compare"):
                    trials.record_trial(self.path, setting, method, fields, run, failure.error if failure else None)
                ready += self._next(setting, method)
                ready.sort(key=lambda one: self._place(one.name))
            self.watcher.ends(job, failure)

    def _fail(self, job: Job, failure: Failure) -> None:
        assert job.path is not None
        told = {"error": failure.error, "asked": failure.asked, "traceback": failure.traceback}
        with disk(self.path, "compare"):
            put(error_file(job.path), json.dumps(told, indent=1) + "\n")
        self.watcher.ends(job, failure)


def _told(path: Path) -> Mapping[str, Any] | None:
    """What the record of a run says of data given in Python, if it began on such."""
    return Run(path).partition.get("data") if (path / "partition.json").is_file() else None


def _done(executor: Executor, ready: list[Job], watcher: Watcher | None = None) -> Iterable[tuple[Job, Failure | None]]:
    """Carries out what is in `ready`, also what is put there meanwhile; yields every job as it ends."""
    busy = 0
    while ready or busy:
        job = executor.take(ready) if ready else None
        if job is not None:
            ready.remove(job)
            busy += 1
            if watcher is not None:
                watcher.begins(job)
            continue
        ended = executor.wait()
        busy -= 1
        yield ended


def _on_gpu(specs: Sequence[Spec]) -> bool:
    import torch

    return torch.cuda.is_available() and any(spec.device != "cpu" for spec in specs)


def _at_once(specs: Sequence[Spec]) -> int:
    """As many runs as cores, where a run needs one; where an engine has them all, one."""
    from fedloom.engines.blocks import cores

    each = max(spec.threads if spec.engine in ("serial", "loopback") else cores() for spec in specs)
    return max(1, min(cores() // each, len(specs)))
