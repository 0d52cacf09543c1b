"""Clients that live elsewhere: bytes alone go to them and come back, and what they remember stays with them."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar

from fedloom.calls import ASKED, SILENT, Call, Outcome
from fedloom.engines import wired
from fedloom.engines.base import Engine
from fedloom.engines.forms import find_strange, form_of
from fedloom.engines.perform import check_reply, decode_reply
from fedloom.engines.wired import Key, Request
from fedloom.errors import CodecError, RunError, UsageError
from fedloom.message import Value
from fedloom.method import Method
from fedloom.runs.spec import Spec
from fedloom.site import Site
from fedloom.task import Task
from fedloom.tasks._apart import AtServer

NO_FORM = "run it with engine=serial, pool or ray, where all clients are on machines of one owner"
REFUSED = {
    "dp": "the noise would come from the run's seed, which every side is told, so that any of them could take it away "
    "again; leave it out until noise is drawn where it protects",
    "secure": "the server would mask the sums itself, and sees every reply here, so that nothing would be hidden from "
    "it; leave it out until clients make the masks",
    "channel": "it plays a noisy channel, and here is a real one; leave it out",
    "attack": "it plays malicious clients, and here are real ones; leave it out",
    "faults": "it plays faults on the way, and here real ones happen; leave it out",
}
TOLD = {"reply": dict, "logs": dict, "steps": int, "labels": int, "changed": bool, "once": dict, "asked": bool}

# What came of a request: what gives the bytes of its answer, or why there is none.
Answer = Callable[[], bytes | memoryview] | str


class Fates:
    """Who was heard in which call, in the order of the server's steps; here nobody writes it down."""

    settled = False  # whether what comes next was settled before, as in a run that is carried out again

    def heard(self, key: Key) -> list[int] | None:
        """Who was heard in the next call of a run that is carried out again; None: that is still open."""
        return None

    def landed(self) -> tuple[Key, int, bool] | None:
        """Whose work ended next in a run that is carried out again, and whether it counts; None: still open."""
        return None

    def note_heard(self, key: Key, clients: list[int]) -> None:
        """A call is over."""

    def note_landed(self, key: Key, client: int, counts: bool) -> None:
        """Submitted work is over."""

    def note_saved(self, round: int) -> None:
        """All before is in a checkpoint that is about to be written."""


class Remote(Engine):
    """Asks clients by bytes; `send` and `hear` are how these travel. Results are bitwise those of `serial`.

    In the place of each client's state the server has a reference to it. A client that fails, or whose answer is none,
    is turned away; one that does not answer is missing. Answers are looked at as they come, and read again one after
    the other when their turn in the call has come, so that one reply at a time is in memory.
    """

    keeps_states: ClassVar[bool] = False
    sees_replies: ClassVar[bool] = True

    name: bytes  # of the run
    registered: Mapping[int, Mapping[str, Any]]  # by client, what it told of its data

    def __init__(self, workers: int = 0, threads: int = 1) -> None:
        super().__init__(workers, threads)
        self.fates = Fates()
        self.rounds: dict[str, int] = {}  # which round's models are the `chosen` and the `last`

    @abstractmethod
    def send(self, request: Request) -> None:
        """Sends a request and returns at once."""

    @abstractmethod
    def hear(self, patience: float | None = None) -> list[tuple[Request, Answer]]:
        """Waits until something came of requests; empty if nothing did within `patience` seconds."""

    def forgo(self, requests: Sequence[Request]) -> None:
        """Nobody waits for what comes of these."""

    def at_server(self, spec: Spec, task: Task) -> Task:
        check(spec)
        return AtServer(task, self.registered)

    def start(self, method: Method, site: Site, states: MutableMapping[int, dict[str, Value]]) -> None:
        has_form(method)
        super().start(method, site, states)
        self.forms: dict[str, dict[str, Any]] = {}  # by function, the form that replies had
        self.flying: dict[bytes, tuple[Call, Request]] = {}  # launched work, by id
        self.landings: deque[tuple[Request, Answer]] = deque()  # that came and were not taken yet
        self.marks: dict[int, dict[str, Any]] = {}  # by client, what is in the last checkpoint

    def run(self, call: Call, clients: Iterable[int]) -> Iterator[Outcome]:
        key = wired.key_of(call)
        asked, known = list(clients), self.fates.heard(key)
        waiting = self._requests(call, asked if known is None else [client for client in asked if client in known])
        answers, forms, refused = dict[int, Answer](), dict[int, dict[str, str]](), dict[int, str]()
        for request in waiting.values():
            self.send(request)
        while len(answers) < len(waiting):
            for request, answer in self.hear():
                if waiting.get(request.client) is not request:
                    self._set_aside(request, answer)
                    continue
                answers[request.client] = answer
                if not isinstance(answer, str):
                    outcome, form = self._looked_at(call, request, answer)
                    forms[request.client] = form
                    if outcome.fault:
                        refused[request.client] = outcome.fault
                    del outcome  # and the reply with it, which is read again when its turn has come
        for part in call.parts.values():
            its = {client: forms[client] for client in part.clients if client in forms}
            refused |= find_strange(part, its, False, self.forms.setdefault(part.place, {}))
        if refused and call.kind == "setup":
            told = "; ".join(f"client {client}: {why}" for client, why in sorted(refused.items()))
            raise RunError(f"{call.function} needs an answer of each client before the first round: {told}")
        self.fates.note_heard(key, [client for client in waiting if client in forms and client not in refused])
        for client, request in waiting.items():
            if client in refused:
                yield turned_away(client, refused[client])
            elif not isinstance(answer := answers.pop(client), str):
                outcome = self._outcome(call, request, answer)
                self.commit(call, outcome)
                yield outcome
                del outcome

    def launch(self, call: Call, clients: Iterable[int]) -> None:
        for request in self._requests(call, clients).values():
            self.flying[request.id] = call, request
            self.send(request)

    def land(self, patience: float | None = None) -> tuple[Call, Outcome] | None:
        until = None if patience is None else time.monotonic() + patience
        known = self.fates.landed()
        while self.flying:
            if known is not None and not known[2]:  # nobody waits for what did not count
                return self._forgone(*known[:2])
            for request, answer in list(self.landings):
                if known is None or (request.key, request.client) == known[:2]:
                    self.landings.remove((request, answer))
                    return self._landed(request, answer, known is None or known[2])
            left = None if until is None or known else until - time.monotonic()
            if left is not None and left <= 0:
                return None
            for request, answer in self.hear(left):
                self._set_aside(request, answer)
        return None

    def _forgone(self, key: Key, client: int) -> tuple[Call, Outcome]:
        """Work that ended without counting, in a run that is carried out again."""
        request = next(one for _, one in self.flying.values() if (one.key, one.client) == (key, client))
        self.landings = deque(pair for pair in self.landings if pair[0] is not request)
        self.forgo([request])
        return self._landed(request, "it did not count", False)

    def _landed(self, request: Request, answer: Answer, counts: bool) -> tuple[Call, Outcome]:
        call, _ = self.flying.pop(request.id)
        if isinstance(answer, str) or not counts:
            outcome = turned_away(request.client, answer if isinstance(answer, str) else "it did not count")
        else:
            outcome, form = self._looked_at(call, request, answer)
            before = self.forms.setdefault(call.place, {})
            if not outcome.fault and (why := find_strange(call, {request.client: form}, False, before)):
                outcome = turned_away(request.client, why[request.client])
        self.fates.note_landed(request.key, request.client, not outcome.fault)
        return call, outcome

    def _set_aside(self, request: Request, answer: Answer) -> None:
        """Keeps what came of launched work; what came of calls that are over is of no use."""
        if request.id in self.flying:
            self.landings.append((request, answer))

    def saving(self, round: int) -> None:
        # Before the checkpoint: a kill in between leaves a mark that nobody asks for, and not a checkpoint without one.
        self.fates.note_saved(round)

    def saved(self, round: int, pending: Iterable[Outcome]) -> None:
        keep: dict[int, set[bytes]] = {client: _ids(self.states[client]) for client in self.states}
        for outcome in pending:
            keep.setdefault(outcome.client, set()).update(_ids(outcome.state or {}))
        for _, request in self.flying.values():
            keep.setdefault(request.client, set()).add(request.id)
        everybody = {*self.registered, *keep}
        self.marks = {client: {"round": round, "keep": sorted(keep.get(client, ()))} for client in everybody}

    def judged(self, which: Iterable[str], round: int) -> None:
        self.rounds |= dict.fromkeys(which, round)

    @property
    def notes(self) -> dict[int, dict[str, Any]]:
        """By client, what it may forget."""
        return self._notes({*self.registered, *self.marks})

    def _notes(self, clients: Iterable[int]) -> dict[int, dict[str, Any]]:
        """What is in the last checkpoint, and which models are no more wanted."""
        told: dict[str, Any] = {"judged": dict(self.rounds)} if self.rounds else {}
        return {client: self.marks.get(client, {}) | told for client in clients}

    def _requests(self, call: Call, clients: Iterable[int]) -> dict[int, Request]:
        asked = [*clients]
        return wired.requests(self.name, call, asked, self.states, self._notes(asked))

    def _looked_at(
        self, call: Call, request: Request, answer: Callable[[], bytes | memoryview]
    ) -> tuple[Outcome, dict[str, str]]:
        """What came of a request, and the form of its reply; with a fault, and no form, if it must not be taken."""
        outcome = self._outcome(call, request, answer)
        try:
            return outcome, {} if outcome.fault else form_of(call, decode_reply(self.site, call, outcome))
        except (CodecError, ValueError, TypeError, KeyError, RuntimeError) as error:
            return turned_away(request.client, str(error)), {}

    def _outcome(self, call: Call, request: Request, answer: Callable[[], bytes | memoryview]) -> Outcome:
        """What came of a request, with a fault if the server must not take it."""
        client = request.client
        try:
            told = wired.decode(answer())
            if told.get("fault") is not None:
                return turned_away(client, f"its function failed ({str(told['fault'])[:80]})")
            for name, kind in TOLD.items():
                if type(told[name]) is not kind:
                    raise TypeError(f"{name} in its answer is of the type {type(told[name]).__name__}")
            if told["steps"] < 0 or told["labels"] < 0 or not all(type(n) is float for n in told["logs"].values()):
                raise ValueError("its answer counts, or logs, what is no number")
            if told["reply"] and call.verb in SILENT:
                raise ValueError(f"it replied to {call.function}, where nothing comes back")
            sizes = {} if call.verb in SILENT else check_reply(told["reply"])
        except (CodecError, ValueError, TypeError, KeyError) as error:
            return turned_away(client, str(error))
        logs = {name: number for name, number in told["logs"].items() if math.isfinite(number)}
        reply, state = self.site.to_device(told["reply"]), wired.reference(request.id, told)
        return Outcome(client, reply, sizes, logs, told["steps"], state, labels=told["labels"])


def check(spec: Spec) -> None:
    """Raises UsageError for a setting that means nothing, or promises too much, where clients are elsewhere."""
    for setting, why in REFUSED.items():
        if value := getattr(spec, setting):
            raise UsageError(f"{setting}={value} does not go with clients on machines of their own: {why}")


def has_form(method: Method) -> None:
    """Raises UsageError for a method that has no form for clients on machines of their own."""
    if any(call.verb == "exchange" for call in method.plan):
        raise UsageError(f"{method.name()} has no network form yet: its clients send each other messages; {NO_FORM}")
    if any("vertical" in one.needs for one in method.nested):
        raise UsageError(
            f"{method.name()} has no network form yet: its clients hold columns of the same samples; {NO_FORM}"
        )


def turned_away(client: int, why: str) -> Outcome:
    """What came of a request whose answer the server does not take."""
    return Outcome(client, {}, {}, {}, 0, None, fault=why)


def _ids(state: Mapping[str, Any]) -> set[bytes]:
    """The states that a reference names."""
    return {state[name] for name in (wired.AT, ASKED) if name in state}
