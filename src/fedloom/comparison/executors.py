"""What carries out the jobs of a comparison: worker processes, or this one."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Any, Protocol

from fedloom.comparison.forks import Forked
from fedloom.comparison.job import Failure, Job, JobRunner
from fedloom.method import Method

OnRow = Callable[[Job, Mapping[str, Any]], object]

TAIL = 2000  # characters of what a process printed last that its failure tells
LEAVING = 30.0  # seconds that a process has to end its round's writing


class Executor(Protocol):
    """Carries out jobs, as many at once as it has places."""

    printed: str  # by worker processes that have ended

    def take(self, ready: Sequence[Job]) -> Job | None:
        """Begins one of the jobs, the first if nothing speaks for another; None if all places are taken."""

    def wait(self) -> tuple[Job, Failure | None]:
        """The next job that ends, and how it failed, if it did."""

    def __enter__(self) -> Executor: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stops what is still going on, so that it can be gone on with."""


class InProcess:
    """This process, one job after another: what is given in Python as objects cannot leave it."""

    printed = ""

    def __init__(self, runner: JobRunner, on_row: OnRow, objects: Mapping[str, Method]) -> None:
        self.runner = runner
        self.on_row = on_row
        self.objects = objects  # by the name of the job's method
        self.job: Job | None = None

    def take(self, ready: Sequence[Job]) -> Job | None:
        """The first job, if none is taken; it is carried out in `wait`."""
        if self.job is not None:
            return None
        self.job = ready[0]
        return self.job

    def wait(self) -> tuple[Job, Failure | None]:
        """Carries out the job that was taken."""
        job, self.job = self.job, None
        assert job is not None
        given = self.objects.get(job.method)
        method = None if given is None else type(given)(**{n: v for n, v in job.spec.method.items() if n != "name"})
        return job, self.runner.run(job, lambda row: self.on_row(job, row), method)

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass


@dataclass(eq=False)
class _Worker:
    """A worker process and the job that it has."""

    process: subprocess.Popen[str] | Forked
    log: IO[str]  # what it and its libraries print
    job: Job | None = None
    source: str | None = None  # of the data that it holds

    def listen(self, heard: queue.SimpleQueue[tuple[_Worker, str | None]]) -> None:
        """Begins to pass on what the process says, and that it has ended (None)."""

        def pass_on() -> None:
            assert self.process.stdout is not None
            for line in self.process.stdout:
                heard.put((self, line))
            heard.put((self, None))

        self.listener = threading.Thread(target=pass_on, daemon=True)
        self.listener.start()

    def leave(self) -> int:
        """Waits for a process that was told to end, or has; gives its exit status."""
        try:
            status = self.process.wait(LEAVING)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.listener.join(LEAVING)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        return status


@dataclass
class WorkerProcesses:
    """Worker processes (`fedloom.comparison.worker`), begun as they are needed.

    They are fresh interpreters or, with `forks`, forked from one, but not from this process: they share nothing with
    it, which may be a notebook, or a script without a guarded main part. One that dies costs the job that it had. What
    they print is in `printed` at the end.
    """

    count: int
    on_row: OnRow
    forks: bool = False
    printed: str = ""
    workers: list[_Worker] = field(default_factory=list)
    heard: queue.SimpleQueue[tuple[_Worker, str | None]] = field(default_factory=queue.SimpleQueue)

    def take(self, ready: Sequence[Job]) -> Job | None:
        """Begins a job; one whose data an idle process holds goes before others."""
        idle = [worker for worker in self.workers if worker.job is None]
        if not idle and len(self.workers) < self.count:
            idle = [self._begin()]
        if not idle:
            return None
        fitting = ((worker, job) for job in ready for worker in idle if worker.source == job.source)
        worker, job = next(fitting, (idle[0], ready[0]))
        worker.job, worker.source = job, job.source
        assert worker.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone, which its output's end will tell
            worker.process.stdin.write(job.line() + "\n")
            worker.process.stdin.flush()
        return job

    def wait(self) -> tuple[Job, Failure | None]:
        """Listens until a job ends."""
        while True:
            worker, line = self.heard.get()
            job = worker.job
            if line is None:
                self.workers.remove(worker)
                status = self._read(worker)
                if job is not None:
                    how = f"signal {-status}" if status < 0 else f"exit code {status}"
                    last = self.printed.rstrip()[-TAIL:]
                    return job, Failure(f"its process ended with {how}", traceback=last)
                continue
            assert job is not None
            answer = json.loads(line)
            if "row" in answer:
                self.on_row(job, answer["row"])
            else:
                worker.job = None
                return job, Failure(**answer["failure"]) if answer["failure"] else None

    def _begin(self) -> _Worker:
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
        worker = _Worker(self._forked(log) or self._fresh(log), log)
        self.workers.append(worker)
        worker.listen(self.heard)
        return worker

    def _forked(self, log: IO[str]) -> Forked | None:
        with contextlib.suppress(OSError):  # what is in the way there may not be in the way of the other
            return Forked("fedloom.comparison.worker:main", log) if self.forks else None
        return None

    def _fresh(self, log: IO[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "fedloom.comparison.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def _read(self, worker: _Worker) -> int:
        """Waits for a process, takes up what it has printed, and gives its exit status."""
        status = worker.leave()
        worker.log.seek(0)
        self.printed += worker.log.read()
        worker.log.close()
        return status

    def __enter__(self) -> WorkerProcesses:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            self._read(worker)
