"""Split learning."""

from dataclasses import dataclass
from typing import Annotated

import torch

from fedloom.cohort import Each
from fedloom.method import Method, client
from fedloom.ranges import Log, Positive
from fedloom.task import Batch, Data
from fedloom.vector import Vector


@dataclass(frozen=True)
class SplitLearning(Method):
    """Can one network be trained across parties with different columns, with features and gradients at the cut alone?

    Vepakomma, Gupta, Swedish, Raskar: Split learning for health: Distributed deep learning without sharing raw patient
    data, arXiv 1812.00564 (its configuration for vertically partitioned data); two parties in NVIDIA/NVFlare,
    cifar10-splitnn.

        for every batch i of aligned samples, drawn by the server:
          party k:   send H_k = f_k(x_k[i])
          server:    l = CE(g(H_1 .. H_K), y[i]);  g <- g - eta m,  m <- beta m + dl / dg;  send G_k = dl / dH_k
          party k:   f_k <- f_k - eta m_k,  m_k <- beta m_k + (dH_k / df_k)' G_k

    Departures:
    1. The server, not a party, has the labels and draws the batches.
    2. A party computes its features again before it takes their gradient: no graph is kept between two messages.
    3. One that does not answer counts as zeros in that step.

    Identities: it is descent on the joint network; 2 N_o sum d_k numbers cross in an epoch.
    """

    lr: Annotated[Positive[float], Log(1e-3, 0.3)] = 0.05  # eta: learning rate; 0.01 in NVFlare's example
    momentum: float = 0.9  # beta: momentum, as in NVFlare's example
    epochs: Positive[int] = 1  # epochs over the aligned samples in a round
    batch: int = 32  # samples in a step; 64 in NVFlare's example

    needs = ("vertical",)
    refuses = dict.fromkeys(("secure", "aggregate", "attack"), "a party sends features that no other has, and no model")

    def setup(self, server, clients):
        server.velocity = server.model.zeros_like()
        server.parties = []  # whose features g has learned from

    def round(self, server, cohort):
        labels = server.task.labels
        places = torch.arange(len(labels), device=labels.device)
        for rows, y in server.batches(self.batch, self.epochs, data=Data(places, labels)):
            here = rows.to(torch.int32)
            parts = {up.client: up.features.clone().requires_grad_() for up in cohort.call(self.forward, rows=here)}
            if not parts:
                continue
            w = Vector(server.model.flat.clone().requires_grad_(), server.layout)
            loss = server.task.criterion(server.scores(w, server.task.joined(parts)), Batch(rows, y))
            by_model, *by_parts = torch.autograd.grad(loss, [w.flat, *parts.values()])
            server.meter(1, len(rows))
            server.log(loss=loss)
            server.velocity = self.momentum * server.velocity + Vector(by_model, server.layout)
            server.model = server.model - self.lr * server.velocity
            server.parties = sorted({*server.parties, *parts})
            pulls = dict(zip(parts, by_parts, strict=True))
            cohort.where(parts).tell(self.backward, rows=here, pull=Each(pulls))

    def network(self, client):
        """The party's weights: trained, or as they were drawn."""
        return client.state.get("model", client.network(f"party:{client.id}"))

    @client
    def forward(self, client, rows):
        x = client.data.x[rows.long()]
        return {"features": client.states(self.network(client), x, "body", train=True)}  # as `backward` normalizes

    @client
    def backward(self, client, rows, pull):
        w = self.network(client).clone()
        gradient = client.grad(w, Batch(client.data.x[rows.long()], pull), pulled)
        velocity = self.momentum * client.state.get("velocity", w.zeros_like()) + gradient
        client.state.update(model=w - self.lr * velocity, velocity=velocity)

    @client
    def encode(self, client):
        """What is judged: features of the samples that the server validates and tests on."""
        return {"features": client.features(self.network(client), client.task.data(client.id, "judged").x)}

    def observe(self, server, clients):
        parts = {up.client: up.features for up in clients.where(server.parties).call(self.encode)}
        features = server.task.joined(parts, len(server.task.data(0, "judged")))
        return server.scores(server.model, features).detach().__getitem__

    @client
    def predict(self, client):
        """Nothing: a party has neither labels nor the others' columns."""


def pulled(net, batch):
    """What has (dH / df)' G as its gradient, for G in place of the labels."""
    return (net.body(batch.x) * batch.y).sum()
