"""Ditto."""

from dataclasses import dataclass
from typing import Annotated

from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Log, Positive


@dataclass(frozen=True)
class Ditto(Method):
    """Does a personal model, tied to a global one that is learned beside it, give fairness and robustness at once?

    Li, Hu, Beirami, Smith: Ditto: Fair and Robust Federated Learning Through Personalization, ICML 2021,
    arXiv 2012.04221 (Algorithm 1).

        server:    w <- sum_k n_k w_k / sum_k n_k
        client k:  w_k <- E epochs of SGD from w;   send w_k - w
                   v_k <- v_k - eta (grad l(v_k; b) + lambda (v_k - w))   for E_p epochs;   keep v_k

    Departures:
    1. The paper's Algorithm 1 averages plainly; weights by samples make the global part FedAvg.
    2. A personal model starts from the global one when its client is first asked, and draws batches of its own.

    Identities: the global model is that of FedAvg bitwise; lambda=0 is local training (from the global model of the
    client's first round); a large lambda (with eta lambda below 2) holds v_k at w.
    """

    lr: LearningRate = 0.05  # eta: learning rate of both models
    epochs: Positive[int] = 1  # E: local epochs of the global model
    batch: int = 10  # batch size
    # lambda: pull of the global model; the paper tunes it in 0.05, 0.1, 1, 2
    lam: Annotated[float, Log(0.01, 2.0)] = 0.1
    personal_epochs: int = 1  # E_p: local epochs of the personal model

    compressible = ("delta",)
    private = ("delta",)

    def round(self, server, cohort):
        up = cohort.mean(self.local, weight="n", model=server.model)
        server.model = server.model + up.delta

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch)
        client.state["personal"], _ = client.descend(
            client.state.get("personal", model),
            lr=self.lr,
            epochs=self.personal_epochs,
            batch=self.batch,
            correct=lambda v: self.lam * (v - model),
        )
        return {"delta": w - model, "n": client.n}

    @client
    def predict(self, client, model):
        return client.state.get("personal", model)
