"""FedBN."""

from dataclasses import dataclass

from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Positive


@dataclass(frozen=True)
class FedBN(Method):
    """When clients' features are shifted, does it help to keep every BatchNorm layer at home?

    Li, Jiang, Zhang, Kamp, Dou: FedBN: Federated Learning on Non-IID Features via Local Batch Normalization, ICLR 2021,
    arXiv 2102.07623 (Algorithm 1).

        server:    for every layer that is no BatchNorm:  w <- sum_k n_k w_k / sum_k n_k
        client k:  put the shared layers around its own BatchNorm (weight, bias, running statistics);  E epochs of SGD;
                   keep the BatchNorm, send the rest

    Departures: weights by samples (the paper's algorithm averages plainly, its clients are of equal size).

    Identities: in a network without BatchNorm it is FedAvg bitwise.
    """

    lr: LearningRate = 0.05  # learning rate; the paper takes 0.01
    epochs: Positive[int] = 1  # E: local epochs, as in the paper
    batch: int = 10  # batch size; the paper takes 32

    global_model = False
    compressible = ("delta",)
    private = ("delta",)
    differences = {"delta": "shared"}

    def setup(self, server, clients):
        server.shared = server.model.drop(*server.names_of(BatchNorm))

    def round(self, server, cohort):
        up = cohort.mean(self.local, weight="n", shared=server.shared)
        server.shared = server.shared + up.delta
        server.model = server.model.merge(server.shared)

    @client
    def local(self, client, shared):
        w, _ = client.descend(self.predict(client, shared), lr=self.lr, epochs=self.epochs, batch=self.batch)
        norms = client.names_of(BatchNorm)
        client.state["norms"] = w.select(*norms)
        return {"delta": w.drop(*norms) - shared, "n": client.n}

    @client
    def predict(self, client, shared):
        norms = client.state.get("norms", client.initial.select(*client.names_of(BatchNorm)))
        return client.initial.merge(shared).merge(norms)
