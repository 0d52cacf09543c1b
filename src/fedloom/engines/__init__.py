"""Engines carry a client-function call to where the client lives. One file each; this is what they share."""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Container, Generator, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

from fedloom import encoding, message
from fedloom.engines import heap
from fedloom.errors import CodecError, RunError, UsageError, unknown
from fedloom.mean import Sum, Tree, parted
from fedloom.message import Sparse
from fedloom.node import Client
from fedloom.random import seeded
from fedloom.site import Site
from fedloom.vector import Vector

if TYPE_CHECKING:
    from fedloom.message import Value
    from fedloom.method import Method

RESERVED = frozenset(
    {"client", "staleness", "seconds", "count", "weight", "missing", "fields", "envelope"}
)  # names a reply may not use
ENGINES = {"serial": "Serial", "loopback": "Loopback", "pool": "Pool", "ray": "Ray", "vectorized": "Vectorized"}


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


class ClientError(RunError):
    """A client function failed; says which, where, and what it had been sent."""


class Engine(ABC):
    """Carries calls to clients. Every engine gives bitwise the same results."""

    def __init__(self, workers: int = 0, threads: int = 1) -> None:
        self.workers = workers
        self.threads = threads

    def start(self, method: Method, site: Site, states: MutableMapping[int, dict[str, Value]]) -> None:
        """Before the first call: the method, the site of the server's process, and the clients' states."""
        self.method = method
        self.site = site
        self.states = states
        self.launched: deque[tuple[Call, int]] = deque()
        heap.keep()

    @abstractmethod
    def run(self, call: Call, clients: Iterable[int]) -> Iterator[Outcome]:
        """The outcomes, in the order of `clients`; a client's state is committed before its outcome is given.

        Not so if the call is `held`: then `keep` does that.
        """

    def reduce(
        self, call: Call, clients: Iterable[int], lost: Container[int], weight: str | None
    ) -> Generator[Outcome, None, Sum | None]:
        """The outcomes of `clients` without their replies; returns the sum of the replies of all that are not `lost`.

        The sum runs along the tree over the places of `call.clients`, those of absent clients being empty.
        """
        tree, places = Tree(), {client: place for place, client in enumerate(call.clients)}
        for outcome in self.run(call, clients):
            place = places[outcome.client]
            while tree.pushed < place:
                tree.push(None)
            tree.push(None if outcome.client in lost else weighed(self.site, call, outcome, weight))
            yield replace(outcome, reply={})
        return tree.total()

    def commit(self, call: Call, outcome: Outcome) -> bool:
        """Keeps what a client remembers from now on, if that is new; evaluation leaves no trace."""
        if outcome.state is None or call.kind == "evaluate" or call.held:
            return False
        self.states[outcome.client] = outcome.state
        return True

    def keep(self, client: int, state: dict[str, Value] | None) -> None:
        """Commits what a client remembers after a `held` call, its reply having counted; None: as before."""
        if state is not None:
            self.states[client] = state

    def launch(self, call: Call, clients: Iterable[int]) -> None:
        """Starts work whose outcomes `land` gives one by one as they come, in real time; the call is `held`.

        An engine without workers does the work in `land`, in the order in which it was launched.
        """
        self.launched.extend((call, client) for client in clients)

    def land(self, patience: float | None = None) -> tuple[Call, Outcome] | None:
        """The next outcome of launched work; None if none is under way, or none came within `patience` seconds."""
        if not self.launched:
            return None
        call, client = self.launched.popleft()
        return call, next(iter(self.run(call, [client])))

    def stop(self) -> None:
        """After the last call, also when the run failed."""


def build(name: str, workers: int = 0, threads: int = 1) -> Engine:
    """The engine of that name, with so many workers of so many threads where it has some.

    0 workers are one a core; for `vectorized`, none: it trains in this process.
    """
    if name not in ENGINES:
        raise unknown("engine", name, [*ENGINES, "auto"])
    if name == "vectorized" and workers > 1:
        from fedloom.engines.pool import Pool

        return Pool(workers, threads, together=True)
    engine: type[Engine] = getattr(importlib.import_module(f"fedloom.engines.{name}"), ENGINES[name])
    return engine(workers, threads)


def received(site: Site, call: Call, outcome: Outcome) -> dict[str, Value]:
    """A reply as the server takes it, once the layers it went through have undone what they did for the way."""
    reply = outcome.reply
    for layer in reversed(site.layers):
        if call.kind in layer.kinds:
            reply = layer.arrive(call, outcome.client, reply, site)
    return reply


def weighed(site: Site, call: Call, outcome: Outcome, weight: str | None) -> Sum:
    """A reply times its weight."""
    return Sum.of(*parted(f"mean of {call.function}", outcome.client, received(site, call, outcome), weight))


def perform(
    method: Method, site: Site, state: Mapping[str, Value], call: Call, client_id: int, msg: Mapping[str, Value]
) -> Outcome:
    """Runs one client function here and now."""
    client = Client(site, client_id, message.deliver(state), call.kind, call.round, call.nth)
    msg = site.at_home(dict(msg))

    def act() -> dict[str, Value]:
        heard = {name: value for name, value in msg.items() if not name.startswith("_")}  # those are for the layers
        returned = attrgetter(call.function)(method)(client, **heard)
        reply = {} if returned is None else returned
        if not isinstance(reply, dict):
            raise TypeError(f"a client function returns a dict of fields or None, not a {type(reply).__name__}")
        return site.at_home(reply)

    for layer in site.layers:
        if call.kind in layer.kinds:
            act = partial(layer.around, client, call, msg, act)
    try:
        with seeded(site.seed, *client.key, "torch"):
            reply = act()
        sizes = _inspected(reply)
    except Exception as error:
        raise ClientError(
            f"client {client_id}, round {call.round}, {method.name()}.{call.function}: "
            f"{_why(error)} [sent: {_shapes(msg)}]"
        ) from error
    logs = {name: sum(_floats(logged)) / len(logged) for name, logged in client.logs.items()}
    return Outcome(client_id, reply, sizes, logs, client.steps, client.state.values_ if client.state.changed else None)


def _why(error: Exception) -> str:
    """What went wrong in a client, in words."""
    if "more than 1 value per channel" in str(error):
        return (
            "BatchNorm cannot train on one row, and the client's rows leave one over for the last batch; take another "
            "batch size (batch=...), or a network without BatchNorm"
        )
    return str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"


def _floats(logged: Sequence[float | torch.Tensor]) -> list[float]:
    """The numbers that a client logged, read from its device all at once."""
    tensors = [number for number in logged if isinstance(number, torch.Tensor)]
    if 1 < len(tensors) == len(logged) and len({tensor.device for tensor in tensors}) == 1:
        numbers: list[float] = torch.stack([tensor.double().reshape(()) for tensor in tensors]).tolist()
        return numbers
    return [float(number) for number in logged]


def _inspected(reply: dict[str, Value]) -> dict[str, int]:
    """The sizes of a reply that may leave its client."""
    sizes = encoding.sizes(reply)
    for field, value in reply.items():
        if field in RESERVED:
            raise CodecError(f"a reply has no field called {field!r}; choose another name")
        if not finite(value):
            raise ValueError(
                f"the field {field!r} of the reply has NaN or infinite numbers; a lower lr or clipping usually helps"
            )
    return sizes


def finite(value: Any) -> bool:
    """Whether all numbers in a value are: neither NaN nor infinite."""
    if isinstance(value, Vector):
        return finite(value.flat)
    if isinstance(value, Sparse):
        return finite(value.values)
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            return finite(torch.view_as_real(value.resolve_conj()))
        if value.is_floating_point() and value.itemsize == 1:
            value = value.float()  # float8 knows no arithmetic
        # A sum is finite unless a number in it is not, or it overflows: only then look at each.
        return not value.is_floating_point() or math.isfinite(value.sum().item()) or bool(value.isfinite().all())
    if isinstance(value, float):
        return value - value == 0
    if isinstance(value, dict):
        return all(finite(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return all(finite(inner) for inner in value)
    return True


def _shapes(msg: Mapping[str, Any]) -> str:
    def shape(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if hasattr(value, "layout"):
            return f"Vector[{value.layout.size}]"
        return type(value).__name__

    return ", ".join(f"{name}: {shape(value)}" for name, value in msg.items()) or "nothing"


__all__ = ["ENGINES", "Call", "ClientError", "CodecError", "Engine", "Outcome", "build", "perform"]
