"""FedNova."""

from dataclasses import dataclass
from typing import Annotated

from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Linear, Positive


@dataclass(frozen=True)
class FedNova(Method):
    """When clients take different numbers of local steps, which average minimizes the objective we meant?

    Wang, Liu, Liang, Joshi, Poor: Tackling the Objective Inconsistency Problem in Heterogeneous Federated
    Optimization, NeurIPS 2020, arXiv 2007.07481 (official code JYWa/FedNova).

        client i:  w_i <- tau_i steps of SGD (momentum rho) from w;   d_i = (w - w_i) / |a_i|_1
                   |a_i|_1 = tau_i for rho = 0, else (tau_i - rho (1 - rho^tau_i) / (1 - rho)) / (1 - rho)
        server:    tau_eff = sum_i p_i |a_i|_1;   w <- w - tau_eff sum_i p_i d_i      with p_i = n_i / sum_j n_j

    Departures:
    1. tau_eff as in the official code without a proximal term.
    2. Server momentum and the proximal variant are left out; running statistics of BatchNorm get the plain average.

    Identities: with equal tau_i it is FedAvg (to rounding); on quadratics its fixed point is the minimizer of
    sum_i p_i F_i for small steps, where FedAvg's is not.
    """

    lr: LearningRate = 0.05  # eta: local learning rate
    epochs: Positive[int] = 1  # local epochs; tau_i follows from the client's samples
    batch: int = 10  # local batch size
    momentum: Annotated[float, Linear(0.0, 0.9)] = 0.0  # rho: local momentum; the paper tries 0 and 0.9

    compressible = ("delta",)
    private = ("delta",)
    refuses = {"optimizer": "its weights |a_i| are those of plain steps, or of steps with its own momentum"}

    def __post_init__(self):
        Method.__post_init__(self)
        if self.momentum >= 1:
            raise UsageError(f"fednova.momentum is {self.momentum}; it must be below 1")

    def round(self, server, cohort):
        up = cohort.mean(self.local, weight="n", model=server.model)
        server.model = server.model + up.delta.merge(up.a * up.delta.params)

    @client
    def local(self, client, model):
        w, steps = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch, momentum=self.momentum)
        a = norm_of_weights(steps, self.momentum)
        delta = w - model
        return {"delta": delta.merge(delta.params / a), "a": a, "n": client.n}


def norm_of_weights(steps, rho):
    """|a|_1: how often each of `steps` gradients counts in the local change, summed."""
    return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
