"""Accuracy on PFLlib's 20-client MNIST partition, method by method: the numbers of docs/comparison.md.

    python benchmarks/mnist20.py ../shared/data/mnist --out benchmarks/results/mnist20.csv

`dnn`, batch 10, learning rate 0.005, one local epoch, 20 clients, all in every round, 20 rounds. Once as the library
normalises (mean and deviation of the training pixels), once with pixels in [-1, 1] as PFLlib does; no validation rows.
"""

import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path

import fedloom
from fedloom import Classification

METHODS = [  # method, fields: those that PFLlib's defaults amount to, and then the papers'
    ("fedavg", {}),
    ("fedprox", {"mu": 0.01}),
    ("scaffold", {}),
    ("fednova", {}),
    ("fedopt", {"server_lr": 0.01}),
    ("feddyn", {"alpha": 0.1}),
    ("moon", {"mu": 1.0}),
    ("ditto", {"lam": 0.1}),
    ("fedrep", {"head_epochs": 1}),
    ("fedproto", {}),
    ("local", {}),
    ("centralized", {}),
]
COLUMNS = ("pixels", "seed", "method", "fields", "round", "judged", "accuracy", "std", "worst")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ask.add_argument("data", type=Path)
    ask.add_argument("--out", type=Path, help="a CSV file; default the standard output")
    ask.add_argument("--seeds", type=int, default=2)
    ask.add_argument("--only", nargs="*", default=[], help="methods; default all")
    ask.add_argument("--pixels", choices=["[-1, 1]", "standard"], help="default both")
    args = ask.parse_args()
    task = Classification.load(str(args.data), partition="column:client", validation=0.0, model="dnn")
    x = task.federation.x
    squeezed = replace(task.federation, x=2 * (x - x.min()) / (x.max() - x.min()) - 1)
    with args.out.open("w") if args.out else sys.stdout as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        problems = {"[-1, 1]": replace(task, federation=squeezed), "standard": task}
        for pixels in [args.pixels] if args.pixels else problems:
            for method, fields in METHODS:
                for seed in range(args.seeds) if not args.only or method in args.only else ():
                    made = fedloom.run(
                        method,
                        problems[pixels],
                        fields=fields | {"lr": 0.005, "epochs": 1},
                        rounds=20,
                        eval_every=5,
                        engine="pool",
                        seed=seed,
                    )
                    named = " ".join(f"{name}={value}" for name, value in fields.items())
                    for row in made.metrics:
                        if "personal_test_accuracy" in row:
                            judged = (
                                "personal" if row["global_test_accuracy"] is None or method == "ditto" else "global"
                            )
                            measured = [row["personal_test_accuracy"], row["personal_test_accuracy_std"]]
                            shown = [round(value, 4) for value in [*measured, row["worst_client_accuracy"]]]
                            table.writerow([pixels, seed, method, named, row["round"], judged, *shown])
                    file.flush()


if __name__ == "__main__":
    main()
