"""Centralized training: the upper end of the scale."""

from dataclasses import dataclass

import torch

from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Positive
from fedloom.task import Data


@dataclass(frozen=True)
class Centralized(Method):
    """How good would the model be if all clients simply handed over their data?

    No federated algorithm: plain stochastic gradient descent on the pooled data, one epoch a round by default.

        setup:          every client sends its training samples, once
        server, round:  for E epochs, for each batch b of the pooled samples:  w <- w - eta grad l(w; b)

    Departures: none. The upload of raw data is real: the ledger counts it and the privacy statement says it. Everybody
    is there for it, so who takes part in a round, and who fails to, changes nothing.

    Identities: one full-batch step is one round of FedAvg with one full-batch step at every client (to rounding).
    """

    lr: LearningRate = 0.05  # eta: learning rate
    epochs: Positive[int] = 1  # epochs over the pooled data in a round
    batch: int = 10  # batch size

    def setup(self, server, clients):
        replies = clients.call(self.share)
        server.x = torch.cat([reply.x for reply in replies])
        server.y = torch.cat([reply.y for reply in replies])

    def round(self, server, cohort):
        server.model, _ = server.descend(
            server.model, lr=self.lr, epochs=self.epochs, batch=self.batch, data=Data(server.x, server.y)
        )

    @client
    def share(self, client):
        return {"x": client.data.x, "y": client.data.y}
