"""FedJETs."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch.nn import functional as F

from fedloom.cohort import Each, Once
from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.methods.personalize._experts import Gate, experts_of, features, mixed, name, number, routed, unlike
from fedloom.ranges import LearningRate, Log, Positive


@dataclass(frozen=True)
class FedJETs(Method):
    """Can a newcomer get a model of its own without a label, by sending each of its inputs to one of a few experts?

    Dun, Hipolito Garcia, Zheng, Awadallah, Sim, Kyrillidis, Dimitriadis: FedJETs: Efficient Just-In-Time
    Personalization with Federated Mixture of Experts, 2023, arXiv 2306.08586.

        server:    common expert W_c, trained beforehand, then frozen; experts W_1 .. W_M; a gate G on features c of W_c
        client i:  I <- the K experts with the largest mean of softmax(G(c(x))) over its data; of an anchor, its own
                   train on W_I and G together:  -log sum_{k in I} softmax_I(G(c(x)))_k softmax(W_k(x))_y
          anchor of expert e:  train on W_e and G:  CE(W_e(x), y) + lam CE(G(c(x)), e)
        server:    W_k <- weighted mean over those that trained it, else as it was;  G <- weighted mean of all
        judged:    every input by the expert that the gate gives the largest score

    Departures:
    1. No official code is known. W_c is the task's network, trained on the server's public data in setup; experts begin
       as copies of it.
    2. The anchors, one an expert, are the clients whose label histograms overlap least with each other, as they report
       them in setup; the paper's server knows them. They act as such whenever they are asked; there is no fixed share.
    3. Losses are ours, from the paper's words.

    Identities: one expert, without pretraining and without its anchor, is FedAvg; an expert that nobody trains, and the
    common one always, stay bitwise.
    """

    lr: LearningRate = 0.05  # local learning rate
    epochs: Positive[int] = 1  # E: local epochs
    batch: int = 10  # batch size, 0 for all samples
    experts: Positive[int] = 5  # M: 5 on CIFAR-10, 10 on CIFAR-100
    chosen: Positive[int] = 2  # K: experts that a client trains, as in the paper
    anchors: bool = True  # whether one client an expert teaches the gate which inputs are its
    lam: Annotated[float, Log(0.1, 10.0)] = 1.0  # lam: weight of that lesson
    hidden: Positive[int] = 32  # width of the gate
    common_epochs: int = 20  # epochs in which the server trains the common expert

    by_class = by_head = True
    needs = ("public",)
    compressible = ("experts", "gate")
    light = {"common_epochs": 3}
    refuses = {
        "aggregate": "clients train different experts, so that their replies are not alike",
        "faults": "a mangled expert that nobody else sent could not be told from a sound one",
    }

    def __post_init__(self):
        Method.__post_init__(self)
        if self.chosen > self.experts:
            raise UsageError(f"fedjets.chosen is {self.chosen}, of {self.experts} experts; it must be at most as many")

    def networks(self, site):
        width = site.initial["head.weight"].shape[1]
        return {"gate": site.network(Gate, width, self.hidden, self.experts)}

    def setup(self, server, clients):
        if self.common_epochs:
            server.model, _ = server.descend(server.model, lr=self.lr, epochs=self.common_epochs, batch=self.batch)
        server.common, server.gate = server.model, server.nets["gate"]
        server.experts = [server.model] * self.experts
        server.anchors = {}
        if self.anchors:
            server.anchors = unlike({up.client: up.labels for up in clients.call(self.labels)}, self.experts)

    @client
    def labels(self, client):
        counts = torch.bincount(client.data.y, minlength=client.task.classes).float()
        return {"labels": counts / counts.sum().clamp(min=1)}

    def round(self, server, cohort):
        common = Once(server.common)
        routes = cohort.call(self.route, gate=server.gate, common=common)
        chosen = {up.client: self.with_anchor(up.order, server.anchors.get(up.client)) for up in routes}
        models = {k: {name(e): server.experts[e] for e in places} for k, places in chosen.items()}
        anchor = Each({k: server.anchors.get(k, -1) for k in chosen})
        up = cohort.where(list(chosen)).mean(
            self.local, weight="n", models=Each(models), gate=server.gate, common=common, anchor=anchor
        )
        server.gate = server.gate + up.gate
        server.experts = [w + up.experts[name(e)] if name(e) in up.experts else w for e, w in enumerate(server.experts)]

    def with_anchor(self, order, anchor):
        """The experts that a client trains: the first K of its order, an anchor its own alone."""
        return order[: self.chosen] if anchor is None else [anchor]

    @client
    def route(self, client, gate, common):
        features = client.features(common, client.data.x)
        shares = client.net(gate)(features).softmax(1).mean(0)
        return {"order": shares.argsort(descending=True, stable=True)[: self.chosen].tolist()}

    @client
    def local(self, client, models, gate, common, anchor):
        nets = {"common": common, "gate": gate, **models}
        loss = mixed if anchor < 0 else self.lesson
        trained, _ = client.descend(
            nets, self.lr, self.epochs, batch=self.batch, loss=loss, only=("gate.*", *(f"{one}.*" for one in models))
        )
        experts = {one: trained[one] - w for one, w in models.items()}
        return {"experts": experts, "gate": trained["gate"] - gate, "n": client.n}

    def lesson(self, nets, batch):
        """What an anchor trains on: its expert, and that the gate sends such inputs there."""
        (own,) = experts_of(nets)
        scores = nets["gate"](features(nets["common"], batch.x))
        taught = torch.full_like(batch.y, number(own))
        return F.cross_entropy(nets[own](batch.x), batch.y) + self.lam * F.cross_entropy(scores, taught)

    def observe(self, server, clients):
        return routed(server, server.experts, server.gate, server.common)

    @client
    def predict(self, client, experts, gate, common):
        return routed(client, experts, gate, common)
