"""Attacks by rules on real data: accuracy, attack success and detection; a table and a picture.

    python benchmarks/robust.py --mnist ../shared/data/mnist --out benchmarks/results

20 clients, all in every round: MNIST as its column `client` deals it (at most 200 training rows a client), and the
embedded digits dealt by dirichlet:1.0. FedAvg with `mlp:32`, one local epoch, batches of 25, learning rate 0.1. The
server of FLTrust has a public share of the training rows. Every rule is told the true share of attackers. `gas` stands
where its inner rule can. Where honest clients run into numbers that are no longer finite, the accuracy is guessing's.
"""

import argparse
import csv
import time
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch

import fedloom
from fedloom import Classification
from fedloom.calls import ClientError
from fedloom.data.shards import Shards
from fedloom.random import stream
from fedloom.runs.spec import Spec
from fedloom.tasks import build

ROWS, TEST = 200, 2000  # training rows of a client, and test rows of all together, at most
ATTACKS = {
    "none": "",
    "sign flip x5": "sign_flip:{f},scale=5",
    "gaussian": "gaussian:{f},std=0.1",
    "zero": "zero:{f}",
    "NaN": "nan:{f}",
    "label flip": "label_flip:{f}",
    "backdoor": "backdoor:{f},target=0",
    "replacement x5": "model_replacement:{f},target=0,scale=5",
    "ALIE": "alie:{f},z=1.5",
    "IPM 0.5": "ipm:{f},epsilon=0.5",
    "mimic": "mimic:{f}",
    "DMPA": "dmpa:{f}",
}
RULES = {
    "mean": None,
    "median": "median",
    "trimmed mean": "trimmed_mean:{share}",
    "Krum": "krum:f={share}",
    "Multi-Krum": "multi_krum:f={share}",
    "geometric median": "geometric_median",
    "centred clipping": "centred_clip",
    "norm bound": "norm_bound",
    "FLTrust": "fltrust",
    "NNM + trimmed mean": "nnm+trimmed_mean:{share}",
    "bucketing + median": "bucketing:2+median",
    "GAS + Multi-Krum": "gas:p=250+multi_krum:f={share}",
    "GAS + median": "gas:p=250,f={share}+median",
}
COLUMNS = ("data", "attackers", "attack", "rule", "accuracy", "attack_success", "precision", "recall", "seconds")


def problems(mnist: Path | None) -> dict[str, Classification]:
    """The tasks, by the name of their data."""
    found = {
        "digits": build(
            Spec(data="digits", partition="dirichlet:1.0", clients=20, model="mlp:32", public=0.05, validation=0.0)
        )
    }
    if mnist:
        task = Classification.load(str(mnist), partition="column:client", validation=0.0, model="mlp:32", public=0.01)
        kept = task.federation
        train, test = few(kept.train, ROWS), few(kept.test, TEST // task.population)
        found["MNIST"] = replace(task, federation=replace(kept, train=train, test=test))
    return found


def few(shards: Shards, count: int) -> Shards:
    """At most so many rows of each client."""
    drawn = [torch.randperm(len(rows), generator=stream(0, "rows", k))[:count] for k, rows in enumerate(shards)]
    kept = [rows[chosen.sort().values] for rows, chosen in zip(shards, drawn, strict=True)]
    return Shards(torch.cat(kept), torch.tensor([0, *accumulate(map(len, kept))]))


def measured(
    task: Classification, attack: str, rule: str | None, rounds: int, seed: int = 0
) -> dict[str, float | None]:
    """What a run ends with; detection is its mean over the rounds."""
    try:
        made = fedloom.run(
            "fedavg",
            task,
            fields={"lr": 0.1, "batch": 25},
            rounds=rounds,
            eval_every=rounds,
            seed=seed,
            attack=attack or None,
            aggregate=rule,
            engine="vectorized",
            report=False,
        )
    except ClientError:
        return {"accuracy": 1 / task.classes}
    caught = {
        name: [row[f"attack/{name}"] for row in made.metrics if row.get(f"attack/{name}") is not None]
        for name in ("precision", "recall")
    }
    last = made.final
    return {
        "accuracy": last["global_test_accuracy"],
        "attack_success": last.get("attack_success_rate"),
    } | {name: sum(values) / len(values) if values else None for name, values in caught.items()}


def split(task: Classification, rounds: int, path: Path) -> None:
    """ALIE by a fifth of the clients: each rule alone, and behind gradient splitting."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("z", "seed", "rule", "accuracy", "accuracy with GAS"))
        for z in ("1.5", "null"):
            for rule in ("krum:f=0.2", "multi_krum:f=0.2", "bulyan:f=0.2", "median", "trimmed_mean:0.2"):
                for seed in range(2):
                    found = [
                        measured(task, f"alie:0.2,z={z}", text, rounds, seed)["accuracy"]
                        for text in (rule, f"gas:p=1000,f=0.2+{rule}")
                    ]
                    table.writerow((z, seed, rule, *found))
                    file.flush()


def picture(rows: list[dict[str, object]], path: Path) -> None:
    """The accuracies, one panel for each problem and share of attackers."""
    import matplotlib.pyplot as plt

    panels = sorted({(str(row["data"]), float(str(row["attackers"]))) for row in rows})
    figure, axes = plt.subplots(1, len(panels), figsize=(4 + 3.1 * len(panels), 5), sharey=True, squeeze=False)
    for axis, (data, share) in zip(axes[0], panels, strict=True):
        here = {
            (r["rule"], r["attack"]): float(str(r["accuracy"]))
            for r in rows
            if (r["data"], r["attackers"]) == (data, share)
        }
        grid = torch.tensor([[100 * here[rule, attack] for attack in ATTACKS] for rule in RULES])
        axis.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        axis.set_title(f"{data}, {share:.0%} attackers", fontsize=9)
        axis.set_xticks(range(len(ATTACKS)), ATTACKS, rotation=60, ha="right", fontsize=7)
        axis.set_yticks(range(len(RULES)), RULES, fontsize=7)
        for y, line in enumerate(grid.tolist()):
            for x, value in enumerate(line):
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=6)
    figure.suptitle("Accuracy in % after FedAvg under attack, by aggregation rule", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ask.add_argument("--mnist", type=Path, help="the folder of MNIST with a column client; default: digits only")
    ask.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    ask.add_argument("--rounds", type=int, default=15)
    ask.add_argument("--only", nargs="*", help="attacks; default all (then nothing is drawn)")
    ask.add_argument("--shares", nargs="*", type=float, default=[0.2, 0.4])
    ask.add_argument("--split", action="store_true", help="only ALIE, each rule alone and behind gas")
    args = ask.parse_args()
    torch.set_num_threads(1)
    if args.split:
        tasks = problems(args.mnist)
        split(tasks.get("MNIST", tasks["digits"]), args.rounds, args.out / "robust_gas.csv")
        return
    rows: list[dict[str, object]] = []
    for data, task in problems(args.mnist).items():
        path = args.out / f"robust_{data.lower()}.csv"
        with (path if not args.only else Path("/dev/stdout")).open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            clean: dict[str, dict[str, float | None]] = {}
            for share in args.shares:
                f = round(share * task.population)
                for attack, text in ATTACKS.items():
                    for rule, form in RULES.items():
                        if args.only and attack not in args.only:
                            continue
                        began = time.perf_counter()
                        aggregate = form.format(share=share) if form else None
                        key = str(aggregate)
                        if text or key not in clean:
                            found = measured(task, text.format(f=f), aggregate, args.rounds)
                        else:
                            found = clean[key]
                        if not text:
                            clean[key] = found
                        numbers = {name: None if v is None else round(v, 4) for name, v in found.items()}
                        row = {"data": data, "attackers": share, "attack": attack, "rule": rule} | numbers
                        rows.append(row | {"seconds": round(time.perf_counter() - began, 2)})
                        table.writerow(rows[-1])
                        file.flush()
    if not args.only:
        picture(rows, args.out / "robust.png")


if __name__ == "__main__":
    main()
