"""Processes that cost a fork in place of the import of PyTorch, which each would else do anew for a second and more.

They are forked from one that has done nothing but import, has one thread, and runs as long as this process wants more:
so they share nothing with this process, as if each were a fresh interpreter.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import IO, Any

LINGER = 120.0  # seconds that the process which forks stays without having anything to do
NEEDED = ("fedloom.comparison.worker", "fedloom.runs.experiment", "fedloom.tasks.classification", "fedloom.nets.mlp")
OFTEN_CHANGED = ("FEDLOOM_", "PYTEST_")  # variables, by their beginning, that nothing reads when it is imported
LOST = 255  # the exit status of a process of which nobody can say how it ended

_NUMBER = struct.Struct("i")
_LENGTH = struct.Struct("!I")
_FILES = 4  # input, output, errors, and where the pid and the exit status are told


class Forked:
    """A forked process that calls `call`, such as "package.module:main", with text pipes for its input and output.

    Its environment and its folder are those of this process. What it offers is that of `subprocess.Popen`.
    """

    def __init__(self, call: str, errors: IO[Any]) -> None:
        request = {"call": call, "folder": str(Path.cwd()), "environment": dict(os.environ)}
        reads, self.stdin = _pipe("r", "w")
        self.stdout, writes = _pipe("r", "w")
        self._told, tells = _pipe("rb", "wb")
        try:
            with reads, writes, tells:
                _Server.send(request, [file.fileno() for file in (reads, writes, errors, tells)])
            pid = self._heard()
            if pid is None:
                raise OSError("the process that forks others has ended")
        except BaseException:
            for file in (self.stdin, self.stdout, self._told):
                file.close()
            raise
        self.pid = pid
        self.returncode: int | None = None

    def _heard(self) -> int | None:
        heard = self._told.read(_NUMBER.size)  # a whole number: so little is written to a pipe at once
        return _NUMBER.unpack(heard)[0] if heard else None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, negative for a signal. Raises subprocess.TimeoutExpired if it does not end in time."""
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._told, select.POLLIN)
            if not poll.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            status = self._heard()
            self.returncode = LOST if status is None else status
            self._told.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the process is known to have ended."""
        with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
            self.wait(0)
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Asks it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it."""
        self.send_signal(signal.SIGKILL)


def _pipe(reading: str, writing: str) -> tuple[IO[Any], IO[Any]]:
    """The two ends of a new pipe; what is binary has no buffer."""
    ends = zip(os.pipe(), (reading, writing), strict=True)
    first, last = (os.fdopen(end, mode, 0 if "b" in mode else -1) for end, mode in ends)
    return first, last


def possible() -> bool:
    """Whether this system can do it: on others a fork of what has imported PyTorch is not safe, or there is none."""
    return sys.platform == "linux" and hasattr(socket, "send_fds")


class _Server:
    """The process that forks, as this one sees it."""

    there: _Server | None = None
    former: list[subprocess.Popen[bytes]] = []  # those that nobody can ask any more  # noqa: RUF012
    lock = threading.Lock()

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment, self.owner = environment, os.getpid()
        self.line, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), str(LINGER), *NEEDED],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    @staticmethod
    def send(request: Mapping[str, Any], files: list[int]) -> None:
        """Hands a request to the server of this process, which is begun if none is there, or a library might differ."""
        wanted = {name: value for name, value in os.environ.items() if not name.startswith(OFTEN_CHANGED)}
        message = json.dumps(request).encode()
        with _Server.lock:
            there = _Server.there
            if there is not None and there.owner == os.getpid() and there.environment == wanted:
                with contextlib.suppress(OSError):  # it had nothing to do for too long, or was killed
                    there._send(message, files)
                    return
            if there is not None:
                there.stop()
            there = _Server.there = _Server(wanted)
            there._send(message, files)

    def _send(self, message: bytes, files: list[int]) -> None:
        socket.send_fds(self.line, [_LENGTH.pack(len(message))], files)
        self.line.sendall(message)

    def stop(self) -> None:
        """The server ends when what it has forked has: it tells how."""
        if self.owner == os.getpid():  # and not in a fork of this process
            with contextlib.suppress(OSError):
                self.line.shutdown(socket.SHUT_RDWR)  # forks of this process have copies of its end
            _Server.former = [one for one in (*_Server.former, self.process) if one.poll() is None]
        self.line.close()

    @staticmethod
    def leave() -> None:
        """None is left when this process ends."""
        there = _Server.there
        if there is not None and there.owner == os.getpid():
            there.stop()
            for process in _Server.former:
                process.terminate()
                process.wait()


atexit.register(_Server.leave)


def _asked(line: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next request, and the files that come with it; None if there will be none."""
    head, files, _, _ = socket.recv_fds(line, _LENGTH.size, _FILES)
    if not head:
        return None
    left, message = _LENGTH.unpack(head)[0], b""
    while left > len(message):
        more = line.recv(left - len(message))
        if not more:
            return None
        message += more
    return json.loads(message), files


def _forks(line: socket.socket, linger: float) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Forks a process for each request, and yields there what it is to do. Here it ends when there is no more to do."""
    woken, waker = socket.socketpair()
    waker.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    children: dict[int, int] = {}  # where the end of each is told
    heard = [woken, line]
    while children or line in heard:
        ready, _, _ = select.select(heard, [], [], None if children else linger)
        if not ready:
            return
        if woken in ready:
            woken.recv(4096)
            for pid in list(children):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    _tell(children[pid], os.waitstatus_to_exitcode(status))
                    os.close(children.pop(pid))
        if line in ready:
            asked = _asked(line)
            if asked is None:
                heard.remove(line)
                continue
            request, files = asked
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of threads: those of OpenBLAS know what to do at a fork
                pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for end in (line, woken, waker):
                    end.close()
                for told in (*children.values(), files.pop()):
                    os.close(told)
                yield request, files
            children[pid] = files.pop()
            for file in files:
                os.close(file)
            _tell(children[pid], pid)


def _tell(file: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody listens any more
        os.write(file, _NUMBER.pack(number))


def _begin(request: Mapping[str, Any], files: list[int], interrupt: Any) -> None:
    """Makes of a fork what a fresh interpreter would be, and calls what was asked for."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, interrupt)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    importlib.import_module("numpy.random").seed()  # else all forks would draw the same
    resolve_name(request["call"])()


def main() -> None:
    """Imports what the others need, and forks them from it."""
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, where others than this one decide
    line = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[3:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is there stays, and is not copied by each fork's own collections
    for request, files in _forks(line, float(sys.argv[2])):
        return _begin(request, files, interrupt)
    os._exit(0)  # there is nothing to clean up


if __name__ == "__main__":
    main()
