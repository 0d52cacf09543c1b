"""As between machines, on one: the clients live in a process of their own, which gets bytes and nothing else.

The server has no client's data; each client has its own alone, makes its method and its network itself, and keeps its
state. The process is started once and serves one run after the other.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fedloom import encoding
from fedloom.calls import ASKED
from fedloom.deploy.offer import accepted, offered
from fedloom.determinism import make_reproducible
from fedloom.engines import wired
from fedloom.engines.remote import Answer, Remote, has_form
from fedloom.engines.seat import InMemory, Seat
from fedloom.engines.wired import Request
from fedloom.errors import CodecError, RunError, UsageError
from fedloom.message import Value
from fedloom.method import build
from fedloom.registry import known_as
from fedloom.runs.fitted import Fitted
from fedloom.runs.spec import Spec
from fedloom.task import Task
from fedloom.tasks._apart import AtClient, registration


class Strict(Remote):
    """Carries calls to clients in another process. For tests: nothing that a method does outlives it unseen."""

    def at_server(self, spec: Spec, task: Task) -> Task:
        fields = {name: value for name, value in spec.method.items() if name != "name"}
        method = build(spec.method["name"], fields)
        has_form(method)
        self.name = os.urandom(8)
        offer = encoding.encode({"offer": offered(spec, method)})
        files = {one.name(): str(known_as(type(one))) for one in method.nested}
        own = {name: file for name, file in files.items() if file.endswith(".py")}
        self.host = _Host.running()
        told = self.host.ask({"do": "begin", "run": self.name, "offer": offer, "methods": own}, task, spec.device)
        self.registered = told["registered"]
        self.waiting: deque[Request] = deque()
        return super().at_server(spec, task)

    def send(self, request: Request) -> None:
        self.waiting.append(request)

    def hear(self, patience: float | None = None) -> list[tuple[Request, Answer]]:
        request = self.waiting.popleft()
        blobs = {blob.hex(): bytes(data) for blob, data in request.blobs.items()}
        told = self.host.ask(
            {"do": "call", "run": self.name, "head": request.head, "note": dict(request.note), "blobs": blobs}
        )
        answer: bytes = told["answer"]
        return [(request, lambda: answer)]

    def remembered(self) -> dict[int, dict[str, Value]]:
        """What every client remembers, by the server's references; the process says what it never would to a server."""
        asked = {client: dict(state) for client, state in self.states.items()}
        told: dict[int, dict[str, Value]] = self.host.ask({"do": "reveal", "run": self.name, "states": asked})["states"]
        return told

    def stop(self) -> None:
        """The run's clients are kept, so that a test may look at them, until the next run begins."""


class _Host:
    """The process in which clients live, as the server's process sees it."""

    there: _Host | None = None

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.owner, self.ways = os.getpid(), list(sys.path)  # on which packages are found, also those added since
        atexit.register(self.pipe.close)

    @staticmethod
    def running() -> _Host:
        """The one of this process."""
        there = _Host.there
        if there is not None and there.owner == os.getpid() and there.ways != sys.path:
            there.pipe.close()
            there.process.join()
        if there is None or there.owner != os.getpid() or not there.process.is_alive():
            there = _Host.there = _Host()
        return there

    def ask(self, request: Mapping[str, Any], *given: Any) -> dict[str, Any]:
        """The answer to a request; `given` is what an operator would have put there by other ways than the network."""
        try:
            self.pipe.send_bytes(encoding.encode(request))
            if given:
                self.pipe.send(given)
            answer = wired.decode(self.pipe.recv_bytes())
        except (EOFError, OSError) as error:
            raise RunError("the process of the clients died; it may have printed why") from error
        if "error" in answer:
            raise (UsageError if answer["usage"] else RunError)(answer["error"])
        return answer


def _serve(pipe: Connection) -> None:
    """The life of the process: until its parent closes the pipe, or is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    seats: dict[int, Seat] = {}
    run = b""
    while True:
        try:
            request = wired.decode(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        answer: dict[str, Value]
        try:
            if request["do"] == "begin":
                run, seats = request["run"], _seats(request, *pipe.recv())
                answer = {"registered": {k: registration(seat.site.task, k) for k, seat in seats.items()}}
            elif request["run"] != run:
                raise RunError("another run has begun in the process of the clients")
            elif request["do"] == "call":
                blobs = {bytes.fromhex(name): data for name, data in request["blobs"].items()}
                seat = seats[wired.decode(request["head"])["client"]]
                answer = {"answer": bytes(seat.answer(request["head"], blobs.__getitem__, request["note"]))}
            else:
                states = {k: (its.get(wired.AT), its.get(ASKED)) for k, its in request["states"].items()}
                answer = {"states": {k: seats[k].remembers(*its) for k, its in states.items()}}
        except (UsageError, RunError, CodecError) as error:
            answer = {"error": str(error), "usage": isinstance(error, UsageError)}
        pipe.send_bytes(encoding.encode(answer))


def _seats(request: Mapping[str, Any], task: Task, device: str) -> dict[int, Seat]:
    """The clients of a run, each with what it has of its own."""
    files = {name: Path(file) for name, file in request["methods"].items()}
    spec, method = accepted(wired.decode(request["offer"])["offer"], files)
    make_reproducible(device, 1)
    fitted = Fitted(spec, task, method)
    pipeline = fitted.stages()
    everybody = range(fitted.task.population + fitted.task.newcomers)
    sites = {k: fitted.site_of(AtClient(fitted.task, k), pipeline) for k in everybody}
    return {k: Seat(k, fitted.method, site, InMemory()) for k, site in sites.items()}
