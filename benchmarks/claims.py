"""What papers claim, tried: `python benchmarks/claims.py [NAME ...]` writes a row a method into results/claims.csv.

A claim is a comparison (`claims/NAME.yaml`), or a function here where the measure is no accuracy. It has `held` if the
95 % interval of the paired differences to the best rival lies above zero, is `contradicted` if it lies below, and else
was `not seen`. Rows that are there already stay unless named.

A spec's comments say what is claimed (`# Claim:`), which of its labels are the method itself in another form and so no
rivals (`# Variants:`), and what else was looked at (`# Note:`). Those on `runs/claims/*.npz` need what
`python benchmarks/claims.py --data` cuts out of `../shared/data`; so does `fedloom compare` with such a spec.
"""

from __future__ import annotations

import argparse
import csv
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

import fedloom
from fedloom.comparison.measures import TRAFFIC, measured
from fedloom.comparison.results import Results
from fedloom.comparison.statistics import interval
from fedloom.comparison.trials import best_fields
from fedloom.data.load import load
from fedloom.random import stream
from fedloom.runs.continual import matrices

HERE = Path(__file__).parent
TABLE = HERE / "results" / "claims.csv"
COLUMNS = ("method", "claim", "setting", "measure", "result", "rivals", "difference", "verdict", "note")
SEEDS = (0, 1, 2)
ROOT = HERE.parent
SMALL = ROOT / "runs" / "claims"  # what specs call runs/claims/
ROWS = 4000  # of a small data set's training split, and of its test split


def smaller() -> None:
    """Writes 4,000 training and 4,000 test images of MNIST and CIFAR-10, drawn once, unless they are there."""
    for name in ("mnist", "cifar10"):
        path = SMALL / f"{name}-{ROWS}.npz"
        if path.exists():
            continue
        source, arrays = load(str(ROOT.parent / "shared" / "data" / name)), {}
        for split, table in (("train", source.train), ("test", source.test)):
            rows = torch.randperm(len(table.y), generator=stream(0, "claims", name, split))[:ROWS]
            pixels = (table.x[rows] * 255).round().to(torch.uint8).movedim(1, -1)
            arrays |= {f"image_{split}": pixels.squeeze(-1).numpy(), f"label_{split}": table.y[rows].numpy()}
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)


def fewer_texts() -> None:
    """Writes 1,500 training and 500 test texts of CLINC150 with their domains, of all ten and of three, drawn once."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    for name, domains in {"clinc150-1500": None, "clinc150-three": ("banking", "travel", "work")}.items():
        for split, rows in {"train": 1500, "test": 500}.items():
            path = SMALL / name / f"{split}.parquet"
            if path.exists():
                continue
            whole = pq.read_table(ROOT.parent / "shared" / "data" / "clinc150" / f"{split}.parquet")
            whole = whole.select(["text", "domain"])
            if domains:
                whole = whole.filter(pc.is_in(whole["domain"].cast("string"), pa.array(domains)))
            taken = torch.randperm(len(whole), generator=stream(0, "claims", "clinc150", split))[:rows]
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(whole.take(taken.tolist()), path)


def header(path: Path) -> dict[str, str]:
    """What the comments at a spec's top say, by the words before their colons."""
    text = " ".join(line.lstrip("# ") for line in path.read_text().split("\nmethods:")[0].splitlines())
    parts = re.split(r"(?:^| )(Claim|Variants|Note): ", text)[1:]
    return dict(zip(parts[::2], map(str.strip, parts[1::2]), strict=True))


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


def row(
    name: str,
    claim: str,
    setting: str,
    measure: str,
    scores: Mapping[str, Mapping[int, float]],
    variants: Sequence[str] = (),
    note: str = "",
) -> dict[str, str]:
    """A row of the table; the first of `scores` (method: seed: value) is the method that the claim is about."""
    label, *others = scores
    best = max((one for one in others if one not in variants), key=lambda rival: sum(scores[rival].values()))
    difference, said = verdict(scores[label], scores[best])
    return {
        "method": name,
        "claim": claim,
        "setting": setting,
        "measure": measure,
        "result": told(list(scores[label].values())),
        "rivals": "; ".join(
            f"{one} {told(list(scores[one].values()))}{' (a variant)' * (one in variants)}" for one in others
        ),
        "difference": f"to {best}: {difference}",
        "verdict": said,
        "note": note,
    }


def compared(path: Path, jobs: int) -> dict[str, str]:
    """The claim of a comparison that has one setting."""
    said = header(path)
    if "runs/claims/clinc" in path.read_text():
        fewer_texts()
    elif "runs/claims/" in path.read_text():
        smaller()
    with tempfile.TemporaryDirectory() as folder:
        results = fedloom.compare(path, out=Path(folder) / "out", report=False, jobs=jobs)
        (place,) = results.settings
        scores = {
            method: {cell.seed: measured(cell.run)[results.spec.metric] for cell in results.of(place, method)}
            for method in results.methods
        }
        tuned = found(results, Path(folder) / "out", place)
        sent = traffic(results, place) if "bytes" in said["Claim"] else ""
    base = results.spec.base | dict(results.spec.settings[place])
    base["data"] = Path(base.get("data", "digits")).stem
    setting = ", ".join(f"{name}={value}" for name, value in [*base.items(), ("seeds", len(results.spec.seeds))])
    variants = re.split(r",\s*", said.get("Variants", ""))
    note = " ".join(part for part in (said.get("Note", ""), sent, tuned) if part)
    return row(path.stem, said["Claim"], setting, results.spec.metric, scores, variants, note)


def traffic(results: Results, place: str) -> str:
    """What each method sent in a run, both ways, in words."""
    mean = {
        method: np.mean([sum(measured(cell.run)[way] or 0 for way in TRAFFIC) for cell in results.of(place, method)])
        for method in results.methods
    }
    return f"MB sent in a run: {', '.join(f'{method} {short(size / 1e6)}' for method, size in mean.items())}."


def found(results: Results, out: Path, place: str) -> str:
    """What tuning chose, in words; nothing where nothing was tuned."""
    if not results.spec.tune:
        return ""
    fields = {method: best_fields(out, place, method) for method in results.methods}
    told = (f"{method} {', '.join(f'{k}={short(v)}' for k, v in one.items())}" for method, one in fields.items() if one)
    return f"Chosen on validation, {results.spec.tune} trials each: {'; '.join(told)}."


def short(value: object) -> str:
    """A field's value in three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def masha() -> dict[str, str]:
    """Payload up to the solution, compressed and not; each with the step size that does best at another seed."""
    rivals = {
        "masha": {"keep": 0.25},
        "masha2": {"keep": 0.25, "variant": "masha2"},
        "extragradient": {"keep": 1.0, "refresh": 1.0},
    }
    steps = {
        label: max((0.05, 0.1, 0.2, 0.4), key=lambda gamma: -spent(fields | {"gamma": gamma}, seed=100))
        for label, fields in rivals.items()
    }
    scores = {
        label: {seed: -spent(fields | {"gamma": steps[label]}, seed) for seed in SEEDS}
        for label, fields in rivals.items()
    }
    return row(
        "masha",
        "Compressed both ways it reaches the solution with fewer bytes than extragradient.",
        "bilinear saddle, 4 clients, 2 x 50 numbers, a quarter of them sent, seeds=3",
        "minus MB until 90 % of |F| is gone",
        scores,
        ["masha2"],
        f"Step sizes chosen at seed 100 of 0.05 to 0.4: {'; '.join(f'{k} {v}' for k, v in steps.items())}. "
        "MASHA2, the paper's second algorithm (the largest coordinates, with error feedback), is told as a variant. "
        "Looked at: without compression it is extragradient (a test), indices and full exchanges are charged; random "
        "coordinates both ways (MASHA1) cost 3.7 times less a round and need seven times the rounds, about what their "
        "smaller step lets expect (0.125 / L by the rule 0.5 sqrt(1 - tau) / (L sqrt(q))).",
    )


def spent(fields: Mapping[str, object], seed: int) -> float:
    """MB until nine tenths of the operator's norm are gone; infinite if 500 rounds do not do it."""
    settings = {"problem": "saddle:bilinear,width=50", "clients": 4, "rounds": 500, "eval_every": 10}
    total = 0
    for one in fedloom.run("masha", fields=fields, seed=seed, **settings).metrics:
        total += one["up_bytes"] + one["down_bytes"]
        if (one.get("global_test_solved") or 0.0) > 0.9:
            return total / 1e6
    return float("inf")


def fcp() -> dict[str, str]:
    """How far the coverage lies from what is promised: pooled scores against the mean of local thresholds."""
    smaller()
    settings = {"data": str(SMALL / f"mnist-{ROWS}.npz"), "partition": "classes:2", "clients": 5, "model": "mlp:64"}
    more = {"rounds": 5, "validation": 0.5, "eval_every": 5}
    coverage = {
        pool: {
            seed: fedloom.run("fcp", fields={"pool": pool, "alpha": 0.1}, seed=seed, **settings, **more).final[
                "personal_test_coverage"
            ]
            for seed in range(8)
        }
        for pool in ("sketch", "mean")
    }
    return row(
        "fcp",
        "Pooled scores cover 90 % as promised; the mean of local thresholds does not.",
        f"mnist-{ROWS}, 5 clients of two classes each, 5 rounds of FedAvg, 2,000 samples for calibration, seeds=8",
        "minus |coverage - 0.9|",
        {pool: {seed: -abs(got - 0.9) for seed, got in found.items()} for pool, found in coverage.items()},
        note="; ".join(f"Coverage with {pool}: {told(list(got.values()))}" for pool, got in coverage.items())
        + ". Sketched scores round up, by at most 1 % of the ranks; the mean of thresholds falls below the promise, "
        "though hardly further from it: the clients are about equally hard here.",
    )


def fal() -> dict[str, str]:
    """Accuracy under attack, trained on worst cases and not; each with the learning rate best at another seed."""
    smaller()
    settings = {
        "data": str(SMALL / f"mnist-{ROWS}.npz"),
        "partition": "dirichlet:0.5",
        "clients": 10,
        "model": "mlp:32",
        "validation": 0.28,
        "rounds": 15,
        "eval_every": 15,
    }

    def robust(seed: int, steps: int, lr: float) -> dict[str, float]:
        inner = {"name": "fedavg", "lr": lr}
        final = fedloom.run("fal", steps=steps, rho=0.1, box=(0.0, 1.0), inner=inner, seed=seed, **settings).final
        return {name: final[f"personal_test_{name}"] for name in ("robust_accuracy", "accuracy")}

    rates, ascents = (0.03, 0.1, 0.3), {"fal": 5, "plain": 0}
    best = {
        label: max(rates, key=lambda lr: robust(100, steps=steps, lr=lr)["robust_accuracy"])
        for label, steps in ascents.items()
    }
    scores = {
        label: {seed: robust(seed, steps=steps, lr=best[label]) for seed in range(4)}
        for label, steps in ascents.items()
    }
    clean = ", ".join(f"{label} {told([one['accuracy'] for one in by.values()])}" for label, by in scores.items())
    return row(
        "fal",
        "Against a bounded attack on the inputs at test it is more accurate than FedAvg.",
        f"mnist-{ROWS}, dirichlet:0.5, 10 clients, 15 rounds, attacks of 20 steps within 0.1 (maximum norm), seeds=4",
        "personal test accuracy under attack",
        {label: {seed: one["robust_accuracy"] for seed, one in by.items()} for label, by in scores.items()},
        note=f"plain is the same without the ascent in training, which is FedAvg. Learning rates chosen at seed 100 of "
        f"{rates}: {best}. Without an attack: {clean}.",
    )


def weighed(rule: str, claim: str, note: str, settings: Mapping[str, object]) -> dict[str, str]:
    """A rule of aggregation beside the mean by samples; each with the learning rate that is best at another seed."""
    rates, base = (0.03, 0.1, 0.3), {"rounds": 20, "eval_every": 20, "clients": 10, "validation": 0.28} | settings

    def accuracy(aggregate: str | None, lr: float, seed: int) -> float:
        return fedloom.run("fedavg", lr=lr, aggregate=aggregate, seed=seed, **base).final["global_test_accuracy"]

    cases = {rule: rule, "mean": None}
    best = {label: max(rates, key=lambda lr: accuracy(one, lr, 100)) for label, one in cases.items()}
    scores = {label: {seed: accuracy(one, best[label], seed) for seed in range(6)} for label, one in cases.items()}
    setting = ", ".join(f"{name}={value}" for name, value in (base | {"data": Path(str(base["data"])).stem}).items())
    return row(
        rule,
        claim,
        f"fedavg, {setting}, seeds=6",
        "global_test_accuracy",
        scores,
        note=f"{note} Learning rates chosen at seed 100 of {rates}: {best}.",
    )


def ida() -> dict[str, str]:
    """Models weighed by inverse distance, where some clients have wrong labels."""
    smaller()
    return weighed(
        "ida",
        "Where clients differ and some are of low quality it is more accurate than the mean.",
        "The paper has CIFAR-10 and others; here labels are wrong, of none at the first client to 0.8 at the last.",
        {
            "data": str(SMALL / f"mnist-{ROWS}.npz"),
            "partition": "dirichlet:0.3+flip:0.8",
            "model": "mlp:32",
        },
    )


def l_dawa() -> dict[str, str]:
    """Tensors weighed by the cosine of their angle to those sent."""
    return weighed(
        "l_dawa",
        "It is more accurate than the mean where clients' data differ.",
        "The paper trains ResNets on CIFAR-100, with and without labels; this is a small residual network on digits.",
        {"data": "digits", "partition": "dirichlet:0.1", "model": "resnet8"},
    )


def fot() -> dict[str, str]:
    """Accuracy over all tasks at the end; each method with the best of four settings at another seed."""
    trials = {
        "fot": [{"lr": lr, "eps": eps} for lr in (0.1, 0.5) for eps in (0.8, 0.95)],
        "fedavg": [{"lr": lr} for lr in (0.05, 0.1, 0.2, 0.5)],
        "fedprox": [{"lr": lr, "mu": mu} for lr in (0.1, 0.5) for mu in (0.1, 1.0)],
    }
    best = {name: max(tried, key=lambda fields: remembered(name, fields, seed=100)) for name, tried in trials.items()}
    return row(
        "fot",
        "Projected updates forget less: higher accuracy over all tasks at the end.",
        "digits, 5 tasks of two classes, 5 clients, 3 rounds of 5 epochs each, seeds=6",
        "mean accuracy over tasks",
        {name: {seed: remembered(name, fields, seed) for seed in range(6)} for name, fields in best.items()},
        note="Chosen of four at seed 100: "
        + "; ".join(f"{name} {', '.join(f'{k}={v}' for k, v in one.items())}" for name, one in best.items())
        + ", by test accuracy there. With lr 0.5 for all (an earlier try, three seeds: 0.963, 0.906, 0.915) rivals "
        "forget; with a smaller one nobody does here, so there is nothing to win. "
        "The paper has ten tasks of harder images.",
    )


def remembered(name: str, fields: Mapping[str, float], seed: int) -> float:
    """The mean accuracy over all tasks of a stream, after the last."""
    settings = {"problem": "stream:5,rounds=3", "partition": "iid", "clients": 5, "rounds": 15, "model": "mlp:30"}
    run = fedloom.run(name, fields={"epochs": 5} | fields, seed=seed, eval_every=15, **settings)
    return float(matrices(run)[0][-1].mean())


def aglfop() -> dict[str, str]:
    """Where a model's disparity by sex comes from on Adult, in three ways of dealing it to two clients."""
    audits = {split: {seed: audited(split, seed) for seed in SEEDS} for split in ("uneven", "crossed", "iid")}
    parts = ("global", "local", "unique", "redundant", "masked")
    sums = {
        split: ", ".join(
            f"{part} {np.mean([one[f'server/{part}_disparity'] for one in by_seed.values()]):.4f}" for part in parts
        )
        for split, by_seed in audits.items()
    }
    costs = [[one[name] for one in audits["uneven"].values()] for name in ("server/limit_0", "server/limit_0.1")]
    accuracy = [one["global_test_accuracy"] for one in audits["uneven"].values()]
    return row(
        "aglfop",
        "Where clients have different groups, disparity between clients is redundant: none of it is seen inside them.",
        "adult, 4,000 training and 4,000 test rows, two clients, FedAvg, 10 rounds; uneven: one has 92 % of the women, "
        "the other 92 % of the men",
        "redundant disparity in bits; its rivals are the same data dealt otherwise",
        {
            split: {seed: one["server/redundant_disparity"] for seed, one in by_seed.items()}
            for split, by_seed in audits.items()
        },
        note=f"In bits: {'; '.join(f'{split}: {parted}' for split, parted in sums.items())}. Crossed: one client has "
        "the rows whose sex goes with their income, the other the rest, with 1 % swapped. The best accuracy of any "
        f"predictor is {told(costs[0])} at no disparity and {told(costs[1])} at a tenth of a bit (uneven); the model "
        f"has {told(accuracy)}. Nothing tuned; the official code trains longer, on all rows, at one seed.",
    )


def audited(split: str, seed: int) -> dict[str, float]:
    """The last round of a run on Adult whose rows go to two clients by a rule."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        for part in ("train", "test"):
            table = pq.read_table(ROOT.parent / "shared" / "data" / "adult" / f"{part}.parquet")
            draw = stream(seed, "claims", "adult", part)
            table = table.take(pa.array(torch.randperm(table.num_rows, generator=draw)[:ROWS].numpy()))
            chance = torch.rand(table.num_rows, generator=draw).numpy()
            woman = np.array([value.strip() == "Female" for value in table.column("sex").to_pylist()])
            rich = np.array([">" in str(value) or value in (1, True) for value in table.column("income").to_pylist()])
            first = {
                "iid": chance < 0.5,
                "uneven": woman ^ (chance < 0.08),
                "crossed": (woman == rich) ^ (chance < 0.01),
            }
            site = pa.array(np.where(first[split], "first", "second"))
            pq.write_table(table.append_column("site", site), Path(folder) / f"{part}.parquet")
        settings = {"label": "income", "partition": "column:site", "metadata": ("sex",), "keep": ("sex",)}
        more = {"missing": "most_frequent", "rounds": 10, "eval_every": 10, "model": "mlp:32", "seed": seed}
        inner = {"name": "fedavg", "lr": 0.1, "batch": 32}
        final = fedloom.run("aglfop", data=folder, inner=inner, **settings, **more).final
    return {name: value for name, value in final.items() if isinstance(value, float)}


BY_HAND: dict[str, Callable[[], dict[str, str]]] = {
    "masha": masha,
    "fal": fal,
    "fcp": fcp,
    "fot": fot,
    "ida": ida,
    "l_dawa": l_dawa,
    "aglfop": aglfop,
}


def table() -> dict[str, dict[str, str]]:
    """The rows that there are, by method."""
    if not TABLE.exists():
        return {}
    with TABLE.open() as file:
        return {one["method"]: one for one in csv.DictReader(file)}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ask.add_argument("names", nargs="*", metavar="NAME", help="default: all that have no row yet")
    ask.add_argument("--jobs", type=int, default=0, help="runs at once; default: one a core")
    ask.add_argument("--data", action="store_true", help="only cut the small data sets")
    asked = ask.parse_args()
    names = asked.names
    torch.set_num_threads(1)
    if asked.data:
        smaller()
        fewer_texts()
        return
    rows = table()
    known = sorted({path.stem for path in (HERE / "claims").glob("*.yaml")} | BY_HAND.keys())
    for name in names or [name for name in known if name not in rows]:
        made = BY_HAND[name]() if name in BY_HAND else compared(HERE / "claims" / f"{name}.yaml", asked.jobs)
        rows = table() | {name: made}  # read again: another process may have written
        print(f"{name}: {made['result']} | {made['rivals']} | {made['difference']} | {made['verdict']}", flush=True)
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows[key] for key in sorted(rows))


if __name__ == "__main__":
    main()
