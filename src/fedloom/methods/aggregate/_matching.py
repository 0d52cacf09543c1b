"""Which neurons of several networks are the same: matching under a Beta-Bernoulli process.

After Yurochkin et al., Bayesian Nonparametric Federated Learning of Neural Networks, ICML 2019, arXiv 1905.12022, with
the costs of FedMA (arXiv 2002.06440).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MOST_OF_ONE = 10  # beyond so many clients a neuron becomes no more popular
WIDEST = 700  # a layer of this width gets one new neuron at a time


class Neurons:
    """Global neurons as posteriors: sums of rows `total` [L, D], and how many clients are in each, `members` [L]."""

    def __init__(self, width: int, sigma: float, sigma0: float, mean: Tensor) -> None:
        self.s, self.s0 = sigma**-2, sigma0**-2
        self.prior = mean * self.s0
        self.total = torch.zeros(0, width, dtype=torch.float64)
        self.members = torch.zeros(0, dtype=torch.int64)

    def precision(self) -> Tensor:
        """[L, 1]."""
        return (self.s0 + self.members.double() * self.s)[:, None]

    def add(self, rows: Tensor, where: Tensor) -> None:
        """Rows [K, D] of one client to the neurons `where` [K]; those beyond the last are new."""
        more = int(where.max()) + 1 - len(self.total) if len(where) else 0
        if more > 0:
            self.total = torch.cat([self.total, self.prior.expand(more, -1)])
            self.members = torch.cat([self.members, self.members.new_zeros(more)])
        self.total[where] += rows * self.s
        self.members[where] += 1

    def remove(self, rows: Tensor, where: Tensor) -> Tensor:
        """Takes them out again; returns the new number of every neuron [L], -1 for one that nobody is left in."""
        self.total[where] -= rows * self.s
        self.members[where] -= 1
        kept = self.members > 0
        self.total, self.members = self.total[kept], self.members[kept]
        return torch.where(kept, kept.cumsum(0) - 1, -1)

    def assign(self, rows: Tensor, clients: int, gamma: float) -> Tensor:
        """The neurons [K] that fit a client's rows [K, D] best, each at most once (Hungarian method)."""
        from scipy.optimize import linear_sum_assignment

        s, precision = self.s, self.precision()
        # sum_d (w s + G)^2 / (s + S) - G^2 / S, for all pairs at once
        cross = (rows * s) @ (self.total / (s + precision)).T
        own = (rows * s).square().sum(1)[:, None] / (s + precision).T
        rest = (self.total.square() / (s + precision) - self.total.square() / precision).sum(1)
        popular = self.members.clamp(max=MOST_OF_ONE).double()
        known = own + 2 * cross + rest + (popular / (clients - popular).clamp(min=1e-6)).log()
        fresh = min(len(rows), max(WIDEST - len(self.total), 1))
        alone = (rows * s + self.prior).square().sum(1) / (self.s0 + s) - self.prior.square().sum() / self.s0
        ranks = torch.arange(1, fresh + 1, dtype=torch.float64)
        new = alone[:, None] - 2 * ranks.log() + 2 * math.log(gamma / clients)
        _, where = linear_sum_assignment(torch.cat([known, new], 1).numpy(), maximize=True)
        # New neurons are numbered without gaps, in the order of their columns.
        columns, old = np.unique(where[where >= len(self.total)]), torch.from_numpy(where)
        places = torch.searchsorted(torch.from_numpy(columns), old.clamp(min=len(self.total)))
        return torch.where(old < len(self.total), old, len(self.total) + places)


def match(
    rows: Sequence[Tensor],
    generator: torch.Generator,
    gamma: float = 7.0,
    sigma: float = 1.0,
    sigma0: float = 1.0,
    mean: Tensor | None = None,
    passes: int = 5,
) -> tuple[Tensor, list[Tensor]]:
    """Global neurons [L, D] of the rows [L_j, D] of several clients, and the neuron of every row, [L_j] a client.

    `gamma` is how readily new neurons are made, `sigma` the deviation of a client's rows from the global ones, `sigma0`
    that of the global ones from `mean` [D] (default 0). After a first round through the clients, widest first, `passes`
    more take each client out and match it again, in random orders.
    """
    rows = [one.double().cpu() for one in rows]
    width = rows[0].shape[1]
    neurons = Neurons(width, sigma, sigma0, torch.zeros(width, dtype=torch.float64) if mean is None else mean.double())
    found: list[Tensor] = [torch.zeros(0, dtype=torch.int64)] * len(rows)
    for place, j in enumerate(sorted(range(len(rows)), key=lambda j: -len(rows[j]))):
        found[j] = neurons.assign(rows[j], len(rows), gamma) if place else torch.arange(len(rows[j]))
        neurons.add(rows[j], found[j])
    for _ in range(passes if len(rows) > 1 else 0):
        for j in torch.randperm(len(rows), generator=generator).tolist():
            renumbered = neurons.remove(rows[j], found[j])
            found = [renumbered[where] if k != j else where for k, where in enumerate(found)]
            found[j] = neurons.assign(rows[j], len(rows), gamma)
            neurons.add(rows[j], found[j])
    return neurons.total / neurons.precision(), found
