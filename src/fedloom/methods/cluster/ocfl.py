"""OCFL."""

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from fedloom.cohort import ByGroup, Each, Replies
from fedloom.errors import NobodyReplied
from fedloom.method import Method, client
from fedloom.methods.cluster._directions import directions, distances, joined, temperature
from fedloom.ops.kmeans import kmeans
from fedloom.ranges import LearningRate, Positive


@dataclass(frozen=True)
class Ocfl(Method):
    """When is the earliest good moment to cluster the clients, once, without a threshold?

    Zuziak, Pellungrini, Rinzivillo: One-Shot Clustering for Federated Learning Under Clustering-Agnostic Assumption,
    2025, arXiv 2509.01587 (extends arXiv 2503.04231, IEEE Big Data 2024; official code MKZuziak).

        client i of cluster c:  w_i <- E epochs of SGD from w_c;   delta_i <- w_i - w_c
        server, at first:       D_ij <- 1 - cos(delta_i, delta_j),  D_ii = 0;   T <- |D|_F / sqrt(4 n (n - 1))
                                once T is higher than in the round before:
                                cluster the clients by D, and give each cluster a copy of w
        server, every round:    w_c <- w_c + eta_s mean of delta_i over the clients of c

    Departures:
    1. With a part of the clients in a round, D is over those that replied. Who was not among them when it clustered is
       sent the model of that moment at its next visit, joins the cluster whose mean update its own is nearest to, and
       then trains with it. The paper has everybody in every round.
    2. HDBSCAN's noise joins the cluster that is nearest by mean distance; the official code makes one cluster of it.
    3. Affinity propagation gets -D; the official code hands it distances where it expects similarities.
    4. Running statistics of BatchNorm are no part of an update's direction.
    5. A rise counts if it is more than the share `tolerance` of T; the default, any rise, is the paper's rule.

    Identities: until it clusters it is FedAvg with plain weights, bitwise. It clusters once at most, and never in the
    first round. Afterwards what a cluster learns does not depend on the data of other clusters.
    """

    lr: LearningRate = 0.05  # eta: local learning rate; official 0.01
    epochs: Positive[int] = 3  # E: local epochs; official
    batch: int = 32  # local batch size; official (CIFAR-10: 64)
    server_lr: float = 1.0  # eta_s; official
    clustering: Literal["hdbscan", "meanshift", "kmeans", "affinity"] = "hdbscan"  # what makes clusters of D
    smallest: float = 0.2  # of hdbscan: the least share of the clients that is a cluster; the paper's
    clusters: Positive[int] = 3  # of kmeans: how many; the paper's
    tolerance: float = 0.0  # share by which T must rise

    global_model = False
    compressible = ("delta",)
    private = ("delta",)
    refuses = {"aggregate": "until it clusters, the server averages updates that it must see one by one"}

    def setup(self, server, clients):
        server.models = [server.model]  # w_c
        server.clusters = {}  # client -> its cluster, once there are any
        server.temperature = None  # T of the round before
        server.start = server.directions = None  # w and the mean update of each cluster [C, D], as it clustered

    def round(self, server, cohort):
        if server.clusters:
            self.place(server, cohort.where(lambda k: k not in server.clusters))
            known, models = cohort.where(server.clusters), ByGroup(enumerate(server.models))
            if not known:
                raise NobodyReplied(f"none of {len(cohort)} clients is in a cluster")
            means = known.means(self.local, groups=server.clusters, model=models)
        else:
            replies = cohort.call(self.local, model=server.models[0])
            if not replies:
                raise NobodyReplied(f"none of {len(cohort)} clients replied")
            self.cluster(server, replies)
            means = by_cluster(replies, server.clusters)
        server.models = [w + self.server_lr * means[c].delta if c in means else w for c, w in enumerate(server.models)]

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch)
        return {"delta": w - model}

    def cluster(self, server, replies):
        """Clusters the clients that replied, if T has risen."""
        if len(replies) < 2:
            return
        rows = directions(replies)
        apart = distances(rows)
        heat, before = temperature(apart), server.temperature
        server.log(temperature=heat)
        server.temperature = heat
        if before is not None and before * (1 + self.tolerance) < heat:
            labels = self.labels(apart, server.rng("clusters"))
            server.clusters = {up.client: c for up, c in zip(replies, labels.tolist(), strict=True)}
            server.start = server.models[0]
            server.models = [server.start] * (1 + max(server.clusters.values()))
            server.directions = torch.stack([rows[labels == c].mean(0) for c in range(len(server.models))])

    def place(self, server, strangers):
        """Finds the clusters of clients that were not there when it clustered."""
        replies = strangers.call(self.local, model=server.start) if strangers else []
        if replies:
            near = F.normalize(directions(replies), dim=1) @ F.normalize(server.directions, dim=1).T
            places = zip(replies, near.argmax(1).tolist(), strict=True)
            server.clusters = server.clusters | {up.client: c for up, c in places}

    def labels(self, apart, draw):
        """The cluster of each client, int64 [n], numbered from 0."""
        from sklearn import cluster

        points = apart.cpu().numpy()
        if self.clustering == "kmeans":
            labels = kmeans(apart, self.clusters, draw)
        else:
            made = {
                "hdbscan": cluster.HDBSCAN(
                    max(2, math.ceil(self.smallest * len(apart))), metric="precomputed", copy=True
                ),
                "meanshift": cluster.MeanShift(),
                "affinity": cluster.AffinityPropagation(affinity="precomputed", random_state=0),
            }[self.clustering]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of no convergence: then all is noise
                labels = torch.from_numpy(made.fit_predict(-points if self.clustering == "affinity" else points)).long()
        return joined(labels.to(apart.device), apart)

    def predict_message(self, server, clients):
        first = server.models[0] if server.start is None else server.start
        models = {k: server.models[c] for k, c in server.clusters.items()}
        return {"model": Each({k: models.get(k, first) for k in clients})}


def by_cluster(replies, clusters):
    """The plain means of the replies of each cluster; all are in cluster 0 before there are any."""
    members = {}
    for up in replies:
        members.setdefault(clusters.get(up.client, 0), []).append(up)
    return {c: Replies(its, asked=[up.client for up in its]).mean("delta") for c, its in members.items()}
