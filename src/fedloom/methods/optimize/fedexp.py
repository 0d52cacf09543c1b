"""FedExP."""

from dataclasses import dataclass
from typing import Annotated

from fedloom.method import client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.ranges import Log, Positive


@dataclass(frozen=True)
class FedExP(FedAvg):
    """Can the server go farther than the mean, by as much as the clients' updates disagree, with nothing to tune?

    Jhunjhunwala, Wang, Joshi: FedExP: Speeding up Federated Averaging via Extrapolation, ICLR 2023, arXiv 2301.09604
    (Algorithm 1; official code Divyansh03/FedExP).

        client i:  w_i <- E epochs of SGD from w;   send D_i = w_i - w and |D_i|^2
        server:    D <- sum_i p_i D_i,  p_i = n_i / sum_j n_j;   w <- w + eta_g D,
                   eta_g <- max(1, sum_i p_i |D_i|^2 / (2 (|D|^2 + epsilon)))
        judged:    the mean of the last two w

    Departures:
    1. p_i go by samples, as in the official code; the paper has equal ones.
    2. epsilon is the paper's; the official code multiplies it by the number of clients in a round, and lets it fall
       with the square of the local rate.
    3. Running statistics of BatchNorm are those of the mean, and of the last w where two are averaged.

    Identities: equal updates, or a large epsilon: eta_g = 1, and w is FedAvg's; K updates of one length that are
    orthogonal: eta_g = K / 2, for K > 2 and epsilon = 0.
    """

    epsilon: Annotated[Positive[float], Log(1e-3, 1e-1)] = 1e-3  # epsilon: official for CIFAR-10 (EMNIST: 0.1)

    refuses = dict.fromkeys(
        ("dp=sample", "dp=client"), "clients tell how long their updates are, which no noise covers"
    )

    def setup(self, server, clients):
        server.average, server.moved = server.model, False

    def round(self, server, cohort):
        up = cohort.mean(self.local, weight="n", model=server.model)
        step, begun = up.delta.params, server.model
        rate = max(1.0, up.square / (2 * (step.norm().item() ** 2 + self.epsilon)))
        server.model = begun + up.delta.merge(rate * step)
        half = server.model.merge(0.5 * (server.model.params + begun.params))
        server.average, server.moved = half if server.moved else server.model, True
        server.log(rate=rate)

    @client
    def local(self, client, model):
        reply = super().local(client, model)
        return {**reply, "square": reply["delta"].params.norm().item() ** 2}

    def observe(self, server, clients):
        return server.average

    @client
    def predict(self, client, average):
        return average
