"""One client after the other, in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedloom import message
from fedloom.calls import Call, Outcome
from fedloom.engines.base import Engine
from fedloom.engines.perform import perform


class Serial(Engine):
    """The reference: messages are handed over as they are, read-only and without a copy."""

    def run(self, call: Call, clients: Iterable[int]) -> Iterator[Outcome]:
        shared = message.deliver(call.shared)
        for client in clients:
            msg = {**shared, **message.deliver(call.own.get(client, {}))}
            outcome = perform(self.method, self.site, self.states.get(client, {}), call, client, msg)
            self.commit(call, outcome)
            yield outcome
