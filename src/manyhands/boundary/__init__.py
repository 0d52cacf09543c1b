"""The one place where messages pass between the server and the clients.

What may happen to a message happens here: it is counted, a client stays silent, a reply is lost, and whatever else
stands on its passage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

from manyhands import message
from manyhands.boundary.meter import Ledger
from manyhands.boundary.passage import Passage
from manyhands.cohort import INBOX, Each, Mean, Replies, Reply
from manyhands.engines import Call, Engine, Outcome, received
from manyhands.errors import UsageError
from manyhands.mean import Sum, Tree, parted
from manyhands.method import Method, is_client_function
from manyhands.node import Client, Site
from manyhands.random import seeded, stream
from manyhands.world import World

if TYPE_CHECKING:
    from manyhands.aggregators import Rule

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
        self.ledger = Ledger()
        self.memory: dict[str, dict[str, Any]] = {}  # what parts of the passage keep from round to round: messages
        self.verbs: dict[str, dict[str, Any]] = {}  # function -> what the server learns from it
        self.pending: deque[tuple[Call, int]] = deque()  # submitted and not yet waited for, oldest first
        self.begin("setup", 0)

    def begin(self, kind: str, round: int) -> None:
        """A new round, or another kind of traffic in it."""
        self.kind, self.round, self.nth = kind, round, 0
        self.logs: dict[str, list[tuple[int, float]]] = {}  # name -> (client, number)
        self.notes: dict[str, float] = {}  # numbers for the round's record
        self.steps = 0
        self.replies = 0

    def info(self, client: int) -> Mapping[str, Any]:
        return self.task.info(client)

    def prepare(self, verb: str, function: Callable[..., Any], clients: Iterable[int], msg: Mapping[str, Any]) -> Call:
        """A checked call: a client function of this method, and a message that every client addressed gets whole."""
        name = self.method.path_of(function) if is_client_function(function) else None
        if name is None:
            got = getattr(function, "__name__", function)
            raise UsageError(f"{verb} needs a function of the method marked @client, got {got}")
        asked = tuple(clients)
        shared = {field: value for field, value in msg.items() if not isinstance(value, Each)}
        own: dict[int, dict[str, Any]] = {}
        for field, value in msg.items():
            if isinstance(value, Each):
                lacking = [client for client in asked if client not in value]
                if lacking:
                    raise UsageError(f"{verb}({name}, {field}=Each(...)) lacks the clients {lacking[:5]}")
                for client in asked:
                    own.setdefault(client, {})[field] = value[client]
        call = Call(verb, name, asked, shared, own, self.kind, self.round, self.nth)
        self.nth += 1
        return call

    def carry(self, call: Call) -> Iterator[Reply]:
        """The replies that arrive, in the order of the call's clients."""
        self._send(call)
        yield from self._bring(call)

    def _bring(self, call: Call) -> Iterator[Reply]:
        for outcome in self._arriving(call):
            reply = received(self.site, call, outcome)
            yield Reply(outcome.client, message.deliver(reply), self.round - call.round)

    def _arriving(self, call: Call) -> Iterator[Outcome]:
        """What reaches the server, one client after the other."""
        awake, lost = self._fates(call)
        outcomes: Iterable[Outcome] = self.engine.run(call, awake)
        if call.kind == "train":
            for transit in self.passage.transits:
                outcomes = transit.carry(self, call, list(outcomes))
        for outcome in outcomes:
            self._book(call, outcome)
            if outcome.client not in lost and not outcome.fault:
                self.replies += 1
                yield outcome

    def mean(self, call: Call, weight: str | None) -> Mean:
        """The (weighted) mean of the replies that arrive. Raises NobodyReplied if none does."""
        self._send(call)
        total, arrived = self._total(call, weight)
        missing = tuple(client for client in call.clients if client not in arrived)
        mean = Mean.of(total, call.clients, missing, f"{call.function} in round {call.round}")
        if self.passage.privacy and call.kind == "train":
            return self.passage.privacy.released(self, call, mean)
        return mean

    def _total(self, call: Call, weight: str | None) -> tuple[Sum | None, set[int]]:
        """The sum of the replies that arrive (None if none does), and whose they are."""
        arrived: set[int] = set()
        if self.passage.whole and call.kind == "train":
            parts: dict[int, tuple[Mapping[str, Any], float]] = {}
            for reply in self._bring(call):
                parts[reply.client] = parted(f"mean of {call.function}", reply.client, reply.fields, weight)
            return (self._combined(call, parts, weight is not None) if parts else None), set(parts)
        awake, lost = self._fates(call)
        outcomes = self.engine.reduce(call, awake, lost, weight)
        while True:
            try:
                outcome = next(outcomes)
            except StopIteration as end:
                self.replies += len(arrived)
                return end.value, arrived
            self._book(call, outcome)
            if outcome.client not in lost:
                arrived.add(outcome.client)

    def _combined(self, call: Call, parts: Mapping[int, tuple[Mapping[str, Any], float]], weighted: bool) -> Sum | None:
        """What the server makes of replies (fields and weight, by client) that it has one by one."""
        if self.passage.secure:
            return self.passage.secure.total(self, call, parts, weighted)
        if self.passage.rule:
            return self._ruled(call, self.passage.rule, parts)
        tree = Tree()
        for client in call.clients:
            tree.push(Sum.of(*parts[client]) if client in parts else None)
        return tree.total()

    def _ruled(self, call: Call, rule: Rule, parts: Mapping[int, tuple[Mapping[str, Any], float]]) -> Sum:
        """A robust rule over the replies, each of them one row of numbers."""
        from manyhands.aggregators import Context

        sums = {client: Sum.of(fields, 1.0) for client, (fields, _) in parts.items()}
        first = next(iter(sums.values()))
        stack = torch.stack([total.row(first) for total in sums.values()])
        weights = torch.tensor([weight for _, weight in parts.values()], dtype=stack.dtype, device=stack.device)
        trusted = self._trusted(call).row(first) if rule.needs_trusted else None
        memory = self.memory.setdefault(f"aggregate {call.function}", {})
        generator = stream(self.site.seed, "world", "aggregate", call.round, call.nth)
        verdict = rule(stack, Context(weights, trusted, memory, generator))
        if verdict.weight is not None:
            self.judged = dict(zip(sums, verdict.weight.tolist(), strict=True))
        return first.filled(verdict.value, sum(weight for _, weight in parts.values()), len(parts))

    def _trusted(self, call: Call) -> Sum:
        """What the client function makes of the server's own data."""
        client = Client(self.site, TRUSTED, {}, call.kind, call.round, call.nth)
        client.given = self.task.public()
        if client.given is None:
            raise UsageError("this rule needs data at the server, and the task has no public data")
        with seeded(self.site.seed, *client.key, "torch"):
            fields = attrgetter(call.function)(self.method)(client, **message.deliver(call.shared))
        return Sum.of(fields, 1.0)

    def _send(self, call: Call) -> None:
        """Books the message to every client. What peers have sent one another is on the edges' account already."""
        sizes = message.sizes(call.shared)
        alike = [client for client in call.clients if client not in call.own]
        self.ledger.charge(self.round, call, "down", alike, sizes)
        for client, own in call.own.items():
            if call.verb == "exchange":
                own = {field: value for field, value in own.items() if field != INBOX}
            self.ledger.charge(self.round, call, "down", [client], sizes | _fields(own))

    def _fates(self, call: Call) -> tuple[list[int], set[int]]:
        """The clients that will work, and those of them whose reply gets lost."""
        if call.kind != "train":
            return list(call.clients), set()
        key = (call.round, call.nth)
        awake = [client for client in call.clients if not self.world.silent(*key, client)]
        return awake, {client for client in awake if self.world.loses(*key, client)}

    def _book(self, call: Call, outcome: Outcome) -> None:
        for name, number in outcome.logs.items():
            self.logs.setdefault(name, []).append((outcome.client, number))
        self.steps += outcome.steps
        masked = self.passage.secure and call.verb == "mean" and call.kind == "train"
        if call.verb != "exchange" and not masked:  # what leaves a client under a mask is booked where it is masked
            self.ledger.charge(self.round, call, "up", [outcome.client], outcome.sizes)
        if call.kind != "evaluate":
            # Under a robust rule the server sees what it averages.
            verb = "call" if call.verb == "mean" and call.kind == "train" and self.passage.rule else call.verb
            noted = self.verbs.setdefault(
                f"{verb} {call.function}", {"verb": verb, "function": call.function, "fields": []}
            )
            noted["fields"] = sorted({*noted["fields"], *outcome.sizes} - {"envelope"})

    def charge_edges(self, call: Call, reply: Reply, targets: Iterable[int]) -> None:
        """Bytes of a peer's message, once an edge."""
        edges = [(reply.client, target) for target in targets]
        self.ledger.charge(self.round, call, "peer", edges, message.sizes(reply.fields))

    def submit(self, call: Call) -> None:
        """Work that begins now; without a clock in the world it is done when it is waited for, in order."""
        self._send(call)
        for client in call.clients:
            one = replace(call, clients=(client,), own={client: call.own.get(client, {})})
            self.pending.append((one, client))

    def wait(self, k: int | None) -> Replies:
        if k is not None and k > len(self.pending):
            raise UsageError(f"wait({k}) with only {len(self.pending)} clients at work; submit first")
        replies: list[Reply] = []
        asked = []
        for _ in range(len(self.pending) if k is None else k):
            call, client = self.pending.popleft()
            asked.append(client)
            replies.extend(self._bring(call))
        return Replies(replies, asked)


def _fields(own: Mapping[str, Any]) -> dict[str, int]:
    sizes = message.sizes(own)
    del sizes["envelope"]
    return sizes
