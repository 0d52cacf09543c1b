"""Worker processes on all cores of this machine, started once a run.

What all clients of a call get travels once, through memory that all workers map; data sets are shared with the workers
that are forked; under `mean` replies are summed where they are made. All files and pipes are nameless, so that no
crash can leave anything behind, and a worker whose parent is gone ends at once.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import warnings
from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from fedloom import encoding
from fedloom.determinism import make_reproducible
from fedloom.engines import heap
from fedloom.engines.blocks import Distributed, cores
from fedloom.engines.gather import Gather
from fedloom.engines.orders import Order, WorkerHandle
from fedloom.engines.worker import Worker
from fedloom.message import Value
from fedloom.method import Method
from fedloom.site import Site


@dataclass(eq=False)
class _Process(WorkerHandle):
    """A worker process as its parent sees it."""

    process: Any
    pipe: Connection


class Pool(Distributed[_Process]):
    """Serves the clients of a call on worker processes of this machine."""

    ADVICE = (
        "it may have printed why; a script that uses the pool with CUDA or several threads needs its main part under "
        "`if __name__ == '__main__':`"
    )

    def __init__(
        self, workers: int = 0, threads: int = 1, start_method: str | None = None, together: bool = False
    ) -> None:
        super().__init__(workers or cores(), threads)
        self.together = together
        self.start_method = start_method

    def start(self, method: Method, site: Site, states: MutableMapping[int, dict[str, Value]]) -> None:
        self.context: Any = multiprocessing.get_context(self.start_method or start_method(site.device, self.threads))
        self.board = _board()
        super().start(method, site, states)

    def stop(self) -> None:
        for handle in self.handles:
            handle.pipe.close()
        for handle in self.handles:
            handle.process.join(1.0)
            if handle.process.is_alive():
                handle.process.kill()
                handle.process.join()
            handle.process.close()
        if self.handles:
            os.close(self.board)
        super().stop()

    def post(self, shared: bytes) -> tuple[int, int]:
        """Puts it on the board, behind what workers may still read: offset and length."""
        asked = (
            order for handle in self.handles for order, _ in handle.work
        )  # calls that were given up are among them
        offset = max((sum(order.spot) for order in {*self.orders.values(), *asked}), default=0)
        os.truncate(self.board, max(os.fstat(self.board).st_size, offset + len(shared)))
        os.pwrite(self.board, shared, offset)
        return offset, len(shared)

    def send(self, handle: _Process, order: Order, request: dict[str, Value]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            handle.pipe.send_bytes(encoding.encode(request | {"spot": list(order.spot)}))

    def hear(self, patience: float | None = None) -> list[tuple[_Process, dict[str, Any] | str]]:
        talking = wait([handle.pipe for handle in self.handles], patience)
        return [(handle, self._read(handle)) for handle in self.handles if handle.pipe in talking]

    def _read(self, handle: _Process) -> dict[str, Any] | str:
        try:
            return encoding.decode(handle.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            handle.pipe.close()
            handle.process.join()
            return f"exit code {handle.process.exitcode}"

    def start_worker(self) -> _Process:
        ours, theirs = self.context.Pipe()
        board: Any = self.board
        foreign = [handle.pipe for handle in self.handles if not handle.pipe.closed] + [ours]
        if self.context.get_start_method() != "fork":
            board, foreign = multiprocessing.reduction.DupFd(self.board), []
        about = (self.site.about, self.method, self.threads, self.together)
        process = self.context.Process(target=_work, args=(theirs, foreign, board, *about), daemon=True)
        with warnings.catch_warnings():
            # Python 3.12 warns of forks beside threads. Torch's are asleep, and a worker uses one thread.
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            process.start()
        theirs.close()
        return _Process(process, ours)


def start_method(device: torch.device, threads: int) -> str:
    """How workers of so many threads are started; neither CUDA nor a parent's thread pool survives a fork."""
    forked = device.type == "cpu" and threads == 1 and "fork" in multiprocessing.get_all_start_methods()
    return "fork" if forked else "spawn"


def _board() -> int:
    """A file without a name, in memory where the system has such: it is gone with the last process that holds it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fedloom")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _work(
    pipe: Connection,
    foreign: list[Connection],
    board: Any,
    about: tuple[Any, ...],
    method: Method,
    threads: int,
    together: bool,
) -> None:
    """A worker's life: until its parent closes the pipe, or is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for end in foreign:  # inherited by the fork; held open, it would hide a parent's death from the others
        end.close()
    board = board if isinstance(board, int) else board.detach()
    gc.freeze()  # what the fork has brought along is not looked through, and so not copied, to be found in use
    make_reproducible(about[2], threads)
    heap.keep()
    site = Site(*about)
    worker = Worker(site, method, Gather(site) if together else None)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        # Always reading, a worker that is busy, or busy answering, never blocks its parent's sending.
        try:
            while True:
                requests.put(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    try:
        pipe.send_bytes(encoding.encode({}))  # ready
    except BrokenPipeError:
        return  # the run was over before this worker had started
    while True:
        request: dict[str, Any] = encoding.decode(requests.get())
        offset, length = request["spot"]
        pipe.send_bytes(encoding.encode(worker.answer(request, partial(os.pread, board, length, offset))))
