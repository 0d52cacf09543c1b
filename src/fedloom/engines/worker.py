"""What a worker of any engine does: it gets blocks of clients as messages and answers with messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedloom import encoding, message
from fedloom.calls import Call, ClientError, Outcome
from fedloom.engines.gather import Gather
from fedloom.engines.perform import perform, weigh_reply
from fedloom.errors import RunError
from fedloom.mean import Sum, Tree
from fedloom.message import Value
from fedloom.method import Method
from fedloom.site import Site


@dataclass
class Worker:
    """Serves blocks at a site, and keeps sums of replies until they are asked for: siblings are joined where they are.

    What it holds for a call, by the call's ticket, goes when a request no longer names the ticket as open.
    """

    site: Site
    method: Method
    gather: Gather | None = None  # where the clients of a block train as one batch
    shared: dict[int, Mapping[str, Value]] = field(default_factory=dict)  # the part of the message that all clients get
    sums: dict[int, Tree] = field(default_factory=dict)

    def answer(self, request: Mapping[str, Any], fetch: Callable[[], Any]) -> dict[str, Value]:
        """The answer to a request: for a block, or (None) for one of the sums that are kept.

        `fetch` gives the encoded part of the message that all clients of the call get; it is asked once a call. The
        answer's `error` is the line of what failed, or None; its `nodes` are sums with their places in the tree.
        """
        ticket, block = request["ticket"], request["block"]
        for held in (self.shared, self.sums):
            for closed in held.keys() - set(request["open"]):
                del held[closed]
        if block is None:
            (level, index), total = self.sums[ticket].nodes.popitem()
            return {"error": None, "outcomes": [], "nodes": [_node(level, index, total)]}
        if ticket not in self.shared:
            self.shared[ticket] = self.site.to_device(encoding.decode(fetch()))
        try:
            return self.serve(ticket, block)
        except RunError as error:
            return {"error": str(error), "client": isinstance(error, ClientError)}

    def serve(self, ticket: int, block: Mapping[str, Any]) -> dict[str, Value]:
        """The outcomes of a block; with `reduce` also the sum of its replies, in whose stead they come back empty."""
        verb, function, kind, round, nth, pace = block["call"]
        clients = tuple(block["places"])
        call = Call(verb, function, clients, self.shared[ticket], block["own"], kind, round, nth, pace=pace)
        reduce, tree = block["reduce"], Tree()
        outcomes: list[Value] = []
        for outcome in self.perform_all(call, block["states"]):
            client = outcome.client
            if reduce is not None:
                tree.put(
                    0,
                    block["places"][client],
                    None if client in reduce["lost"] else weigh_reply(self.site, call, outcome, reduce["weight"]),
                )
            outcomes.append(_packed(outcome, reduce is None))
        nodes: list[Value] = []
        if reduce is not None:
            for place in set(range(*reduce["span"])).difference(block["places"].values()):
                tree.put(0, place, None)
            if reduce["keep"]:
                kept = self.sums.setdefault(ticket, Tree())
                for (level, index), total in tree.nodes.items():
                    kept.put(level, index, total)
            else:
                nodes += (_node(level, index, total) for (level, index), total in tree.nodes.items())
        return {"error": None, "outcomes": outcomes, "nodes": nodes}

    def perform_all(self, call: Call, states: Mapping[int, Any]) -> Iterable[Outcome]:
        """The outcomes of all clients of a call: one by one, or as one batch where there is a place to gather."""
        jobs = (
            (client, self.site.to_device(states.get(client, {})), message.deliver(call.message(client)))
            for client in call.clients
        )
        if self.gather is not None:
            return self.gather.together(self.method, call, jobs)
        return (perform(self.method, self.site, state, call, client, msg) for client, state, msg in jobs)


def _node(level: int, index: int, total: Sum | None) -> Value:
    return [level, index, None if total is None else total.packed()]


def _packed(outcome: Outcome, whole: bool) -> dict[Any, Value]:
    return {
        "client": outcome.client,
        "reply": outcome.reply if whole else {},
        "sizes": dict(outcome.sizes),
        "logs": dict(outcome.logs),
        "steps": outcome.steps,
        "labels": outcome.labels,
        "state": outcome.state,
    }
