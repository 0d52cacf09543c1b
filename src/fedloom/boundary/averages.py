"""How the replies of a call become their mean: summed as they come, where they are made, or of all in view."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom.boundary.stage import Combined, Gathered
from fedloom.calls import Outcome
from fedloom.cohort import Mean
from fedloom.engines.perform import part_of_mean, weigh_reply
from fedloom.mean import Placed, Sum

if TYPE_CHECKING:
    from fedloom.boundary.arrivals import Arrivals, Asked
    from fedloom.calls import Call
    from fedloom.plugin import Weights


class Averages:
    """Takes the means of one run."""

    def __init__(self, arrivals: Arrivals) -> None:
        self.arrivals = arrivals

    def mean(self, call: Call, weight: str | None, weights: Weights = None) -> Mean:
        """The (weighted) mean of the replies that arrive. Raises NobodyReplied if none does.

        The server's `weights` stand in place of those that clients send.
        """
        arrivals, books, pipeline = self.arrivals, self.arrivals.books, self.arrivals.pipeline
        books.summed = True
        for stage in pipeline.with_hook("weighted_by", call.kind):
            weight = stage.weighted_by(call, weight)
        asked, taken = arrivals.ask(call), set[int]()
        if pipeline.whole(call.kind):
            total, taken = self._gathered(asked, weight, weights)
        else:
            sums = Placed(call.clients)
            whole = weights is None and not arrivals.selects(call)
            summing = arrivals.engine.reduce(call, asked.awake, asked.lost, weight) if whole else None
            for arrival in arrivals.receive(asked, summing or arrivals.engine.run(call, asked.awake)):
                if arrival.counts:
                    taken.add(arrival.outcome.client)
                    arrivals.keep(call, arrival.outcome)
                    if not summing:
                        sums.add(
                            arrival.outcome.client, weigh_reply(books.site, call, arrival.outcome, weight, weights)
                        )
            total = summing.total if summing else sums.total()
        total = pipeline.total(books, call, total)
        missing = tuple(client for client in call.clients if client not in taken)
        why = ", ".join(f"{books.notes[fate]} {fate}" for fate in arrivals.world.outcome_kinds if books.notes.get(fate))
        where = f"{call.function} in round {call.round}{f' ({why})' if why else ''}"
        return pipeline.mean(books, call, Mean.of(total, call.clients, missing, where))

    def _gathered(self, asked: Asked, weight: str | None, weights: Weights) -> tuple[Sum | None, set[int]]:
        """The sum of the replies that arrive (None if none does) as the stages make it of all, and whose are in it."""
        arrivals, call, outcomes = self.arrivals, asked.call, dict[int, Outcome]()
        replies = Gathered(weight is not None)
        for arrival in arrivals.receive(asked, arrivals.engine.run(call, asked.awake)):
            outcome = arrival.outcome
            if arrival.fate != "broken":
                replies.worked.add(outcome.client)
            if arrival.counts:
                replies.parts[outcome.client] = part_of_mean(arrivals.books.site, call, outcome, weight, weights)
                outcomes[outcome.client] = outcome

        def plain() -> Combined:
            sums = Placed(call.clients)
            for client, part in replies.parts.items():
                sums.add(client, Sum.of(*part))
            return sums.total(), list(replies.parts)

        if not replies.parts:
            return None, set()
        total, taken = arrivals.pipeline.combined(arrivals.books, call, replies, plain)
        for client in taken:
            arrivals.keep(call, outcomes[client])
        return total, set(taken)
