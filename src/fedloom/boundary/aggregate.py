"""A robust rule in place of the mean: `aggregate`. Under it the server sees every reply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedloom import aggregators, message
from fedloom.aggregators import Context, Rule
from fedloom.boundary.stage import Combined, Gathered, Stage
from fedloom.engines.perform import function_at
from fedloom.errors import NobodyReplied, UsageError
from fedloom.mean import Sum
from fedloom.node import Client
from fedloom.random import seeded, stream

if TYPE_CHECKING:
    from fedloom.boundary.books import Books
    from fedloom.calls import Call
    from fedloom.method import Method
    from fedloom.site import Site

TRUSTED = -1  # the number of the client that the server plays on its own data


@dataclass(frozen=True)
class Aggregate(Stage):
    """Lets a rule make one row of the replies of a call, each of them a row of numbers."""

    rule: Rule
    method: Method

    setting = "aggregate"

    @staticmethod
    def of(text: str, method: Method) -> Aggregate:
        """The rule that a text asks for; raises UsageError with what is wrong in it."""
        return Aggregate(aggregators.build(text), method)

    def reported_verb(self, call: Call) -> str:
        return "call" if call.verb == "mean" else call.verb

    def combine(self, books: Books, call: Call, replies: Gathered, inner: Callable[[], Combined]) -> Combined:
        rule, parts = self.rule, replies.parts
        sums = {client: Sum.of(fields, 1.0) for client, (fields, _) in parts.items()}
        first = next(iter(sums.values()))
        stack = torch.stack([total.row(first) for total in sums.values()])
        weights = torch.tensor([weight for _, weight in parts.values()], dtype=stack.dtype, device=stack.device)
        averaged = next(iter(parts.values()))[0]  # without the weight
        trusted = self.trusted(books.site, call, averaged).row(first) if rule.needs_trusted else None
        memory = books.memory.setdefault(f"aggregate {call.function}", {})
        generator = stream(books.site.seed, "world", "aggregate", call.round, call.nth)
        if len(sums) < len(call.clients):  # the rule allows for so many attackers, and too few others are left
            try:
                rule.check(len(sums))
            except UsageError as error:
                raise NobodyReplied(f"{len(sums)} replies are left to {call.function}: {error}") from error
        context = Context(weights, trusted, memory, generator)
        verdict = aggregators.apply(rule, stack, context, first.learned(stack.device))
        taken = list(parts)
        if verdict.weight is not None:
            books.judged |= dict(zip(sums, verdict.weight.tolist(), strict=True))
            taken = [client for client, weight in zip(sums, verdict.weight.tolist(), strict=True) if weight]
            if not taken:
                raise NobodyReplied(f"{rule.name()} rejects all {len(sums)} replies to {call.function}")
        return first.filled(verdict.value, sum(parts[client][1] for client in taken), len(taken)), taken

    def trusted(self, site: Site, call: Call, like: Mapping[str, Any]) -> Sum:
        """What the client function makes of the server's own data: the fields that `like` has."""
        client = Client(site, TRUSTED, {}, call.kind, call.round, call.nth)
        client.given = site.task.public()
        if client.given is None:
            raise UsageError("this rule needs data at the server, and the task has no public data")
        with seeded(site.seed, *client.key, "torch"):
            fields = function_at(self.method, client, call, message.deliver(call.shared))()
        return Sum.of({name: value for name, value in fields.items() if name in like}, 1.0)
