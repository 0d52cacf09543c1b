"""How the replies of a call become means: summed as they come, where they are made, or of all in view.

A mean of all is one of a single group, `None`. Whatever a stage makes of a sum it makes of each group's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom.boundary.stage import Combined, Gathered
from fedloom.calls import Call, Outcome
from fedloom.cohort import Mean
from fedloom.engines.perform import part_of_mean, weigh_reply
from fedloom.errors import NobodyReplied
from fedloom.mean import Placed, Sum

if TYPE_CHECKING:
    from fedloom.boundary.arrivals import Arrivals, Asked
    from fedloom.plugin import Weights

Group = int | str | None
Totals = tuple[dict[Group, Sum | NobodyReplied | None], set[int]]  # the sums or why there is none; whose are in one


class Averages:
    """Takes the means of one run."""

    def __init__(self, arrivals: Arrivals) -> None:
        self.arrivals = arrivals

    def taken(self, call: Call, weight: str | None, weights: Weights = None) -> dict[Group, Mean]:
        """The (weighted) mean of the replies of each group of which some count. Raises NobodyReplied if none does.

        The server's `weights` stand in place of those that clients send.
        """
        arrivals, books, pipeline = self.arrivals, self.arrivals.books, self.arrivals.pipeline
        books.summed = True
        for stage in pipeline.with_hook("weighted_by", call.kind):
            weight = stage.weighted_by(call, weight)
        asked, means = arrivals.ask(call), dict[Group, Mean]()
        empty: NobodyReplied | None = None
        totals, taken = (self._gathered if pipeline.whole(call.kind) else self._summed)(asked, weight, weights)
        why = ", ".join(f"{books.notes[fate]} {fate}" for fate in arrivals.world.outcome_kinds if books.notes.get(fate))
        where = f"{call.function} in round {call.round}{f' ({why})' if why else ''}"
        for group, part in call.parts.items():
            if isinstance(total := totals.get(group), NobodyReplied):
                empty = total
                continue
            total = pipeline.total(books, part, total)
            missing = tuple(client for client in part.clients if client not in taken)
            if total is not None or call.groups is None:
                means[group] = pipeline.mean(books, part, Mean.of(total, part.clients, missing, where))
        if not means:
            raise empty or NobodyReplied(f"none of the {len(call.clients)} clients replied to {where}")
        return means

    def _summed(self, asked: Asked, weight: str | None, weights: Weights) -> Totals:
        """The sums of the replies that arrive, taken as they come; and whose are in one."""
        arrivals, call, taken = self.arrivals, asked.call, set[int]()
        sums = {group: Placed(part.clients) for group, part in call.parts.items()}
        # Workers sum along one tree; those of groups would be many, and small.
        whole = call.groups is None and weights is None and not arrivals.selects(call)
        summing = arrivals.engine.reduce(call, asked.awake, asked.lost, weight) if whole else None
        for arrival in arrivals.receive(asked, summing or arrivals.engine.run(call, asked.awake)):
            if arrival.counts:
                client = arrival.outcome.client
                taken.add(client)
                arrivals.keep(call, arrival.outcome)
                if not summing:
                    reply = weigh_reply(arrivals.books.site, call, arrival.outcome, weight, weights)
                    sums[call.groups[client] if call.groups else None].add(client, reply)
        return ({None: summing.total} if summing else {group: its.total() for group, its in sums.items()}), taken

    def _gathered(self, asked: Asked, weight: str | None, weights: Weights) -> Totals:
        """The sums of the replies that arrive, as the stages make each of all; or why a group has none."""
        arrivals, call, outcomes = self.arrivals, asked.call, dict[int, Outcome]()
        whole = Gathered(weight is not None)
        for arrival in arrivals.receive(asked, arrivals.engine.run(call, asked.awake)):
            outcome = arrival.outcome
            if arrival.fate != "broken":
                whole.worked.add(outcome.client)
            if arrival.counts:
                whole.parts[outcome.client] = part_of_mean(arrivals.books.site, call, outcome, weight, weights)
                outcomes[outcome.client] = outcome
        totals: dict[Group, Sum | NobodyReplied | None] = {}
        kept: set[int] = set()
        for group, part in call.parts.items():
            here = {client: whole.parts[client] for client in part.clients if client in whole.parts}
            if here:
                try:
                    totals[group], taken = self._combined(part, Gathered(whole.weighted, here, whole.worked))
                except NobodyReplied as nobody:
                    if call.groups is None:
                        raise
                    totals[group] = nobody
                    continue
                for client in taken:
                    arrivals.keep(call, outcomes[client])
                kept.update(taken)
        return totals, kept

    def _combined(self, call: Call, replies: Gathered) -> Combined:
        """What the stages make of the replies to a call, or to a part of one; and whose they took."""

        def plain() -> Combined:
            sums = Placed(call.clients)
            for client, part in replies.parts.items():
                sums.add(client, Sum.of(*part))
            return sums.total(), list(replies.parts)

        return self.arrivals.pipeline.combined(self.arrivals.books, call, replies, plain)
