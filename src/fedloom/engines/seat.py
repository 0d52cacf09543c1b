"""A client where it lives: it answers calls that come as bytes, and what it remembers stays with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import Any, Protocol

from fedloom import message
from fedloom.calls import ASKED, ClientError
from fedloom.encoding import Pieces
from fedloom.engines import wired
from fedloom.engines.perform import perform, predicted
from fedloom.errors import RunError, UsageError
from fedloom.message import Value
from fedloom.method import Method
from fedloom.node import Client
from fedloom.site import Site

log = logging.getLogger("fedloom.client")

QUICK = 0.02  # seconds: an answer that took less, and left no state, is made again when it is asked for again
Body = bytes | memoryview | Pieces
SMALL = 1 << 16  # bytes of an answer that may travel with the question for more work


class Forgotten(RunError):
    """A state that the server names is not on the shelf."""


class Shelf(Protocol):
    """Where a client keeps its answers and its states, by the ids of the calls."""

    def answer(self, id: bytes) -> Body | None:
        """The answer to a call, if it was given before."""

    def state(self, id: bytes) -> bytes | memoryview:
        """The state that a call left; raises Forgotten where it is gone."""

    def put(self, id: bytes, round: int, answer: Pieces, state: Pieces | None) -> None:
        """Keeps both, or neither."""

    def forget(self, round: int, keep: Collection[bytes]) -> None:
        """Drops the answers of calls up to a round, and the states that they left but those to `keep`."""


class InMemory:
    """A shelf that is gone with its process."""

    def __init__(self) -> None:
        self.kept: dict[bytes, tuple[int, bytes | None, bytes | None]] = {}  # id -> round, answer, state

    def answer(self, id: bytes) -> bytes | None:
        return self.kept[id][1] if id in self.kept else None

    def state(self, id: bytes) -> bytes:
        found = self.kept[id][2] if id in self.kept else None
        if found is None:
            raise Forgotten("a state that the server names is not here")
        return found

    def put(self, id: bytes, round: int, answer: Pieces, state: Pieces | None) -> None:
        self.kept[id] = round, bytes(answer), None if state is None else bytes(state)

    def forget(self, round: int, keep: Collection[bytes]) -> None:
        for id, (when, _, state) in list(self.kept.items()):
            if when <= round and id in keep:
                self.kept[id] = when, None, state
            elif when <= round:
                del self.kept[id]


class Seat:
    """One client of a run, with a method and a site of its own making."""

    judged: Callable[[int, Client, Any], None] | None = None  # takes what it would use in a round

    def __init__(self, client: int, method: Method, site: Site, shelf: Shelf) -> None:
        self.client, self.method, self.site, self.shelf = client, method, site, shelf

    def answer(self, head: bytes, blob: Callable[[bytes], bytes | memoryview], note: dict[str, Any]) -> Body:
        """The answer to a call, the same for ever, however often it is asked.

        It is on the shelf before it is given, unless it is made again sooner than it is written.
        """
        id, told = wired.name_of(head), wired.decode(head)
        if "round" in note:
            kept = {one for one in (told["state"], told["labels"], id) if one}
            self.shelf.forget(note["round"], kept | {*note["keep"]})
        if (before := self.shelf.answer(id)) is not None:
            return before
        began = time.perf_counter()
        answer, state = self._worked(told, blob)
        if state is not None or len(answer) > SMALL or time.perf_counter() - began > QUICK:
            self.shelf.put(id, told["at"][1], answer, state)
        return answer

    def remembers(self, at: bytes | None, labels: bytes | None = None) -> dict[str, Value]:
        """The state that a call left; with the labels of another one, if those were paid for since."""
        state = self._read(at) if at else {}
        if labels and labels != at:
            state[ASKED] = self._read(labels)[ASKED]
        return state

    def _read(self, id: bytes) -> dict[str, Any]:
        held: Any = wired.decode(self.shelf.state(id))["state"]
        moved: dict[str, Any] = message.moved(held, self.site.device)
        return moved

    def _worked(self, told: dict[str, Any], blob: Callable[[bytes], Any]) -> tuple[Pieces, Pieces | None]:
        """The answer to a call, and the state that it leaves."""
        call, sent = wired.asked(told, blob)
        state = self.remembers(told["state"], told["labels"])
        try:
            msg = message.deliver(self.site.to_device(sent))
            outcome = perform(self.method, self.site, state, call, self.client, msg)
            if self.judged and call.kind == "evaluate" and call.function == "evaluate":
                before = self.remembers(told["state"], told["labels"])
                self.judged(call.round, *predicted(self.method, self.site, before, call, self.client, msg))
        except (ClientError, UsageError) as error:
            log.exception("%s", error)
            return wired.failed(type(error.__cause__ or error).__name__), None
        left = None if outcome.state is None or call.kind == "evaluate" else outcome.state
        return wired.answered(outcome), None if left is None else Pieces({"state": left})
