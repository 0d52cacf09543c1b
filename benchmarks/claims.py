"""What papers claim, tried: `python benchmarks/claims.py [NAME ...]` writes a row a method into results/claims.csv.

A claim is a comparison (`claims/NAME.yaml`, three seeds, its first line says what is claimed), or a function here where
the measure is no accuracy. It has `held` if the 95 % interval of the paired differences to the best rival lies above
zero, is `contradicted` if it lies below, and else was `not seen`. Rows that are there already stay unless named.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

import manyhands
from manyhands.comparison.measures import measured
from manyhands.comparison.statistics import interval
from manyhands.tasks.stream import matrices

HERE = Path(__file__).parent
TABLE = HERE / "results" / "claims.csv"
COLUMNS = ("method", "claim", "setting", "measure", "result", "rivals", "difference", "verdict", "note")
SEEDS = (0, 1, 2)


def told(values: Sequence[float]) -> str:
    """A mean with half its 95 % interval."""
    found = interval(values)
    return f"{found.mean:.3f} ± {found.half:.3f}"


def verdict(mine: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[str, str]:
    """The paired difference in words, and what it says of the claim."""
    found = interval([mine[seed] - theirs[seed] for seed in sorted(mine)])
    assert found.mean is not None and found.low is not None and found.high is not None
    said = "held" if found.low > 0 else "contradicted" if found.high < 0 else "not seen"
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})", said


def row(name: str, claim: str, setting: str, measure: str, scores: Mapping[str, Mapping[int, float]]) -> dict[str, str]:
    """A row of the table; the first of `scores` (method: seed: value) is the method that the claim is about."""
    label, *rivals = scores
    best = max(rivals, key=lambda rival: sum(scores[rival].values()))
    difference, said = verdict(scores[label], scores[best])
    return {
        "method": name,
        "claim": claim,
        "setting": setting,
        "measure": measure,
        "result": told(list(scores[label].values())),
        "rivals": "; ".join(f"{rival} {told(list(scores[rival].values()))}" for rival in rivals),
        "difference": f"to {best}: {difference}",
        "verdict": said,
        "note": "",  # written by hand: what was looked at, where a claim did not hold
    }


def compared(path: Path) -> dict[str, str]:
    """The claim of a comparison."""
    claim = path.read_text().partition("\n")[0].removeprefix("# Claim: ")
    with tempfile.TemporaryDirectory() as folder:
        results = manyhands.compare(path, out=Path(folder) / "out", report=False)
        scores = {
            method: {cell.seed: measured(cell.run)[results.spec.metric] for cell in results.of(setting, method)}
            for setting in results.settings
            for method in results.methods
        }
        base = results.spec.base | dict(results.spec.settings[results.settings[0]])
    setting = ", ".join(f"{name}={value}" for name, value in base.items())
    return row(path.stem, claim, setting, results.spec.metric, scores)


def masha() -> dict[str, str]:
    """Payload up to the solution, compressed and not."""
    settings = {"problem": "saddle:bilinear,width=50", "clients": 4, "rounds": 2000, "eval_every": 10}
    scores: dict[str, dict[int, float]] = {}
    for label, fields in {
        "masha": {"keep": 0.25, "gamma": 0.1},
        "extragradient": {"keep": 1.0, "refresh": 1.0, "gamma": 0.3},
    }.items():
        scores[label] = {}
        for seed in SEEDS:
            rows = manyhands.run("masha", fields=fields, seed=seed, **settings).metrics
            spent = 0
            for one in rows:
                spent += one["up_bytes"] + one["down_bytes"]
                if one.get("global_test_solved") is not None and one["global_test_solved"] > 0.9:
                    break
            else:
                spent = float("inf")
            scores[label][seed] = -spent / 1e6
    claim = "Compressed both ways it reaches the solution with fewer bytes than extragradient."
    return row(
        "masha", claim, "bilinear saddle, 4 clients, 2 x 50 numbers", "minus MB until 90 % of |F| is gone", scores
    )


def fcp() -> dict[str, str]:
    """How far the coverage lies from what is promised: pooled scores against the mean of local thresholds."""
    settings = {"partition": "classes:2", "clients": 10, "rounds": 5, "validation": 0.3, "eval_every": 5}
    scores: dict[str, dict[int, float]] = {}
    for pool in ("sketch", "mean"):
        runs = {
            seed: manyhands.run("fcp", fields={"pool": pool, "alpha": 0.1}, seed=seed, **settings).final
            for seed in SEEDS
        }
        scores[pool] = {seed: -abs(final["personal_test_coverage"] - 0.9) for seed, final in runs.items()}
    claim = "Pooled scores cover 90 % as promised; the mean of local thresholds does not."
    return row("fcp", claim, "digits, two classes a client", "minus |coverage - 0.9|", scores)


def fot() -> dict[str, str]:
    """Accuracy over all tasks at the end, and forgetting."""
    settings = {"problem": "stream:5,rounds=3", "partition": "iid", "clients": 5, "rounds": 15, "model": "mlp:30"}
    fields = {"lr": 0.5, "epochs": 5}
    scores: dict[str, dict[int, float]] = {}
    for name, more in {"fot": {"eps": 0.8}, "fedavg": {}, "fedprox": {"mu": 0.1}}.items():
        scores[name] = {}
        for seed in SEEDS:
            accuracy, _ = matrices(manyhands.run(name, fields=fields | more, seed=seed, **settings))
            scores[name][seed] = float(accuracy[-1].mean())
    claim = "Projected updates forget less: higher accuracy over all tasks at the end."
    return row("fot", claim, "digits, 5 tasks of two classes, 3 rounds each", "mean accuracy over tasks", scores)


BY_HAND: dict[str, Callable[[], dict[str, str]]] = {"masha": masha, "fcp": fcp, "fot": fot}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ask.add_argument("names", nargs="*", metavar="NAME", help="default: all that have no row yet")
    names = ask.parse_args().names
    torch.set_num_threads(1)
    rows = {}
    if TABLE.exists():
        with TABLE.open() as file:
            rows = {one["method"]: one for one in csv.DictReader(file)}
    known = sorted({path.stem for path in (HERE / "claims").glob("*.yaml")} | BY_HAND.keys())
    for name in names or [name for name in known if name not in rows]:
        made = BY_HAND[name]() if name in BY_HAND else compared(HERE / "claims" / f"{name}.yaml")
        rows[name] = made
        print(f"{name}: {made['result']} | {made['rivals']} | {made['difference']} | {made['verdict']}", flush=True)
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows[key] for key in sorted(rows))


if __name__ == "__main__":
    main()
