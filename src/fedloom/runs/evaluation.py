"""What a model is worth: measured on data that no training sees, for the server and for each client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from fedloom.cohort import Cohort
from fedloom.errors import UsageError
from fedloom.quality import KNOWN, MEAN, TALLY, Quality, named, overlap
from fedloom.random import stream
from fedloom.runs.parts import Parts

JUDGED_CLIENTS = 1000  # of a larger population, this many seeded clients stand for all in personal measures

Measures = Mapping[str, float]


@dataclass(frozen=True)
class Subject:
    """What was judged: what stood for the global model, and the clients, which were asked in the call `nth`."""

    model: Any
    clients: Cohort
    nth: int


def evaluate(parts: Parts, round: int) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]], Subject]:
    """The measures of the global model and of what each client would use; the test of each client by itself; and what
    was judged.

    The measures: `global_test_*`, `personal_test_*` (over all samples), `validation_accuracy` (or what else is the
    task's main measure), ...; None where there is nothing to measure. Those of one of several judged models, or of a
    further test, end in `@NAME`. Where there is no global test, clients alone judge. Newcomers have no say in anything
    but `newcomer_test_*`.
    """
    method, server, pipeline, books = parts.method_in(round), parts.server, parts.pipeline, parts.boundary.books
    parts.boundary.begin("evaluate", round)
    server.logs = {}
    stand_in = pipeline.observe(books, server, partial(method.observe, server, parts.everybody))
    model = server.model if stand_in is None else stand_in
    main, own = parts.task.qualities[0], {one.name for one in parts.task.qualities}
    asked = [one.name for one in parts.qualities if one.name not in own]
    row: dict[str, Any] = {f"global_test_{main.name}": None, "global_test_loss": None} | logged(parts)
    row |= {f"global_test_{name}": None for name in asked}
    if method.global_model and not parts.spec.blind and len(server.task.global_test()):
        measured = server.evaluate(model)
        kept = {name: value for name, value in measured.items() if name != "n" and not name.startswith(TALLY)}
        row |= {f"global_test_{name}": value for name, value in kept.items()}
        row |= pipeline.collect("measure", server)
        _steady(parts, "observe", tuple(model) if isinstance(model, Mapping) else ())
    judged = parts.everybody
    for stage in pipeline.with_hook("is_honest"):
        judged = judged.where(stage.is_honest)
    judged = _some(parts, judged)
    subject = Subject(model, judged, books.nth)
    replies = judged.call(method.evaluate, **method.predict_message(server, judged))
    tests = [(reply.client, reply.test) for reply in replies if reply.test["n"]]
    seen = [(reply.client, measures) for reply in replies for measures in (reply.validation, reply.test)]
    _steady(parts, "predict", _alike((client, measures) for client, measures in seen if measures["n"]))
    held = server.task.global_validation()
    validations = [reply.validation for reply in replies] if held is None else [server.judge(model, held)]
    names = dict.fromkeys((main.name, *_others(validations, f"{main.name}@"), *asked, parts.chooser.name))
    row |= {f"validation_{name}": pooled(validations, name) for name in names}
    row |= {"chosen_by": parts.chooser.name} if parts.spec.choose_by else {}
    if lower := [name for name in asked if named(name) not in parts.qualities]:  # that no name tells
        row["lower_is_better"] = ",".join(lower)
    row |= personal("personal_test", [test for _, test in tests], main)
    row |= left_out("personal_test", [test for _, test in tests], asked)
    row |= {name: None for name in (f"personal_test_{one}" for one in asked) if name not in row}
    having = [test[main.name] for _, test in tests if main.name in test]
    row[f"worst_client_{main.name}"] = main.worst(having) if having else None
    for one in parts.qualities:
        if one != main and (values := [test[one.name] for _, test in tests if one.name in test]):
            row[f"worst_client_{one.name}"] = one.worst(values)
    if (stage_of_task := parts.task.stage(round)) is not None:
        row["stage"] = stage_of_task
    told = [one.name for one in parts.qualities]
    each = {"clients": _each(tests, told)}
    if late := _some(parts, parts.newcomers):
        came = late.call(method.judge_newcomer, **method.predict_message(server, late)) if not parts.spec.blind else []
        tests = [(reply.client, reply.test) for reply in came if reply.test["n"]]
        row |= personal("newcomer_test", [test for _, test in tests], main)
        row |= left_out("newcomer_test", [test for _, test in tests], asked)
        each["newcomers"] = _each(tests, told)
    return row, each, subject


def _some(parts: Parts, clients: Cohort) -> Cohort:
    """The clients that stand for all, where they are many."""
    if len(clients) <= JUDGED_CLIENTS:
        return clients
    order = torch.randperm(len(clients), generator=stream(parts.spec.seed, "world", "judged"))
    return clients.where([clients[place] for place in order[:JUDGED_CLIENTS].tolist()])


def _each(tests: Iterable[tuple[int, Measures]], names: Iterable[str]) -> list[dict[str, Any]]:
    """The tests of clients one by one, by these measures."""
    names = (*names, "n")
    return [{"id": client} | {name: test[name] for name in names if name in test} for client, test in tests]


def left_out(called: str, tests: list[Measures], names: Iterable[str]) -> dict[str, int]:
    """How many clients have test rows that do not tell a measure, and so no say in it; only where there are some."""
    counts = {f"{called}_{name}_left_out": sum(name not in test for test in tests) for name in names}
    return {name: count for name, count in counts.items() if count}


def personal(called: str, tests: list[Measures], main: Quality) -> dict[str, float | None]:
    """The measures of clients' own tests but the loss, over all samples; and the spread of the main one over clients.

    What cannot be had of several tests by their measures alone is left out.
    """
    row = {f"{called}_{main.name}": pooled(tests, main.name), f"{called}_{main.name}_std": spread(tests, main.name)}
    for name in _others(tests, but=main.name):
        measure, at, whose = name.partition("@")
        if measure != "loss" and KNOWN.get(measure, MEAN).pooled != "alone":
            row[f"{called}_{name}"] = pooled(tests, name)
        if measure == main.name:
            row[f"{called}_{measure}_std{at}{whose}"] = spread(tests, name)
    return row


def spread(tests: list[Measures], name: str) -> float | None:
    """The standard deviation of a measure over clients; None where nobody has it."""
    having = [test[name] for test in tests if name in test]
    return float(np.std(having)) if having else None


def _others(measured: list[Measures], start: str = "", but: str = "") -> list[str]:
    """The names of measures beside the loss and one more, those that begin so."""
    names = {name for measures in measured for name in measures} - {"n", "loss", but}
    return sorted(name for name in names if name.startswith(start) and not name.startswith(TALLY))


def _alike(tests: Iterable[tuple[int, Measures]]) -> tuple[str, ...]:
    """The names of the models that clients judge, in their order; raises UsageError unless all have the same."""
    found: dict[tuple[str, ...], int] = {}
    for client, test in tests:
        found.setdefault(tuple(dict.fromkeys(name.partition("@")[2] for name in test if "@" in name)), client)
    if len(found) > 1:
        told = [f"client {client} {list(names) or 'one without a name'}" for names, client in found.items()]
        raise UsageError(
            f"predict names what is judged differently: {told[0]}, {told[1]}; give the same names, in the same order, "
            "at all clients"
        )
    return next(iter(found), ())


def _steady(parts: Parts, box: str, names: tuple[str, ...]) -> None:
    """Raises UsageError where another judged model is the main one than before: it would not be one curve."""
    mains, main = parts.boundary.books.memory.setdefault("judged", {}), next(iter(names), "")
    if mains.setdefault(box, main) != main:
        raise UsageError(
            f"{box} named {mains[box] or 'nothing'!r} first in an earlier round, and now {main or 'nothing'!r}: the "
            "first is the main one, by which rounds compare; keep it"
        )


def logged(parts: Parts) -> dict[str, float]:
    """What the server logged in the step under way."""
    own = {name: float(torch.as_tensor(numbers).double().mean()) for name, numbers in parts.server.logs.items()}
    return {f"server/{name}": number for name, number in own.items()}


def pooled(measured: list[Measures], name: str) -> float | None:
    """A measure over all samples, from those of several tests; None where nobody has it."""
    if KNOWN.get(name.partition("@")[0], MEAN).pooled == "tallies":
        return tallied([m for m in measured if m["n"] and name in m], name)
    having = [(m["n"], m[name]) for m in measured if m["n"] and name in m]
    return KNOWN.get(name.partition("@")[0], MEAN).pool(having) if having else None


def tallied(having: list[Measures], name: str) -> float | None:
    """A measure of what several tests counted, all of it together; None of no tests."""
    if not having:
        return None
    measure, at, whose = name.partition("@")
    keys = [key for key in having[0] if key.startswith(TALLY) and key.partition("@")[1:] == (at, whose)]
    return overlap(measure, {key: sum(m[key] for m in having) for key in keys})
