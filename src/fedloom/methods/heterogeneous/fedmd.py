"""FedMD."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch.nn import functional as F

from fedloom.message import Seed
from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Log, Positive
from fedloom.task import Data
from fedloom.variety import own


@dataclass(frozen=True)
class FedMD(Method):
    """Can clients with networks of their own design teach each other by what they say of public samples alone?

    Li, Wang: FedMD: Heterogenous Federated Learning via Model Distillation, NeurIPS 2019 Workshop on Federated Learning
    for Data Privacy and Confidentiality, arXiv 1910.03581 (Algorithm 1; official code diogenes0319/FedMD_clean).

        client k:  w_k <- E_0 epochs of SGD on its own data, before its first round
        all:       draw n of the public samples;  client k sends the scores f_k(x) of each
        server:    f(x) <- mean of f_k(x) over the clients;  sends it down
        client k:  digest:   S epochs of SGD on  mean |w_k(x) - f(x)|  over the public samples
                   revisit:  E epochs of SGD on its own data;  keep w_k
        predict:   w_k

    Departures:
    1. The public samples have no labels here. So a client begins with its own data; in the paper it first learns the
       public labels, which are of other classes.
    2. Steps are those of SGD; the official code takes Adam (the setting optimizer=adam).
    3. The samples of a round are drawn alike from all; the official code draws as many of every public label.
    4. The mean is over those of the round's cohort that replied; with the paper's few parties that is everybody. Its
       option of unequal weights is not here.

    Identities: a client alone finds its own scores as the consensus, and does local training, bitwise; no weight of a
    model ever leaves a client, and what it sends does not depend on its network.
    """

    lr: LearningRate = 0.05  # learning rate on the client's own data; the official code takes Adam with 0.001
    epochs: Positive[int] = 1  # E: epochs of revisiting; 4 to 10 in the official code
    batch: int = 10  # batch size on the client's own data; 5 to 10 in the official code
    digest_lr: Annotated[float, Log(1e-2, 1.0)] = 0.1  # learning rate on public samples, whose gradients are small
    digest_epochs: int = 1  # S: epochs over the public samples, as in the official code
    digest_batch: int = 32  # public samples a step; 128 to 256 in the official code
    samples: int = 1000  # n: public samples a round, at most; 5000 in the official code
    start_epochs: int = 5  # E_0: until it converges in the paper, up to 25 in the official code
    models: tuple[str, ...] = ()  # networks by name, dealt to the clients in turn; none: the task's for everybody

    global_model = False
    private = ("scores",)
    needs = ("shared_data",)
    rough = True  # the gradient of a distance is its sign, which rounding decides where a client finds its own scores
    refuses = {"dp=sample": "clients train on public samples beside their own"}

    def round(self, server, cohort):
        draw = Seed(int(torch.randint(2**62, (), generator=server.rng("samples"))))
        up = cohort.mean(self.communicate, draw=draw)
        cohort.tell(self.digest, draw=draw, consensus=up.scores)

    @client
    def communicate(self, client, draw):
        client.state["model"] = w = self.begun(client)
        with torch.no_grad():
            return {"scores": client.scores(w, self.drawn(client, draw))}

    @client
    def digest(self, client, draw, consensus):
        w, public = self.begun(client), Data(self.drawn(client, draw), consensus)
        asked = {"epochs": self.digest_epochs, "batch": self.digest_batch}
        w, _ = client.descend(w, lr=self.digest_lr, loss=disagreement, data=public, **asked)
        client.state["model"], _ = client.descend(w, lr=self.lr, epochs=self.epochs, batch=self.batch)

    def begun(self, client):
        """The client's model: what it remembers, or its network after it has trained alone."""
        start = own(client, self.models)
        if "model" in client.state:
            return client.state["model"]
        return client.descend(start, lr=self.lr, epochs=self.start_epochs, batch=self.batch)[0]

    def drawn(self, client, draw):
        """The inputs of the round's public samples: the same at every client."""
        order = draw.expand(len(client.shared_data), distribution="uniform").argsort(stable=True)
        x = client.shared_data.x
        return x[order[: self.samples].to(x.device, non_blocking=True)]

    @client
    def predict(self, client):
        return client.state.get("model", own(client, self.models))


def disagreement(net, batch):
    """The mean distance of a network's scores [B, C] from those in place of labels."""
    return F.l1_loss(net(batch.x), batch.y)
