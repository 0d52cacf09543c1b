"""SCAFFOLD."""

from dataclasses import dataclass
from typing import Annotated

from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Log, Positive


@dataclass(frozen=True)
class Scaffold(Method):
    """Can control variates, which estimate how a client's gradient differs from everybody's, undo client drift?

    Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: SCAFFOLD: Stochastic Controlled Averaging for Federated Learning,
    ICML 2020, arXiv 1910.06378 (Algorithm 1, option II).

        server:    x <- x + eta_g mean_{i in S}(y_i - x);   c <- c + |S|/N mean_{i in S}(c_i' - c_i)
        client i:  y_i <- x;  K times:  y_i <- y_i - eta_l (g_i(y_i) - c_i + c)
                   c_i' <- c_i - c + (x - y_i) / (K eta_l);   send y_i - x and c_i' - c_i;   c_i <- c_i'

    Departures:
    1. K is given as epochs, so clients with more samples take more steps; each divides by its own K.
    2. S are the clients whose replies count; any other keeps its c_i, as if it had not been asked.
    3. Running statistics of BatchNorm are averaged with the model and have no control variate.

    Identities: after one full-batch step c_i is the client's gradient at x; with c = c_i = 0 the first round is that of
    FedAvg with equal weights; under full participation c stays the mean of the c_i.
    """

    lr: LearningRate = 0.05  # eta_l: local learning rate
    epochs: Positive[int] = 1  # K, in epochs
    batch: int = 10  # local batch size, 0 for all samples
    server_lr: Annotated[float, Log(0.1, 1.0)] = 1.0  # eta_g: the paper's experiments take 1

    compressible = ("delta", "shift")
    private = ("delta", "shift")
    refuses = {"optimizer": "its control variates are mean gradients only where steps are lr times a gradient"}

    def setup(self, server, clients):
        server.control = server.model.params.zeros_like()

    def round(self, server, cohort):
        up = cohort.mean(self.local, model=server.model, control=server.control)
        server.model = server.model + up.delta.merge(self.server_lr * up.delta.params)
        server.control = server.control + up.count / server.population * up.shift

    @client
    def local(self, client, model, control):
        own = client.state.get("control", control.zeros_like())
        w, steps = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch, correct=control - own)
        new = own - control + (model - w).params / (steps * self.lr)
        client.state["control"] = new
        return {"delta": w - model, "shift": new - own}
