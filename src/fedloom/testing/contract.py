"""The contract that every method passes: ours, and with `fedloom check FILE.py` the users'.

Each check is a function of a `Lab`, which runs the method on a toy problem and remembers what came out. A check fails
with one line that says what was seen and what the rule is.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import tempfile
from pathlib import Path
from typing import Any

from fedloom import encoding
from fedloom.engines import build as build_engine
from fedloom.errors import RunError, UsageError
from fedloom.method import build
from fedloom.phases import Span, spans
from fedloom.plugin import welcomes
from fedloom.registry import method_class_in
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.sources import functions_of
from fedloom.tasks import regression
from fedloom.tasks.toy import MET, HeadlessToy, blocks_for
from fedloom.testing.lab import (
    LOST,
    ROUNDS,
    Backwards,
    ContractError,
    Lab,
    Unasked,
    Watching,
    WiredBackwards,
    accepted,
    alike,
    difference,
    require,
    tensors_in,
    trace,
)

LEARNING_ROUNDS = 12
LEARNED = 0.8  # accuracy of three well separated clouds; guessing gives a third
FAILURES: tuple[dict[str, Any], ...] = ({"dropout": 0.5}, {"lost": LOST}, {"dropout": 1.0}, {"lost": 1.0})
NEARLY = 1e-4  # what rounding may make of a value of size one in a few rounds


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
    if strange := lab.cls.light.keys() - {f.name for f in dataclasses.fields(lab.cls)}:
        raise ContractError(f"light names {', '.join(sorted(strange))}, which is no field of {lab.cls.__name__}")
    encoding.check(lab.method.fields(), "fields")
    require(
        lab.method == type(lab.method)(**lab.method.fields()),
        "the method is not equal to itself rebuilt from its fields",
    )


def check_spec_round_trip(lab: Lab) -> None:
    """Written to a spec and read again, it is the same method."""
    spec = Spec.of({"method": lab.method.to_spec()})
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
    again, _ = lab.watched
    alike(lab.serial, trace(again), "two runs with one seed differ")
    other = trace(lab.experiment(seed=1))
    require(
        difference([lab.serial["server"], lab.serial["states"]], [other["server"], other["states"]]) is not None,
        "two seeds give bitwise the same result; randomness must come from node.rng(purpose)",
    )


def check_loopback(lab: Lab) -> None:
    """Encoded messages and a method rebuilt for every call change no bit."""
    if not lab.wired_backwards:
        alike(lab.serial, trace(lab.experiment(engine=build_engine("loopback"))), "serial and loopback differ")


def check_pool(lab: Lab) -> None:
    """Worker processes, which sum replies where they are made, change no bit."""
    one = () if lab.resumed_in_pool else (1,)
    for workers in (*one, 2, 5) if lab.device == "cpu" else (2,):  # with a device, to start one takes seconds
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
    if not lab.wired_backwards:
        for engine in (Backwards(), WiredBackwards()):
            alike(lab.serial, trace(lab.experiment(engine=engine)), "the order in which clients work matters")


def check_evaluation_changes_nothing(lab: Lab) -> None:
    """Evaluating more or less often changes no bit."""
    seldom = trace(lab.experiment(eval_every=ROUNDS))
    alike(lab.serial, seldom, "evaluating less often changes the result", ("server", "states"))


def check_resume(lab: Lab) -> None:
    """Stopped after a round and resumed, it leaves bitwise what an uninterrupted run leaves, also in new processes."""
    if not lab.resumed_in_pool:
        for engine in ("serial", "pool") if lab.device == "cpu" else ("serial",):
            alike(lab.serial, lab.resumed(engine, 1), f"a run resumed on {engine} differs from an uninterrupted one")


def check_payload_bytes(lab: Lab) -> None:
    """The ledger counts exactly the bytes of the encoded messages."""
    made, watching = lab.watched
    shipped = [line for line in made.record.ledger if line["verb"] == "ship"]
    for line in shipped:
        field = len(encoding.encode({"x": made.server.shared_data.x})) - len(encoding.encode({}))
        require(
            line["clients"] == [*made.everybody] and line["bytes"] in (field, len(encoding.encode({}))),
            f"the shared data are booked as {line}, and to each of {len(made.everybody)} clients go {field} bytes once",
        )
    require(
        sorted(line["field"] for line in shipped) == (["envelope", "x"] if "shared_data" in lab.method.needs else []),
        f"the ledger has the shared data as {shipped}; they are sent once, to the clients of methods that need them",
    )
    for way in ("down", "up"):
        lines = [line for line in made.record.ledger if line["direction"] == way and line["kind"] != "evaluate"]
        lines = [line for line in lines if line["verb"] != "ship"]
        counted = sum(line["bytes"] * len(line["clients"]) for line in lines if line["verb"] != "exchange")
        if way == "up":  # a reply is booked when it arrives; the last ones of overlapping work never did
            coming = (outcome for _, _, job in made.boundary.pending.queue for outcome in job.outcomes)
            counted += sum(len(encoding.encode(outcome.reply)) for outcome in coming)
        require(
            counted == watching.bytes[way],
            f"{way}: the ledger counts {counted} bytes, encoded are {watching.bytes[way]}",
        )


def check_messages_untouched(lab: Lab) -> None:
    """No client function changes its arguments or what it remembers in place, or gives an argument back."""
    _, watching = lab.watched
    require(not watching.changed, "; ".join(watching.changed[:1]))
    require(not watching.aliased, "; ".join(watching.aliased[:1]))


def check_plan(lab: Lab) -> None:
    """Every call that it makes can be read from its text, so that settings it cannot bear are refused beforehand."""
    _, watching = lab.watched
    unplanned = watching.asked - {(call.kind, call.verb, call.function) for call in lab.method.plan}
    require(
        not unplanned,
        f"{sorted(unplanned)[:2]} cannot be read from its text; write cohort.VERB(self.FUNCTION, ...) in its boxes, or "
        "in functions that these call as self.NAME(...)",
    )


def check_phases(lab: Lab) -> None:
    """The phases of a run are known before it, and stay what they are."""
    made, _ = lab.watched
    before, after = (spans(lab.method.phases(server)) for server in (lab.begun().server, made.server))
    require(
        before == after,
        f"its phases are {_named(before)} before a run and {_named(after)} after it; make them of the fields, "
        "server.population and server.planned alone",
    )


def check_declared_values(lab: Lab) -> None:
    """What a box sets on the server is declared in `setup`, also where the small problem never comes to it."""
    stored = {
        name: [
            node.attr
            for node in ast.walk(box)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if isinstance(node.value, ast.Name) and node.value.id == "server"
        ]
        for name, box in functions_of([lab.cls]).items()
    }
    declared = {*lab.serial["server"], *stored.get("setup", ())}
    for box, name in ((box, name) for box, names in stored.items() for name in names if name not in declared):
        raise ContractError(
            f"{box} sets server.{name}, which setup does not declare; write server.{name} = ... there, or None until "
            "it has a value"
        )


def check_lost_clients(lab: Lab) -> None:
    """Silent clients and lost replies, also all of them, leave a run that goes on with finite values."""
    for settings in FAILURES:
        if settings.keys() & lab.method.refuses.keys():
            continue
        made = lab.losing if settings == {"lost": LOST} else lab.experiment(rounds=2, **settings)
        _healthy(made, str(settings))


def check_lost_is_unasked(lab: Lab) -> None:
    """A client whose reply is lost goes on as if it had not been asked, and so does the server."""
    if "lost" not in lab.method.refuses:
        unasked = trace(lab.experiment(lost=LOST, engine=Unasked(LOST)))
        what = "a client whose reply was lost remembers what did not count"
        alike(trace(lab.losing), unasked, what, ("server", "states"))


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


def check_newcomers(lab: Lab) -> None:
    """Newcomers leave no trace in what is learned, and are judged; or they are refused before the first round."""
    if not {*lab.cls.needs} <= {*MET}:
        return  # such problems hold no clients out
    try:
        made = lab.experiment(lab.toy(newcomers=(22,)))
    except UsageError as refused:
        expected = not welcomes(lab.method) or "newcomers" in lab.method.refuses
        require(expected and "newcomers" in str(refused), f"newcomers are refused: {refused}")
        return
    except RunError as failed:
        raise ContractError(f"a newcomer, whose state is empty, cannot be judged: {failed}") from failed
    found = trace(made)
    require(
        all(row["newcomer_test_accuracy"] is not None for row in found["metrics"]), "newcomers were judged by nothing"
    )
    for row, plain in zip(found["metrics"], lab.serial["metrics"], strict=True):
        for name in row.keys() - plain.keys():
            require(name.startswith("newcomer_test_"), f"with newcomers the record has {name}")
            del row[name]
        for name in ("eval_up_bytes", "eval_down_bytes"):
            row[name] = plain[name]
    found["ledger"] = [line for line in found["ledger"] if line["function"] != "judge_newcomer"]
    alike(lab.serial, found, "newcomers are noticed by those who train")


def check_regression(lab: Lab) -> None:
    """It learns to predict a number too, or declares `by_class` and refuses such a problem before the first round."""
    if not {*lab.cls.needs} <= {*MET} - {"encoder"}:
        return
    blocks = blocks_for(lab.cls.needs)
    made = accepted(
        lab,
        lambda: lab.at_defaults.begun(
            regression.toy(blocks=blocks), rounds=LEARNING_ROUNDS, eval_every=LEARNING_ROUNDS
        ),
        "by_class",
        "a problem of regression",
    )
    if made is None:
        return
    try:
        made.go()
    except RunError as failed:
        raise ContractError(
            f"it cannot predict a number ({failed}); if it works class by class, declare by_class = True"
        ) from failed
    _healthy(made, "regression")
    rmse = made.record.final[f"{'global' if lab.method.global_model else 'personal'}_test_rmse"]
    always = float(made.task.global_test().y.std())
    what = f"after {LEARNING_ROUNDS} rounds of regression the RMSE is {rmse:.3g}"
    require(rmse < always, f"{what}, no better than that of always the mean, {always:.3g}")


def check_headless(lab: Lab) -> None:
    """It trains a network without `body` and `head`, or declares `by_head` and refuses that before the first round."""
    if not {*lab.cls.needs} <= {*MET} - {"blocks", "encoder"}:
        return
    made = accepted(lab, lambda: lab.begun(HeadlessToy(), eval_every=ROUNDS), "by_head", "a network without a head")
    if made is None:
        return
    try:
        made.go()
    except (RunError, UsageError) as failed:
        raise ContractError(
            f"a network without `body` and `head` ends the run ({failed}); if it works on these, declare by_head = True"
        ) from failed
    _healthy(made, "a network without a head")


def check_learns(lab: Lab) -> None:
    """It learns three well separated clouds, or what else its small problem asks for."""
    made = lab.at_defaults.experiment(rounds=LEARNING_ROUNDS, eval_every=LEARNING_ROUNDS)
    final = made.record.final
    name, least = getattr(made.task, "goal", ("accuracy", LEARNED))
    measure = f"{'global' if lab.method.global_model else 'personal'}_test_{name}"
    require(final[measure] >= least, f"{measure} is {final[measure]:.3g} after {LEARNING_ROUNDS} rounds, below {least}")


def _healthy(made: Experiment, where: str) -> None:
    rows = made.record.metrics
    require(len(rows) == made.spec.rounds, f"{where}: {len(rows)} of {made.spec.rounds} rounds were recorded")
    for name, value in made.server.values.items():
        for tensor in tensors_in(value):
            finite = not tensor.is_floating_point() or bool(tensor.isfinite().all())
            require(finite, f"{where}: server.{name} is no longer finite")


def _named(phases: list[Span]) -> str:
    return ", ".join(f"{span.name} from round {span.first}" for span in phases) or "none"
