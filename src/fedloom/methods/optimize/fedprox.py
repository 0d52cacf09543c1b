"""FedProx."""

from dataclasses import dataclass
from typing import Annotated

import torch

from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Log, Positive


@dataclass(frozen=True)
class FedProx(Method):
    """Does a pull toward the global model, with the partial work of slow devices kept, make FedAvg robust?

    Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated Optimization in Heterogeneous Networks, MLSys 2020,
    arXiv 1812.06127 (Algorithm 2; official code litian96/FedProx).

        server:    w <- sum_k n_k w_k / sum_k n_k  over all that reply, stragglers included
        client k:  w_k ~ argmin_v F_k(v) + mu/2 |v - w|^2:   w_k <- w_k - eta (grad l(w_k; b) + mu (w_k - w))
        straggler: as every client, for fewer epochs: uniform in {1, ..., E-1}

    Departures:
    1. Weights by samples, as the official code does (the paper's analysis samples clients by n_k and averages plainly).
    2. Every client is a straggler with the given probability; the official code draws a fixed number of them.
    3. The adaptive mu of the paper's appendix is left to the user.

    Identities: mu=0 without stragglers is FedAvg bitwise; so is any mu with one local step, where the pull is zero.
    """

    lr: LearningRate = 0.05  # eta: local learning rate
    epochs: Positive[int] = 1  # E: local epochs; the paper takes 20
    batch: int = 10  # B: local batch size, as in the paper
    mu: Annotated[float, Log(1e-3, 1.0)] = 0.01  # mu: strength of the pull; the paper tunes it in 0.001, 0.01, 0.1, 1
    stragglers: float = 0.0  # share of clients that manage fewer epochs, of 2 or more; the paper tries 0, 0.5, 0.9

    compressible = ("delta",)
    private = ("delta",)

    def __post_init__(self):
        Method.__post_init__(self)
        if self.stragglers > 1:
            raise UsageError(f"fedprox.stragglers is {self.stragglers}; it is a share of the clients, at most 1")
        if self.stragglers and self.epochs == 1:
            raise UsageError(
                f"fedprox.stragglers is {self.stragglers} and epochs 1, of which nobody can do fewer; set epochs=2"
            )

    def round(self, server, cohort):
        up = cohort.mean(self.local, weight="n", model=server.model)
        server.model = server.model + up.delta

    @client
    def local(self, client, model):
        w, _ = client.descend(
            model,
            lr=self.lr,
            epochs=self.affordable(client.rng("straggler")),
            batch=self.batch,
            correct=lambda w: self.mu * (w - model),
        )
        return {"delta": w - model, "n": client.n}

    def affordable(self, generator):
        """E, or fewer epochs for a straggler."""
        if torch.rand((), generator=generator) >= self.stragglers:
            return self.epochs
        return int(torch.randint(1, self.epochs, (), generator=generator))
