"""PSO-Fed."""

import math
from dataclasses import dataclass

import torch

from fedloom.cohort import Each
from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Positive
from fedloom.vector import Vector


@dataclass(frozen=True)
class PsoFed(Method):
    """Does sharing only M of D coordinates a round, which saves bytes, also weaken clients that poison the model?

    Lari, Arablouei, Gogineni, Werner: Resilience in Online Federated Learning: Mitigating Model-Poisoning Attacks via
    Partial Sharing, IEEE Trans. Signal and Information Processing over Networks 2025, arXiv 2403.13108; the algorithm
    is that of Gogineni, Werner, Huang, Kuh, ICASSP 2022, arXiv 2110.06556.

        S_kn: the M coordinates from s_k + n * stride on, round the end; both sides know them
        client k, round n:  v <- w_k;  if it is selected, v <- w in the coordinates S_kn
                            w_k <- v - mu grad l(v; b)         selected or not
                            if it is selected, send w_k in the coordinates S_k,n+1
        server:             w <- w + mean over the selected of S_k,n+1 (w_k - w)

    Departures:
    1. The paper has linear models, and takes one step on one new sample a round; here they are steps of SGD on
       mini-batches, of any network.
    2. The places s_k go to the clients before the first round, one number each.
    3. A selected client that does not hear its message, or whose reply is lost, leaves out that round.
    4. Running statistics of BatchNorm stay at their node.

    Identities: with share = 1 a selected client forgets w_k, and with all selected it is plain FedAvg. With
    stride = 1 each coordinate is in a client's S_kn in M of any D rounds.
    """

    lr: LearningRate = 0.1  # mu: step size; the paper's are from 0.01 to 0.5 for linear models
    share: float = 0.5  # M / D: share of the coordinates that go each way; the paper's are 1, 0.5, 0.1, 0.02
    steps: Positive[int] = 1  # gradient steps of a client in a round; the paper's
    batch: int = 10  # samples of a step; 1 in the paper
    stride: int = 0  # places by which S_kn moves in a round; 0: M, the variant that covers the model fastest
    coordinated: bool = False  # whether all clients share the same coordinates; the paper's default is each its own

    def __post_init__(self):
        Method.__post_init__(self)
        if not 0 < self.share <= 1:
            raise UsageError(f"pso_fed.share is {self.share}; it is a share of the coordinates, over 0 and at most 1")

    def setup(self, server, clients):
        places = torch.randint(server.layout.split, (server.population,), generator=server.rng("places")).tolist()
        server.places = [0] * server.population if self.coordinated else places  # s_k
        clients.tell(self.begin, place=Each(dict(enumerate(server.places))))

    def round(self, server, cohort):
        w, n = server.model.params.flat, server.round
        parts = {k: w[self.coordinates(server.places[k], n, len(w))] for k in cohort}
        replies = cohort.call(self.selected, part=Each(parts))
        cohort.everybody.where(lambda k: k not in cohort).work(self.alone)
        moved, heard = torch.zeros_like(w), torch.zeros_like(w, dtype=torch.bool)
        for up in replies:
            index = self.coordinates(server.places[up.client], n + 1, len(w)).to(w.device)
            moved[index] += (up.entries - w[index]) / len(replies)
            heard[index] = True
        server.model = server.model.merge(Vector(torch.where(heard, w + moved, w), server.model.params.layout))

    @client
    def begin(self, client, place):
        client.state["place"] = place

    @client
    def selected(self, client, part):
        w = client.state.get("model", client.initial)
        v = w.params.flat.clone()
        v[self.coordinates(client.state["place"], client.round, len(v)).to(v.device)] = part
        w = self.step(client, w.merge(Vector(v, w.params.layout)))
        index = self.coordinates(client.state["place"], client.round + 1, len(v)).to(v.device)
        return {"entries": w.params.flat[index]}

    @client
    def alone(self, client):
        self.step(client, client.state.get("model", client.initial))

    def step(self, client, v):
        """The client's steps from v; it keeps where they lead."""
        client.state["model"], _ = client.descend(v, lr=self.lr, steps=self.steps, batch=self.batch)
        return client.state["model"]

    def coordinates(self, place, n, size):
        """S_kn: where the ones of the mask are, int64 [M]."""
        count = math.ceil(self.share * size)
        return (place + (self.stride or count) * n + torch.arange(count)) % size
