"""A million clients: seconds to start, seconds a round, and memory as the cohort grows.

    python benchmarks/scale.py
    python benchmarks/scale.py --population 100000 --rounds 10

A client has two samples in R^16, by index into storage that all share; `mlp:64`, one epoch, batch 2, engine `serial`.
Clients of `fedavg` remember nothing, those of `scaffold` a vector of the model's size; in the last line the states have
a budget of 4 MiB, and most of them lie on disk. Each line is a process of its own: `start` is all the time that is not
spent in rounds or evaluations, `peak` the most that was resident, of which `import` is there before anything is made.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from multiprocessing.connection import Connection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedloom import nets
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.task import Batch, Data, Scores, Task

SAMPLES, FEATURES, CLASSES = 2, 16, 10
TESTED = 10_000  # the first samples are the global test: accuracy is beside the point
PLAN = [  # method, cohort, MiB that states may take in memory
    ("fedavg", 100, None),
    ("fedavg", 1_000, None),
    ("fedavg", 10_000, None),
    ("scaffold", 1_000, None),
    ("scaffold", 1_000, 4),
]


class Crowd(Task):
    """Random samples of a population; a client's test is its first training sample."""

    classes = CLASSES

    def __init__(self, population: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.population = population
        self.x = torch.randn(population * SAMPLES, FEATURES, generator=draw)
        self.y = torch.randint(0, CLASSES, (len(self.x),), generator=draw)

    def network(self) -> nn.Module:
        return nets.build("mlp:64", (FEATURES,), CLASSES)

    def data(self, client: int, split: str) -> Data:
        first = client * SAMPLES
        return Data(self.x, self.y, torch.arange(first, first + (SAMPLES if split == "train" else 1)))

    def global_test(self) -> Data:
        return Data(self.x[:TESTED], self.y[:TESTED])

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.y)

    def judge(self, scores: Scores, data: Data) -> dict[str, float]:
        out = scores(data.x)
        accuracy = (out.argmax(1) == data.y).double().mean().item()
        return {"n": len(data), "loss": F.cross_entropy(out, data.y).item(), "accuracy": accuracy}

    def to(self, device: torch.device) -> Task:
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self


def peak() -> float:
    """MiB that this process had resident at most."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10


def measure(method: str, cohort: int, budget: int | None, population: int, rounds: int, pipe: Connection) -> None:
    """Sends one line of the table."""
    imported, began = peak(), time.perf_counter()
    settings = {"partition": "given", "cohort": cohort, "rounds": rounds, "eval_every": rounds}
    spec = Spec.of({"method": {"name": method, "batch": SAMPLES}, **settings})
    made = Experiment(spec, Crowd(population)).begin(None)
    if budget is not None:
        made.states.budget = budget * 2**20
    rows = made.go().metrics
    start = time.perf_counter() - began - sum(row["seconds"] + row.get("eval_seconds", 0.0) for row in rows)
    seconds = statistics.median(row["seconds"] for row in rows)
    disk = made.states.spill.end / 2**20 if made.states.spill else 0.0
    pipe.send(
        f"{method:9} {cohort:7,} {start:8.2f} {seconds:8.2f} {1e3 * seconds / cohort:10.2f} "
        f"{rows[-1]['eval_seconds']:8.2f} {imported:10.0f} {peak():9.0f} {len(made.states):7,} {disk:9.1f}"
    )


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ask.add_argument("--population", type=int, default=1_000_000)
    ask.add_argument("--rounds", type=int, default=3)
    args = ask.parse_args()
    print(f"{args.population:,} clients, {args.rounds} rounds, medians")
    print("method     cohort  start s  round s  ms/client   eval s import MiB  peak MiB  states  disk MiB")
    context = multiprocessing.get_context("spawn")  # a fork would inherit its parent's memory
    for line in PLAN:
        ours, theirs = context.Pipe()
        process = context.Process(target=measure, args=(*line, args.population, args.rounds, theirs))
        process.start()
        theirs.close()
        print(ours.recv(), flush=True)
        process.join()


if __name__ == "__main__":
    main()
