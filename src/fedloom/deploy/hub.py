"""Who takes part, what each is to do next, and what has come of it: what the server's two threads have in common.

The run's thread gives requests and takes what came of them. The other one has the connections (`listening`). Nothing of
a method or a model is known here.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.deploy.counted import Crossed
from fedloom.deploy.parcels import Parcels
from fedloom.encoding import Pieces
from fedloom.engines import wired
from fedloom.engines.wired import Request
from fedloom.errors import TakenError

log = logging.getLogger("fedloom.server")

IN_MEMORY = 4096  # bytes of an answer that is kept without a file: should it be lost, its client makes it again


@dataclass(eq=False)
class Member:
    """A client as the server knows it."""

    name: str
    number: int
    session: str = ""
    until: float = 0.0  # the end of its lease
    registered: dict[str, Any] | None = None
    declined: str | None = None  # why it does not take part
    left: bool = False  # it has said that it does not come back
    told: bool = False  # that the run is over
    open: OrderedDict[bytes, Request] = field(default_factory=OrderedDict)  # what it is to do, the oldest first
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    up: int = 0  # bytes that came from it, and went to it, without those of TLS and HTTP
    down: int = 0
    wire: Crossed = field(default_factory=Crossed)  # with those, over all of its connections

    @property
    def live(self) -> bool:
        """Whether it gave a sign of life within its lease."""
        return time.monotonic() < self.until


class Hub:
    """The members of a run, and what is under way.

    `arrived` gives what came, in the order in which it did: a request whose answer is in the `inbox`, or None, when a
    member came, left or fell silent.
    """

    def __init__(self, names: Sequence[str], lease: float) -> None:
        self.members = {name: Member(name, number) for number, name in enumerate(names)}
        self.by_number = [*self.members.values()]
        self.lease = lease
        self.blobs: dict[bytes, Pieces] = {}
        self.awaited = Counter[bytes]()  # of each blob, how many open requests have it
        self.arrived: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.small: dict[bytes, bytes] = {}  # answers of a few kilobytes, which need no file
        self.inbox: Parcels | None = None  # answers that came, until a checkpoint has what was made of them
        self.over = False
        self.last: Mapping[int, Mapping[str, Any]] = {}  # by member, what it may forget when the run is over
        self.soon: Callable[..., object] = lambda what, *about: what(*about)  # has something done in the other thread

    # -- for the run's thread

    def open_inbox(self, folder: Path) -> None:
        """Takes answers in this folder, before the first request."""
        self.inbox = Parcels(folder, "the server goes on by itself")
        self.inbox.sweep()
        self.inbox.drop_doubtful()

    def expect(self) -> None:
        """Those that registered before the server was started again are waited for as if they had just been heard."""
        for member in self.by_number:
            if member.registered is not None:
                member.until = max(member.until, time.monotonic() + self.lease)

    def send(self, request: Request) -> None:
        """Gives a member something to do; an answer that is here already has arrived."""
        if self.has(request.id):
            self.arrived.put(request)
        else:
            self.soon(self._add, request)

    @property
    def opened(self) -> Parcels:
        """The inbox of a run that goes on."""
        assert self.inbox is not None
        return self.inbox

    def has(self, id: bytes) -> bool:
        """Whether the answer to a request is here."""
        return id in self.small or (self.inbox is not None and id in self.inbox)

    def answer(self, id: bytes) -> bytes | memoryview:
        """The answer to a request."""
        return self.small[id] if id in self.small else self.opened.read(id)

    def take(self, id: bytes, answer: bytes) -> None:
        """An answer that came in one piece."""
        if len(answer) <= IN_MEMORY:
            self.small[id] = answer
        else:
            self.opened.put(id, answer)

    def drop(self, keep: Collection[bytes]) -> None:
        """Drops all answers but those to `keep`: a checkpoint has what was made of them."""
        for id in [*self.opened.names()]:
            if id not in keep:
                self.opened.drop(id)

    def tidy(self, keep: Collection[bytes]) -> None:
        """Drops the small answers but those to `keep`: what was made of them is known."""
        for id in [*self.small]:  # at once: the other thread adds to it
            if id not in keep:
                self.small.pop(id, None)

    def withdraw(self, requests: Sequence[Request]) -> None:
        """Nobody waits for these any more."""
        self.soon(self._remove, requests)

    def finish(self, patience: float, last: Mapping[int, Mapping[str, Any]]) -> None:
        """The run is over: waits until all that are there have heard it, for so many seconds at most."""
        self.over, self.last = True, last
        for member in self.by_number:
            self.soon(member.wake.set)
        until = time.monotonic() + patience
        while time.monotonic() < until and any(member.live and not member.told for member in self.by_number):
            time.sleep(0.02)

    # -- for the thread of the connections

    def greet(self, member: Member, session: str) -> None:
        """A member says hello in a session of its choice; raises TakenError while it is there in another one."""
        if len(session) < 32:
            raise ValueError(f"a session of {len(session)} letters, which somebody could guess")
        if member.session and member.live and not secrets.compare_digest(session, member.session):
            raise TakenError(
                f"the client {member.name} is connected already, from elsewhere; stop that one, or wait "
                f"{member.until - time.monotonic():.0f} s until its lease has run out"
            )
        member.session, member.left = session, False
        self.sign(member)

    def sign(self, member: Member) -> None:
        """A sign of life."""
        fell = not member.live
        member.until = time.monotonic() + self.lease
        if fell:
            self.arrived.put(None)

    def register(self, member: Member, registration: dict[str, Any] | None, why: str = "") -> None:
        """A member takes part with these data, or says why it does not."""
        member.registered = registration or member.registered
        member.declined = None if registration else why
        self.arrived.put(None)

    def leave(self, member: Member) -> None:
        """A member says that it does not come back."""
        member.left, member.until = True, min(member.until, time.monotonic())
        self.arrived.put(None)

    def came(self, member: Member, id: bytes) -> None:
        """The answer to a request is in the inbox."""
        request = member.open[id]
        self._close(request)
        self.arrived.put(request)

    def refuse(self, member: Member, id: bytes, why: str) -> None:
        """The answer to a request is not taken: in its place is that it failed, and nobody waits for another."""
        log.warning("client %s: %s", member.name, why)
        self.take(id, bytes(wired.failed(why)))
        self.came(member, id)

    async def watch(self) -> None:
        """Tells the run's thread when somebody falls silent."""
        before: set[str] = set()
        while True:
            there = {member.name for member in self.by_number if member.live}
            for name in sorted(before - there):
                log.warning("client %s gave no sign of life for %g s", name, self.lease)
                self.arrived.put(None)
            before = there
            await asyncio.sleep(min(1.0, self.lease / 4))

    def _add(self, request: Request) -> None:
        member = self.by_number[request.client]
        if request.id not in member.open:
            member.open[request.id] = request
            self.blobs.update(request.blobs)
            self.awaited.update(request.blobs.keys())
        member.wake.set()

    def _remove(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._close(request)
            if self.inbox is not None:
                self.inbox.part(request.id).unlink(missing_ok=True)

    def _close(self, request: Request) -> None:
        """A member has no longer to do this; forgets the blobs that it was the last one to fetch."""
        if self.by_number[request.client].open.pop(request.id, None) is None:
            return
        for name in request.blobs:
            self.awaited[name] -= 1
            if not self.awaited[name]:
                del self.awaited[name], self.blobs[name]


class Registered(Mapping[int, Mapping[str, Any]]):
    """What members told of their data, by number: of all that have come so far."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        told = self.hub.by_number[number].registered if 0 <= number < len(self.hub.by_number) else None
        if told is None:
            raise KeyError(number)
        return told

    def __iter__(self) -> Iterator[int]:
        return (one.number for one in self.hub.by_number if one.registered is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)
