"""IFCA."""

from dataclasses import dataclass
from typing import Literal

from fedloom.errors import NobodyReplied
from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Positive
from fedloom.vector import Vector


@dataclass(frozen=True)
class Ifca(Method):
    """Can clients that fall into k groups find their groups and learn a model each, by trying all k models every round?

    Ghosh, Chung, Yin, Ramchandran: An Efficient Framework for Clustered Federated Learning, NeurIPS 2020,
    arXiv 2006.04088 (Algorithm 1; official code jichan3751).

        client i:  c_i <- the j whose w_j has the least loss on its training data
                   averaging models:     v_i <- E epochs of SGD from w_{c_i};   delta_i <- v_i - w_{c_i}
                   averaging gradients:  delta_i <- -eta grad l(w_{c_i}; b) of one batch
        server:    averaging models:     w_j <- w_j + mean of delta_i over the clients of j
                   averaging gradients:  w_j <- w_j + 1/m sum of delta_i over the clients of j,  m: all that replied

    Departures:
    1. The choice and the training are two calls, so that the server learns a client's cluster, as in the paper, and of
       the models only their means. A client keeps the model that it has chosen in between.
    2. A client is judged by the model that is best on its training data; the official code looks at its test data.
    3. The first of the k models is the one from which every method starts; the others are drawn alike.

    Identities: with k = 1, averaging models is FedAvg with plain weights, bitwise, and averaging gradients is FedSGD.
    """

    k: Positive[int] = 2  # k: clusters
    lr: LearningRate = 0.05  # eta or gamma: learning rate; official 0.1 on MNIST
    epochs: Positive[int] = 1  # E, of averaging models; official 10 steps of all data (tau)
    batch: int = 10  # local batch size; 0: all samples, official
    averaging: Literal["models", "gradients"] = "models"  # option II or option I of Algorithm 1

    global_model = False
    compressible = ("delta",)
    private = ("delta",)
    refuses = {"dp=sample": "which cluster a client chooses depends on its samples, and no noise covers that"}

    def setup(self, server, clients):
        drawn = (Vector.of(server.task.network(), server.layout) for _ in range(1, self.k))
        server.models = [server.model, *(server.site.to_device(w.clone()) for w in drawn)]  # w_j
        server.clusters = {}  # client -> the cluster that it chose last

    def round(self, server, cohort):
        replies = cohort.call(self.choose, models=server.models)
        chosen = {up.client: up.cluster for up in replies if up.cluster in range(self.k)}
        if not chosen:
            raise NobodyReplied(f"none of {len(cohort)} clients chose a cluster")
        server.clusters = server.clusters | chosen
        means = cohort.where(chosen).means(self.local, groups=chosen)
        m = sum(up.count for up in means.values())
        for c, up in means.items():
            step = up.delta if self.averaging == "models" else up.count / m * up.delta
            server.models = [*server.models[:c], server.models[c] + step, *server.models[c + 1 :]]

    @client
    def choose(self, client, models):
        c = best(client, models)
        client.state["start"] = models[c]
        return {"cluster": c}

    @client
    def local(self, client):
        w = client.state["start"]
        if self.averaging == "gradients":
            return {"delta": -self.lr * client.grad(w, next(client.batches(self.batch)))}
        v, _ = client.descend(w, lr=self.lr, epochs=self.epochs, batch=self.batch)
        return {"delta": v - w}

    @client
    def predict(self, client, models):
        return models[best(client, models)]


def best(client, models):
    """The place of the model with the least loss on the client's training data; the first of equals."""
    losses = [client.judge(w, client.data)["loss"] for w in models]
    return losses.index(min(losses))
