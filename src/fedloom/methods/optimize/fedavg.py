"""FedAvg."""

from dataclasses import dataclass

from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Positive


@dataclass(frozen=True)
class FedAvg(Method):
    """Can clients train one model together by averaging what each reaches in a few local epochs?

    McMahan, Moore, Ramage, Hampson, Agueera y Arcas: Communication-Efficient Learning of Deep Networks from
    Decentralized Data, AISTATS 2017, arXiv 1602.05629 (Algorithm 1).

        server, round t:  S_t <- a random set of clients;  w <- sum_{k in S_t} n_k w_k / sum_{k in S_t} n_k
        client k:         w_k <- w;  for E epochs, for each batch b of B samples:  w_k <- w_k - eta grad l(w_k; b)

    Departures:
    1. The average runs over the replies that arrive.
    2. Clients send differences, which can be compressed; w plus their mean is the mean of the models.

    Identities: FedProx(mu=0), FedOpt(optimizer="momentum", beta1=0, server_lr=1) and the global model of Ditto are
    FedAvg bitwise; one full-batch step of every client is one step of centralized descent.
    """

    lr: LearningRate = 0.05  # eta: local learning rate; the paper tunes it per task
    epochs: Positive[int] = 1  # E: local epochs; the paper tries 1, 5, 20
    batch: int = 10  # B: local batch size, 0 for all samples; the paper's non-IID MNIST setting

    compressible = ("delta",)
    private = ("delta",)

    def round(self, server, cohort):
        up = cohort.mean(self.local, weight="n", model=server.model)
        server.model = server.model + up.delta

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch)
        return {"delta": w - model, "n": client.n}
