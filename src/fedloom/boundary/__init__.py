"""The one place where messages pass between the server and the clients.

What may happen to a message happens here: it is counted, a client stays silent, a reply is lost, and whatever else
stands on its passage.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

from fedloom import encoding, message
from fedloom.boundary.cache import Cache
from fedloom.boundary.flight import Flights, Sent
from fedloom.boundary.meter import Ledger
from fedloom.boundary.passage import Passage
from fedloom.boundary.pick import picked, wanted
from fedloom.boundary.timeline import Timeline
from fedloom.cohort import INBOX, Each, Mean, NobodyReplied, Reply
from fedloom.engines import Call, Engine, Outcome, received
from fedloom.errors import UsageError
from fedloom.mean import Sum, Tree, parted
from fedloom.method import Method, is_client_function
from fedloom.node import Client
from fedloom.random import seeded, stream
from fedloom.site import Site
from fedloom.world import Trip, World
from fedloom.world import clock as clocks

if TYPE_CHECKING:
    from fedloom.aggregators import Rule

TRUSTED = -1  # the number of the client that the server plays on its own data


class Boundary:
    """Carries the calls of one experiment through the world and the engine, and keeps the books."""

    def __init__(
        self, method: Method, site: Site, world: World, engine: Engine, passage: Passage | None = None
    ) -> None:
        self.method = method
        self.site = site
        self.task = site.task
        self.world = world
        self.engine = engine
        self.passage = passage or Passage()
        if self.passage.privacy:
            self.passage.privacy.vet(site)
        self.ledger = Ledger()
        self.memory: dict[str, dict[str, Any]] = {}  # what parts of the passage keep from round to round: messages
        self.verbs: dict[str, dict[str, Any]] = {}  # function -> what the server learns from it
        self.shown: set[tuple[str, ...]] = set()  # verb, function and fields that are in `verbs` already
        self.clock = clocks.build(world.clock)
        self.version = 0  # how often the model has moved
        self.flights = Flights(self)
        self.cache = Cache(self) if self.passage.cache else None
        self.timeline = Timeline()
        self.begin("setup", 0)

    def begin(self, kind: str, round: int) -> None:
        """A new round, or another kind of traffic in it."""
        if self.cache:
            self.cache.begin()
        self.kind, self.round, self.nth = kind, round, 0
        self.logs = defaultdict[str, list[tuple[int, float]]](list)  # name -> (client, number)
        self.notes: dict[str, float] = {}  # numbers for the round's record
        self.judged: dict[int, float] = {}  # client -> its weight in the server's eyes; 0: turned away
        if kind == "train":
            self.notes |= dict.fromkeys(self.world.fates, 0)
        self.asked = 0  # clients of this round, where the world chose them
        self.drawn: Sequence[int] = ()  # and who they are
        self.steps = 0
        self.replies = 0
        self.worked: set[int] = set()  # who has a reply to mask in the secure sum under way
        self.summed = False  # whether a mean was taken in this round

    def info(self, client: int) -> Mapping[str, Any]:
        profile = self.world.profile(client)
        return {**self.task.info(client), **profile} if profile else self.task.info(client)

    def register(self) -> None:
        """Books what clients tell of their devices, once a run; beforehand they are known by their task only."""
        everybody = range(self.world.population)
        if profile := self.world.profile(0):
            call = Call("register", "info", (), {}, {}, self.kind, self.round, 0)
            self.ledger.charge(self.round, call, "up", everybody, encoding.sizes({"info": {**profile}}))

    @cached_property
    def doubtful(self) -> bool:
        """Whether a reply may fail to count: lost, late, surplus, turned away or rejected.

        What a client remembers is then kept when its reply counts, and only then, so that neither side moves without
        the other: a client whose reply did not count is as if it had not been asked. (Its next message can tell a real
        client whether its last reply counted.) Peers owe the server no reply: in `exchange` they keep what they did.
        """
        return bool(self.world.lost or self.world.picks or self.passage.whole("train"))

    def prepare(self, verb: str, function: Callable[..., Any], clients: Iterable[int], msg: Mapping[str, Any]) -> Call:
        """A checked call: a client function of this method, and a message that every client addressed gets whole."""
        name = self.method.path_of(function) if is_client_function(function) else None
        if name is None:
            got = getattr(function, "__name__", function)
            raise UsageError(f"{verb} needs a function of the method marked @client, got {got}")
        asked = tuple(clients)
        busy = self.flights.busy
        if busy and verb != "submit" and self.kind != "evaluate" and not busy.isdisjoint(asked):
            working = sorted(busy.intersection(asked))[:5]
            raise UsageError(f"{verb} to clients {working} that still work; use cohort.idle")
        if self.passage.privacy and self.kind == "train":
            msg = {**msg, **self.passage.privacy.begin(self, asked)}
        shared: dict[str, Any] = {}
        own: dict[int, dict[str, Any]] = {}
        for field, value in msg.items():
            if not isinstance(value, Each):
                shared[field] = value
            else:
                lacking = [client for client in asked if client not in value]
                if lacking:
                    raise UsageError(f"{verb}({name}, {field}=Each(...)) lacks the clients {lacking[:5]}")
                for client in asked:
                    own.setdefault(client, {})[field] = value[client]
        held = verb == "submit" or (self.kind == "train" and self.doubtful)
        call = Call(verb, name, asked, shared, own, self.kind, self.round, self.nth, held, self.version)
        if self.passage.secure:
            self.passage.secure.admit(call)
        self.nth += 1
        return call

    def carry(self, call: Call) -> Iterator[Reply]:
        """The replies that arrive, in the order of the call's clients."""
        for outcome, trip in self._arriving(call, self.send(call)):
            self._keep(call, outcome)
            yield self.reply(call, outcome, trip)

    def reply(self, call: Call, outcome: Outcome, trip: Trip) -> Reply:
        """A reply as the method sees it."""
        fields = message.deliver(received(self.site, call, outcome))
        return Reply(outcome.client, fields, self.version - call.version, trip.seconds)

    def passed(self, call: Call, outcomes: Iterable[Outcome]) -> Iterable[Outcome]:
        """What the transits make of the outcomes of a call, with all of them in view."""
        for transit in self.passage.transits:
            if call.kind in transit.kinds:
                outcomes = transit.carry(self, call, list(outcomes))
        return outcomes

    def _arriving(self, call: Call, sent: Sent) -> Iterator[tuple[Outcome, Trip]]:
        """What reaches the server, one client after the other, and how long each took. The clock goes with it."""
        awake, lost = self.fates(call)
        picks, began = self.world.picks and call.kind == "train", self.clock.now
        outcomes = self.passed(call, self.engine.run(call, awake))
        timed: Iterable[tuple[Outcome, Trip, str]] = (
            (outcome, self._trip(call, sent, outcome, began), "lost" if outcome.client in lost else "arrived")
            for outcome in outcomes
        )
        if picks:
            timed = picked(self.world, call, self.asked, began, timed)
        heard: set[int] = set()
        gone = self._silence(call, awake)
        for outcome, trip, fate in timed:
            self.noted(call, outcome.client, began, trip, fate)
            if fate == "broken":
                self.steps += outcome.steps
            else:
                self.book(call, outcome)
                if call.verb == "exchange" and (fate != "arrived" or outcome.fault):
                    self._keep(call, outcome)
            if fate in ("lost", "broken"):
                gone = max(gone, trip.seconds)
            if fate == "arrived":
                heard.add(outcome.client)
                self._reach(call, began, trip.seconds)
                if not outcome.fault:
                    self.replies += 1
                    yield outcome, trip
        if len(heard) < (wanted(self.world, call, self.asked) if picks else len(call.clients)):
            # Under a deadline the server waits until then for whoever is silent; without, it hears of a failure.
            self._reach(call, began, self.world.deadline if picks and self.world.deadline else gone)

    def _keep(self, call: Call, outcome: Outcome) -> None:
        """What a client remembers from now on, its reply having counted."""
        if call.held:
            self.engine.keep(outcome.client, outcome.state)

    def _trip(self, call: Call, sent: Sent, outcome: Outcome, began: float) -> Trip:
        """How long a client's part in a call took; peers hear of each other on the edges, at the edges' pace."""
        if self.clock.real:
            return Trip(0.0, self.clock.now - began, 0.0)
        up = 0 if call.verb == "exchange" else sum(outcome.sizes.values())
        trip = self.world.trip(outcome.client, sent.to(outcome.client), outcome.steps, up)
        return trip._replace(up=0.0) if call.verb == "exchange" else trip

    def _reach(self, call: Call, began: float, seconds: float) -> None:
        """The server has waited for so long; evaluation takes no time."""
        if call.kind != "evaluate":
            self.clock.reach(began + seconds)

    def _silence(self, call: Call, awake: Sequence[int]) -> float:
        """Seconds after which the server knows who does not react: a message could have gone to and fro."""
        return 2 * self.world.latency if len(awake) < len(call.clients) else 0.0

    def noted(self, call: Call, client: int, began: float, trip: Trip, fate: str) -> None:
        """Counts what became of a client's work, and writes it down for the timeline."""
        if self.cache:
            self.cache.noted(call, client, fate == "arrived")
        if call.kind != "evaluate":
            if fate in self.notes:
                self.notes[fate] += 1
            if self.world.moves or call.verb == "submit":
                self.timeline.note(self.round, call.function, client, began, trip, fate)

    def mean(self, call: Call, weight: str | None) -> Mean:
        """The (weighted) mean of the replies that arrive. Raises NobodyReplied if none does."""
        self.summed = True
        private = self.passage.privacy if call.kind == "train" else None
        if private:
            weight = private.weight(call, weight)
        total, arrived = self._total(call, weight, self.send(call))
        if private:
            total = private.summed(self, call, total)
        missing = tuple(client for client in call.clients if client not in arrived)
        why = ", ".join(f"{self.notes[fate]} {fate}" for fate in self.world.fates if self.notes.get(fate))
        where = f"{call.function} in round {call.round}{f' ({why})' if why else ''}"
        mean = Mean.of(total, call.clients, missing, where)
        return private.released(self, call, mean) if private else mean

    def _total(self, call: Call, weight: str | None, sent: Sent) -> tuple[Sum | None, set[int]]:
        """The sum of the replies that arrive (None if none does), and whose they are."""
        arrived: set[int] = set()
        if self.passage.whole(call.kind):
            parts: dict[int, tuple[Mapping[str, Any], float]] = {}
            outcomes: dict[int, Outcome] = {}
            self.worked.clear()
            for outcome, trip in self._arriving(call, sent):
                reply = self.reply(call, outcome, trip)
                parts[reply.client] = parted(f"mean of {call.function}", reply.client, reply.fields, weight)
                outcomes[reply.client] = outcome
            if not parts:
                return None, arrived
            total, taken = self._combined(call, parts, weight is not None)
            for client in taken:
                self._keep(call, outcomes[client])
            return total, set(taken)
        if self.world.picks and call.kind == "train":
            return self._streamed(call, weight, sent)
        awake, lost = self.fates(call)
        began = self.clock.now
        summing = self.engine.reduce(call, awake, lost, weight)
        while True:
            try:
                outcome = next(summing)
            except StopIteration as end:
                self.replies += len(arrived)
                self._reach(call, began, self._silence(call, awake))
                return end.value, arrived
            self.book(call, outcome)
            trip, fate = self._trip(call, sent, outcome, began), "lost" if outcome.client in lost else "arrived"
            self.noted(call, outcome.client, began, trip, fate)
            self._reach(call, began, trip.seconds)
            if outcome.client not in lost:
                arrived.add(outcome.client)
                self._keep(call, outcome)

    def _streamed(self, call: Call, weight: str | None, sent: Sent) -> tuple[Sum | None, set[int]]:
        """As `_total`, one reply after the other, where it is known only then who came in time."""
        tree, places = Tree(), {client: place for place, client in enumerate(call.clients)}
        arrived: set[int] = set()
        for outcome, trip in self._arriving(call, sent):
            reply = self.reply(call, outcome, trip)
            arrived.add(reply.client)
            self._keep(call, outcome)
            while tree.pushed < places[reply.client]:
                tree.push(None)
            tree.push(Sum.of(*parted(f"mean of {call.function}", reply.client, reply.fields, weight)))
        return tree.total(), arrived

    def _combined(
        self, call: Call, parts: Mapping[int, tuple[Mapping[str, Any], float]], weighted: bool
    ) -> tuple[Sum | None, Sequence[int]]:
        """What the server makes of replies (fields and weight, by client) that it has one by one, and which it took."""
        if self.passage.secure and call.kind == "train":
            return self.passage.secure.total(self, call, parts, weighted), list(parts)
        if self.passage.rule and call.kind == "train":
            return self._ruled(call, self.passage.rule, parts)
        tree = Tree()
        for client in call.clients:
            tree.push(Sum.of(*parts[client]) if client in parts else None)
        return tree.total(), list(parts)

    def unused(self) -> str | None:
        """A setting for sums that found none in a round that heard of clients; None if all had something to do."""
        if not self.replies or self.summed:
            return None
        return "secure" if self.passage.secure else "aggregate" if self.passage.rule else None

    def _ruled(
        self, call: Call, rule: Rule, parts: Mapping[int, tuple[Mapping[str, Any], float]]
    ) -> tuple[Sum, Sequence[int]]:
        """A robust rule over the replies, each of them one row of numbers; and whose it took."""
        from fedloom.aggregators import Context, apply

        sums = {client: Sum.of(fields, 1.0) for client, (fields, _) in parts.items()}
        first = next(iter(sums.values()))
        stack = torch.stack([total.row(first) for total in sums.values()])
        weights = torch.tensor([weight for _, weight in parts.values()], dtype=stack.dtype, device=stack.device)
        averaged = next(iter(parts.values()))[0]  # without the weight
        trusted = self._trusted(call, averaged).row(first) if rule.needs_trusted else None
        memory = self.memory.setdefault(f"aggregate {call.function}", {})
        generator = stream(self.site.seed, "world", "aggregate", call.round, call.nth)
        if len(sums) < len(call.clients):  # the rule allows for so many attackers, and too few others are left
            try:
                rule.check(len(sums))
            except UsageError as error:
                raise NobodyReplied(f"{len(sums)} replies are left to {call.function}: {error}") from error
        verdict = apply(rule, stack, Context(weights, trusted, memory, generator), first.learned(stack.device))
        taken = list(parts)
        if verdict.weight is not None:
            self.judged |= dict(zip(sums, verdict.weight.tolist(), strict=True))
            taken = [client for client, weight in zip(sums, verdict.weight.tolist(), strict=True) if weight]
            if not taken:
                raise NobodyReplied(f"{rule.name()} rejects all {len(sums)} replies to {call.function}")
        return first.filled(verdict.value, sum(parts[client][1] for client in taken), len(taken)), taken

    def _trusted(self, call: Call, like: Mapping[str, Any]) -> Sum:
        """What the client function makes of the server's own data: the fields that `like` has."""
        client = Client(self.site, TRUSTED, {}, call.kind, call.round, call.nth)
        client.given = self.task.public()
        if client.given is None:
            raise UsageError("this rule needs data at the server, and the task has no public data")
        with seeded(self.site.seed, *client.key, "torch"):
            fields = attrgetter(call.function)(self.method)(client, **message.deliver(call.shared))
        return Sum.of({name: value for name, value in fields.items() if name in like}, 1.0)

    def send(self, call: Call) -> Sent:
        """Books the message to every client. What peers have sent one another is on the edges' account already."""
        if self.cache and call.kind != "evaluate":
            return self._send_unheld(call, self.cache)
        sizes = encoding.sizes(call.shared)
        alike = [client for client in call.clients if client not in call.own] if call.own else call.clients
        self.ledger.charge(self.round, call, "down", alike, sizes)
        sent = Sent(sum(sizes.values()), {})  # with what peers sent: it takes time to arrive
        for client, own in call.own.items():
            if call.verb == "exchange":
                own = {field: value for field, value in own.items() if field != INBOX}
            whole = sizes | _fields(own)
            self.ledger.charge(self.round, call, "down", [client], whole)
            sent.own[client] = sum((whole | _fields(call.own[client])).values())
        return sent

    def _send_unheld(self, call: Call, cache: Cache) -> Sent:
        """As `send`, where a value that a client holds costs its name."""
        sent = Sent(0, {})
        for clients, sizes in cache.groups(call):
            self.ledger.charge(self.round, call, "down", clients, sizes)
            for client in clients:
                heard = {field: value for field, value in call.own.get(client, {}).items() if field == INBOX}
                sent.own[client] = sum((sizes | _fields(heard)).values())
        return sent

    def fates(self, call: Call) -> tuple[Sequence[int], set[int]]:
        """The clients that will work, and those of them whose reply gets lost."""
        if call.kind != "train":
            return list(call.clients), set()
        key, world = (call.round, call.nth), self.world
        awake: Sequence[int] = call.clients
        if not world.fails:
            return awake, set()
        if world.there:
            mask = world.there.mask(self.round, self.clock.now)
            awake = [client for client in awake if mask[client]]
            self.notes["absent"] += len(call.clients) - len(awake)
        if world.dropout:
            awake = [client for client in awake if not world.silent(*key, client)]
        return awake, {client for client in awake if world.loses(*key, client)} if world.lost else set()

    def book(self, call: Call, outcome: Outcome) -> None:
        """Writes down what a client logged, its steps, and the bytes of its reply."""
        for name, number in outcome.logs.items():
            self.logs[name].append((outcome.client, number))
        self.steps += outcome.steps
        new = True
        if self.passage.secure and call.verb == "mean" and call.kind == "train":
            self.worked.add(outcome.client)  # its bytes are booked where it is masked
        elif call.verb != "exchange":
            new = self.ledger.charge(self.round, call, "up", (outcome.client,), outcome.sizes)
        if call.kind != "evaluate" and (new or self.passage.privacy):
            if self.passage.privacy:
                self.passage.privacy.saw(self, call, outcome.client, list(outcome.sizes), outcome.steps)
            # Under a robust rule the server sees what it averages.
            verb = "call" if call.verb == "mean" and call.kind == "train" and self.passage.rule else call.verb
            shown = (verb, call.function, *outcome.sizes)
            if shown not in self.shown:
                self.shown.add(shown)
                noted = self.verbs.setdefault(
                    f"{verb} {call.function}", {"verb": verb, "function": call.function, "fields": []}
                )
                noted["fields"] = sorted({*noted["fields"], *outcome.sizes} - {"envelope"})

    def charge_edges(self, call: Call, reply: Reply, targets: Iterable[int]) -> float:
        """Bytes of a peer's message, once an edge. Returns the seconds in which they leave it, one after the other."""
        edges = [(reply.client, target) for target in targets]
        sizes = encoding.sizes(reply.fields)
        self.ledger.charge(self.round, call, "peer", edges, sizes)
        return reply.seconds + self.world.upload(reply.client, len(edges) * sum(sizes.values())) if edges else 0.0


def _fields(own: Mapping[str, Any]) -> dict[str, int]:
    sizes = encoding.sizes(own)
    del sizes["envelope"]
    return sizes
