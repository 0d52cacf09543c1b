"""FED-PUB."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch.nn import functional as F

from fedloom.cohort import Each
from fedloom.data.graph import normalised
from fedloom.errors import NobodyReplied, UsageError
from fedloom.message import Seed
from fedloom.method import Method, client
from fedloom.ops.adam import Adam
from fedloom.ranges import LearningRate, Log, Positive
from fedloom.vector import Vector


@dataclass(frozen=True)
class FedPub(Method):
    """Whose weights, and which of them, help a client that holds one community of a larger graph?

    Baek, Jeong, Jin, Yoon, Hwang: Personalized Subgraph Federated Learning, ICML 2023, arXiv 2206.10206 (Algorithms 1
    and 2; official code JinheonBaek/FED-PUB).

        client k:  W <- theta_k;  E epochs of Adam on W and m:  CE(W * m) + l1 |m|_1 + l2 |W - theta_k|^2
                   e_k <- mean over the nodes of a random graph of the last convolution of W * m, m pruned at l1
                   send W - theta_k, e_k, n_k;  keep m
        server:    A_ij = exp(tau cos(e_i, e_j)) / sum_l exp(tau cos(e_i, e_l));  theta_i <- sum_j A_ij W_j
        predict:   the client's W * m, m pruned at l1

    Departures:
    1. Both penalties pull as in the paper's equation 7. In the official code they have no gradient (they are taken of
       detached tensors), the second is not squared, and l1 = 1e-3 does no more than prune: hence l1 is smaller here.
    2. The masks stay at home; the official code sends them along and ignores them.
    3. The random graph is sent as the seed that it is drawn from, to each client in each round.
    4. Similarity is known among the clients of one round: who is away keeps the theta_k of its last round. A client
       that comes for the first time starts from the mean of the last round's W, weighted by n.

    Identities: tau=0 without penalties sends everybody the plain mean; a large tau leaves each client its own weights.
    """

    lr: LearningRate = 0.01  # learning rate of Adam, as in the official code on Cora
    epochs: Positive[int] = 3  # E: local epochs; the official code takes 1, for 100 rounds
    batch: int = 0  # training nodes in a batch; 0: all, as in the official code
    # tau: sharpness of the similarities; the official default (its scripts take 3 to 10)
    tau: Annotated[float, Log(1.0, 30.0)] = 10.0
    # lambda_1: pull of the masks to zero, and where they are pruned; the paper takes 1e-3
    l1: Annotated[float, Log(1e-6, 1e-3)] = 1e-4
    # lambda_2: pull of the weights to those that came, from the second round on; as in the paper
    l2: Annotated[float, Log(1e-5, 1e-1)] = 1e-3
    weight_decay: float = 1e-6  # of Adam, on weights and masks, as in the official code
    communities: int = 5  # communities of the random graph, of 100 nodes each, as in the official code

    global_model = False
    needs = ("graph",)
    compressible = ("delta",)

    def setup(self, server, clients):
        if not hasattr(server.net(server.model).body, "embed"):
            raise UsageError("fed_pub compares what graph convolutions do; take a network that has some: model=gcn")
        server.proxy = Seed(int(torch.randint(2**62, (), generator=server.rng("proxy"))))
        server.starts = {}  # theta_k of the clients that have replied

    def round(self, server, cohort):
        starts = {k: server.starts.get(k, server.model) for k in cohort}
        replies = cohort.call(self.local, start=Each(starts), proxy=server.proxy)
        if not replies:
            raise NobodyReplied(f"none of {len(cohort)} clients replied")
        models = torch.stack([(starts[up.client] + up.delta).flat for up in replies])
        sizes = torch.tensor([up.n for up in replies]).to(models)
        shares = attention(torch.stack([up.embedding for up in replies]), self.tau)
        joint = [Vector(flat, server.layout) for flat in shares @ models]
        server.starts = server.starts | dict(zip([up.client for up in replies], joint, strict=True))
        server.model = Vector(sizes @ models / sizes.sum(), server.layout)

    @client
    def local(self, client, start, proxy):
        w = start
        mask = client.state.get("mask", matrices(start).map(torch.ones_like))
        adam = Adam(self.lr, weight_decay=self.weight_decay)
        moments = client.state.get("moments", {"w": {}, "mask": {}})
        l2 = self.l2 if client.round > 1 else 0.0
        for batch in client.batches(self.batch, self.epochs):
            g = client.grad(masked(w, mask), batch)  # by W * m
            by_mask = matrices(g) * matrices(w) + self.l1 * mask.sign()
            by_w = masked(g, mask) + 2 * l2 * (w - start)
            w, of_w = adam.step(w, by_w, moments["w"])
            mask, of_mask = adam.step(mask, by_mask, moments["mask"])
            moments = {"w": of_w, "mask": of_mask}
        own = masked(w, mask.where(mask.flat.abs() >= self.l1))
        client.state.update(mask=mask, moments=moments, model=own)
        embedding = client.net(own).body.embed(*random_graph(proxy, self.communities, client.task.graphs.x)).mean(0)
        return {"delta": w - start, "embedding": embedding, "n": client.n}

    @client
    def predict(self, client, model):
        return client.state.get("model", model)


def matrices(v):
    """The entries of `v` that have masks: all but biases."""
    names = [name for name, shape in zip(v.layout.names, v.layout.shapes, strict=True) if len(shape) > 1]
    return v.select(*names)


def masked(v, mask):
    """`v` with its matrices times the mask."""
    return v.merge(matrices(v) * mask)


def attention(embeddings, tau):
    """A [K, K] of embeddings [K, D]: each row the softmax of tau times the cosines with all others and itself."""
    directions = F.normalize(embeddings, dim=1)
    return (tau * directions @ directions.T).softmax(1)


def random_graph(seed, communities, like, size=100, chance=0.1):
    """Normal features [N, F], of the width and type of `like`, and adjacency of communities with no edge across."""
    n = communities * size
    joined = seed.expand(communities, size, size, distribution="uniform").triu(1)
    which, one, other = ((joined > 0) & (joined < chance)).nonzero().T
    edges = torch.stack([one, other]) + which * size
    x = seed.expand(n, like.shape[1]).to(like)
    return x, normalised(edges, n, x.dtype).to(x.device)
