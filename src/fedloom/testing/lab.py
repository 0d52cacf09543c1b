"""Runs one method on small problems, and compares what the runs leave."""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from fedloom import encoding, message
from fedloom.calls import ASKED, ONCE, SILENT, SUMMED, Call, Outcome
from fedloom.deploy.strict import Strict
from fedloom.engines import build as build_engine
from fedloom.engines.base import Engine
from fedloom.engines.loopback import Loopback
from fedloom.engines.serial import Serial
from fedloom.errors import UsageError
from fedloom.message import Sparse
from fedloom.method import Method
from fedloom.runs.experiment import Experiment
from fedloom.runs.record import Run
from fedloom.runs.spec import Spec
from fedloom.site import Site
from fedloom.task import Task
from fedloom.tasks.toy import toy_for
from fedloom.vector import Vector
from fedloom.world import World

ROUNDS = 3
LOST = 0.5  # of the replies, where some are
SEVEN = (12, 9, 15, 10, 13, 11, 8)  # training samples of as many clients


class ContractError(AssertionError):
    """A method breaks the contract."""


class Lab:
    """Runs one method on toy problems; what several checks need is run once."""

    def __init__(self, method: Method | type[Method], device: str = "cpu") -> None:
        self.cls = method if isinstance(method, type) else type(method)
        self.given = None if isinstance(method, type) else method
        self.device = device

    @cached_property
    def method(self) -> Method:
        return self.given or self.cls(**self.cls.light)

    @cached_property
    def at_defaults(self) -> Lab:
        """The same method at its defaults; itself, if these are what it tries."""
        return Lab(self.cls(), self.device) if self.cls.light and self.given is None else self

    def begun(
        self, task: Task | None = None, engine: Engine | None = None, out: Path | None = None, **settings: Any
    ) -> Experiment:
        """An experiment about to run; `engine` replaces the one that the settings name."""
        given = {"method": self.method.to_spec(), "partition": "given", "rounds": ROUNDS, "device": self.device}
        return Experiment(Spec.of(given | settings), task or self.toy(), self.method, engine).begin(out)

    def experiment(self, task: Task | None = None, engine: Engine | None = None, **settings: Any) -> Experiment:
        """An experiment that has run."""
        made = self.begun(task, engine, **settings)
        made.go()
        return made

    def resumed(self, engine: str = "serial", workers: int = 0) -> Trace:
        """What a run leaves that was stopped after a round and resumed, both times on a new engine of this name."""

        def stop(row: Mapping[str, Any]) -> None:
            raise KeyboardInterrupt

        task = self.toy()
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.suppress(KeyboardInterrupt):
                self.begun(task, build_engine(engine, workers), Path(folder) / "run").go(stop)
            record = Run(Path(folder) / "run")
            again = Experiment(record.spec, task, self.method, build_engine(engine, workers)).take_up(record)
            again.go()
            return trace(again)

    def toy(self, **shape: Any) -> Task:
        """A small problem of the kind that the method needs, for clients of `sizes` training samples."""
        return toy_for(self.cls.needs, **shape)

    @cached_property
    def serial(self) -> Trace:
        """What the plain run leaves."""
        return trace(self.experiment())

    @cached_property
    def watched(self) -> tuple[Experiment, Watching]:
        """The plain run a second time, with all that crosses looked at."""
        watching = Watching()
        return self.experiment(engine=watching), watching

    @cached_property
    def losing(self) -> Experiment:
        """A run in which half of the replies are lost."""
        return self.experiment(lost=LOST)

    @cached_property
    def many(self) -> Trace:
        """What the plain run leaves with so many clients that robust rules have enough."""
        return trace(self.experiment(self.toy(sizes=SEVEN)))

    # Two changes that must leave every bit share a run: where it leaves the bits of the plain one, neither of them
    # matters. Where it does not, or fails, each is tried by itself, so that the complaint is of the right one.

    @cached_property
    def wired_backwards(self) -> bool:
        """Whether encoded messages and the reverse order together leave what the plain run leaves."""
        return self._unmoved(lambda: trace(self.experiment(engine=WiredBackwards())))

    @cached_property
    def resumed_in_pool(self) -> bool:
        """Whether a run in one worker process, stopped and resumed in another, leaves what the plain run leaves."""
        return self.device == "cpu" and self._unmoved(lambda: self.resumed("pool", 1))

    def _unmoved(self, run: Callable[[], Trace]) -> bool:
        with contextlib.suppress(Exception):
            return difference(self.serial, run()) is None
        return False


Trace = dict[str, Any]
TIMES = ("seconds", "eval_seconds")


def trace(experiment: Experiment) -> Trace:
    """All that an experiment leaves: server values, clients' states, metrics without times, ledger."""
    engine = experiment.engine
    remembered = engine.remembered() if isinstance(engine, Strict) else engine.states
    return {
        "server": dict(experiment.server.values),
        "states": {client: dict(state) for client, state in sorted(remembered.items())},
        "metrics": [without_times(row) for row in experiment.record.metrics],
        "ledger": list(experiment.record.ledger),
    }


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of metrics without what a clock measured."""
    return {name: value for name, value in row.items() if name not in TIMES}


def difference(one: Any, other: Any, path: str = "", nearly: float = 0.0) -> str | None:
    """Where two values differ, as a path and the two values; None if nowhere.

    They differ if any bit does; with `nearly`, numbers differ if they are farther apart, relative to 1 + the size of
    the largest beside them: what rounding leaves of a sum depends on its largest terms. Of the values that
    clients keep because they are sent once the names are left out then, for they are those of the bits.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{path}: {sorted(map(str, one))} and {sorted(map(str, other))}"
        if nearly and ONCE in one:
            one, other = _unnamed(one), _unnamed(other)
        inner = ((one[key], other[key], f"{path}.{key}") for key in one)
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        inner = ((a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True)))
    elif nearly and _close(one, other, nearly):
        return None
    else:
        return None if encoding.same(one, other) else f"{path.lstrip('.')}: {_short(one)} and {_short(other)}"
    return next(filter(None, (difference(a, b, way, nearly) for a, b, way in inner)), None)


def _unnamed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A client's state with what it was sent once by field, and not by name."""
    return {**state, ONCE: {field: value for field, (_, value) in state[ONCE].items()}}


def _close(one: Any, other: Any, nearly: float) -> bool:
    if isinstance(one, Vector) and isinstance(other, Vector) and one.layout == other.layout:
        one, other = one.flat, other.flat
    if isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape and one.is_floating_point():
        if not one.numel():
            return True
        one, other = one.double(), other.double()
        return bool((one - other).abs().max() <= nearly * (1 + one.abs().max()))
    return isinstance(one, float) and isinstance(other, float) and abs(one - other) <= nearly * (1 + abs(one))


def _short(value: Any) -> str:
    flat = value.flat if isinstance(value, Vector) else value
    return f"{flat.flatten()[:3].tolist()}..." if isinstance(flat, Tensor) else repr(value)[:80]


def require(holds: bool, complaint: str) -> None:
    """Raises ContractError with the complaint unless it holds."""
    if not holds:
        raise ContractError(complaint)


def accepted(lab: Lab, begun: Callable[[], Experiment], declared: str, what: str) -> Experiment | None:
    """An experiment that has begun; None where it is refused, which a class variable must declare."""
    try:
        return begun()
    except UsageError as refused:
        declares = any(getattr(one, declared) for one in lab.method.nested)
        require(declares, f"{what} is refused, and nothing declares {declared}: {refused}")
        return None


def alike(
    one: Trace, other: Trace, what: str, parts: Iterable[str] = ("server", "states", "metrics", "ledger")
) -> None:
    """Requires that two traces agree in every bit of the named parts."""
    for part in parts:
        found = difference(one[part], other[part], part)
        require(found is None, f"{what}: {found}")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor inside a message value."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Vector):
        yield value.flat
    elif isinstance(value, Sparse):
        yield value.values
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors_in(inner)


class Backwards(Serial):
    """Serves the clients in reverse order."""

    def run(self, call: Call, clients: Iterable[int]) -> Iterator[Outcome]:
        return iter(list(super().run(call, list(clients)[::-1]))[::-1])


class WiredBackwards(Loopback):
    """Serves the clients in reverse order, over a wire."""

    def run(self, call: Call, clients: Iterable[int]) -> Iterator[Outcome]:
        return iter(list(super().run(call, list(clients)[::-1]))[::-1])


class Watching(Serial):
    """Weighs every message, looks whether an argument was changed or given back, and counts the replies alive."""

    def start(self, method: Method, site: Site, states: MutableMapping[int, dict[str, Any]]) -> None:
        super().start(method, site, states)
        self.bytes = {"down": 0, "up": 0}
        self.asked: set[tuple[str, str, str]] = set()
        self.changed: list[str] = []
        self.aliased: list[str] = []
        self.alive: list[weakref.ref[Tensor]] = []
        self.most_alive = 0

    def run(self, call: Call, clients: Iterable[int]) -> Iterator[Outcome]:
        if call.function != "evaluate":
            self.asked.add((call.kind, call.verb, call.function))
        for client in clients:
            sent = call.message(client)
            before = message.copy(sent)
            remembered = message.copy(self.states.get(client, {}))
            state = self.states.get(client, {})
            for outcome in super().run(call, [client]):
                where = f"{call.function} at client {client}"
                if not encoding.same(before, sent):
                    self.changed.append(f"{where} changed its arguments ({difference(before, sent)})")
                if not encoding.same(remembered, state):
                    self.changed.append(
                        f"{where} changed a remembered value in place ({difference(remembered, state)})"
                    )
                mine = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(outcome.reply) if tensor.numel()}
                theirs = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(sent) if tensor.numel()}
                if mine & theirs:
                    self.aliased.append(f"{where} gave an argument back; send a copy, or nothing")
                if call.verb != "exchange" and call.kind != "evaluate":
                    self.bytes["down"] += 0 if call.verb == "work" else len(encoding.encode(sent))
                    self.bytes["up"] += 0 if call.verb in SILENT else len(encoding.encode(outcome.reply))
                if call.verb in SUMMED:
                    self.alive = [r for r in self.alive if r() is not None]
                    kept = {t.untyped_storage().data_ptr() for t in tensors_in(self.states.get(client, {}))}
                    sent_up = [t for t in tensors_in(outcome.reply) if t.untyped_storage().data_ptr() not in kept]
                    self.alive += [weakref.ref(tensor) for tensor in sent_up]
                    self.most_alive = max(self.most_alive, len(self.alive))
                yield outcome


class Unasked(Serial):
    """Does not ask a client whose reply would be lost; peers and who is told, who owe none, are asked all the same.

    What is submitted takes its time, and so it is done, and forgotten. Labels that such a client asks for are its own.
    """

    def __init__(self, lost: float) -> None:
        super().__init__()
        self.lost = lost

    def run(self, call: Call, clients: Iterable[int]) -> Iterator[Outcome]:
        world = World(self.site.task.population, lost=self.lost, seed=self.site.seed)
        for client in clients:
            owed = call.kind == "train" and call.verb not in ("exchange", *SILENT)
            lost = owed and world.loses(call.round, call.nth, client)
            if not lost:
                yield from super().run(call, [client])
            elif call.verb == "submit":
                yield from map(_labels_alone, super().run(call, [client]))
            elif "oracle" in self.method.needs:
                for outcome in super().run(call, [client]):
                    if asked := _labels_alone(outcome).state:
                        self.keep(client, {**self.states.get(client, {}), **asked})


def _labels_alone(outcome: Outcome) -> Outcome:
    """An outcome of which the client remembers nothing but the labels that it has asked for."""
    asked = {ASKED: outcome.state[ASKED]} if outcome.labels and outcome.state else None
    return replace(outcome, state=asked)
