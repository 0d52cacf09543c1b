"""The jobs that the benchmarks time, and the same jobs as a bare PyTorch loop.

A: 20 clients with the sizes of PFLlib's MNIST partition (52,492 images of 28 x 28), `cnn`, batch 10, one epoch, all.
B: 1,000 clients of 50 samples in R^64, 100 a round, `mlp:64`, batch 10, one epoch.
C: as A with `dnn`.
L: 10 clients of 10 images of 32 x 32 x 3, `resnet18:group` (11 million parameters), one step of batch 10 each.
S: as A with a tenth of the samples: what `serial` costs on a convolutional network, in a minute or two.

Inputs and labels are random: what is measured is time, and it does not depend on them.
"""

import copy
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedloom import nets
from fedloom.task import Batch, Data, Scores, Task

LR, BATCH = 0.05, 10
MNIST = (  # training samples of the clients
    *(1972, 374, 1222, 1905, 1437, 4641, 942, 951, 2700, 3004),
    *(2337, 2829, 2709, 1600, 4297, 4086, 2721, 4239, 3949, 4577),
)


@dataclass
class Job(Task):
    """Random samples for a network: `sizes[k]` for client k, `cohort` clients a round."""

    network_name: str
    input_shape: tuple[int, ...]
    sizes: Sequence[int]
    cohort: int
    classes: int = 10

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.population = len(self.sizes)
        self.x = torch.randn(sum(self.sizes), *self.input_shape, generator=draw)
        self.y = torch.randint(0, self.classes, (len(self.x),), generator=draw)
        self.rows = torch.arange(len(self.x)).split(list(self.sizes))

    def network(self) -> nn.Module:
        return nets.build(self.network_name, self.input_shape, self.classes)

    def data(self, client: int, split: str) -> Data:
        return Data(self.x, self.y, self.rows[client] if split == "train" else self.rows[client][:1])

    def global_test(self) -> Data:
        return Data(self.x[:10], self.y[:10])

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch.y)

    def judge(self, scores: Scores, data: Data) -> dict[str, float]:
        return {"n": len(data), "loss": 0.0, "accuracy": 0.0}

    def to(self, device: torch.device) -> Task:
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self

    def chosen(self) -> list[int]:
        """The clients of a round of the bare loop."""
        return torch.randperm(self.population)[: self.cohort].tolist()


def jobs(names: Sequence[str]) -> dict[str, Job]:
    """The jobs of these names."""
    make = {
        "A": lambda: Job("cnn", (1, 28, 28), MNIST, 20),
        "B": lambda: Job("mlp:64", (64,), (50,) * 1000, 100),
        "C": lambda: Job("dnn", (1, 28, 28), MNIST, 20),
        "L": lambda: Job("resnet18:group", (3, 32, 32), (10,) * 10, 10),
        "S": lambda: Job("cnn", (1, 28, 28), [n // 10 for n in MNIST], 20),
    }
    return {name: make[name]() for name in names}


def train(net: nn.Module, job: Job, clients: Sequence[int]) -> dict[str, Tensor]:
    """The obvious loop over some clients: SGD from the network's weights; the weighted sum of the state dicts."""
    start = copy.deepcopy(net.state_dict())
    total = {name: torch.zeros_like(value) for name, value in start.items()}
    for k in clients:
        x, y = job.data(k, "train").all()
        net.load_state_dict(start)
        net.train()
        optimizer = torch.optim.SGD(net.parameters(), lr=LR)
        for rows in torch.randperm(len(y)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
        for name, value in net.state_dict().items():
            total[name] += value * len(y)
    net.load_state_dict(start)
    return total


def bare_round(net: nn.Module, job: Job) -> float:
    """Seconds of one round by hand, one client after the other."""
    began = time.perf_counter()
    clients = job.chosen()
    total = train(net, job, clients)
    samples = sum(job.sizes[k] for k in clients)
    net.load_state_dict({name: value / samples for name, value in total.items()})
    return time.perf_counter() - began


class BothCores:
    """The bare loop in two processes that split the clients evenly by samples and exchange nothing but the sums."""

    def __init__(self, net: nn.Module, job: Job) -> None:
        self.job = job
        self.pipes, self.processes = [], []
        context = multiprocessing.get_context("fork")
        for _ in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_half, args=(net, job, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def round(self) -> float:
        """Seconds of one round."""
        began = time.perf_counter()
        halves: list[list[int]] = [[], []]
        loads = [0, 0]
        for k in sorted(self.job.chosen(), key=lambda k: -self.job.sizes[k]):
            lighter = loads.index(min(loads))
            halves[lighter].append(k)
            loads[lighter] += self.job.sizes[k]
        for pipe, half in zip(self.pipes, halves, strict=True):
            pipe.send(half)
        for pipe in self.pipes:
            pipe.recv()
        return time.perf_counter() - began

    def stop(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            process.terminate()
            process.join()


def _half(net: nn.Module, job: Job, pipe) -> None:
    torch.set_num_threads(1)
    while True:
        train(net, job, pipe.recv())
        pipe.send(True)
