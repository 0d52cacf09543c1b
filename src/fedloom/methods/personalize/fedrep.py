"""FedRep."""

from dataclasses import dataclass
from typing import Annotated

from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Log, Positive


@dataclass(frozen=True)
class FedRep(Method):
    """Should clients learn one representation together, and each its own head on top of it?

    Collins, Hassani, Mokhtari, Shakkottai: Exploiting Shared Representations for Personalized Federated Learning,
    ICML 2021, arXiv 2102.07078 (Algorithm 1; official code lgcollins/FedRep).

        client i:  h_i <- E_h epochs of SGD on the head, the body fixed at phi
                   phi_i <- E epochs of SGD on the body, the head fixed at h_i;    send phi_i - phi, keep h_i
        server:    phi <- sum_i n_i phi_i / sum_i n_i

    Departures: weights by samples, as in the official code (the paper: equal).

    Identities: only the body travels; with no head epochs and heads that never move it is FedAvg of the body.
    """

    lr: LearningRate = 0.05  # alpha: learning rate of body and head; the paper takes 0.01 with momentum 0.5
    epochs: Positive[int] = 1  # E: epochs of the body, as in the paper
    batch: int = 10  # batch size, as in the paper
    head_epochs: Annotated[int, Log(1, 10)] = 10  # tau: epochs of the head before; the paper takes 10

    global_model = False
    by_head = True
    compressible = ("delta",)
    private = ("delta",)
    differences = {"delta": "body"}
    light = {"head_epochs": 2}

    def setup(self, server, clients):
        server.body = server.model.select("body.*")

    def round(self, server, cohort):
        up = cohort.mean(self.local, weight="n", body=server.body)
        server.body = server.body + up.delta
        server.model = server.model.merge(server.body)

    @client
    def local(self, client, body):
        self.join(client, body)
        w = self.predict(client, body)
        w, _ = client.descend(w, lr=self.lr, epochs=self.epochs, batch=self.batch, only="body.*")
        return {"delta": w.select("body.*") - body, "n": client.n}

    @client
    def join(self, client, body):
        w = self.predict(client, body)
        w, _ = client.descend(w, lr=self.lr, epochs=self.head_epochs, batch=self.batch, only="head.*")
        client.state["head"] = w.select("head.*")

    @client
    def predict(self, client, body):
        head = client.state.get("head", client.initial.select("head.*"))
        return client.initial.merge(body).merge(head)
