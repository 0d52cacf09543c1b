"""What each client would use: what its `predict` gives, asked for beside the protocol, so that no byte is booked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedloom import message
from fedloom.cohort import Each, Once
from fedloom.method import Method
from fedloom.node import Client
from fedloom.plugin import Plugin
from fedloom.random import seeded
from fedloom.runs.evaluation import Subject
from fedloom.runs.parts import Parts

ELSEWHERE = (
    "the models of clients are with them: each judged its own, of which its replies' measures are here, and has it in "
    "a file beside its state"
)
FUNCTION = "what is judged is a function of more than one network's weights"


def personalises(method: Method) -> bool:
    """Whether clients use something else than the global model: a `predict` of the method's own."""
    return any(type(one).predict not in (Method.predict, Plugin.predict) for one in method.nested)


def models(parts: Parts, round: int, subject: Subject) -> Iterator[tuple[Client, Any]]:
    """Each client that was judged in a round, and what it was judged by; of several models the main one.

    A client draws the same random numbers as when it was judged.
    """
    # A plug-in may send more than it predicts by, to judge with; then the method inside is asked.
    nested, site = parts.method_in(round).nested, parts.site
    method = next(one for one in nested if type(one).predict is not Plugin.predict)
    told = method.predict_message(parts.server, subject.clients)
    for number in subject.clients:
        state = parts.engine.states.get(number, {})
        client = Client(site, number, message.deliver(state), "evaluate", round, subject.nth)
        sent = {name: _of(value, number) for name, value in told.items()}
        with seeded(site.seed, *client.key, "torch"):
            judged = method.predict(client, **site.to_device(message.deliver(sent)))
        yield client, next(iter(judged.values())) if isinstance(judged, Mapping) else judged


def _of(value: Any, client: int) -> Any:
    """A client's part of a message."""
    value = value[client] if isinstance(value, Each) else value
    return value.value if isinstance(value, Once) else value
