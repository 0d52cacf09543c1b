"""How much a model tells about who was in its training data: a membership-inference attack, beside the proved bound.

The attack on each sample's loss of Yeom, Giacomelli, Fredrikson, Jha, CSF 2018, arXiv 1709.01604.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedloom.random import stream

if TYPE_CHECKING:
    from fedloom.node import Server
    from fedloom.task import Batch, Data, Task

MOST = 2000  # samples of each kind that are attacked
PARTIES = 200  # clients whose samples are


@dataclass(frozen=True)
class Leak:
    """What guessing "member" below a threshold on the loss achieves."""

    auc: float  # area under the curve of hits against false alarms; 0.5 is guessing
    advantage: float  # the most that hits exceed false alarms by
    hits: float  # share of members found at one false alarm in a hundred


def attacked(members: Tensor, others: Tensor) -> Leak:
    """The attack on losses of samples that were trained on [M] and of samples that were not [N]."""
    losses = torch.cat([members, others]).double().cpu()
    is_member = torch.cat([torch.ones(len(members)), torch.zeros(len(others))]).double()
    order = losses.argsort(stable=True)
    steps = torch.cat([losses[order].diff() > 0, torch.tensor([True])])  # equal losses are told apart by nobody
    hits = (is_member[order].cumsum(0) / len(members))[steps]
    alarms = ((1 - is_member[order]).cumsum(0) / len(others))[steps]
    hits, alarms = (torch.cat([torch.zeros(1, dtype=torch.float64), curve]) for curve in (hits, alarms))
    auc = float(torch.trapezoid(hits, alarms))
    return Leak(auc, float((hits - alarms).max()), float(hits[alarms <= 0.01].max()))


def bound(epsilon: float, delta: float, false_alarms: float = 0.01) -> float:
    """The share of members that no attack exceeds at so many false alarms [Kairouz, Oh, Viswanath 2015]."""
    if epsilon > 700:
        return 1.0
    return max(
        0.0, min(1.0, math.exp(epsilon) * false_alarms + delta, 1 - math.exp(-epsilon) * (1 - delta - false_alarms))
    )


def losses(net: nn.Module, task: Task, batch: Batch) -> Tensor:
    """The loss of every sample, [n]."""
    with torch.no_grad():
        scores = net(batch.x)
        one_by_one = (slice(i, i + 1) for i in range(len(batch)))
        return torch.stack([task.criterion(scores[one], batch.part(one)) for one in one_by_one])


def leakage(server: Server, task: Task, seed: int) -> Leak:
    """The attack on the global model: clients' training samples against samples of the global test."""
    net = server.net(server.model)

    def some(which: str, parties: Sequence[Data]) -> Tensor:
        """The losses of MOST samples, each client's computed by themselves: a graph's nodes belong together."""
        ends = list(accumulate((len(data) for data in parties), initial=0))
        chosen = torch.randperm(ends[-1], generator=stream(seed, "world", "membership", which))[:MOST].sort().values
        found = []
        for data, start, stop in zip(parties, ends, ends[1:], strict=False):
            rows = chosen[(chosen >= start) & (chosen < stop)] - start
            if len(rows):
                here = data.taken(rows.to(data.labels.device))
                found.append(losses(net, task, data.at(here)))
        return torch.cat(found)

    members = [task.data(k, "train") for k in range(min(task.population, PARTIES))]
    return attacked(some("members", members), some("others", [task.global_test()]))
