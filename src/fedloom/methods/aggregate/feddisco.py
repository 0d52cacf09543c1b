"""FedDisco."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.plugin import Plugin
from fedloom.ranges import Linear


@dataclass(frozen=True)
class FedDisco(Plugin):
    """Should a client count less in the average, the farther the labels it has seen are from those of everybody?

    Ye, Xu, Wang, Xu, Chen, Wang: FedDisco: Federated Learning with Discrepancy-Aware Collaboration, ICML 2023, arXiv
    2305.19229 (Algorithm 1; official code MediaBrain-SJTU/FedDisco).

        once, client k:     D_k <- shares of the classes among its labels;  send d_k = KL(D_k || T), T uniform
        server, round t:    p_k <- n_k / sum_{j in S} n_j;  e_k <- d_k / sum_{j in S} d_j, for the participants S
                            q_k <- max(0, p_k - a e_k + b);  the method inside averages with weights q_k / sum_j q_j
        client k:           what the method inside does

    Departures:
    1. S are the clients asked; the mean divides by the weights of those whose replies arrive.
    2. Whatever the method inside averages in a round is weighted by q: of SCAFFOLD also the control variates, which the
       official code averages with equal weights.
    3. If every q_k is 0, they are the p_k; the official code fails.
    4. T is uniform. The official code takes the test set's distribution where that is another.

    Identities: a = b = 0 around FedAvg is FedAvg bitwise; equal distributions give (p_k + b) / (1 + b |S|).
    """

    inner: Method = FedAvg()  # the method that trains
    # a: how much the discrepancy counts; the official scripts take 0.5 of 0.1 to 1
    a: Annotated[float, Linear(0.0, 1.0)] = 0.5
    # b: what every client has on top; the official scripts take 0.1 of 0 to 0.5
    b: Annotated[float, Linear(0.0, 0.5)] = 0.1
    metric: Literal["kl", "l1", "l2", "cosine"] = "kl"  # of distributions; all but kl are taken as they are, e_k = d_k

    by_class = True

    def setup(self, server, clients):
        self.inner.setup(server, clients)
        server.discrepancy = {up.client: up.discrepancy for up in clients.call(self.compare)}

    @client
    def compare(self, client):
        labels = client.data.y.flatten()
        counts = torch.bincount(labels[labels >= 0], minlength=client.task.classes).double()
        return {"discrepancy": float(METRICS[self.metric](counts / counts.sum().clamp(min=1)))}

    def weigh(self, server, cohort):
        n = torch.tensor([cohort.info(k)["n"] for k in cohort]).double()
        d = torch.tensor([server.discrepancy[k] for k in cohort]).double()
        if self.metric == "kl" and d.sum() > 0:
            d = d / d.sum()
        q = (n - n.sum() * (self.a * d - self.b)).clamp(min=0)  # q_k times the sum of the n_j
        return dict(zip(cohort, (q if q.sum() > 0 else n).tolist(), strict=True))


def kl(shares):
    """KL(shares || uniform) in nats, of shares [C]."""
    return torch.special.xlogy(shares, shares * len(shares)).sum().clamp(min=0)


def l1(shares):
    """The sum of absolute differences from uniform."""
    return (shares - 1 / len(shares)).abs().sum()


def l2(shares):
    """The Euclidean distance from uniform."""
    return (shares - 1 / len(shares)).norm()


def cosine(shares):
    """1 - cos(shares, uniform), of shares [C]; 0 where there are none."""
    return 1 - shares.sum() / (shares.norm() * len(shares) ** 0.5) if shares.any() else shares.new_zeros(())


METRICS = {"kl": kl, "l1": l1, "l2": l2, "cosine": cosine}
