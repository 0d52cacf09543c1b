"""What is read off one run, and how it is said: accuracy, fairness, cost and stability."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fedloom.errors import unknown
from fedloom.runs.choice import comparable
from fedloom.runs.continual import continual

if TYPE_CHECKING:
    from fedloom.runs.record import Run

TRAFFIC = ("up_bytes", "down_bytes", "peer_bytes")
SHARE = 0.95  # of the reference's validation accuracy: the target, where nobody gives one
DECILE = 0.1


@dataclass(frozen=True)
class Measure:
    """One number of a run: how it is called, what it counts (share, index, count, bytes, seconds), what is better."""

    words: str
    unit: str
    better: str  # high, low, or neither


# What methods can be compared by. The first is the default: every method has it, while a purely personal method has no
# global model.
METRICS: dict[str, Measure] = {
    "personal_test_accuracy": Measure("personal test accuracy", "share", "high"),
    "global_test_accuracy": Measure("global test accuracy", "share", "high"),
    "newcomer_test_accuracy": Measure("newcomers", "share", "high"),
    "worst_client_accuracy": Measure("worst client", "share", "high"),
    "worst_decile_accuracy": Measure("worst tenth of the clients", "share", "high"),
    "incremental_accuracy": Measure("accuracy on the tasks so far, mean over tasks", "share", "high"),
}
OF_RUNS = ("worst_decile_accuracy", "incremental_accuracy")  # of the metrics, those that no single round has
MEASURES: dict[str, Measure] = METRICS | {
    "personal_test_accuracy_std": Measure("spread over clients", "share", "low"),
    "newcomer_test_accuracy_std": Measure("spread over newcomers", "share", "low"),
    "jain_index": Measure("Jain's index", "index", "high"),
    "validation_accuracy": Measure("validation accuracy", "share", "high"),
    "forgetting": Measure("forgetting", "share", "low"),
    "backward_transfer": Measure("backward transfer", "share", "high"),
    "drop": Measure("drop from peak to end, validation", "share", "low"),
    "round": Measure("chosen round", "count", "neither"),
    "rounds": Measure("rounds in all", "count", "neither"),
    "rounds_to_target": Measure("rounds to target", "count", "low"),
    "bytes_to_target": Measure("bytes to target", "bytes", "low"),
    "virtual_seconds_to_target": Measure("virtual time to target", "seconds", "low"),
    "up_bytes": Measure("bytes up", "bytes", "low"),
    "down_bytes": Measure("bytes down", "bytes", "low"),
    "peer_bytes": Measure("bytes between peers", "bytes", "low"),
    "steps_per_client": Measure("gradient steps a client", "count", "low"),
    "virtual_seconds": Measure("virtual time", "seconds", "low"),
    "seconds": Measure("wall time", "seconds", "low"),
}


def metric(name: str | None) -> str:
    """The name of the measure that methods are compared by; None is the default. Raises UsageError.

    Of a judged model or a test by itself it ends in `@NAME`, but for what no single round has.
    """
    chosen = next(iter(METRICS)) if name is None else name
    plain, _, whose = chosen.partition("@")
    if plain not in METRICS or (whose and plain in OF_RUNS):
        raise unknown("metric", chosen, METRICS)
    return chosen


def about(name: str) -> Measure:
    """What a measure is; one of a judged model or a test by itself (`NAME@exit3`) is what the measure is that it is of.

    Examples:
        >>> about("global_test_accuracy@exit3").words
        'global test accuracy @exit3'
    """
    plain, at, whose = name.partition("@")
    return replace(MEASURES[plain], words=f"{MEASURES[plain].words} @{whose}") if at else MEASURES[plain]


def of_single_models(names: Iterable[str]) -> list[str]:
    """Those of some columns that are measures of one judged model or one test by itself, in order."""
    return [name for name in names if "@" in name and name.partition("@")[0] in MEASURES]


def measured(run: Run, target: float | None = None) -> dict[str, float | None]:
    """Every measure of a finished run, by its name in MEASURES, or with `@NAME` behind it; None where it has none.

    Accuracies are those of the round that the validation data chose; what a stream of tasks left (`continual`) is of
    each task's last. Costs are those of training up to the last round, without evaluation; `gradient_steps` holds the
    server's own too. `target`: the validation accuracy up to which the costs `*_to_target` run.
    """
    rows, chosen = run.metrics, run.selected
    accuracies = [client["accuracy"] for client in run.chosen_clients.get("clients", ()) if "accuracy" in client]
    judged = [row["validation_accuracy"] for row in comparable(rows)]
    timed = any("virtual_seconds" in row for row in rows)
    found: dict[str, float | None] = {
        name: chosen.get(name) for name in (*MEASURES, *of_single_models(chosen)) if name in chosen
    }
    return found | {
        "worst_decile_accuracy": worst_share(accuracies),
        "jain_index": jain(accuracies),
        "drop": max(judged) - judged[-1] if judged else None,
        "round": chosen["round"],
        "rounds": len(rows),
        **{name: total(rows, name) for name in (*TRAFFIC, "seconds")},
        "virtual_seconds": total(rows, "virtual_seconds") if timed else None,
        "steps_per_client": total(rows, "gradient_steps") / (run.partition.get("population") or run.spec.clients or 1),
        **to_target(rows, target),
        **continual(run),
    }


def total(rows: Sequence[Mapping[str, Any]], *names: str) -> float:
    """The sum of columns over the rounds."""
    return math.fsum(row.get(name) or 0 for row in rows for name in names)


def running(rows: Sequence[Mapping[str, Any]], *names: str) -> list[float]:
    """The sum of columns up to each round [R]."""
    return list(accumulate(math.fsum(row.get(name) or 0 for name in names) for row in rows))


def to_target(rows: Sequence[dict[str, Any]], target: float | None) -> dict[str, float | None]:
    """Rounds, bytes and virtual seconds up to the first comparable round whose validation accuracy is the target's."""
    names = ("rounds_to_target", "bytes_to_target", "virtual_seconds_to_target")
    if target is None:
        return dict.fromkeys(names)
    alike = {row["round"] for row in comparable(rows)}
    for place, row in enumerate(rows):
        if row["round"] in alike and row["validation_accuracy"] >= target:
            until = rows[: place + 1]
            virtual = total(until, "virtual_seconds") if "virtual_seconds" in row else None
            return dict(zip(names, (row["round"], total(until, *TRAFFIC), virtual), strict=True))
    return dict.fromkeys(names)


def worst_share(accuracies: Sequence[float], share: float = DECILE) -> float | None:
    """The mean accuracy of the worst tenth of the clients, at least of one (Li et al. 2020, arXiv:1905.10497)."""
    if not accuracies:
        return None
    worst = sorted(accuracies)[: max(1, math.ceil(share * len(accuracies) - 1e-9))]
    return math.fsum(worst) / len(worst)


def jain(accuracies: Sequence[float]) -> float | None:
    """Jain's index of fairness, (sum x)^2 / (n sum x^2): from 1/n to 1, all alike (Jain et al. 1984, DEC-TR-301)."""
    squares = math.fsum(x * x for x in accuracies)
    return math.fsum(accuracies) ** 2 / (len(accuracies) * squares) if squares else None


def target_of(scores: Mapping[str, float], asked: float | None, baseline: str | None) -> float | None:
    """The validation accuracy that costs are counted up to, under a setting with these `scores` by method.

    The one `asked` for, or SHARE of that of the baseline (of the best method by validation, if there is no baseline).
    """
    if asked is not None:
        return asked
    reference = max(scores.values(), default=None) if baseline is None else scores.get(baseline)
    return None if reference is None else SHARE * reference
