"""The engine whose clients are on machines of their own, and when it no longer waits for one."""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedloom.calls import Call, Outcome
from fedloom.deploy.hub import Hub, Registered
from fedloom.engines.remote import Answer, Remote
from fedloom.engines.wired import Key, Request
from fedloom.errors import RunError
from fedloom.runs.spec import Spec
from fedloom.task import Task


@dataclass(frozen=True)
class Patience:
    """When a call is over although not all have answered; in setup all are waited for."""

    deadline: float | None = None  # seconds after which it is, if `quorum` have answered
    quorum: int = 1  # replies without which it is not, deadline or not
    enough: float = 1.0  # share of those asked whose answers are enough
    most: float = math.inf  # seconds of silence of those without whom it is not, after which the run stops


class Network(Remote):
    """Asks the members of a hub."""

    def __init__(self, hub: Hub, run: bytes, patience: Patience) -> None:
        super().__init__()
        self.hub, self.name, self.patience = hub, run, patience
        self.waiting: dict[bytes, tuple[Request, float]] = {}  # what is under way, and since when
        self.known = 0  # clients that had registered when it was looked last
        self.newcomer: Callable[[], object] = lambda: None  # is told when another one has
        self.counts: dict[Key, int] = {}  # of calls under way: how many were asked

    def at_server(self, spec: Spec, task: Task) -> Task:
        self.registered = Registered(self.hub)
        return super().at_server(spec, task)

    def send(self, request: Request) -> None:
        self.waiting[request.id] = (request, time.monotonic())
        self.counts[request.key] = self.counts.get(request.key, 0) + 1
        self.hub.send(request)

    def run(self, call: Call, clients: Iterable[int]) -> Iterator[Outcome]:
        if len(self.registered) != self.known:
            self.known = len(self.registered)
            self.newcomer()
        yield from super().run(call, clients)
        self.hub.tidy({*self.waiting, *self.flying})

    def hear(self, patience: float | None = None) -> list[tuple[Request, Answer]]:
        until = math.inf if patience is None else time.monotonic() + patience
        while True:
            try:
                came = self.hub.arrived.get_nowait()  # what came in time counts, however late it is looked at
            except queue.Empty:
                if found := self._given_up():
                    return found
                left = min(until, self._next_deadline()) - time.monotonic()
                try:
                    came = self.hub.arrived.get(timeout=None if left == math.inf else max(0.0, left))
                except queue.Empty:
                    if time.monotonic() >= until:
                        return []
                    continue
            if came is not None and came.id in self.waiting:
                del self.waiting[came.id]
                return [(came, partial(self.hub.answer, came.id))]

    def saved(self, round: int, pending: Iterable[Outcome]) -> None:
        super().saved(round, pending)
        self.hub.drop(self.flying)

    def forgo(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.waiting.pop(request.id, None)
        self.hub.withdraw(requests)

    def stop(self) -> None:
        self.forgo([request for request, _ in self.waiting.values()])

    def _given_up(self) -> list[tuple[Request, Answer]]:
        """What nobody waits for any more, and why; raises RunError where the run cannot go on without it."""
        calls: dict[Key, list[Request]] = {}
        for request, _ in self.waiting.values():
            calls.setdefault(request.key, []).append(request)
        found = [(one, why) for key, its in calls.items() for one, why in self._missing(key, its)]
        if found:
            self.forgo([request for request, _ in found])
        for key in self.counts.keys() - {request.key for request, _ in self.waiting.values()}:
            del self.counts[key]
        return found

    def _missing(self, key: Key, unanswered: list[Request]) -> list[tuple[Request, Answer]]:
        """Whose answers to a call are not waited for, and why."""
        members, rule = self.hub.by_number, self.patience
        gone = [one for one in unanswered if members[one.client].left]
        silent = [one for one in unanswered if not members[one.client].live]
        if key[0] == "setup" or self.fates.settled:
            return self._waited_for(key, unanswered, needed=True)
        if len(gone) == len(unanswered):
            return [(one, "it has left") for one in gone]
        if unanswered[0].verb == "submit":
            there = sum(member.live for member in members)
            staying = sum(not member.left for member in members)
            if there >= min(rule.quorum, staying):
                return [(one, "it is silent") for one in silent]
            return self._waited_for(key, unanswered)
        answered = self.counts[key] - len(unanswered)
        late = rule.deadline is not None and time.monotonic() >= self.waiting[unanswered[0].id][1] + rule.deadline
        enough = answered >= math.ceil(rule.enough * self.counts[key] - 1e-9)
        if answered < rule.quorum or not (late or enough or len(silent) == len(unanswered)):
            return self._waited_for(key, unanswered)
        return [(one, "it is silent" if one in silent else "it is late") for one in unanswered]

    def _waited_for(self, key: Key, unanswered: list[Request], needed: bool = False) -> list[tuple[Request, Answer]]:
        """Nobody is missing yet; raises RunError where all were silent for too long, or one left that is `needed`."""
        members = [self.hub.by_number[one.client] for one in unanswered]
        what = f"the run cannot go on without an answer to {unanswered[0].function} ({key[0]}, round {key[1]})"
        gone = [one.name for one in members if one.left]
        if needed and gone and unanswered[0].verb != "submit":  # of submitted work, another may be next
            raise RunError(f"{', '.join(gone)} left, and {what}; start what left again, then this server")
        if all(not one.live and time.monotonic() >= one.until + self.patience.most for one in members):
            raise RunError(
                f"{', '.join(one.name for one in members)} gave no sign of life for {self.patience.most:g} seconds "
                f"(rounds.patience), and {what}; start this server again when they are back"
            )
        return []

    def _next_deadline(self) -> float:
        """When the next of the calls under way has lasted as long as it may, or a client was silent for too long."""
        now, rule = time.monotonic(), self.patience
        ends = [began + rule.deadline for _, began in self.waiting.values()] if rule.deadline is not None else []
        ends += [self.hub.by_number[request.client].until + rule.most for request, _ in self.waiting.values()]
        return min((end for end in ends if end > now), default=math.inf)

    def manifest(self) -> Mapping[str, Any]:
        """Who takes part, and the bytes of messages that went up and down; `wire_` with those of HTTP and TLS."""
        told = [
            {
                "name": m.name,
                "number": m.number,
                "up": m.up,
                "down": m.down,
                "wire_up": m.wire.up,
                "wire_down": m.wire.down,
            }
            for m in self.hub.by_number
        ]
        return {"network": told}
