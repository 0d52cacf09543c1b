"""Processes that are forked from one that has imported everything: as fresh ones, but for what they cost."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import fedloom
from fedloom.comparison import forks
from fedloom.comparison.executors import WorkerProcesses
from fedloom.comparison.forks import Forked
from fedloom.comparison.job import Job
from fedloom.runs.spec import Spec

pytestmark = pytest.mark.skipif(not forks.possible(), reason="nothing is forked on this system")

NEEDED = forks.NEEDED

DONE = """
import json, os, select, signal, sys

import numpy as np


def tell():
    paths = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd") if int(n) > 2]
    files = [os.readlink(path) for path in paths if os.path.exists(path)]  # without that of the folder itself
    print(json.dumps({
        "heard": sys.stdin.readline(),
        "folder": os.getcwd(),
        "variables": dict(os.environ),
        "interrupted": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "child": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
        "drawn": np.random.random(),
        "files": files,
        "threads": len(os.listdir("/proc/self/task")),
        "loaded": "torch" in sys.modules,
        "parent": os.getppid(),
    }))
    print("and this", file=sys.stderr)


def leave():
    os._exit(7)


def fail():
    raise ValueError("as asked")


def wait():
    print("here", flush=True)
    select.select([sys.stdin], [], [], 20)
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Where Python finds the module `done` too: a variable of the environment, so that a server of its own forks."""
    folder = tmp_path_factory.mktemp("done")
    (folder / "done.py").write_text(DONE)
    given = os.environ.get("PYTHONPATH")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *([given] if given else [])]))
        patch.setattr(forks, "NEEDED", ())  # which takes a second each time
        yield folder


@contextlib.contextmanager
def forked(call, log=None):
    with tempfile.TemporaryFile("w+") as own:
        process = Forked(call, log or own)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()


def told(log=None):
    with forked("done:tell", log) as process:
        process.stdin.write("a line\n")
        process.stdin.close()
        assert process.wait(60) == 0
        return json.loads(rest(process))


def rest(process):
    """What is left to read; an error if somebody may still write."""
    os.set_blocking(process.stdout.fileno(), False)
    return process.stdout.read()


def test_it_is_a_process_as_a_fresh_one_would_be(path, tmp_path, monkeypatch):
    assert told()["folder"] == str(Path.cwd())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDLOOM_OF_LATE", "yes")
    with (tmp_path / "log").open("w+") as log:
        first = told(log)
    assert (tmp_path / "log").read_text() == "and this\n"
    assert first["heard"] == "a line\n" and first["folder"] == str(tmp_path)
    assert first["variables"] == dict(os.environ)
    assert first["interrupted"] and first["child"]
    assert first["files"] == []  # nobody else's pipe is held open by it
    monkeypatch.delenv("FEDLOOM_OF_LATE")
    second = told()
    assert second["parent"] == first["parent"] and "FEDLOOM_OF_LATE" not in second["variables"]


def test_what_is_forked_from_has_imported_all_and_has_one_thread(path, monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # others are ended at a fork, and begun again
    monkeypatch.setattr(forks, "NEEDED", NEEDED)
    heard = told()
    assert heard["drawn"] != told()["drawn"]  # nobody seeded it, so that it differs, as in fresh interpreters
    assert heard["loaded"] and heard["threads"] == 1
    assert len(list(Path(f"/proc/{heard['parent']}/task").iterdir())) == 1


def test_what_it_inherits_from_others_it_does_not_hold_open(path):
    with forked("done:wait") as before:
        assert before.stdout.readline() == "here\n"
        assert told()["files"] == []
        before.stdin.close()
        assert before.wait(60) == 0


def test_how_it_ended_is_told(path, tmp_path):
    with forked("done:leave") as process:
        assert process.wait(60) == 7 == process.wait()
    with (tmp_path / "log").open("w+") as log, forked("done:fail", log) as process:
        assert process.wait(60) == 1
    said = (tmp_path / "log").read_text()
    assert said.startswith("Traceback") and said.endswith("ValueError: as asked\n")
    for number in (signal.SIGTERM, signal.SIGKILL):
        with forked("done:wait") as process:
            process.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.01)
            process.send_signal(number)
            assert process.wait(60) == -number and rest(process) == ""
            process.terminate()  # which finds nobody


def test_the_one_that_forks_is_begun_anew_where_a_library_might_read_another_variable(path, monkeypatch):
    before = told()["parent"]
    with forked("done:wait") as process:
        process.stdout.readline()
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        after = told()
        assert after["parent"] != before and after["variables"]["OMP_NUM_THREADS"] == "3"
        process.stdin.close()
        assert process.wait(60) == 0  # what the old one forked is still heard of


def test_one_that_was_killed_is_replaced(path):
    before = told()["parent"]
    with forked("done:wait") as process:
        os.kill(before, signal.SIGKILL)
        assert process.wait(60) == 255
        process.stdin.close()
        process.stdout.read()
    assert told()["parent"] != before


def test_none_is_left_when_a_process_ends_or_is_killed(path, tmp_path):
    code = """
import sys, time
from fedloom.comparison import forks
from fedloom.comparison.forks import Forked

forks.NEEDED = ()
process = Forked("done:wait", sys.stderr)
process.stdout.readline()
print(process.pid, open(f"/proc/{process.pid}/stat").read().split()[3], flush=True)
if sys.argv[1] == "killed":
    time.sleep(60)
"""
    python = [sys.executable, "-W", "always::ResourceWarning"]
    for how in ("ended", "killed"):
        with (
            (tmp_path / how).open("w") as log,
            subprocess.Popen([*python, "-c", code, how], stdout=subprocess.PIPE, stderr=log, text=True) as parent,
        ):
            left = [Path(f"/proc/{pid}/stat") for pid in parent.stdout.readline().split()]
            if how == "killed":
                parent.kill()
            assert parent.wait(60) == (0 if how == "ended" else -9)
        assert "subprocess" not in (tmp_path / how).read_text()  # the server was waited for
        until = time.monotonic() + 20
        while any(there(stat) for stat in left):
            assert time.monotonic() < until
            time.sleep(0.02)


def there(stat):
    """Whether a process runs: one that has ended may be there until its new parent looks."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_one_without_anything_to_do_leaves_and_is_begun_again(path, monkeypatch):
    monkeypatch.setattr(forks, "LINGER", 0.1)
    monkeypatch.setenv("TO_HAVE_ONE", "of its own")
    before = told()["parent"]
    until = time.monotonic() + 20
    while there(Path(f"/proc/{before}/stat")):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert told()["parent"] != before


@pytest.mark.parametrize("forking", [True, False])
def test_a_worker_does_the_same_forked_or_fresh_where_that_cannot_be(forking, monkeypatch, tmp_path):
    if not forking:
        monkeypatch.setattr(forks._Server, "send", lambda request, files: (_ for _ in ()).throw(OSError("no")))
    rows = []
    spec = Spec(method={"name": "fedavg"}, clients=3, rounds=2)
    job = Job("one", "fedavg", tmp_path / "run", spec)
    with WorkerProcesses(1, lambda job, row: rows.append(row), True) as workers:
        assert workers.take([job]) is job and workers.take([job]) is None
        assert workers.wait() == (job, None)
        assert isinstance(workers.workers[0].process, Forked) == forking
    here = fedloom.run("fedavg", clients=3, rounds=2, out=tmp_path / "here", report=False)
    assert len(rows) == 2
    theirs, mine = fedloom.load(tmp_path / "run").metrics, here.metrics
    assert [list(row) for row in theirs] == [list(row) for row in mine]
    times = {"seconds": 0, "eval_seconds": 0}
    assert [row | times for row in theirs] == [row | times for row in mine]
