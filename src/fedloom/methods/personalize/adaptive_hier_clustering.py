"""Adaptive hierarchical clustering and meta-learning."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from fedloom.cohort import ByGroup, Each, Replies
from fedloom.errors import NobodyReplied
from fedloom.method import Method, client
from fedloom.ops.ward import cut, merges
from fedloom.ranges import LearningRate, Linear, Positive


@dataclass(frozen=True)
class AdaptiveHierClustering(Method):
    """Do models of clusters, found after a warm-up and trained on for quick adaptation, help clients with few classes?

    Yeganeh, Farshad, Boschmann, Gaus, Frantzen, Navab: Adaptive Personalization in Federated Learning for Highly
    Non-i.i.d. Data, 2022, arXiv 2207.03448 (code iwan933/mlmi-federated-learning).

        T0 rounds:     FedAvg;   w
        once, all:     client i:  E_c epochs from w;   send w_i - w
                       server:    Ward's clusters of the w_i - w, cut at a height;   w_c <- mean of c's w_i, by samples
        S rounds, c:   B members of c in turn:  k steps from w_c;   send w_i - w_c
                       server:    w_c <- w_c + eps_s mean(w_i - w_c), by samples;   eps_s from eps_0 to eps_end
        judged:        client i:  k' steps from the model of its cluster

    Departures:
    1. T0 is a share of the planned rounds, of which at least two are left: one to cluster, one to go on. S is what is
       left. In the code, which goes by numbers of rounds, T0 = 20, S = 2000.
    2. The cut is a share of the greatest height, or a height as in the code, which depends on the scale of the weights.
       The code clusters the w_i, or only their distances from w, by which clients in other directions look alike.
    3. Classes count alike; the code weighs them in the loss by their rarity at the client.
    4. Who is not heard in the round of the clustering, or is new, has no cluster and is judged with w, adapted.

    Identities: one cluster, eps = 1, everybody in every batch and k steps an epoch is FedAvg; clusters of one client
    train alone; with eps = 0 the model of a cluster stays.
    """

    lr: LearningRate = 0.05  # learning rate until there are clusters; the code takes 0.065 on FEMNIST
    epochs: Positive[int] = 1  # E: local epochs of the warm-up
    batch: int = 10  # local batch size, 0 for all samples
    warm: Annotated[float, Linear(0.0, 0.9)] = 0.4  # T0, as a share of the planned rounds; ours
    cluster_epochs: Positive[int] = 3  # E_c, as in the code
    feature: Literal["update", "model", "distance"] = "update"  # what is clustered; the code takes the other two
    cut: Annotated[float, Linear(0.0, 1.0)] = 0.7  # height of the cut, as a share of the greatest; ours
    height: float = 0.0  # h: height of the cut itself, as in the code (6 to 20 there); 0: by `cut`
    smallest: Positive[int] = 1  # clusters of fewer clients are dissolved, each to the nearest in distance from w
    meta_batch: int = 5  # B: members of each cluster in a round, as in the code; 0 for all
    inner_lr: LearningRate = 0.05  # beta_in, as in the code
    inner_steps: Positive[int] = 7  # k: the code takes 7 on FEMNIST, 70 on HAM10k
    adapt_steps: int = 7  # k': steps before a client is judged, as many as k in the code
    eps: float = 1.0  # eps_0, as in the code on HAM10k
    eps_end: float = 0.0  # eps_end, after the last round

    global_model = False
    scheduled = True
    compressible = ("delta",)
    private = ("delta",)
    light = {"inner_steps": 2, "adapt_steps": 2}

    def phases(self, server):
        warm = min(int(self.warm * server.planned), max(0, server.planned - 2))
        return [("warm", warm), ("cluster", 1), ("meta", None)]

    def setup(self, server, clients):
        server.group = {}  # client -> its cluster, called by its first client; who is not in it has none
        server.models = {}  # w_c

    def select(self, server, clients):
        if server.phase.name == "cluster":
            return clients
        if server.phase.name == "warm" or not server.models:
            return None
        members = {c: sorted(k for k, its in server.group.items() if its == c) for c in server.models}
        turn = server.phase.round - 1
        return clients.where([k for mine in members.values() for k in in_turn(mine, self.meta_batch, turn)])

    def round(self, server, cohort):
        if server.phase.name == "cluster":
            self.split(server, cohort)
        elif server.models:
            self.reptile(server, cohort)
        else:
            server.model = server.model + cohort.mean(self.local, weight="n", model=server.model).delta

    def split(self, server, cohort):
        """Clusters of all that reply, and their models."""
        replies = cohort.call(self.settle, model=server.model)
        if not replies:
            raise NobodyReplied(f"nobody replied to settle in round {server.round}")
        moved = torch.stack([up.delta.params.flat for up in replies]).double()
        far = moved.norm(dim=1)
        x = {"update": moved, "model": moved + server.model.params.flat, "distance": far[:, None]}[self.feature]
        tree = merges(x)
        height = self.height or self.cut * max((at for *_, at in tree), default=0.0)
        labels = dissolved(cut(tree, len(x), height), far.tolist(), self.smallest)
        server.group = {up.client: replies[label].client for up, label in zip(replies, labels, strict=True)}
        names = sorted({*server.group.values()})
        clusters = {c: [up for up in replies if server.group[up.client] == c] for c in names}
        server.models = {
            c: server.model + Replies(mine, [up.client for up in mine]).mean("delta", weight="n").delta
            for c, mine in clusters.items()
        }
        server.log(clusters=len(clusters))

    def reptile(self, server, cohort):
        """A meta step of every cluster of which somebody replies."""
        groups = {k: server.group[k] for k in cohort}
        ups = cohort.means(self.adapt, groups, weight="n", model=ByGroup(server.models))
        eps = self.eps + (self.eps_end - self.eps) * (server.phase.round - 1) / server.phase.rounds
        steps = {c: up.delta.zeros_like().merge(eps * up.delta.params) for c, up in ups.items()}
        server.models = {c: w + steps[c] if c in steps else w for c, w in server.models.items()}

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch)
        return {"delta": w - model, "n": client.n}

    @client
    def settle(self, client, model):
        w, _ = client.descend(model, lr=self.lr, epochs=self.cluster_epochs, batch=self.batch)
        return {"delta": w - model, "n": client.n}

    @client
    def adapt(self, client, model):
        w, _ = client.descend(model, lr=self.inner_lr, steps=self.inner_steps, batch=self.batch)
        return {"delta": w - model, "n": client.n}

    @client
    def predict(self, client, model):
        w, _ = client.descend(model, lr=self.inner_lr, steps=self.adapt_steps, batch=self.batch)
        return w

    def predict_message(self, server, clients):
        return {"model": Each({k: server.models.get(server.group.get(k), server.model) for k in clients})}


def in_turn(members, size, turn):
    """So many of the members (0: all) in the given turn, around and around."""
    size = min(size or len(members), len(members))
    return [members[(turn * size + place) % len(members)] for place in range(size)]


def dissolved(labels, far, smallest):
    """The labels, those of clusters with fewer than `smallest` members replaced by that of the nearest in `far`."""
    kept = [place for place, label in enumerate(labels) if labels.count(label) >= smallest]
    nearest = [min(kept or [place], key=lambda other: abs(far[other] - mine)) for place, mine in enumerate(far)]
    return [labels[place if place in kept else near] for place, near in enumerate(nearest)]
