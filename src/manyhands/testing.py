"""The contract that every method passes: ours, and with `manyhands check FILE.py` the users'.

Each check is a function of a `Lab`, which runs the method on a toy problem and remembers what came out. A check fails
with one line that says what was seen and what the rule is.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyhands import encoding, message
from manyhands.engines import Call, Engine, Outcome
from manyhands.engines import build as build_engine
from manyhands.engines.serial import Serial
from manyhands.errors import UsageError
from manyhands.experiment import Experiment
from manyhands.message import Sparse
from manyhands.method import Method, build, method_class_in
from manyhands.record import Run
from manyhands.site import Site
from manyhands.spec import Spec
from manyhands.task import Task
from manyhands.tasks.toy import Toy
from manyhands.vector import Vector
from manyhands.world import World

ROUNDS = 3
LEARNING_ROUNDS = 12
LEARNED = 0.8  # accuracy of three well separated clouds; guessing gives a third


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
        return self.given or self.cls()

    def experiment(self, task: Task | None = None, engine: Engine | None = None, **settings: Any) -> Experiment:
        """An experiment that has run; `engine` replaces the one that the settings name."""
        fields = self.method.described()
        given = {"method": fields, "partition": "given", "rounds": ROUNDS, "device": self.device} | settings
        made = Experiment(Spec.of(given), task or self.toy(), self.method).begin(None)
        if engine is not None:
            made.engine = made.boundary.engine = engine
        made.go(report=False)
        return made

    def toy(self, **shape: Any) -> Task:
        """A small problem of the kind that the method needs, for clients of `sizes` training samples."""
        kinds = [need for need in self.cls.needs if need != "public"]
        made: Task = importlib.import_module(f"manyhands.tasks.{kinds[0]}").toy(**shape) if kinds else Toy(**shape)
        return made

    @cached_property
    def serial(self) -> Trace:
        """What the plain run leaves."""
        return trace(self.experiment())


Trace = dict[str, Any]
FAILURES: tuple[dict[str, Any], ...] = ({"dropout": 0.5}, {"lost": 0.5}, {"dropout": 1.0}, {"lost": 1.0})
NEARLY = 1e-4  # what rounding may make of a value of size one in a few rounds
TIMES = ("seconds", "eval_seconds")


def trace(experiment: Experiment) -> Trace:
    """All that an experiment leaves: server values, clients' states, metrics without times, ledger."""
    return {
        "server": dict(experiment.server.values),
        "states": {client: dict(state) for client, state in sorted(experiment.engine.states.items())},
        "metrics": [without_times(row) for row in experiment.record.metrics],
        "ledger": list(experiment.record.ledger),
    }


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of metrics without what a clock measured."""
    return {name: value for name, value in row.items() if name not in TIMES}


def difference(one: Any, other: Any, path: str = "", nearly: float = 0.0) -> str | None:
    """Where two values differ, as a path and the two values; None if nowhere.

    They differ if any bit does; with `nearly`, numbers differ if they are farther apart, relative to 1 + their size.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{path}: {sorted(map(str, one))} and {sorted(map(str, other))}"
        inner = ((one[key], other[key], f"{path}.{key}") for key in one)
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        inner = ((a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True)))
    elif nearly and _close(one, other, nearly):
        return None
    else:
        return None if encoding.same(one, other) else f"{path.lstrip('.')}: {_short(one)} and {_short(other)}"
    return next(filter(None, (difference(a, b, way, nearly) for a, b, way in inner)), None)


def _close(one: Any, other: Any, nearly: float) -> bool:
    if isinstance(one, Vector) and isinstance(other, Vector) and one.layout == other.layout:
        one, other = one.flat, other.flat
    if isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape and one.is_floating_point():
        return torch.allclose(one, other, rtol=nearly, atol=nearly)
    return isinstance(one, float) and isinstance(other, float) and abs(one - other) <= nearly * (1 + abs(one))


def _short(value: Any) -> str:
    flat = value.flat if isinstance(value, Vector) else value
    return f"{flat.flatten()[:3].tolist()}..." if isinstance(flat, Tensor) else repr(value)[:80]


def require(holds: bool, complaint: str) -> None:
    """Raises ContractError with the complaint unless it holds."""
    if not holds:
        raise ContractError(complaint)


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
                    self.bytes["down"] += len(encoding.encode(sent))
                    self.bytes["up"] += len(encoding.encode(outcome.reply))
                if call.verb == "mean":
                    self.alive = [r for r in self.alive if r() is not None]
                    kept = {t.untyped_storage().data_ptr() for t in tensors_in(self.states.get(client, {}))}
                    sent_up = [t for t in tensors_in(outcome.reply) if t.untyped_storage().data_ptr() not in kept]
                    self.alive += [weakref.ref(tensor) for tensor in sent_up]
                    self.most_alive = max(self.most_alive, len(self.alive))
                yield outcome


class Unasked(Serial):
    """Does not ask a client whose reply would be lost; peers, who owe no reply, are asked all the same.

    What is submitted takes its time, and so it is done, and forgotten.
    """

    def __init__(self, lost: float) -> None:
        super().__init__()
        self.lost = lost

    def run(self, call: Call, clients: Iterable[int]) -> Iterator[Outcome]:
        world = World(self.site.task.population, lost=self.lost, seed=self.site.seed)
        for client in clients:
            lost = world.loses(call.round, call.nth, client) and call.kind == "train" and call.verb != "exchange"
            if not lost or call.verb == "submit":
                yield from (
                    replace(outcome, state=None) if lost else outcome for outcome in super().run(call, [client])
                )


def check_frozen(lab: Lab) -> None:
    """A method is a frozen dataclass that can be made without arguments, and its fields are values of messages."""
    require(dataclasses.is_dataclass(lab.cls), f"{lab.cls.__name__} is not a dataclass; write @dataclass(frozen=True)")
    frozen = lab.cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    require(frozen, f"{lab.cls.__name__} is not frozen; write @dataclass(frozen=True)")
    lacking = [
        f.name
        for f in dataclasses.fields(lab.cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    require(not lacking, f"fields without a default: {', '.join(lacking)}; give each the paper's")
    encoding.check(lab.method.fields(), "fields")
    require(
        lab.method == type(lab.method)(**lab.method.fields()),
        "the method is not equal to itself rebuilt from its fields",
    )


def check_spec_round_trip(lab: Lab) -> None:
    """Written to a spec and read again, it is the same method."""
    spec = Spec.of({"method": lab.method.described()})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.yaml"
        path.write_text(spec.text("0"))
        fields = dict(Spec.read(path).method)
    again = build(fields.pop("name"), fields)
    require(again.fields() == lab.method.fields(), f"{lab.method.fields()} comes back from a spec as {again.fields()}")


def check_file_rules(lab: Lab) -> None:
    """One class a file, no __init__, no generator of its own, no files, no devices, no global state."""
    path = Path(inspect.getsourcefile(lab.cls) or "")
    tree = ast.parse(path.read_text())
    cls = method_class_in(tree, path)
    for node in ast.walk(tree):
        line = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            raise ContractError(f"{line}: __init__; a method's fields are all it is, checks go into __post_init__")
        if isinstance(node, ast.Global | ast.Nonlocal):
            raise ContractError(
                f"{line}: {type(node).__name__.lower()} state; keep it in server values or client.state"
            )
        if isinstance(node, ast.Name) and node.id in ("open", "print"):
            raise ContractError(f"{line}: {node.id}; a method touches no files, and logs with node.log(name=number)")
        if isinstance(node, ast.Attribute) and node.attr in ("cuda", "manual_seed", "seed"):
            raise ContractError(
                f"{line}: .{node.attr}; devices belong to the engine, randomness comes from node.rng(purpose)"
            )
        imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        banned = {"random", "os", "time", "threading", "multiprocessing", "secrets"} & {
            n.split(".")[0] for n in imported
        }
        if banned:
            raise ContractError(f"{line}: import of {', '.join(sorted(banned))}; a method is mathematics over messages")
    require(
        bool(ast.get_docstring(cls)), f"{cls.name} has no docstring; say which question it answers and cite its paper"
    )


def check_repeats(lab: Lab) -> None:
    """The same seed gives the same bits, another seed gives others."""
    alike(lab.serial, trace(lab.experiment()), "two runs with one seed differ")
    other = trace(lab.experiment(seed=1))
    require(
        difference([lab.serial["server"], lab.serial["states"]], [other["server"], other["states"]]) is not None,
        "two seeds give bitwise the same result; randomness must come from node.rng(purpose)",
    )


def check_loopback(lab: Lab) -> None:
    """Encoded messages and a method rebuilt for every call change no bit."""
    alike(lab.serial, trace(lab.experiment(engine=build_engine("loopback"))), "serial and loopback differ")


def check_pool(lab: Lab) -> None:
    """Worker processes, which sum replies where they are made, change no bit."""
    for workers in (1, 2, 5) if lab.device == "cpu" else (2,):  # with a device, to start one takes seconds
        pool = trace(lab.experiment(engine=build_engine("pool", workers=workers)))
        alike(lab.serial, pool, f"serial and a pool of {workers} differ")


def check_vectorized(lab: Lab) -> None:
    """Clients that train as one batch leave the same, but for rounding; a `rough` method sends as many bytes."""
    alone, together = (
        trace(lab.experiment(lab.toy(sizes=(8, 20, 13)), build_engine(name), rounds=1))
        for name in ("serial", "vectorized")
    )
    if lab.method.rough:
        alike(alone, together, "serial and vectorized send other messages", ("ledger",))
        return
    for part in ("server", "states"):
        found = difference(alone[part], together[part], part, NEARLY)
        require(found is None, f"serial and vectorized differ by more than rounding: {found}")


def check_client_order(lab: Lab) -> None:
    """The order in which clients work changes no bit."""
    alike(lab.serial, trace(lab.experiment(engine=Backwards())), "the order in which clients work matters")


def check_evaluation_changes_nothing(lab: Lab) -> None:
    """Evaluating more or less often changes no bit."""
    seldom = trace(lab.experiment(eval_every=ROUNDS))
    alike(lab.serial, seldom, "evaluating less often changes the result", ("server", "states"))


def check_resume(lab: Lab) -> None:
    """Stopped after a round and resumed, it leaves bitwise what an uninterrupted run leaves."""

    def stop(row: Mapping[str, Any]) -> None:
        raise KeyboardInterrupt

    task = lab.toy()
    with tempfile.TemporaryDirectory() as folder:
        fields = lab.method.described()
        spec = Spec.of({"method": fields, "partition": "given", "rounds": ROUNDS, "device": lab.device})
        begun = Experiment(spec, task, lab.method).begin(Path(folder) / "run")
        with contextlib.suppress(KeyboardInterrupt):
            begun.go(stop, report=False)
        record = Run(Path(folder) / "run")
        again = Experiment(record.spec, task, lab.method).take_up(record)
        again.go(report=False)
        alike(lab.serial, trace(again), "a resumed run differs from an uninterrupted one")


def check_payload_bytes(lab: Lab) -> None:
    """The ledger counts exactly the bytes of the encoded messages."""
    made = lab.experiment(engine=(watching := Watching()))
    for way in ("down", "up"):
        lines = [line for line in made.record.ledger if line["direction"] == way and line["kind"] != "evaluate"]
        counted = sum(line["bytes"] * len(line["clients"]) for line in lines if line["verb"] != "exchange")
        if way == "up":  # a reply is booked when it arrives; the last ones of overlapping work never did
            coming = (outcome for _, _, job in made.boundary.flights.queue for outcome in job.outcomes)
            counted += sum(len(encoding.encode(outcome.reply)) for outcome in coming)
        require(
            counted == watching.bytes[way],
            f"{way}: the ledger counts {counted} bytes, encoded are {watching.bytes[way]}",
        )


def check_messages_untouched(lab: Lab) -> None:
    """No client function changes its arguments or what it remembers in place, or gives an argument back."""
    lab.experiment(engine=(watching := Watching()))
    require(not watching.changed, "; ".join(watching.changed[:1]))
    require(not watching.aliased, "; ".join(watching.aliased[:1]))


def check_plan(lab: Lab) -> None:
    """Every call that it makes can be read from its text, so that settings it cannot bear are refused beforehand."""
    lab.experiment(engine=(watching := Watching()))
    unplanned = watching.asked - {(call.kind, call.verb, call.function) for call in lab.method.plan}
    require(
        not unplanned,
        f"{sorted(unplanned)[:2]} cannot be read from its text; write cohort.VERB(self.FUNCTION, ...) in its boxes, or "
        "in functions that these call as self.NAME(...)",
    )


def check_lost_clients(lab: Lab) -> None:
    """Silent clients and lost replies, also all of them, leave a run that goes on with finite values."""
    for settings in FAILURES:
        if settings.keys() & lab.method.refuses.keys():
            continue
        _healthy(lab.experiment(rounds=2, **settings), str(settings))


def check_lost_is_unasked(lab: Lab) -> None:
    """A client whose reply is lost goes on as if it had not been asked, and so does the server."""
    if "lost" not in lab.method.refuses:
        lost, unasked = (trace(lab.experiment(lost=0.4, engine=engine)) for engine in (None, Unasked(0.4)))
        alike(lost, unasked, "a client whose reply was lost remembers what did not count", ("server", "states"))


def check_small_cohorts(lab: Lab) -> None:
    """A cohort of one client, and a client with one sample, work."""
    if "cohort" not in lab.method.refuses:
        _healthy(lab.experiment(cohort=1), "cohort=1")
    _healthy(lab.experiment(lab.toy(sizes=(1, 9, 12, 20)), rounds=2), "a client with one sample")


def check_batch_norm(lab: Lab) -> None:
    """A network with running statistics works, the same over a wire, or is refused."""
    task = lab.toy(norm=True, sizes=(30, 20, 25, 35))
    try:
        plain = lab.experiment(task, rounds=2)
    except UsageError:
        return  # refused in words
    _healthy(plain, "a network with BatchNorm")
    wired = trace(lab.experiment(task, rounds=2, engine=build_engine("loopback")))
    alike(trace(plain), wired, "with BatchNorm, serial and loopback differ")


def check_constant_memory(lab: Lab) -> None:
    """Under `mean`, the number of replies in memory does not grow with the cohort."""
    few, many = Watching(), Watching()
    lab.experiment(lab.toy(sizes=(12,) * 3), few, rounds=1)
    lab.experiment(lab.toy(sizes=(12,) * 12), many, rounds=1)
    require(
        many.most_alive <= max(few.most_alive, 2) * 2,
        f"{few.most_alive} tensors of replies are alive with 3 clients and {many.most_alive} with 12",
    )


def check_learns(lab: Lab) -> None:
    """It learns three well separated clouds, or what else its small problem asks for."""
    made = lab.experiment(rounds=LEARNING_ROUNDS, eval_every=LEARNING_ROUNDS)
    final = made.record.final
    name, least = getattr(made.task, "goal", ("accuracy", LEARNED))
    measure = f"{'global' if lab.method.global_model else 'personal'}_test_{name}"
    require(final[measure] >= least, f"{measure} is {final[measure]:.3g} after {LEARNING_ROUNDS} rounds, below {least}")


CHECKS: tuple[Callable[[Lab], None], ...] = tuple(
    function for name, function in list(globals().items()) if name.startswith("check_")
)

OnCheck = Callable[[str, str | None, float], object]


def check_method(
    method: Method | type[Method],
    checks: Sequence[Callable[[Lab], None]] = CHECKS,
    on_check: OnCheck = lambda name, problem, seconds: None,
    device: str = "cpu",
) -> None:
    """Puts a method through the contract; raises ContractError with a line for every check that fails.

    `on_check(name, problem or None, seconds)` is told of every check as it ends.
    """
    lab, problems = Lab(method, device), []
    for check in checks:
        began = time.perf_counter()
        problem = None
        try:
            check(lab)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong under a check is what the check found
            problem = str(error) if isinstance(error, ContractError) else f"{type(error).__name__}: {error}"
            problems.append(f"{title(check)}: {problem}")
        on_check(title(check), problem, time.perf_counter() - began)
    if problems:
        raise ContractError("\n".join(problems))


def title(check: Callable[[Lab], None]) -> str:
    """A check's name in words."""
    return check.__name__.removeprefix("check_").replace("_", " ")


def _healthy(made: Experiment, where: str) -> None:
    rows = made.record.metrics
    require(len(rows) == made.spec.rounds, f"{where}: {len(rows)} of {made.spec.rounds} rounds were recorded")
    for name, value in made.server.values.items():
        for tensor in tensors_in(value):
            finite = not tensor.is_floating_point() or bool(tensor.isfinite().all())
            require(finite, f"{where}: server.{name} is no longer finite")
