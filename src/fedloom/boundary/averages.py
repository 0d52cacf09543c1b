"""How the replies of a call become means: summed as they come, where they are made, or of all in view.

A mean of all is one of a single group, `None`. Whatever a stage makes of a sum it makes of each group's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedloom.boundary.stage import Combined, Gathered
from fedloom.calls import Call, Outcome
from fedloom.cohort import Mean
from fedloom.engines.perform import part_of_mean, weigh_reply
from fedloom.errors import NobodyReplied
from fedloom.mean import Placed, Sum

if TYPE_CHECKING:
    from fedloom.boundary.arrivals import Arrivals, Asked
    from fedloom.boundary.selection import Arrival
    from fedloom.plugin import Weights

Group = int | str | None


class Averages(ABC):
    """The means of one call in the making: whoever asked takes in all that is `coming`, and then their `means`.

    The server's `weights` stand in place of those that clients send.
    """

    coming: Iterator[Arrival]

    def __init__(self, arrivals: Arrivals, asked: Asked, weight: str | None, weights: Weights) -> None:
        self.arrivals, self.asked, self.call = arrivals, asked, asked.call
        self.weight, self.weights = weight, weights
        self.taken: set[int] = set()  # whose replies are in a sum

    @staticmethod
    def of(arrivals: Arrivals, call: Call, weight: str | None, weights: Weights = None) -> Averages:
        """Asks the clients of a call for replies of which the means are taken, by a field of theirs or by weights."""
        arrivals.books.summed = True
        for stage in arrivals.pipeline.with_hook("weighted_by", call.kind):
            weight = stage.weighted_by(call, weight)
        kind = InView if arrivals.pipeline.whole(call.kind) else AsTheyCome
        return kind(arrivals, arrivals.ask(call), weight, weights)

    @abstractmethod
    def add(self, arrival: Arrival) -> None:
        """Takes in what arrived."""

    @abstractmethod
    def totals(self) -> dict[Group, Sum | NobodyReplied | None]:
        """The sum of each group's replies, or why there is none."""

    def means(self) -> dict[Group, Mean]:
        """The (weighted) mean of the replies of each group of which some count. Raises NobodyReplied if none does."""
        call, books, pipeline = self.call, self.arrivals.books, self.arrivals.pipeline
        totals, means = self.totals(), dict[Group, Mean]()
        fates = self.arrivals.world.outcome_kinds
        why = ", ".join(f"{books.notes[fate]} {fate}" for fate in fates if books.notes.get(fate))
        where = f"{call.function} in round {call.round}{f' ({why})' if why else ''}"
        empty: NobodyReplied | None = None
        for group, part in call.parts.items():
            if isinstance(total := totals.get(group), NobodyReplied):
                empty = total
                continue
            total = pipeline.total(books, part, total)
            missing = tuple(client for client in part.clients if client not in self.taken)
            if total is not None or call.groups is None:
                means[group] = pipeline.mean(books, part, Mean.of(total, part.clients, missing, where))
        if not means:
            raise empty or NobodyReplied(f"none of the {len(call.clients)} clients replied to {where}")
        return means


class AsTheyCome(Averages):
    """Sums of replies as they come, or where they are made."""

    def __init__(self, arrivals: Arrivals, asked: Asked, weight: str | None, weights: Weights) -> None:
        super().__init__(arrivals, asked, weight, weights)
        call, engine = self.call, arrivals.engine
        self.sums = {group: Placed(part.clients) for group, part in call.parts.items()}
        # Workers sum along one tree; those of groups would be many, and small.
        whole = call.groups is None and weights is None and not arrivals.selects(call)
        self.summing = engine.reduce(call, asked.awake, asked.lost, weight) if whole else None
        self.coming = arrivals.receive(asked, self.summing or engine.run(call, asked.awake))

    def add(self, arrival: Arrival) -> None:
        if arrival.counts:
            client = arrival.outcome.client
            self.taken.add(client)
            self.arrivals.keep(self.call, arrival.outcome)
            if not self.summing:
                site, groups = self.arrivals.books.site, self.call.groups
                reply = weigh_reply(site, self.call, arrival.outcome, self.weight, self.weights)
                self.sums[groups[client] if groups else None].add(client, reply)

    def totals(self) -> dict[Group, Sum | NobodyReplied | None]:
        return {None: self.summing.total} if self.summing else {group: its.total() for group, its in self.sums.items()}


class InView(Averages):
    """Sums that the stages make with all replies in view."""

    def __init__(self, arrivals: Arrivals, asked: Asked, weight: str | None, weights: Weights) -> None:
        super().__init__(arrivals, asked, weight, weights)
        self.whole = Gathered(weight is not None)
        self.outcomes: dict[int, Outcome] = {}
        self.coming = arrivals.receive(asked, arrivals.engine.run(self.call, asked.awake))

    def add(self, arrival: Arrival) -> None:
        outcome = arrival.outcome
        if arrival.fate != "broken":
            self.whole.worked.add(outcome.client)
        if arrival.counts:
            site = self.arrivals.books.site
            part = part_of_mean(site, self.call, outcome, self.weight, self.weights)
            self.whole.parts[outcome.client] = part
            self.outcomes[outcome.client] = outcome

    def totals(self) -> dict[Group, Sum | NobodyReplied | None]:
        whole, totals = self.whole, dict[Group, Sum | NobodyReplied | None]()
        for group, part in self.call.parts.items():
            here = {client: whole.parts[client] for client in part.clients if client in whole.parts}
            if here:
                try:
                    totals[group], taken = self._combined(part, Gathered(whole.weighted, here, whole.worked))
                except NobodyReplied as nobody:
                    if self.call.groups is None:
                        raise
                    totals[group] = nobody
                    continue
                for client in taken:
                    self.arrivals.keep(self.call, self.outcomes[client])
                self.taken.update(taken)
        return totals

    def _combined(self, call: Call, replies: Gathered) -> Combined:
        """What the stages make of the replies to a call, or to a part of one; and whose they took."""

        def plain() -> Combined:
            sums = Placed(call.clients)
            for client, part in replies.parts.items():
                sums.add(client, Sum.of(*part))
            return sums.total(), list(replies.parts)

        return self.arrivals.pipeline.combined(self.arrivals.books, call, replies, plain)
