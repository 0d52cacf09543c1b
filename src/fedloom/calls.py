"""A call of a client function, and what comes of it at one client: all that engines and the boundary exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from fedloom.errors import RunError

if TYPE_CHECKING:
    from fedloom.message import Value

Fields = dict[str, Any]  # what a client function returns

ONCE = "_once"  # the field of a message, and of a client's state, in which lie names of what it is sent once
ASKED = "_asked"  # in a client's state: rows of the storage whose labels it has asked for, in that order
SUMMED = frozenset({"mean", "means"})  # verbs of which the server gets averages only
SILENT = frozenset({"tell", "work"})  # verbs by which a client owes no reply

RESERVED = frozenset(
    {"client", "staleness", "seconds", "count", "weight", "missing", "fields", "envelope"}
)  # names a reply may not use


@dataclass(frozen=True)
class Call:
    """One client function, asked of some clients with one message; `own` is what only one client gets."""

    verb: str
    function: str
    clients: tuple[int, ...]
    shared: Mapping[str, Value]
    own: Mapping[int, Mapping[str, Value]]
    kind: str  # setup, train, finish or evaluate: each has streams of its own
    round: int
    nth: int  # number of the call within its round and kind
    held: bool = False  # states are kept when a reply counts, not as soon as its client has worked
    version: int = 0  # of the model, when it was asked
    groups: Mapping[int, int | str] | None = None  # under `means`: whose reply goes into which mean
    group: int | str | None = None  # of a part of such a call: which
    pace: float = 1.0  # times the method's learning rate is the clients' in this call

    @property
    def parts(self) -> dict[int | str | None, Call]:
        """By group, the part of the call that is its clients'; without groups the call is the only one.

        What all clients of a group are sent is its part's shared message.
        """
        if self.groups is None:
            return {None: self}
        members: dict[int | str, list[int]] = {}
        for client in self.clients:
            members.setdefault(self.groups[client], []).append(client)
        return {group: self._part(group, tuple(clients)) for group, clients in members.items()}

    def _part(self, group: int | str, clients: tuple[int, ...]) -> Call:
        own = {client: self.own[client] for client in clients if client in self.own}
        alike = {
            field: value
            for field, value in self.own.get(clients[0], {}).items()
            if all(field in its and its[field] is value for its in (self.own.get(client, {}) for client in clients))
        }
        shared = {**self.shared, **alike}
        return replace(self, clients=clients, shared=shared, own=own, groups=None, group=group)

    @property
    def place(self) -> str:
        """What is remembered from round to round of calls like this one is remembered under this name."""
        return self.function if self.group is None else f"{self.function} of {self.group!r}"

    @property
    def key(self) -> tuple[int | str, ...]:
        """Its place among the calls of a kind, and among the parts of one, for random streams."""
        return (self.round, self.nth) if self.group is None else (self.round, self.nth, repr(self.group))

    def message(self, client: int) -> dict[str, Value]:
        """What that client gets."""
        return {**self.shared, **self.own.get(client, {})}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a call at one client."""

    client: int
    reply: dict[str, Value]  # empty where a worker has already added it to a sum
    sizes: Mapping[str, int]  # encoded bytes of the reply, by field
    logs: Mapping[str, float]
    steps: int  # gradients taken
    state: dict[str, Value] | None = None  # the client's new state; None if it did not change
    fault: str | None = None  # why the server turns the reply away
    labels: int = 0  # that it has asked for, and so paid for


class ClientError(RunError):
    """A client function failed; says which, where, and what it had been sent."""


class Layer:
    """Wraps the client functions of a run in whatever process they run; methods know nothing of it.

    A layer is frozen data, as a method is: it travels to the workers. What it remembers of a client is in
    `client.state` under names that begin with an underscore; its draws come from `client.rng(purpose)` under purposes
    that begin with its own name, so that it moves no stream of the method's.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"train"})  # of calls that it acts in
    guards: ClassVar[bool] = False  # it guards gradients, so that no clients take theirs together

    def receive(self, client: Any, call: Call, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a message is when it reaches a `node.Client`, before anything is made of it."""
        return message

    def around(self, client: Any, call: Call, message: Mapping[str, Any], inner: Callable[[], Fields]) -> Fields:
        """The reply that leaves a `node.Client`; `inner` gives what the layers further inside make of it."""
        return inner()

    def arrive(self, call: Call, client: int, reply: Fields, site: Any = None) -> Fields:
        """What the server takes a reply for at its `site.Site`: undoes what `around` did for the way."""
        return reply
