"""MOON."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch.nn import functional as F

from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Log, Positive


@dataclass(frozen=True)
class Moon(Method):
    """Can contrasting a client's features with those of the global and of its last model stop its drift?

    Li, He, Song: Model-Contrastive Federated Learning, CVPR 2021, arXiv 2103.16257 (Algorithm 1).

        client:  z, z_glob, z_prev <- features of the batch under the current, the global, the client's last model
                 l_con = -log( exp(cos(z, z_glob)/tau) / (exp(cos(z, z_glob)/tau) + exp(cos(z, z_prev)/tau)) )
                 SGD on l_sup + mu l_con from w;   remember the result as the last model
        server:  w <- sum_k n_k w_k / sum_k n_k

    Departures:
    1. Features are what the network's body gives; the paper puts a two-layer projection between body and head.
    2. A client that was never asked has no last model; the global one in its place makes the pull vanish. (The official
       code contrasts with a random network there.)

    Identities: mu=0 is FedAvg (to rounding); so is the first round for every mu.
    """

    lr: LearningRate = 0.05  # eta: local learning rate; the paper takes 0.01
    epochs: Positive[int] = 1  # E: local epochs; the paper takes 10
    batch: int = 10  # local batch size; the paper takes 64
    mu: Annotated[float, Log(0.1, 10.0)] = 1.0  # mu: weight of the contrast; the paper tunes it in 0.1, 1, 5, 10
    temperature: Annotated[float, Log(0.1, 1.0)] = 0.5  # tau: as in the paper

    by_head = True
    compressible = ("delta",)
    private = ("delta",)

    def round(self, server, cohort):
        up = cohort.mean(self.local, weight="n", model=server.model)
        server.model = server.model + up.delta

    @client
    def local(self, client, model):
        loss = partial(
            contrastive,
            criterion=client.task.criterion,
            anchor=client.net(model).body,
            last=client.net(client.state.get("model", model)).body,
            mu=self.mu,
            temperature=self.temperature,
        )
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch, loss=loss)
        client.state["model"] = w
        return {"delta": w - model, "n": client.n}


def contrastive(net, batch, criterion, anchor, last, mu, temperature):
    """l_sup + mu l_con of a batch; `anchor` and `last` are the bodies of the global and of the last local model."""
    z = net.body(batch.x)
    towards = F.cosine_similarity(z, anchor(batch.x)) / temperature
    away = F.cosine_similarity(z, last(batch.x)) / temperature
    contrast = -F.log_softmax(torch.stack([towards, away], dim=1), dim=1)[:, 0].mean()
    return criterion(net.head(z), batch) + mu * contrast
