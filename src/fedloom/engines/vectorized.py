"""Many small clients as one batch dimension, in this process or in the worker processes of a pool."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from itertools import islice

from fedloom import message
from fedloom.calls import Call, Outcome
from fedloom.engines.base import Engine
from fedloom.engines.gather import Gather
from fedloom.message import Value
from fedloom.method import Method
from fedloom.site import Site

AT_ONCE_BYTES = 256 * 2**20  # of models in one batch of clients


class Vectorized(Engine):
    """Serves clients in batches. Results agree with `serial` to rounding, not bitwise: sums run in another order."""

    def start(self, method: Method, site: Site, states: MutableMapping[int, dict[str, Value]]) -> None:
        super().start(method, site, states)
        self.gather = Gather(site)

    def run(self, call: Call, clients: Iterable[int]) -> Iterator[Outcome]:
        shared = message.deliver(dict(call.shared))
        left = iter(clients)
        while batch := list(islice(left, at_once(self.site))):
            jobs = [
                (client, self.states.get(client, {}), {**shared, **message.deliver(dict(call.own.get(client, {})))})
                for client in batch
            ]
            for outcome in self.gather.together(self.method, call, jobs):
                self.commit(call, outcome)
                yield outcome


def at_once(site: Site) -> int:
    """How many clients fit into one batch."""
    return max(1, min(512, AT_ONCE_BYTES // (4 * max(1, site.bench.layout.size))))
