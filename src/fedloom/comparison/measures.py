"""What is read off one run, and how it is said: accuracy, fairness, cost and stability."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fedloom.errors import unknown
from fedloom.quality import ACCURACY, KNOWN, LOSS, Quality, in_column, judged_by, main_of, named, of_family
from fedloom.runs.choice import comparable
from fedloom.runs.continual import continual

if TYPE_CHECKING:
    from fedloom.runs.record import Run

TRAFFIC = ("up_bytes", "down_bytes", "peer_bytes")
SHARE = 0.95  # of the reference's validation accuracy: the target, where nobody gives one
DECILE = 0.1


@dataclass(frozen=True)
class Measure:
    """One number of a run: how it is called, what it counts (share, index, amount, count, bytes, seconds), what is
    better."""

    words: str
    unit: str
    better: str  # high, low, or neither


def metrics_of(qualities: Sequence[Quality] = (ACCURACY,)) -> dict[str, Measure]:
    """What methods can be compared by where a problem has such measures, the main one first.

    The first is the default: every method has it, while a purely personal method has no global model.
    """
    found: dict[str, Measure] = {}
    for place, one in enumerate(qualities):
        newcomers = "newcomers" if one == ACCURACY else f"newcomers, {one.words}"
        words = {"personal_test": f"personal test {one.words}", "global_test": f"global test {one.words}",
                 "newcomer_test": newcomers}  # fmt: skip
        words |= {"worst_client": "worst client" if place == 0 else f"worst client, {one.words}"}
        if place == 0:
            words |= {"worst_decile": "worst tenth of the clients"}
        found |= {
            f"{where}_{one.name}": Measure(said, one.unit, one.better)
            for where, said in words.items()
            if where in ("global_test", "worst_client") or one.pooled != "alone"
        }
    return found | (STREAMS if qualities[0] == ACCURACY else {})


def measures_of(qualities: Sequence[Quality] = (ACCURACY,)) -> dict[str, Measure]:
    """Every measure of a run where a problem has such measures."""
    main = qualities[0]
    return (
        metrics_of(qualities)
        | {
            f"personal_test_{main.name}_std": Measure("spread over clients", main.unit, "low"),
            f"newcomer_test_{main.name}_std": Measure("spread over newcomers", main.unit, "low"),
            "jain_index": Measure("Jain's index", "index", "high"),
            f"validation_{main.name}": Measure(f"validation {main.words}", main.unit, main.better),
            **(KEPT if main == ACCURACY else {}),
            "drop": Measure("drop from peak to end, validation", main.unit, "low"),
        }
        | COSTS
    )


# Of a stream of tasks: the metric that no single round has, and what becomes of earlier tasks.
STREAMS = {"incremental_accuracy": Measure("accuracy on the tasks so far, mean over tasks", "share", "high")}
KEPT = {
    "forgetting": Measure("forgetting", "share", "low"),
    "backward_transfer": Measure("backward transfer", "share", "high"),
}
COSTS: dict[str, Measure] = {
    "round": Measure("chosen round", "count", "neither"),
    "rounds": Measure("rounds in all", "count", "neither"),
    "rounds_to_target": Measure("rounds to target", "count", "low"),
    "bytes_to_target": Measure("bytes to target", "bytes", "low"),
    "virtual_seconds_to_target": Measure("virtual time to target", "seconds", "low"),
    "up_bytes": Measure("bytes up", "bytes", "low"),
    "down_bytes": Measure("bytes down", "bytes", "low"),
    "peer_bytes": Measure("bytes between peers", "bytes", "low"),
    "steps_per_client": Measure("gradient steps a client", "count", "low"),
    "labels": Measure("labels asked for", "count", "low"),
    "virtual_seconds": Measure("virtual time", "seconds", "low"),
    "seconds": Measure("wall time", "seconds", "low"),
}
METRICS, MEASURES = metrics_of(), measures_of()  # where right and wrong are counted
ANY: dict[str, Measure] = {name: one for q in KNOWN.values() for name, one in measures_of((q,)).items()} | MEASURES


def metric(name: str | None, qualities: Sequence[Quality] = (ACCURACY,)) -> str:
    """The name of the measure that methods are compared by; None is the default. Raises UsageError.

    Of a judged model or a test by itself it ends in `@NAME`, but for what no single round has.
    """
    metrics = metrics_of(qualities)
    chosen = next(iter(metrics)) if name is None else name
    plain, _, whose = chosen.partition("@")
    if plain not in metrics or (whose and of_run(plain)):
        raise unknown("metric", chosen, metrics)
    return chosen


def of_run(metric: str) -> bool:
    """Whether a metric is one that no single round has."""
    return metric in STREAMS or metric.startswith("worst_decile_")


def qualities_in(rows: Sequence[Mapping[str, Any]]) -> tuple[Quality, ...]:
    """The measures that the rows of a record have, the main one first."""
    main, names = main_of(rows), {name for row in rows for name in row}
    others = (one for one in (*KNOWN.values(), *judged_by(rows)) if f"global_test_{one.name}" in names)
    return tuple(dict.fromkeys((main, *(one for one in others if one != LOSS))))


def about(name: str, qualities: Sequence[Quality] = ()) -> Measure:
    """What a measure is; one of a judged model or a test by itself (`NAME@exit3`) is what the measure is that it is of.

    `qualities` are those that a run has beyond those of the library.

    Examples:
        >>> about("global_test_accuracy@exit3").words
        'global test accuracy @exit3'
    """
    plain, at, whose = name.partition("@")
    own = measures_of((ACCURACY, *qualities)) if qualities else {}
    found = own.get(plain) or ANY.get(plain) or measures_of((ACCURACY, named(in_column(plain))))[plain]
    return replace(found, words=f"{found.words} @{whose}") if at else found


def of_single_models(names: Iterable[str]) -> list[str]:
    """Those of some columns that are measures of one judged model or one test by itself, in order."""
    plain = ((name, name.partition("@")[0]) for name in names if "@" in name)
    return [name for name, its in plain if its in ANY or (in_column(its) != its and of_family(in_column(its)))]


def measured(run: Run, target: float | None = None) -> dict[str, float | None]:
    """Every measure of a finished run, by its name in `measures_of`, or with `@NAME` behind it; None where it has none.

    Accuracies (or what else is the main measure) are those of the round that the validation data chose; what a stream
    of tasks left (`continual`) is of each task's last. Costs are those of training up to the last round, without
    evaluation; `gradient_steps` holds the server's own too. `target`: the validation measure up to which the costs
    `*_to_target` run.
    """
    rows, chosen = run.metrics, run.selected
    qualities = qualities_in(rows)
    main = qualities[0]
    of_clients = [client[main.name] for client in run.chosen_clients.get("clients", ()) if main.name in client]
    judged = [row[f"validation_{main.name}"] for row in comparable(rows)]
    timed = any("virtual_seconds" in row for row in rows)
    found: dict[str, float | None] = {
        name: chosen.get(name) for name in (*measures_of(qualities), *of_single_models(chosen)) if name in chosen
    }
    return found | {
        f"worst_decile_{main.name}": worst_share(of_clients, main=main),
        "jain_index": jain(of_clients),
        "drop": abs(main.best(judged) - judged[-1]) if judged else None,
        "round": chosen["round"],
        "rounds": len(rows),
        **{name: total(rows, name) for name in (*TRAFFIC, "seconds")},
        "labels": total(rows, "labels") if "labels" in rows[-1] else None,
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
    """Rounds, bytes and virtual seconds up to the first comparable round whose validation measure is as good as the
    target."""
    names = ("rounds_to_target", "bytes_to_target", "virtual_seconds_to_target")
    if target is None:
        return dict.fromkeys(names)
    main, alike = main_of(rows), {row["round"] for row in comparable(rows)}
    for place, row in enumerate(rows):
        if row["round"] in alike and main.score(row[f"validation_{main.name}"]) >= main.score(target):
            until = rows[: place + 1]
            virtual = total(until, "virtual_seconds") if "virtual_seconds" in row else None
            return dict(zip(names, (row["round"], total(until, *TRAFFIC), virtual), strict=True))
    return dict.fromkeys(names)


def worst_share(values: Sequence[float], share: float = DECILE, main: Quality = ACCURACY) -> float | None:
    """The mean of the worst tenth of the clients, at least of one (Li et al. 2020, arXiv:1905.10497)."""
    if not values:
        return None
    worst = sorted(values, key=main.score)[: max(1, math.ceil(share * len(values) - 1e-9))]
    return math.fsum(worst) / len(worst)


def jain(accuracies: Sequence[float]) -> float | None:
    """Jain's index of fairness, (sum x)^2 / (n sum x^2): from 1/n to 1, all alike (Jain et al. 1984, DEC-TR-301)."""
    squares = math.fsum(x * x for x in accuracies)
    return math.fsum(accuracies) ** 2 / (len(accuracies) * squares) if squares else None


def target_of(
    scores: Mapping[str, float], asked: float | None, baseline: str | None, main: Quality = ACCURACY
) -> float | None:
    """The validation measure that costs are counted up to, under a setting with these `scores` by method.

    The one `asked` for, or SHARE of that of the baseline (of the best method by validation, if there is no baseline);
    of an error, that divided by SHARE.
    """
    if asked is not None:
        return asked
    reference = scores.get(baseline) if baseline is not None else main.best(scores.values()) if scores else None
    if reference is None:
        return None
    return reference / SHARE if main.better == "low" else SHARE * reference
