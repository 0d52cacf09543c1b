"""DFedSAM."""

from dataclasses import dataclass
from typing import Annotated, Literal

from fedloom.cohort import Each
from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.methods.decentralized._graphs import metropolis, topology
from fedloom.ranges import LearningRate, Linear, Log, Positive


@dataclass(frozen=True)
class DFedSAM(Method):
    """Do flat local minima and several gossip steps make clients agree that have no server?

    Shi, Shen, Wei, Sun, Yuan, Wang, Tao: Improving the Model Consistency of Decentralized Federated Learning, ICML
    2023, arXiv 2302.04083 (DFedSAM, and with Q > 1 DFedSAM-MGS).

        client i:  y <- x_i;  for each batch b:
                     e = rho grad l(y; b) / |grad l(y; b)|;  y <- y - eta grad l(y + e; b)
                   z_i <- y;  Q times with its neighbors:  z_i <- sum_j w_ij z_j;  x_i <- z_i
        w_ij = 1 / (1 + max(deg_i, deg_j)) on the edges, w_ii the rest of 1

    Departures:
    1. No momentum and no weight decay; the paper's experiments use 0.9 and 5e-4.
    2. A random graph is drawn anew every round; it spans the round's cohort, and the server only simulates it. Where a
       cohort has no more than degree + 1 clients, as 11 by default, it is complete.
    3. The global model is the mean of all models, gathered for evaluation only and charged there.
    4. The weight of a peer whose message does not come stays with the receiver.

    Identities: rho=0 on the complete graph with one gossip step is FedAvg with equal weights; mixing keeps the mean;
    equal models stay equal.
    """

    lr: LearningRate = 0.05  # eta: learning rate; the paper takes 0.1, times 0.998 a round
    epochs: Positive[int] = 1  # local epochs; the paper takes 5
    batch: int = 10  # batch size; the paper takes 128
    rho: Annotated[float, Log(0.01, 0.1)] = 0.01  # rho: length of the ascent step; the paper tunes it in 0.01 to 0.1
    gossip: Annotated[int, Linear(1, 8)] = 1  # Q: gossip steps a round; 4 in DFedSAM-MGS
    graph: Literal["ring", "grid", "exponential", "random", "complete"] = "random"  # topology; the paper's random one
    degree: int | None = None  # neighbors in the random graph; null is 10, as in the paper

    def __post_init__(self):
        Method.__post_init__(self)
        if self.degree is not None and self.graph != "random":
            raise UsageError(f"dfedsam.degree is {self.degree} and graph {self.graph}; only graph=random has a degree")
        if self.degree == 0 or self.gossip == 0:
            raise UsageError(f"dfedsam.degree is {self.degree}, gossip {self.gossip}; without, nobody hears of others")

    updates = {"model": "state.model"}

    def round(self, server, cohort):
        graph = topology(self.graph, cohort, server.rng("graph"), 10 if self.degree is None else self.degree)
        weights = Each(metropolis(graph))
        cohort.exchange(self.train, self.mix, graph, weights=weights)
        for _ in range(self.gossip - 1):
            cohort.exchange(self.tell, self.mix, graph, weights=weights)

    def observe(self, server, clients):
        server.model = clients.mean(self.tell).model

    @client
    def train(self, client, weights):
        y = client.state.get("model", client.initial).clone()  # its running statistics move in the first pass
        for batch in client.batches(self.batch, self.epochs):
            g = client.grad(y, batch).params
            if self.rho:
                raised = y.merge(y.params + self.rho / (g.norm() + 1e-12) * g)
                g = client.grad(raised, batch, statistics=False).params
            y = y.merge(y.params - self.lr * g)
        client.state["model"] = y
        return {"model": y}

    @client
    def tell(self, client, weights=None):
        return {"model": client.state.get("model", client.initial)}

    @client
    def mix(self, client, inbox, weights):
        own = client.state.get("model", client.initial)
        client.state["model"] = own + sum(
            (weights[peer] * (said["model"] - own) for peer, said in inbox.items()), own.zeros_like()
        )

    @client
    def predict(self, client):
        return client.state.get("model", client.initial)
