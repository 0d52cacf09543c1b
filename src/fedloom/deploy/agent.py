"""A client between machines: takes part in the run that its server offers, until that is over."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from fedloom._version import __version__
from fedloom.deploy.config import ClientConfig, address
from fedloom.deploy.line import LONGEST, Line, SessionOver, Withdrawn
from fedloom.deploy.models import Models
from fedloom.deploy.offer import accepted, network_of
from fedloom.deploy.outbox import AGAIN, Outbox
from fedloom.deploy.own import task_of
from fedloom.deploy.parcels import Parcels
from fedloom.deploy.proxy import Proxy
from fedloom.deploy.tls import client_context
from fedloom.determinism import make_reproducible
from fedloom.engines import heap, wired
from fedloom.engines.seat import SMALL, Body, Forgotten, Seat
from fedloom.errors import CodecError, RunError, UsageError
from fedloom.runs.fitted import Fitted, device_named
from fedloom.runs.personal import personalises
from fedloom.runs.writing import disk, hold, write_aside
from fedloom.tasks._apart import AtClient, registration

log = logging.getLogger("fedloom.client")

BLOBS = 8  # parts of messages that are kept, the last ones: what is sent again need not travel again


class Watch(Protocol):
    """Is told what a client does, for people."""

    def __call__(self, what: str, round: int | None = None, rounds: int | None = None) -> None: ...


class Agent:
    """Takes part in one run after the other, as its settings say; `watch` hears what it does."""

    def __init__(self, config: ClientConfig, watch: Watch) -> None:
        self.config, self.watch = config, watch
        self.folder = config.folder / config.state
        with disk(self.folder, again=AGAIN):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        context = client_context(config.folder / config.certificates)
        self.model: Path | None = None  # the folder of its own model, when the run is over
        at = address(config.server, "server")
        self.line = Line(at, context, config.server_name, Proxy.of(config.proxy, at[0]))

    def run(self) -> None:
        """Takes part until the run is over, however often the server is started again in between."""
        run, seat = b"", None
        with contextlib.closing(self.line), hold(self.folder):
            while True:
                try:
                    self.watch(f"dialling {self.line.place}")
                    self.line.verify()
                    told = self._hello()
                    self.line.longest = min(LONGEST, told["lease"] / 4)  # the lease lives through a pause
                    if seat is None or told["run"] != run:
                        if told["over"]:
                            raise RunError(f"the run of the server at {self.line.place} is over")
                        seat, run = self._seat(told), told["run"]
                    elif not told["registered"]:
                        self._consent(seat)
                    with Beats(self.line, told["lease"] / 4) as self.beats:
                        self._work(seat, told["lease"])
                    self.watch("the run is over")
                    return
                except SessionOver as error:
                    log.info("%s", error)

    def leave(self) -> None:
        """Tells the server that this client does not come back."""
        with contextlib.closing(self.line):
            self.line.verify()
            self._hello()
            self.line.ask("/v1/beat", {"call": None, "leaves": True})

    def _hello(self) -> dict[str, Any]:
        """What the server offers, in a session that is on the disk before the server hears of it."""
        self.line.session = self._session()
        return self.line.ask("/v1/hello", {"fedloom": __version__, "session": self.line.session})

    def _session(self) -> str:
        """The key of the session with this server: by it a client that was killed goes on as the same one."""
        kept = self.folder / "session.json"
        with contextlib.suppress(OSError, ValueError, KeyError):
            found: dict[str, str] = json.loads(kept.read_text())
            return found[self.line.place]
        session = secrets.token_hex(16)
        text = json.dumps({self.line.place: session})
        with disk(self.folder, again=AGAIN):
            write_aside(kept, lambda file: file.write(text.encode()), private=True)
        return session

    def _seat(self, told: dict[str, Any]) -> Seat:
        """The client of this run; where it does not take part it tells the server so, and raises why.

        What is wrong with its data is said here alone: the sentence may have values, names of files and the like.
        """
        why = "it does not follow the server's offer"
        try:
            self.watch("reading the data")
            try:
                spec, method = accepted(told["offer"], self._methods())
            except UsageError as error:
                why = str(error)
                raise
            why = "its data, or its device, do not fit this run; its own terminal says why"
            device = device_named(self.config.device)
            make_reproducible(device, self.config.threads)
            heap.keep()
            task = task_of(self.config, spec, told["offer"], told["number"])
            fitted = Fitted(replace(spec, device=device), task, method)
            site = fitted.site_of(AtClient(fitted.task, told["number"]), fitted.stages())
        except (UsageError, CodecError):
            self.line.ask("/v1/consent", {"accepts": False, "why": why, "registration": None})
            raise
        self.rounds = spec.rounds
        run = self.folder / told["run"].hex()
        self.parts = Parcels(run / "parts", AGAIN)
        self.parts.drop_doubtful()
        self.held: list[bytes] = sorted(self.parts.names(), key=lambda name: self.parts.path(name).stat().st_mtime)
        self.outbox = Outbox(run)
        seat = Seat(told["number"], fitted.method, site, self.outbox)
        self.models = Models(run, fitted.method, site.task)
        if personalises(fitted.method) and not spec.blind:
            seat.judged = self.models.keep
        self._consent(seat)
        return seat

    def _consent(self, seat: Seat) -> None:
        """Takes part: tells the server what it must know of the data, and of the network made here."""
        own = registration(seat.site.task, seat.client) | network_of(seat.site)
        self.line.ask("/v1/consent", {"accepts": True, "why": "", "registration": own})

    def _methods(self) -> dict[str, Path]:
        return {name: self.config.folder / file for name, file in self.config.methods.items()}

    def _work(self, seat: Seat, lease: float) -> None:
        """Answers calls until the run is over."""
        wait, answer = min(25.0, lease / 2), None
        while True:
            try:
                if answer is None:
                    self.watch("waiting")
                told, answer = self.line.work(wait, answer), None
                if told is None:
                    continue
                if told.get("over"):
                    self._tidy(told["note"])
                    return
                id, body = self._answered(seat, told)
                if len(body) <= SMALL:
                    answer = id, bytes(body)
                    continue
                del body  # it is in the outbox
                self.watch("sending")
                with self.beats.during(id):
                    self.line.deliver(id, self.outbox.answers)
            except Withdrawn as error:
                log.info("%s", error)

    def _tidy(self, note: dict[str, Any]) -> None:
        """Drops what nobody will ask for again; the states stay that the run has ended with."""
        if "round" in note:
            self.outbox.forget(note["round"], note["keep"])
        self.model = self.models.end(note.get("judged", {}))
        for name in self.held:
            self.parts.drop(name)

    def _answered(self, seat: Seat, told: dict[str, Any]) -> tuple[bytes, Body]:
        """The id of a call, and its answer."""
        head, note = told["head"], told["note"]
        id, asked = wired.name_of(head), wired.decode(head)
        kind, round, _ = asked["at"]
        self.watch(f"{asked['function']} ({kind})", round, self.rounds)
        if rounds := note.get("judged"):
            self.models.forget(round, rounds)
        with self.beats.during(id):
            try:
                return id, seat.answer(head, self._part, note)
            except Forgotten as error:
                log.warning("%s", error)
                return id, wired.failed(type(error).__name__)

    def _part(self, name: bytes) -> bytes | memoryview:
        """Part of a message: of those that are here, or from the server."""
        if name not in self.parts:
            self.line.fetch(name, self.parts)
        data = self.parts.read(name)
        self.held = [*(one for one in self.held if one != name), name]
        while len(self.held) > BLOBS:
            self.parts.drop(self.held.pop(0))
        return data


class Beats:
    """Signs of life while something takes its time: one every so many seconds, from a thread of its own."""

    def __init__(self, line: Line, every: float) -> None:
        self.line, self.every = line, every
        self.call: bytes | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="beats", daemon=True)

    def __enter__(self) -> Beats:
        self.thread.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self.over.set()
        self.thread.join(1.0)

    @contextlib.contextmanager
    def during(self, call: bytes) -> Iterator[None]:
        """Beats for a call inside the block."""
        self.call = call
        try:
            yield
        finally:
            self.call = None

    def _beat(self) -> None:
        while not self.over.wait(self.every):
            if (call := self.call) is not None:
                with contextlib.suppress(RuntimeError, SessionOver, Withdrawn, ValueError, CancelledError):
                    self.line.ask("/v1/beat", {"call": call, "leaves": False}, patient=False)


def silent(what: str, round: int | None = None, rounds: int | None = None) -> None:
    """Watches nothing."""
