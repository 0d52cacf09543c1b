"""FRL."""

import math
from dataclasses import dataclass

import torch

from fedloom.errors import UsageError
from fedloom.message import Packed
from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Positive


@dataclass(frozen=True)
class Frl(Method):
    """Does voting with rankings of a frozen random network's edges, in place of updates, bound what poison can do?

    Mozaffari, Shejwalkar, Houmansadr: Every Vote Counts: Ranking-Based Training of Federated Learning to Resist
    Poisoning Attacks, USENIX Security 2023, arXiv 2110.04350 (Algorithms 1 to 3; official code SPIN-UMass/FRL).

        W frozen:  sign(random) sqrt(2 / fan_in); the network in use is W m, where m keeps the top k of the edges
        client u:  scores S from the ranking R (the edge at place r gets the r-th smallest score);
                   E epochs of SGD on S by dL/dS = dL/dm (straight through);      send R_u = argsort(S)
        server:    V(e) <- sum_u place of edge e in R_u;      R <- argsort(V)

    Departures:
    1. The mask keeps the top k of the scores as in the paper (the official code: of their magnitudes).
    2. The sorted scores of a layer are the even spread of their initial law U(-1, 1) / sqrt(fan_in), not one draw of
       it: everybody knows them, and nothing is sent for them. Weights come from the network's shared initial ones.
    3. What has one axis is not ranked: biases are 0, and gains of normalization layers stay 1. BatchNorm keeps its
       initial running statistics, which no vote covers; take a network without it, or with GroupNorm.
    4. A reply that is no ranking does not count as a vote (the bound on what one client can do rests on this).

    Identities: if all send one ranking it is the next global one; no weight ever changes and the scores are at any
    time the same multiset; whatever one client sends moves an edge's vote by less than the size of its layer.
    """

    lr: LearningRate = 0.4  # eta: learning rate of the scores; official
    lr_decay: float = 0.999  # factor of the learning rate after each round; official
    momentum: float = 0.9  # official
    weight_decay: float = 1e-4  # of the scores; official
    epochs: Positive[int] = 5  # E: local epochs; official for CIFAR-10 (MNIST: 2)
    batch: int = 10  # local batch size; official: 8
    keep: float = 0.5  # k: share of the edges that the network uses; the paper's

    refuses = {"aggregate": "votes are counted, and there is no mean"}

    def __post_init__(self):
        Method.__post_init__(self)
        if not 0 < self.keep <= 1:
            raise UsageError(f"frl.keep is {self.keep}; it is a share of the edges, above 0 and at most 1")

    rankings = ("ranking",)

    def setup(self, server, clients):
        draw = server.rng("ranking")
        server.ranking = {
            name: packed(torch.randperm(stop - start, generator=draw).to(server.model.flat.device))
            for name, start, stop in ranked(server.layout)
        }
        server.model = self.used(frozen(server.initial), scores(server.layout, server.ranking))

    def round(self, server, cohort):
        votes, heard = dict.fromkeys(server.ranking, torch.tensor(0)), 0
        for reply in cohort.stream(self.local, ranking=server.ranking):
            places = {name: places_of(reply.ranking.get(name), r) for name, r in server.ranking.items()}
            if any(place is None for place in places.values()):
                continue
            votes = {name: place + votes[name] for name, place in places.items()}
            heard += 1
        server.log(votes=heard)
        if heard:
            server.ranking = {name: packed(vote.argsort(stable=True)) for name, vote in votes.items()}
            server.model = self.used(frozen(server.initial), scores(server.layout, server.ranking))

    @client
    def local(self, client, ranking):
        weights = frozen(client.initial)
        s = scores(client.layout, ranking)
        m, passed = torch.zeros_like(s), torch.zeros_like(s)  # what dL/dm is times: the weight of a ranked edge
        for _, start, stop in ranked(client.layout):
            passed[start:stop] = weights.flat[start:stop]
        for epoch in range(self.epochs):
            lr = self.lr * self.lr_decay ** (client.round - 1) * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
            for batch in client.batches(self.batch, epochs=1):
                grad = client.grad(self.used(weights, s), batch).flat * passed
                m = self.momentum * m + grad + self.weight_decay * s
                s = s - lr * m
        return {"ranking": {name: packed(s[a:b].argsort(stable=True)) for name, a, b in ranked(client.layout)}}

    def used(self, weights, s):
        """The network with the weights of the top edges by score [D], in every layer."""
        on = torch.ones_like(s, dtype=torch.bool)
        for _, start, stop in ranked(weights.layout):
            kept = stop - start - int((1 - self.keep) * (stop - start))
            on[start:stop] = False
            on[start + s[start:stop].topk(kept, sorted=False).indices] = True
        return weights.where(on)


def ranked(layout):
    """(name, start, stop) in the flat vector of every layer whose edges are ranked: parameters of two axes or more."""
    return [
        (name, layout.offsets[p], layout.offsets[p + 1])
        for p, name in enumerate(layout.names[: layout.parameters])
        if len(layout.shapes[p]) > 1
    ]


def fan_in(shape):
    """Inputs of a unit of a layer."""
    return math.prod(shape[1:])


def frozen(initial):
    """The weights that never change: signed constants, no biases, everything else as it was initialized."""
    weights = initial.clone()
    for place, name in enumerate(initial.layout.names[: initial.layout.parameters]):
        if len(shape := initial.layout.shapes[place]) > 1:
            weights[name].copy_(torch.where(initial[name] < 0, -1.0, 1.0) * math.sqrt(2 / fan_in(shape)))
        elif "bias" in name.rpartition(".")[2]:
            weights[name].zero_()
    return weights


def scores(layout, ranking):
    """Scores [D] in which every layer's edges lie in the order of its ranking, a place from the next by one step."""
    some = next(iter(ranking.values())).values
    s = torch.zeros(layout.size, device=some.device)
    for name, start, stop in ranked(layout):
        reach = 1 / math.sqrt(fan_in(layout.shapes[layout.places[name]]))
        s[start + ranking[name].values] = torch.linspace(-reach, reach, stop - start, device=s.device)
    return s


def packed(order):
    """A permutation of n edges, int64 [n], in ceil(log2 n) bits each."""
    return Packed(order, max((len(order) - 1).bit_length(), 1))


def places_of(vote, ranking):
    """The place of every edge in a vote, int64 [n]; None if the vote is no permutation of the edges."""
    if not isinstance(vote, Packed) or vote.values.shape != ranking.values.shape:
        return None
    order = vote.values.long()
    places = order.argsort()
    return places if torch.equal(order[places], torch.arange(len(order), device=order.device)) else None
