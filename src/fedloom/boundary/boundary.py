"""The one place where messages pass between the server and the clients: what a cohort's verbs are made of.

What may happen to a message happens here: it is counted, a client stays silent, a reply is lost, and whatever else
the stages of the run do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from fedloom import encoding, message
from fedloom.boundary import once
from fedloom.boundary.arrivals import Arrivals
from fedloom.boundary.averages import Averages
from fedloom.boundary.books import Books
from fedloom.boundary.pending import PendingWork
from fedloom.boundary.pipeline import Pipeline
from fedloom.boundary.registration import register
from fedloom.calls import Call
from fedloom.cohort import ByGroup, Cohort, Each, Mean, Replies, Reply
from fedloom.errors import UsageError
from fedloom.method import Method, is_client_function, paced
from fedloom.plugin import held_along, weights_in_means
from fedloom.site import Site
from fedloom.world import World
from fedloom.world import clock as clocks

if TYPE_CHECKING:
    from fedloom.engines.base import Engine
    from fedloom.node import Server


class Boundary:
    """Carries the calls of one experiment through the world and the engine, and keeps the books."""

    def __init__(
        self,
        method: Method,
        site: Site,
        world: World,
        engine: Engine,
        pipeline: Pipeline | None = None,
        pace: Callable[[int], float] | None = None,
    ) -> None:
        self.method = method
        self.pace = pace  # the factor on the method's learning rate in a round; None: always 1
        self.site = site
        self.world = world
        self.pipeline = pipeline or Pipeline()
        for stage in self.pipeline.with_hook("check_network"):
            stage.check_network(site)
        self.clock = clocks.build(world.clock)
        self.books = Books(site, self.info)
        self.server: Server | None = None  # whose act it is
        self.arrivals = Arrivals(self.books, world, engine, self.pipeline, self.clock)
        self.pending = PendingWork(self.arrivals)

    @property
    def engine(self) -> Engine:
        """What carries a call to where the clients live."""
        return self.arrivals.engine

    @property
    def population(self) -> int:
        """How many clients there are."""
        return self.world.population

    @property
    def busy(self) -> set[int]:
        """The clients that have submitted work under way."""
        return self.pending.busy

    def begin(self, kind: str, round: int) -> None:
        """A new round, or another kind of traffic in it."""
        if self.pace:
            self.books.pace = self.pace(round)
        for stage in self.pipeline.with_hook("begin"):
            stage.begin(self.books)
        self.books.begin(kind, round, self.world.outcome_kinds if kind == "train" else ())

    def info(self, client: int) -> Mapping[str, Any]:
        """What a client registered."""
        profile = self.world.profile(client) if client < self.population else None  # a newcomer registers no device
        return {**self.site.task.info(client), **profile} if profile else self.site.task.info(client)

    def register(self) -> None:
        """What passes between the server and everybody once a run, before `setup`: see `registration`."""
        register(self.books, self.world, self.clock)

    @cached_property
    def doubtful(self) -> bool:
        """Whether a reply may fail to count: lost, late, surplus, turned away or rejected.

        What a client remembers is then kept when its reply counts, and only then, so that neither side moves without
        the other: a client whose reply did not count is as if it had not been asked. (Its next message can tell a real
        client whether its last reply counted.) Who owes no reply keeps what it did: in `exchange`, `tell`, `work`.
        """
        return bool(self.world.lost or self.world.selects_replies or self.pipeline.whole("train"))

    def prepare(
        self,
        verb: str,
        function: Callable[..., Any],
        clients: Iterable[int],
        msg: Mapping[str, Any],
        groups: Mapping[int, int | str] | None = None,
    ) -> Call:
        """A checked call: a client function of this method, and a message that every client addressed gets whole."""
        method = paced(self.method, self.books.pace)
        name = method.path_of(function) if is_client_function(function) else None
        if name is None:
            got = getattr(function, "__name__", function)
            raise UsageError(f"{verb} needs a function of the method marked @client, got {got}")
        asked, books = tuple(clients), self.books
        if self.busy and verb != "submit" and books.kind != "evaluate" and not self.busy.isdisjoint(asked):
            working = sorted(self.busy.intersection(asked))[:5]
            raise UsageError(f"{verb} to clients {working} that still work; use cohort.idle")
        msg = {**msg, **held_along(self.method, name, books.kind, verb, self.server)}
        for stage in self.pipeline.with_hook("hidden_fields", books.kind):
            msg = {**msg, **stage.hidden_fields(books, asked)}
        if groups is not None:
            groups = _grouped(f"{verb}({name}, groups=...)", groups, asked)
        shared: dict[str, Any] = {}
        own: dict[int, dict[str, Any]] = {}
        for field, value in msg.items():
            if isinstance(value, ByGroup):
                value = _by_client(f"{verb}({name}, {field}=ByGroup(...))", value, groups)
            if not isinstance(value, Each):
                shared[field] = value
            else:
                lacking = [client for client in asked if client not in value]
                if lacking:
                    raise UsageError(f"{verb}({name}, {field}=Each(...)) lacks the clients {lacking[:5]}")
                for client in asked:
                    own.setdefault(client, {})[field] = value[client]
        once.settle(shared, own, asked, self.engine.states)
        held = verb == "submit" or (books.kind == "train" and self.doubtful)
        asked_in = (books.kind, books.round, books.nth, held, books.version)
        call = Call(verb, name, asked, shared, own, *asked_in, groups=groups, pace=books.pace)
        for stage in self.pipeline.with_hook("check_call"):
            stage.check_call(call)
        books.nth += 1
        return call

    def carry(self, call: Call) -> Iterator[Reply]:
        """The replies that arrive, in the order of the call's clients."""
        arrivals, asked = self.arrivals, self.arrivals.ask(call)
        for arrival in arrivals.receive(asked, self.engine.run(call, asked.awake)):
            if arrival.counts or (call.verb == "exchange" and arrival.fate != "broken"):
                arrivals.keep(call, arrival.outcome)
            if arrival.counts:
                yield arrivals.reply(call, arrival.outcome, arrival.trip)

    def tell(self, call: Call) -> None:
        """Has a call done that nobody replies to. What a client did it keeps, unless it was broken off."""
        asked = self.arrivals.ask(call)
        for arrival in self.arrivals.receive(asked, self.engine.run(call, asked.awake)):
            if arrival.fate != "broken":
                self.arrivals.keep(call, arrival.outcome)

    def means(self, call: Call, weight: str | None) -> dict[int | str | None, Mean]:
        """The (weighted) mean of the replies of each group of which some count: without groups that of all, `None`.

        Raises NobodyReplied if none has any.
        """
        cohorts = (Cohort(part.clients, self) for part in call.parts.values())
        weights = weights_in_means(paced(self.method, call.pace), call, self.server, cohorts)
        averages = Averages.of(self.arrivals, call, weight, weights)
        for arrival in averages.coming:
            averages.add(arrival)
            del arrival  # what is summed is let go before the next reply is read
        return averages.means()

    def submit(self, call: Call) -> None:
        """Starts work on every client of a call."""
        if self.world.deadline:
            raise UsageError(
                f"deadline={self.world.deadline} is for rounds that wait for their clients, and "
                f"{self.method.name()} submits work without; leave it out, or give one to wait(k, deadline=...)"
            )
        self.pending.submit(call)

    def wait(self, k: int | None, seconds: float | None) -> Replies:
        """The next `k` pieces of submitted work that end (None: all), or those that do within so many seconds."""
        return self.pending.wait(k, seconds)

    def charge_edges(self, call: Call, reply: Reply, targets: Iterable[int]) -> float:
        """Bytes of a peer's message, once an edge. Returns the seconds in which they leave it, one after the other."""
        edges = [(reply.client, target) for target in targets]
        sizes = encoding.sizes(reply.fields)
        self.books.ledger.charge(self.books.round, call, "peer", edges, sizes)
        return reply.seconds + self.world.upload(reply.client, len(edges) * sum(sizes.values())) if edges else 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to know, beside the frames of the work under way."""
        return {
            "verbs": self.books.verbs,
            "memory": self.books.memory,
            "now": self.clock.now,
            "version": self.books.version,
            "there": self.world.reachable.state() if self.world.reachable else {},
            "tickets": self.pending.tickets,
            "flights": len(self.pending.waiting) + len(self.pending.queue),
        }

    def frames(self) -> Iterator[bytes]:
        """The work under way, a message for each piece."""
        return map(encoding.encode, self.pending.frames())

    def restore(self, state: Mapping[str, Any], frames: Iterator[dict[str, Any]]) -> None:
        """Takes up what `state` and `frames` gave."""
        self.pending.restore(islice(frames, state["flights"]), self.site.device)
        self.pending.tickets = state["tickets"]
        self.books.verbs = state["verbs"]
        self.books.memory = {part: message.moved(kept, self.site.device) for part, kept in state["memory"].items()}
        self.books.version = state["version"]
        self.clock.now = state["now"]
        if self.world.reachable:
            self.world.reachable.restore(message.moved(state["there"], torch.device("cpu")))


def _grouped(where: str, groups: Mapping[int, int | str], asked: Sequence[int]) -> dict[int, int | str]:
    """The groups of the clients asked, each of which has one; raises UsageError otherwise."""
    if not isinstance(groups, Mapping):
        raise UsageError(f"{where} got a {type(groups).__name__}; expected the group of each client, as in {{0: 'a'}}")
    if lacking := [client for client in asked if client not in groups]:
        raise UsageError(f"{where} lacks the clients {lacking[:5]}; every client asked belongs to one group")
    for client in asked:
        if not isinstance(groups[client], int | str):
            raise UsageError(f"{where}: client {client} is in {groups[client]!r}; a group is a whole number or a word")
    return {client: groups[client] for client in asked}


def _by_client(where: str, values: ByGroup, groups: Mapping[int, int | str] | None) -> Each:
    """An argument by group, for each client; raises UsageError if there are no groups, or one is not in it."""
    if groups is None:
        raise UsageError(f"{where}: only cohort.means has groups; take Each({{client: value}})")
    if lacking := [group for group in dict.fromkeys(groups.values()) if group not in values]:
        raise UsageError(f"{where} lacks the groups {lacking[:5]}")
    return Each({client: values[group] for client, group in groups.items()})
