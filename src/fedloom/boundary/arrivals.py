"""The one way by which messages go out and replies come in: sent, carried out, timed, booked and counted.

The verbs are folds over what arrives here: `call` and `stream` give it, `mean` sums it, `exchange` hands it on, and
`submit` and `wait` sort it by the moment of its end. By `tell` and `work` no reply comes: what arrives is that a client
is done.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fedloom import encoding, message
from fedloom.boundary.selection import Arrival, replies_needed, select_replies
from fedloom.calls import ASKED, SILENT, SUMMED, Call, Outcome
from fedloom.cohort import INBOX, Reply
from fedloom.engines.perform import decode_reply
from fedloom.world import Trip

if TYPE_CHECKING:
    from fedloom.boundary.books import Books
    from fedloom.boundary.pipeline import Pipeline
    from fedloom.boundary.stage import Groups
    from fedloom.engines.base import Engine
    from fedloom.world import World
    from fedloom.world.clock import Clock


log = logging.getLogger("fedloom.boundary")


class Sent(NamedTuple):
    """The bytes of a call's message: to every client alike, and to those that got one of their own."""

    alike: int
    own: dict[int, int]

    def to(self, client: int) -> int:
        """To one client."""
        return self.own.get(client, self.alike)


class Asked(NamedTuple):
    """A call whose message has gone out, and to what effect."""

    call: Call
    sent: Sent
    awake: Sequence[int]  # who will work
    lost: set[int]  # and of those, whose reply gets lost
    began: float


class Arrivals:
    """Carries the calls of one run through the world, the engine and the stages."""

    def __init__(self, books: Books, world: World, engine: Engine, pipeline: Pipeline, clock: Clock) -> None:
        self.books = books
        self.world = world
        self.engine = engine
        self.pipeline = pipeline
        self.clock = clock

    def ask(self, call: Call) -> Asked:
        """Sends a call's message, and sees whom it reaches."""
        return Asked(call, self._send(call), *self._fates(call), self.clock.now)

    def _send(self, call: Call) -> Sent:
        """Books the message to every client. What peers have sent one another is on the edges' account already."""
        sent: Sent | None = None
        if call.verb == "work":  # of what goes along, for the layers, clients keep the count themselves
            return Sent(0, {})
        for clients, sizes in self.pipeline.message_sizes(self.books, call, lambda: _plain(call)):
            self.books.ledger.charge(self.books.round, call, "down", clients, sizes)
            whole = sum(sizes.values())
            sent = sent or Sent(whole, {})
            for client in clients if len(call.own) or whole != sent.alike else ():
                inbox = call.own.get(client, {}).get(INBOX) if call.verb == "exchange" else None
                # What came from peers takes time to arrive.
                more = 0 if inbox is None else encoding.sizes({INBOX: inbox})[INBOX]
                if whole + more != sent.alike:
                    sent.own[client] = whole + more
        return sent or Sent(0, {})

    def _fates(self, call: Call) -> tuple[Sequence[int], set[int]]:
        """The clients that will work, and those of them whose reply gets lost."""
        if call.kind != "train" or call.verb == "work":
            return list(call.clients), set()
        key, world = (call.round, call.nth), self.world
        awake: Sequence[int] = call.clients
        if not world.has_failures:
            return awake, set()
        if world.reachable:
            mask = world.reachable.mask(self.books.round, self.clock.now)
            awake = [client for client in awake if mask[client]]
            self.books.notes["absent"] += len(call.clients) - len(awake)
        if world.dropout:
            awake = [client for client in awake if not world.silent(*key, client)]
        replying = [] if call.verb in SILENT or not world.lost else awake
        return awake, {client for client in replying if world.loses(*key, client)}

    def apply_stages(self, call: Call, outcomes: Iterable[Outcome]) -> Iterable[Outcome]:
        """What the stages make of the outcomes of a call on their way: of those that are on one."""
        for stage in () if call.verb in SILENT else self.pipeline.with_hook("outcomes", call.kind):
            outcomes = stage.outcomes(self.books, call, list(outcomes))
        return outcomes

    def receive(self, asked: Asked, outcomes: Iterable[Outcome]) -> Iterator[Arrival]:
        """What comes of a call, one client after the other, booked; the clock goes with it."""
        call, sent, awake, lost, began = asked
        world, picks, outcomes = self.world, self.selects(call), self.apply_stages(call, outcomes)

        def timed(outcome: Outcome) -> Arrival:
            trip = self._trip(call, sent, outcome, began)
            return Arrival(outcome, trip, "lost" if outcome.client in lost else "arrived")

        many = replies_needed(world, call, self.books.asked) if picks else len(call.clients)
        patience = self.world.deadline if picks and call.verb in SILENT else None
        heard: set[int] = set()
        gone = 2 * world.latency if len(awake) < len(call.clients) else 0.0  # a message could have gone to and fro
        for one in select_replies(world, call, self.books.asked, began, map(timed, outcomes)) if picks else outcomes:
            arrival = one if isinstance(one, Arrival) else timed(one)
            self.book_arrival(call, arrival.outcome.client, began, arrival.trip, arrival.fate, [arrival.outcome])
            if arrival.fate in ("lost", "broken"):
                gone = max(gone, arrival.trip.seconds)
            if arrival.fate == "arrived":
                heard.add(arrival.outcome.client)
                seconds = arrival.trip.seconds
                self._reach(call, began, seconds if patience is None else min(seconds, patience))
            yield arrival
            del arrival, one  # a reply is let go before the next one is read
        if len(heard) < many and call.verb not in SILENT:
            # Under a deadline the server waits until then for whoever is silent; without, it hears of a failure.
            self._reach(call, began, world.deadline if picks and world.deadline else gone)

    def selects(self, call: Call) -> bool:
        """Whether it is known only at the end of a call which replies the server takes."""
        return self.world.selects_replies and call.kind == "train"

    def book_arrival(
        self, call: Call, client: int, began: float, trip: Trip, fate: str, outcomes: Sequence[Outcome]
    ) -> Outcome | None:
        """Notes what became of a client's part in a call, and books what came of it; gives the outcome that counts."""
        books = self.books
        for stage in self.pipeline.with_hook("call_ended"):
            stage.call_ended(books, call, client, fate == "arrived")
        if call.kind != "evaluate":
            if fate in books.notes:
                books.notes[fate] += 1
            if self.world.has_timing or call.verb == "submit":
                books.timeline.note(books.round, call.function, client, began, trip, fate)
        if not self.engine.keeps_states and (turned := [outcome for outcome in outcomes if outcome.fault]):
            self._turned_away(call, turned)
        for outcome in outcomes:
            self._pay(call, outcome)
        if fate == "broken":
            books.steps += sum(outcome.steps for outcome in outcomes)
            return None
        for outcome in outcomes:
            self._book(call, outcome)
        good = next((outcome for outcome in outcomes if fate == "arrived" and not outcome.fault), None)
        if good is not None and call.verb not in SILENT:
            books.replies += 1
            books.came.append((client, books.version - call.version))
            books.submitted |= call.verb == "submit"
        return good

    def _turned_away(self, call: Call, outcomes: Sequence[Outcome]) -> None:
        """Counts what the engine has turned away, as faults are counted that a run plays."""
        notes = self.books.notes
        notes["fault/refused"] = notes.get("fault/refused", 0) + len(outcomes)
        for outcome in outcomes:
            log.warning("round %d, %s: client %d: %s", call.round, call.function, outcome.client, outcome.fault)

    def _pay(self, call: Call, outcome: Outcome) -> None:
        """Counts the labels that a client has asked for, and leaves it them, whether its reply counts or not.

        Whoever labelled the samples is to be paid, and it was the client, not the server, that was told.
        """
        self.books.labels += outcome.labels
        if outcome.labels and call.held:
            assert outcome.state is not None
            states = self.engine.states
            self.engine.keep(outcome.client, {**states.get(outcome.client, {}), ASKED: outcome.state[ASKED]})

    def keep(self, call: Call, outcome: Outcome) -> None:
        """What a client remembers from now on, its reply having counted."""
        if call.held:
            self.engine.keep(outcome.client, outcome.state)

    def reply(self, call: Call, outcome: Outcome, trip: Trip) -> Reply:
        """A reply as the method sees it."""
        fields = message.deliver(decode_reply(self.books.site, call, outcome))
        return Reply(outcome.client, fields, self.books.version - call.version, trip.seconds)

    def _book(self, call: Call, outcome: Outcome) -> None:
        """Writes down what a client logged, its steps, and the bytes of its reply."""
        books, new = self.books, True
        for name, number in outcome.logs.items():
            books.logs[name].append((outcome.client, number))
        books.steps += outcome.steps
        if (
            outcome.sizes
            and call.verb != "exchange"
            and not any(stage.books_replies(call) for stage in self.pipeline.with_hook("books_replies", call.kind))
        ):
            new = books.ledger.charge(books.round, call, "up", (outcome.client,), outcome.sizes)
        if call.kind == "evaluate":
            return
        for stage in self.pipeline.with_hook("reply_seen"):
            stage.reply_seen(books, call, outcome)
        if new:
            verb = "call" if self.engine.sees_replies and call.verb in SUMMED else call.verb
            for stage in self.pipeline.with_hook("reported_verb", call.kind):
                verb = stage.reported_verb(call)
            books.show(verb, call.function, outcome.sizes)

    def _trip(self, call: Call, sent: Sent, outcome: Outcome, began: float) -> Trip:
        """How long a client's part in a call took; peers hear of each other on the edges, at the edges' pace."""
        if call.kind == "evaluate":
            return Trip(0.0, 0.0, 0.0)
        if self.clock.real:
            return Trip(0.0, self.clock.now - began, 0.0)
        trip = self.world.trip(outcome.client, sent.to(outcome.client), outcome.steps, sum(outcome.sizes.values()))
        if call.verb == "work":
            trip = trip._replace(down=0.0)
        return trip._replace(up=0.0) if call.verb == "exchange" or call.verb in SILENT else trip

    def _reach(self, call: Call, began: float, seconds: float) -> None:
        """The server has waited for so long; evaluation takes no time."""
        if call.kind != "evaluate":
            self.clock.reach(began + seconds)


def _plain(call: Call) -> Groups:
    """The bytes of a message by field: to all that get what all get, and to each that gets something of its own."""
    sizes = encoding.sizes(call.shared)
    yield [client for client in call.clients if client not in call.own] if call.own else call.clients, sizes
    for client, own in call.own.items():
        if call.verb == "exchange":
            own = {field: value for field, value in own.items() if field != INBOX}
        alone = encoding.sizes(own)
        del alone["envelope"]
        yield [client], sizes | alone
