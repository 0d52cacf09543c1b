"""FedAU."""

from dataclasses import dataclass
from typing import Annotated

from fedloom.cohort import Each
from fedloom.method import Method, client
from fedloom.methods.participate._intervals import Intervals
from fedloom.ops.overlap import apply_update, update_message
from fedloom.ranges import LearningRate, Log, Positive


@dataclass(frozen=True)
class FedAU(Method):
    """If clients come with unknown and unequal probabilities, can the bias be removed with a few numbers for each?

    Wang, Ji: A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging, ICLR 2024,
    arXiv 2306.03401 (Algorithms 1 and 2; official code IBM/fedau).

        client n:  I steps of SGD from x;   send omega_n (x_n - x)
        server:    x <- x + eta_g / N sum_{n present} omega_n (x_n - x)                        (N: all clients)
                   omega_n: mean length in rounds of n's intervals, 1 before the first; an interval closes when n comes
                   or when it is K long, and counts from the next round on

    Departures:
    1. I is given as epochs. Present is whose reply arrives.
    2. The server keeps the intervals, for a client that is away cannot count; it sends n its omega, eight bytes.
    3. Running statistics of BatchNorm get the plain average.

    Identities: everybody in every round: omega = 1 and FedAvg with equal weights.
    """

    lr: LearningRate = 0.1  # eta_l: local learning rate, as in the official code
    epochs: Positive[int] = 1  # I, in epochs; the paper takes 5 steps
    batch: int = 16  # local batch size, as in the official code
    server_lr: Annotated[float, Log(0.1, 3.0)] = 1.0  # eta_g: as in the paper
    cutoff: int = 50  # K: as in the paper; 0: infinite

    compressible = ("delta",)
    private = ("delta",)

    def setup(self, server, clients):
        server.intervals = Intervals.none(server.population).value()

    def round(self, server, cohort):
        known = Intervals(*server.intervals)
        omega = Each({k: known.mean[k].item() for k in cohort})
        up = cohort.mean(self.local, model=server.model, omega=omega)
        server.model = apply_update(server.model, up, self.server_lr * up.count / server.population, 1.0)
        present = set(cohort) - set(up.missing)
        server.intervals = known.after(server.round, present, self.cutoff).value()

    @client
    def local(self, client, model, omega):
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch)
        sent = update_message(w, model)
        return {**sent, "delta": omega * sent["delta"]}
