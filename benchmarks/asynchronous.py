"""Virtual time to 90 % of FedAvg's final accuracy, where the fastest client is ten times as fast as the slowest.

    python benchmarks/asynchronous.py ../shared/data/mnist --out benchmarks/results/asynchronous.csv

Twenty clients, all of them at work; speeds are log-normal (deviation 1, within a factor of ten), drawn by the seed.
`digits` is dealt by Dirichlet 0.3, MNIST in PFLlib's partition. FedAvg runs its rounds; each other method runs until it
has FedAvg's 90 %, or until the time that FedAvg took for all its rounds is over. A method is judged after every server
step, those that step at every arrival after every fifth. Nothing is tuned: all have FedAvg's learning rate and batch,
and the amounts of work below. A seed of MNIST takes some three minutes of one core.

FedAST trains two models over one pool. Its time is that at which both have reached their targets, each at its first
look there; a target is 90 % of what FedAvg alone reaches on that problem. The others train one model after the other,
and their times add up. FedAvg's sum is 1 there, too.
"""

import argparse
import contextlib
import csv
import time
from functools import partial
from pathlib import Path

import fedloom
from fedloom import Classification
from fedloom.tasks.several import Several

PROBLEMS = {  # rounds of FedAvg, settings of all, steps of a median client's epoch
    "digits": (20, {"lr": 0.05, "batch": 10}, 6),
    "mnist": (10, {"lr": 0.02, "batch": 50}, 50),
}
PAIRS = {  # rounds of FedAvg on each, settings of all, FedAST's server steps between two looks
    ("digits", "breast_cancer"): ((20, 20), {"lr": 0.05, "batch": 10}, 1),
    ("mnist", "digits"): ((10, 20), {"lr": 0.05, "batch": 10}, 10),  # most are steps of digits, whose jobs are short
}
WORLD = {"speed": "lognormal:1.0,within=10", "step_seconds": 0.1}
COLUMNS = (
    "problem",
    "seed",
    "method",
    "fields",
    "target",
    "seconds",
    "of_fedavg",
    "server_steps",
    "gradient_steps",
    "up_mb",
)


def fields_of(steps):
    """Methods by label: name, fields, server steps between two looks."""
    plain = {"inner": "sgd", "steps": 3 * steps, "grace": 0.5}
    return {
        "fedbuff": ("fedbuff", {"buffer": 5}, 1),
        "fedbuff, undiscounted": ("fedbuff", {"buffer": 5, "decay": 0.0}, 1),
        "fedasync": ("fedasync", {"epochs": 1}, 5),
        "fedasmu": ("fedasmu", {"epochs": 1}, 5),
        "fedasmu, no refresh": ("fedasmu", {"epochs": 1, "refresh": 1.0}, 5),
        "fedcompass": ("fedcompass", {"fewest": steps, "most": 5 * steps}, 1),
        "async_local_sgd": ("async_local_sgd", plain, 5),
        "async_local_sgd, no DyLU": ("async_local_sgd", plain | {"dynamic": False}, 5),
        "async_local_sgd, no momentum": ("async_local_sgd", plain | {"beta": 0.0, "server_lr": 1.0}, 5),
    }


class Reached(Exception):
    """The run has what was asked of it."""


class Reaching:
    """Looks at a run of two models, until each has had its target."""

    def __init__(self, targets):
        self.targets, self.there, self.spent = targets, {}, [0.0, 0, 0.0]

    def __call__(self, row):
        for place, name in enumerate(("virtual_seconds", "gradient_steps", "up_bytes")):
            self.spent[place] += row[name]
        for m, target in enumerate(self.targets):
            if row.get(f"server/part_{m}_accuracy", 0.0) >= target and m not in self.there:
                seconds, steps, sent = self.spent
                self.there[m] = (seconds, row[f"server/part_{m}_accuracy"], row["round"], steps, sent / 1e6)
        if len(self.there) == len(self.targets):
            raise Reached


def pair(tasks, rounds, common, every, seed):
    """Rows (label, fields, targets, look or None) of two problems, and FedAvg's time for one after the other."""
    alone = [measured(task, "fedavg", common, seed, rounds=n) for task, n in zip(tasks, rounds, strict=True)]
    targets, budget = [0.9 * looks[-1][1] for looks in alone], sum(looks[-1][0] for looks in alone)
    fedavg = added([reached(looks, target) for looks, target in zip(alone, targets, strict=True)])
    limits = {"rounds": 100_000, "max_virtual_seconds": budget}
    yield "fedavg, one after the other", {}, targets, fedavg
    fields = {"buffer": 5}
    looks = [
        reached(measured(task, "fedbuff", common | fields, seed, target, **limits), target)
        for task, target in zip(tasks, targets, strict=True)
    ]
    yield "fedbuff, one after the other", fields, targets, added(looks)
    for label, fields in {"fedast": {"epochs": 1}, "fedast, static": {"epochs": 1, "dynamic": False}}.items():
        look = Reaching(targets)
        with contextlib.suppress(Reached):
            fedloom.run(
                "fedast",
                Several(tasks),
                fields=common | fields,
                seed=seed,
                on_round=look,
                report=False,
                eval_every=every,
                **WORLD | limits,
            )
        yield label, fields, targets, max(look.there.values()) if len(look.there) == 2 else None


def reached(looks, target):
    """The first look that has the target, or None."""
    return next((look for look in looks if look[1] >= target), None)


def added(looks):
    """What two runs took together."""
    return None if None in looks else tuple(sum(numbers) for numbers in zip(*looks, strict=True))


def measured(task, method, fields, seed, target=2.0, **settings):
    """(virtual seconds, accuracy, server steps, gradient steps, MB up) at each look, until one has the target."""
    looks, spent = [], [0.0, 0, 0.0]

    def look(row):
        spent[0] += row["virtual_seconds"]
        spent[1] += row["gradient_steps"]
        spent[2] += row["up_bytes"] / 1e6
        if row.get("global_test_accuracy") is not None:
            looks.append((spent[0], row["global_test_accuracy"], row["round"], spent[1], spent[2]))
            if row["global_test_accuracy"] >= target:
                raise Reached

    with contextlib.suppress(Reached):
        fedloom.run(method, task, fields=fields, seed=seed, on_round=look, report=False, **WORLD | settings)
    return looks


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ask.add_argument("mnist", type=Path, nargs="?", help="PFLlib's partition; without it digits only")
    ask.add_argument("--out", type=Path, default=Path("benchmarks/results/asynchronous.csv"))
    ask.add_argument("--seeds", type=int, default=5)
    ask.add_argument("--pairs", action="store_true", help="only FedAST's part, added to the file that is there")
    args = ask.parse_args()
    dealt = {"clients": 20, "partition": "dirichlet:0.3", "validation": 0.0}
    tasks = {name: partial(Classification.load, name, **dealt) for name in ("digits", "breast_cancer")}
    if args.mnist:
        mnist = Classification.load(str(args.mnist), partition="column:client", validation=0.0, model="dnn")
        tasks["mnist"] = lambda seed: mnist
    singles = {} if args.pairs else {name: tasks[name] for name in PROBLEMS if name in tasks}
    began = time.perf_counter()
    with args.out.open("a" if args.pairs else "w", newline="") as file:
        table = csv.writer(file)
        if not args.pairs:
            table.writerow(COLUMNS)
        for problem, task_of in singles.items():
            rounds, common, steps = PROBLEMS[problem]
            for seed in range(args.seeds):
                task = task_of(seed=seed)
                looks = measured(task, "fedavg", common, seed, rounds=rounds)
                target, budget = 0.9 * looks[-1][1], looks[-1][0]
                first = next(look for look in looks if look[1] >= target)
                write(table, problem, seed, "fedavg", {}, target, first, first[0])
                for label, (method, fields, every) in fields_of(steps).items():
                    settings = {"rounds": 100_000, "max_virtual_seconds": budget, "eval_every": every}
                    looks = measured(task, method, common | fields, seed, target, **settings)
                    there = looks[-1] if looks and looks[-1][1] >= target else None
                    write(table, problem, seed, label, fields, target, there, first[0])
                file.flush()
                print(f"{problem}, seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
        for names, (rounds, common, every) in PAIRS.items():
            for seed in range(args.seeds if set(names) <= tasks.keys() else 0):
                problem, first = " and ".join(names), None
                for label, fields, targets, look in pair(
                    [tasks[name](seed=seed) for name in names], rounds, common, every, seed
                ):
                    first = first or look[0]
                    write(table, problem, seed, label, fields, min(targets), look, first)
                file.flush()
                print(f"{problem}, seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
    draw(args.out)


def write(table, problem, seed, label, fields, target, look, fedavg) -> None:
    named = " ".join(f"{name}={value}" for name, value in fields.items())
    numbers = ["never"] * 5
    if look is not None:
        numbers = [round(look[0], 2), round(look[0] / fedavg, 3), look[2], look[3], round(look[4], 3)]
    table.writerow([problem, seed, label, named, round(target, 4), *numbers])


def draw(path: Path) -> None:
    """The picture beside the table: each seed's time as a share of FedAvg's."""
    import matplotlib.pyplot as plt

    with path.open() as file:
        rows = list(csv.DictReader(file))
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    labels = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(1, len(problems), figsize=(4.5 * len(problems), 3.6), sharey=True, squeeze=False)
    for ax, problem in zip(axes[0], problems, strict=True):
        for place, label in enumerate(labels):
            mine = [row["of_fedavg"] for row in rows if (row["problem"], row["method"]) == (problem, label)]
            there = [float(share) for share in mine if share != "never"]
            ax.plot(there, [place] * len(there), "o", color="tab:blue", alpha=0.6)
            if len(there) < len(mine):
                missed = f"never: {len(mine) - len(there)} of {len(mine)}"
                ax.text(0.98, place, missed, transform=ax.get_yaxis_transform(), fontsize=7, ha="right", va="bottom")
        ax.axvline(1, color="0.7", zorder=0)
        ax.set(title=problem, xlabel="time to 90 % of FedAvg's accuracy, FedAvg = 1", xscale="log")
    axes[0][0].set_yticks(range(len(labels)), labels)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
