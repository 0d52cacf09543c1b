"""A robust rule in place of the mean: `aggregate`. Under it the server sees every reply."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedloom import aggregators, message
from fedloom.aggregators import Context, Piece, Rule, Wrapper
from fedloom.boundary.attack.numbers import Updates
from fedloom.boundary.stage import Combined, Gathered, Stage
from fedloom.calls import ONCE, SUMMED, Call
from fedloom.engines.perform import function_at, replied
from fedloom.errors import NobodyReplied, Refused, UsageError
from fedloom.mean import Sum
from fedloom.method import paced
from fedloom.node import Client
from fedloom.random import seeded, stream
from fedloom.vector import Vector

if TYPE_CHECKING:
    from fedloom.boundary.books import Books
    from fedloom.method import Method, Planned
    from fedloom.site import Site
    from fedloom.task import Task

TRUSTED = -1  # the number of the client that the server plays on its own data


@dataclass(frozen=True)
class Aggregate(Stage):
    """Lets a rule make one row of the replies of a call, each of them a row of numbers."""

    rule: Rule
    method: Method
    updates: Updates

    setting = "aggregate"

    @staticmethod
    def of(text: str, method: Method) -> Aggregate:
        """The rule that a text asks for; raises UsageError with what is wrong in it."""
        return Aggregate(aggregators.build(text), method, Updates.of(method))

    def on(self, task: Task) -> Aggregate | None:
        rule = self.rule
        while isinstance(rule, Wrapper):  # what stands before a rule may ask for more clients than the problem has
            rule = rule.inner
        return replace(self, rule=rule) if rule.needs_models else None

    def reported_verb(self, call: Call) -> str:
        return "call" if call.verb in SUMMED else call.verb

    def combine(self, books: Books, call: Call, replies: Gathered, inner: Callable[[], Combined]) -> Combined:
        rule, parts = self.rule, replies.parts
        sums = {client: Sum.of(fields, 1.0) for client, (fields, _) in parts.items()}
        first = next(iter(sums.values()))
        stack = torch.stack([total.row(first) for total in sums.values()])
        weights = torch.tensor([weight for _, weight in parts.values()], dtype=stack.dtype, device=stack.device)
        averaged = next(iter(parts.values()))[0]  # without the weight
        trusted = self.trusted(books.site, call, averaged).row(first) if rule.needs_trusted else None
        memory = books.memory.setdefault(f"aggregate {call.place}", {})
        generator = stream(books.site.seed, "world", "aggregate", *call.key)
        # The rule allows for so many attackers, and too few others are left, or were never in this group.
        if len(sums) < len(call.clients) or call.group is not None:
            try:
                rule.check(len(sums))
            except UsageError as error:
                raise NobodyReplied(f"{len(sums)} replies are left to {call.function}: {error}") from error
        sent = torch.zeros_like(stack[0])
        pieces = self.begun(call, first, sent)
        if rule.needs_models and not any(piece.origin for piece in pieces):
            raise Refused(
                f"aggregate={rule.name()} compares models, and what {self.method.name()} averages of {call.function} "
                f"({', '.join(averaged)}) is none, nor a difference from one, that all clients were sent; take another "
                "rule, or say in the method what it begins from (updates, differences)"
            )
        context = Context(weights, pieces, sent, trusted, memory, generator)
        verdict = aggregators.apply(rule, stack, context, first.learned(stack.device))
        taken = list(parts)
        if verdict.weight is not None:
            books.judged |= dict(zip(sums, verdict.weight.tolist(), strict=True))
            taken = [client for client, weight in zip(sums, verdict.weight.tolist(), strict=True) if weight]
            if not taken:
                raise NobodyReplied(f"{rule.name()} rejects all {len(sums)} replies to {call.function}")
        return first.filled(verdict.value, sum(parts[client][1] for client in taken), len(taken)), taken

    def begun(self, call: Call, like: Sum, sent: Tensor) -> tuple[Piece, ...]:
        """The learned tensors of rows of the form of `like`; what models in them began from goes into `sent` [D]."""
        begun, pieces, start, learned = self.updates.begun(call.shared), list[Piece](), 0, 0
        for one in like.portions():
            size, place = math.prod(one.shape), ".".join(map(str, one.path))
            origin, there = begun.get(place, (None, None))
            if isinstance(there, Vector) and there.layout == one.layout:
                first = there.layout.offsets[there.layout.places[one.name]]
                sent[start : start + size] = there.flat[first : first + size]
            else:
                origin = None
            if one.learned:
                pieces.append(Piece(place, one.name, one.shape, slice(learned, learned + size), origin))
                learned += size
            start += size
        return tuple(pieces)

    def check_call(self, call: Call | Planned) -> None:
        if not self.rule.needs_trusted or not isinstance(call, Call) or call.verb not in SUMMED:
            return
        apart = {field for fields in (call.shared, *call.own.values()) for field in fields if field == ONCE}
        apart |= {field for fields in call.own.values() for field in fields if not field.startswith("_")}
        if apart:
            raise Refused(
                f"aggregate={self.rule.name()} has the server play a client, and what clients are sent for "
                f"{call.function} is not alike (Each, ByGroup or Once); take a rule that needs no data at the server"
            )

    def trusted(self, site: Site, call: Call, like: Mapping[str, Any]) -> Sum:
        """What the client function makes of the server's own data: the fields that `like` has."""
        client = Client(site, TRUSTED, {}, call.kind, call.round, call.nth)
        client.given = site.task.public()
        if client.given is None:
            raise UsageError("this rule needs data at the server, and the task has no public data")
        with seeded(site.seed, *client.key, "torch"):
            method = paced(self.method, call.pace)
            fields = replied(site, call, function_at(method, client, call, message.deliver(call.shared)))
        return Sum.of({name: value for name, value in fields.items() if name in like}, 1.0)
