"""As over a network, without one: every message and state is encoded and decoded, the method rebuilt for every call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from fedloom import encoding, message
from fedloom.calls import Call, Outcome
from fedloom.engines import wired
from fedloom.engines.base import Engine
from fedloom.engines.perform import perform
from fedloom.message import Value


class Loopback(Engine):
    """Shows that a method would survive a deployment: nothing but encoded bytes passes between server and client."""

    def run(self, call: Call, clients: Iterable[int]) -> Iterator[Outcome]:
        for client in clients:
            method = type(self.method)(**over_the_wire(self.method.fields()))
            msg = message.deliver(self._arrived(call.message(client)))
            state = self._arrived(self.states.get(client, {}))
            outcome = perform(method, self.site, state, call, client, msg)
            kept = None if outcome.state is None else self._arrived(outcome.state)
            arrived = replace(outcome, reply=self._arrived(outcome.reply), state=kept)
            self.commit(call, arrived)
            yield arrived

    def _arrived(self, msg: Mapping[str, Value]) -> dict[str, Value]:
        return self.site.to_device(over_the_wire(msg))


def over_the_wire(msg: Mapping[str, Value]) -> dict[str, Value]:
    """A message as it arrives; its bytes must be exactly as many as the ledger counts."""
    data = encoding.encode(msg)
    counted = sum(encoding.sizes(msg).values())
    if len(data) != counted:
        raise AssertionError(f"the ledger counts {counted} bytes for a message of {len(data)}")
    return wired.decode(data)
