"""Many clients: what exists grows with those that work, not with those that are registered."""

import multiprocessing
import resource
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.task import Data, Task

POPULATION = 200_000
WIDTH = 12_500  # the model has 4 * WIDTH numbers, 200 kB


class Crowd(Task):
    """Two samples in R^2 for each of many clients."""

    population, classes = POPULATION, 2

    def __init__(self):
        self.x = torch.randn(2 * POPULATION, 2, generator=torch.Generator().manual_seed(0))
        self.y = (self.x.sum(1) > 0).long()

    def network(self):
        net = nn.Sequential(nn.Linear(2, WIDTH, bias=False), nn.ReLU())
        return nn.Sequential(net, nn.Linear(WIDTH, 2, bias=False))

    def data(self, client, split):
        return Data(self.x, self.y, torch.arange(2 * client, 2 * client + 2))

    def global_test(self):
        return Data(self.x[:10], self.y[:10])

    def criterion(self, outputs, batch):
        return F.cross_entropy(outputs, batch.y)

    def judge(self, scores, data):
        return {"n": len(data), "loss": self.criterion(scores(data.x), data.all()).item(), "accuracy": 0.0}

    def to(self, device):
        return self


def peak():
    """MiB that this process had resident at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure(method, cohorts, budget, pipe):
    """Sends, for a run with each cohort: seconds beside training, peak memory beyond what was there before, states."""
    torch.set_num_threads(1)
    task, before = Crowd(), peak()
    for cohort in cohorts:
        began = time.perf_counter()
        settings = {"partition": "given", "rounds": 2, "cohort": cohort, "eval_every": 2}
        made = Experiment(Spec.of({"method": method, **settings}), task).begin(None)
        made.states.budget = budget
        rows = made.go().metrics
        seconds = time.perf_counter() - began - sum(row["seconds"] + row.get("eval_seconds", 0) for row in rows)
        pipe.send((seconds, peak() - before, len(made.states)))


def measured(method, cohorts, budget=2**30):
    context = multiprocessing.get_context("spawn")  # a process of its own: its peak is not that of the tests before
    ours, theirs = context.Pipe()
    process = context.Process(target=measure, args=(method, cohorts, budget, theirs))
    process.start()
    theirs.close()
    seen = [ours.recv() for _ in cohorts]
    process.join()
    return seen


def test_a_run_of_many_clients_starts_at_once_and_its_memory_does_not_grow_with_the_cohort():
    (start, few, _), (_, many, _) = measured("fedavg", (20, 600))
    assert start < 5, f"{start:.1f} s beside training"
    assert few < 60, f"{few:.0f} MiB for {POPULATION} clients"
    assert many - few < 40, f"{many - few:.0f} MiB more with 580 clients more, whose replies are 110 MiB"


def test_states_beyond_the_budget_take_no_memory():
    ((_, memory, states),) = measured("scaffold", (300,), budget=16 * 2**20)
    assert 590 <= states <= 600
    assert memory < 110, f"{memory:.0f} MiB with {states} states of 0.2 MB and a budget of 16 MiB"
