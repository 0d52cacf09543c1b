"""One run of a comparison, as it is handed to a process, and how it is carried out there."""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedloom.errors import RunError, UsageError
from fedloom.runs.record import Run
from fedloom.runs.spec import FREE, KNOWN, Spec
from fedloom.runs.writing import hold

if TYPE_CHECKING:
    from fedloom.data.given import Given
    from fedloom.method import Method
    from fedloom.task import Task

OnRow = Callable[[Mapping[str, Any]], object]

ASIDE = FREE | {"method", "blind"}  # settings that a task does not come from
PATIENCE = 30.0  # seconds that a run's folder is waited for, whose process was killed and is still leaving


@dataclass(frozen=True)
class Job:
    """A run to begin or to go on with, in `path`; without a path its parts are put together only, which checks them."""

    name: str
    method: str  # its label
    path: Path | None
    spec: Spec

    @property
    def source(self) -> str:
        """What the run's task comes from: jobs of one source can share it."""
        return json.dumps([getattr(self.spec, name) for name in KNOWN if name not in ASIDE])

    def line(self) -> str:
        """The job as a line of JSON, for another process."""
        path = None if self.path is None else str(self.path)
        return json.dumps({"name": self.name, "method": self.method, "path": path, "spec": self.spec.text("")})

    @staticmethod
    def of(line: str) -> Job:
        """The job that `line` wrote."""
        told = json.loads(line)
        path = None if told["path"] is None else Path(told["path"])
        return Job(told["name"], told["method"], path, Spec.parsed(told["spec"], told["name"]))


@dataclass(frozen=True)
class Failure:
    """How a job failed: in a line, and in all its length. `asked`: the request cannot be carried out as it stands."""

    error: str
    asked: bool = False
    traceback: str = ""

    @staticmethod
    def of(error: Exception) -> Failure:
        """The failure that an exception is."""
        plain = str(error) if isinstance(error, UsageError | RunError) else f"{type(error).__name__}: {error}"
        whole = "".join(traceback.format_exception(error))
        return Failure(" ".join(plain.split()), isinstance(error, UsageError), whole)


class JobRunner:
    """Carries out jobs, one after another. The task of the last one stays for the next, if that has the same data."""

    def __init__(self, task: Task | Given | None = None) -> None:
        self.given: Given | None = None
        self.source: str | None = None
        self.task: Task | None = None
        if task is not None:
            self._take(task)
        self.lasting = self.task is not None  # whatever a job's settings are

    def _take(self, task: Task | Given) -> None:
        from fedloom.data.given import Given

        if isinstance(task, Given):
            self.given = task
        else:
            self.task = task

    @property
    def told(self) -> Mapping[str, Any] | None:
        """What a record says of the data that were given in Python."""
        if self.given is not None:
            return self.given.told
        return self.task.describe().get("data") if self.task is not None else None

    def run(self, job: Job, on_row: OnRow, method: Method | None = None) -> Failure | None:
        """Carries out a job; None, or how it failed: no Exception leaves this.

        A run that was stopped, killed or failed goes on from its checkpoint. `method`: in place of the spec's.
        """
        try:
            self._run(job, on_row, method)
        except Exception as error:  # noqa: BLE001 - the other cells go on whatever happens in this one
            return Failure.of(error)
        return None

    def _run(self, job: Job, on_row: OnRow, method: Method | None) -> None:
        from fedloom.runs.experiment import Experiment

        path = job.path
        if path is not None and (path / "spec.yaml").is_file():
            record = Run(path)
            with hold(path, PATIENCE):
                if record.manifest.get("status") != "finished":
                    Experiment(record.spec, self._task(job), method).take_up(record).go(on_row)
        elif path is not None:
            begun = Experiment(job.spec, self._task(job), method).begin(path)
            with begun.record.lock():
                begun.go(on_row)
        else:
            Experiment(dataclasses.replace(job.spec, engine="serial"), self._task(job), method)

    def _task(self, job: Job) -> Task:
        from fedloom import tasks

        if not self.lasting and self.source != job.source:
            self.source = self.task = None  # the old one goes before the new one comes
            self.task = tasks.build(job.spec, self.given)
            self.source = job.source
        assert self.task is not None
        return self.task
