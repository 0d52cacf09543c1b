"""RFFL."""

import math
from dataclasses import dataclass

import torch

from fedloom.cohort import Each
from fedloom.message import Sparse
from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Positive


@dataclass(frozen=True)
class Rffl(Method):
    """Can one reputation remove adversaries and pay every honest client in proportion to what it contributes?

    Xu, Lyu: A Reputation Mechanism Is All You Need: Collaborative Fairness and Adversarial Robustness in Federated
    Learning, FL-ICML workshop 2021, arXiv 2011.10464 (Algorithm 1; official code XinyiYS).

        client i:  w_i' <- E epochs of SGD from w_i;   g_i <- w_i' - w_i, clipped to length Gamma;   w_i <- w_i + g_i
        server:    g <- sum_i p_i g_i,   p = r (at first n_i / n);   phi_i <- cos(g_i, g)
                   r_i <- alpha r_i + (1 - alpha) phi_i, at least 0;   r <- r / sum r
                   after the grace period: who has r_i < c / |R| leaves R for good, r_i = 0, and r is scaled again
                   q_i <- r_i / max_j r_j;   client i gets, of every layer of g, the q_i largest entries, and adds them

    Departures:
    1. With a part of the clients in a round, p is r among them, scaled to sum 1 (n_i / n where none of them has any);
       only who was heard is judged and rewarded, and a client that is new earns its reputation from 0 (the paper has
       everybody in every round).
    2. A reputation is never negative. In the paper it may be, until the removal: the sum by which it is divided can
       then be near 0, and g longer than any upload.
    3. q_i = 1 is the whole layer; the official code keeps one entry less.
    4. Running statistics of BatchNorm never leave their client.

    Identities: with reputation=false and masking=false a client moves by g_i + sum_j n_j g_j / n every round; g is no
    longer than the longest upload; the most reputed client gets all of g, a removed one zeros, and goes on alone.
    """

    lr: LearningRate = 0.15  # eta: local learning rate; official for MNIST (CIFAR-10: 0.015)
    lr_decay: float = 0.977  # gamma: factor of the learning rate after each local epoch; official
    epochs: Positive[int] = 3  # E: local epochs; official
    batch: int = 32  # B: local batch size; official for MNIST
    clip: float = 0.5  # Gamma: the greatest length of an upload; official for MNIST (CIFAR-10: 0.15, text: 1)
    alpha: float = 0.95  # alpha: share of the old reputation in the new; the paper's
    threshold: float = 1 / 3  # c: beta = c / |R|; the paper's
    grace: int = 10  # rounds before anybody is removed; from the paper's experiments
    reputation: bool = True  # false: p = q = n_i / n for ever, nobody is removed; so in the official code
    masking: bool = True  # false: everybody gets all of g

    global_model = False
    refuses = dict.fromkeys(("aggregate", "dp=client"), "the server weighs every upload by its client's reputation")
    compressible = ("delta",)
    private = ("delta",)

    def setup(self, server, clients):
        server.reputation = {}  # r: client -> number, zero for who was removed
        server.removed = server.flagged = []

    def round(self, server, cohort):
        replies = cohort.call(self.local)
        if not replies:
            return
        ids = [reply.client for reply in replies]
        uploads = torch.stack([reply.delta.flat for reply in replies]).double()
        sizes = torch.tensor([float(cohort.info(k)["n"]) for k in ids], dtype=torch.float64, device=uploads.device)
        p = torch.tensor([server.reputation.get(k, 0.0) for k in ids], dtype=torch.float64, device=uploads.device)
        if not self.reputation or not p.any():
            p = sizes * torch.tensor([k not in server.removed for k in ids], device=sizes.device)
        p = p / p.sum().clamp(min=1e-300)  # all of them may have been removed
        g = p @ uploads
        if self.reputation:
            phi = torch.cosine_similarity(uploads, g[None], eps=1e-10)
            server.reputation, server.removed = self.judge(server, dict(zip(ids, phi.tolist(), strict=True)))
            server.flagged = server.removed
            most = max(server.reputation.values())
            q = {k: server.reputation[k] / most if most else 0.0 for k in ids}
        else:
            q = dict(zip(ids, p.tolist(), strict=True))
        if not self.masking:
            q = dict.fromkeys(ids, 1.0)
        server.log(removed=len(server.removed))
        g, layout = g.to(replies[0].delta.flat.dtype), replies[0].delta.layout
        parts = {share: largest(g, layout, share) for share in set(q.values())}
        cohort.where(ids).tell(self.rewarded, reward=Each({k: parts[q[k]] for k in ids}))

    @client
    def local(self, client):
        start = w = client.state.get("model", client.initial)
        done = client.state.get("epochs", 0)
        for epoch in range(self.epochs):
            w, _ = client.descend(w, lr=self.lr * self.lr_decay ** (done + epoch), epochs=1, batch=self.batch)
        delta = (w - start).params
        delta = delta * torch.clamp(self.clip / delta.norm(), max=1.0)
        client.state["model"] = w.merge(start.params + delta)
        client.state["epochs"] = done + self.epochs
        return {"delta": delta}

    @client
    def rewarded(self, client, reward):
        w = client.state.get("model", client.initial)
        client.state["model"] = w.merge(w.params.map(lambda flat: flat + reward.dense()))

    @client
    def predict(self, client):
        return client.state.get("model", client.initial)

    def judge(self, server, phi):
        """Reputations and the removed after a round in which each client heard had the cosine `phi`."""
        removed = set(server.removed)
        r = dict(server.reputation)
        for k, cosine in phi.items():
            r[k] = 0.0 if k in removed else max(self.alpha * r.get(k, 0.0) + (1 - self.alpha) * cosine, 0.0)
        r = scaled(r)
        if server.round > self.grace:
            beta = self.threshold / max(server.population - len(removed), 1)
            removed |= {k for k in phi if r[k] < beta}
            r = scaled({k: 0.0 if k in removed else value for k, value in r.items()})
        return r, sorted(removed)


def scaled(r):
    """Reputations that sum to 1, unless all are 0."""
    total = sum(r.values())
    return {k: value / total for k, value in r.items()} if total else r


def largest(g, layout, share):
    """Of every layer of g [D] the ceil(share * size) entries with the largest magnitude."""
    kept = [
        start + g[start:stop].abs().topk(math.ceil(share * (stop - start))).indices
        for start, stop in zip(layout.offsets, layout.offsets[1:], strict=False)
    ]
    return Sparse.of(g, torch.cat(kept))
