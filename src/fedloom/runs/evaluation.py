"""What a model is worth: measured on data that no training sees, for the server and for each client."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from fedloom.random import stream
from fedloom.runs.parts import Parts

JUDGED_CLIENTS = 1000  # of a larger population, this many seeded clients stand for all in personal measures


def evaluate(parts: Parts, round: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The measures of the global model and of what each client would use; and the test of each client by itself.

    The measures: `global_test_*`, `personal_test_*` (means over samples), `validation_accuracy`, ...; None where there
    is nothing to measure.
    """
    method, server, pipeline, books = parts.method, parts.server, parts.pipeline, parts.boundary.books
    parts.boundary.begin("evaluate", round)
    server.logs = {}
    stand_in = pipeline.observe(books, server, partial(method.observe, server, parts.everybody))
    model = server.model if stand_in is None else stand_in
    row: dict[str, Any] = {"global_test_accuracy": None, "global_test_loss": None} | logged(parts)
    if method.global_model and not parts.spec.blind:
        measured = server.evaluate(model)
        row |= {f"global_test_{name}": value for name, value in measured.items() if name != "n"}
        row |= pipeline.collect("measure", server)
    judged = parts.everybody
    for stage in pipeline.with_hook("is_honest"):
        judged = judged.where(stage.is_honest)
    if len(judged) > JUDGED_CLIENTS:
        order = torch.randperm(len(judged), generator=stream(parts.spec.seed, "world", "judged"))
        judged = judged.where(order[:JUDGED_CLIENTS].tolist())
    replies = judged.call(method.evaluate, **method.predict_message(server))
    tests = [(reply.client, reply.test) for reply in replies if reply.test["n"]]
    held = server.task.global_validation()
    validations = [reply.validation for reply in replies] if held is None else [server.judge(model, held)]
    row["validation_accuracy"] = weighted(validations, "accuracy")
    row["personal_test_accuracy"] = weighted([test for _, test in tests], "accuracy")
    accuracies = [test["accuracy"] for _, test in tests if "accuracy" in test]
    row["personal_test_accuracy_std"] = float(np.std(accuracies)) if accuracies else None
    row["worst_client_accuracy"] = min(accuracies, default=None)
    for name in sorted({name for _, test in tests for name in test} - {"n", "accuracy", "loss"}):
        row[f"personal_test_{name}"] = weighted([test for _, test in tests], name)
    if (stage_of_task := parts.task.stage(round)) is not None:
        row["stage"] = stage_of_task
    each = [{"id": client} | {name: test[name] for name in ("accuracy", "n") if name in test} for client, test in tests]
    return row, each


def logged(parts: Parts) -> dict[str, float]:
    """What the server logged in the step under way."""
    own = {name: float(torch.as_tensor(numbers).double().mean()) for name, numbers in parts.server.logs.items()}
    return {f"server/{name}": number for name, number in own.items()}


def weighted(measured: list[dict[str, float]], name: str) -> float | None:
    """The mean of a measure over samples; None where nobody has it."""
    having = [m for m in measured if m["n"] and name in m]
    return float(sum(m[name] * m["n"] for m in having) / sum(m["n"] for m in having)) if having else None
