"""One-shot and few-shot VFL."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch.nn import functional as F

from fedloom.cohort import Each
from fedloom.data.augment import strong, weak
from fedloom.errors import NobodyReplied
from fedloom.method import Method, client
from fedloom.ops.kmeans import kmeans
from fedloom.ranges import Log, Positive
from fedloom.task import Data


@dataclass(frozen=True)
class OneShotVFL(Method):
    """Can parties with different columns of the same samples learn together in one exchange, not in one a step?

    Sun, Xu, Yang, Nath, Li, Zhao, Xu, Chen, Roth: Communication-Efficient Vertical Federated Learning with Limited
    Overlapping Samples, ICCV 2023, arXiv 2303.16270 (official code NVIDIA/NVFlare, research/one-shot-vfl).

        party k:   send H_k = f_k(x_k) of the aligned samples, f_k untrained
        server:    send G_k = d sum CE(g(H_1 .. H_K), y) / d H_k, g untrained
        party k:   c <- k-means of the rows of G_k;  E epochs of SGD on q_k(f_k(.)):  CE with c on the aligned
                     + lam CE(strong view, argmax of the weak view) on others, where that one is surer than t
                   send H_k again
        server:    E_s epochs of SGD on CE(g(H_1 .. H_K), y)                               one-shot ends here
        few-shot:  parties send f_k of their other samples;  the server makes up what is missing, by attention to the
                   aligned ones, and labels those of which g is sure and a classifier on H_k says the same;
                   parties learn with these too and send H_k;  the server trains g on

    Departures:
    1. Features are taken in evaluation mode and as they are; in the official code in training mode, of random views;
       k-means starts ten times, there once; messages have 32 bits, there gradients have 16.
    2. The official code has one party, aligned samples only and no few-shot; the rest follows the paper's outline.
    3. In few-shot, parties send c, which tells which samples are of one class: so the server names classes as they do.

    Identities: with lam=0 a party trains as on labels c; 3 N_o sum d_k numbers cross, whatever E.
    """

    lr: Annotated[Positive[float], Log(1e-3, 0.3)] = 0.05  # learning rate of the parties; 0.01 in the official code
    momentum: float = 0.9  # momentum of parties and server, as in the official code
    epochs: Positive[int] = 30  # E: epochs of a party; 200 in the official code
    batch: int = 32  # samples of each kind in a step; 64 in the official code
    server_lr: Annotated[float, Log(1e-3, 0.3)] = 0.05  # learning rate of g; 0.01 in the official code
    server_epochs: int = 50  # E_s: epochs of g; the official code names 50 and runs 200
    clusters: int = 0  # C: clusters of the gradients; 0: as many as classes, as in the official code
    lam: Annotated[float, Log(0.1, 10.0)] = 1.0  # lambda: weight of samples without a label; 1 in FixMatch
    sure: float = 0.95  # t: least confidence of a pseudo-label; 0.95 in FixMatch
    few_shot: bool = False  # whether one more exchange labels samples that are not aligned

    needs, one_shot = ("vertical",), True
    light = {"epochs": 5, "server_epochs": 5}
    refuses = dict.fromkeys(("secure", "aggregate", "attack"), "a party sends features that no other has, and no model")

    def setup(self, server, clients):
        server.parties = []  # whose features g has learned from

    def round(self, server, cohort):
        parts = heard(cohort.call(self.encode))
        pulls = dict(zip(parts, self.pulls(server, parts), strict=True))
        replies = cohort.where(parts).call(self.learn, pull=Each(pulls))
        parts = heard(replies)
        model = self.trained(server, server.model, parts)
        if self.few_shot:
            clusters = {up.client: up.clusters.long() for up in replies}
            others = heard(cohort.where(parts).call(self.encode, split="alone"))
            told = {k: self.labelled(server, model, k, u, parts, clusters[k]) for k, u in others.items()}
            parts = heard(cohort.where(told).call(self.learn, told=Each(told)))
            model = self.trained(server, model, parts)
        server.model, server.parties = model, list(parts)

    @client
    def encode(self, client, split="train"):
        return {"features": client.features(self.network(client), client.task.data(client.id, split).x)}

    def network(self, client):
        """The party's weights: trained, or as they were drawn."""
        return client.state.get("model", client.network(f"party:{client.id},{self.clusters or client.task.classes}"))

    def pulls(self, server, parts):
        """G_k [N_o, d_k] of every party; of the sum over samples, so that all have one scale."""
        parts = {k: h.clone().requires_grad_() for k, h in parts.items()}
        scores = judged(server, server.model, parts)
        return torch.autograd.grad(F.cross_entropy(scores, server.task.labels, reduction="sum"), [*parts.values()])

    @client
    def learn(self, client, pull=None, told=None):
        w, others = self.network(client).clone(), client.task.data(client.id, "alone")
        if pull is not None:
            client.state["clusters"] = kmeans(pull, self.clusters or client.task.classes, client.rng("k-means"))
        clusters, told = client.state["clusters"], others.y if told is None else told.long()
        some = Data(torch.cat([client.data.x, others.x[told >= 0]]), torch.cat([clusters, told[told >= 0]]))
        rest = Data(others.x[told < 0], others.y[told < 0])
        steps, draw, velocity = -(-len(some) // self.batch) * self.epochs, client.rng("views"), w.zeros_like()
        more = client.batches(self.batch, steps=steps, data=rest) if self.lam and len(rest) else iter(())
        for batch in client.batches(self.batch, self.epochs, data=some):
            u = next(more, None)
            loss = u and partial(consistent, task=client.task, views=(weak(u.x, draw), strong(u.x, draw)), rule=self)
            velocity = self.momentum * velocity + client.grad(w, batch, loss)
            w = w - self.lr * velocity
        client.state["model"] = w
        sent = {"clusters": clusters.to(torch.int16)} if self.few_shot else {}
        return {"features": client.features(w, client.data.x), **sent}

    def trained(self, server, w, parts):
        """The classifier w after E_s epochs on the features of all parties."""
        rule = {"lr": self.server_lr, "momentum": self.momentum, "epochs": self.server_epochs, "batch": self.batch}
        return server.descend(w, data=Data(server.task.joined(parts), server.task.labels), **rule)[0]

    def labelled(self, server, model, k, u, parts, clusters):
        """For party k's other samples with features u [N_u, d_k]: its cluster of their class, -1 where unsure."""
        near = (u @ parts[k].T / u.shape[1] ** 0.5).softmax(1)
        p = judged(server, model, {j: near @ h for j, h in parts.items()} | {k: u}).softmax(1)
        alone = judged(server, self.trained(server, server.initial, {k: parts[k]}), {k: u})
        keep = (p.max(1).values > self.sure) & (alone.argmax(1) == p.argmax(1))
        shared = F.one_hot(server.task.labels, server.task.classes).float().T @ F.one_hot(clusters).float()
        return shared.argmax(1)[p.argmax(1)].where(keep, -1).to(torch.int16)

    def observe(self, server, clients):
        parts = {up.client: up.features for up in clients.where(server.parties).call(self.encode, split="judged")}
        return judged(server, server.model, parts, len(server.task.data(0, "judged"))).detach().__getitem__

    @client
    def predict(self, client):
        """Nothing: a party has neither labels nor the others' columns."""


def heard(replies):
    """The features by party, where any came."""
    if not replies:
        raise NobodyReplied(f"none of {len(replies.asked)} parties replied")
    return {up.client: up.features for up in replies}


def judged(server, w, parts, count=None):
    """The scores [count, C] of the classifier w on the features of some parties."""
    return server.scores(w, server.task.joined(parts, count))


def consistent(net, batch, task, views, rule):
    """The labeled loss, and FixMatch's on a weak and a strong view of others."""
    with torch.no_grad():
        p = net(views[0]).softmax(1)
    taught = (p.max(1).values > rule.sure) * F.cross_entropy(net(views[1]), p.argmax(1), reduction="none")
    return task.loss(net, batch) + rule.lam * taught.mean()
