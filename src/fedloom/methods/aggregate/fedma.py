"""FedMA."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch

from fedloom.cohort import Each
from fedloom.method import Method, client
from fedloom.methods.aggregate._layers import assembled, inputs, layers_of, rows_of, scattered
from fedloom.methods.aggregate._matching import match
from fedloom.ranges import LearningRate, Log, Positive

STEP = "every client takes part in every phase of a round, or the others cannot go on"


@dataclass(frozen=True)
class FedMA(Method):
    """Can neurons be matched before they are averaged, so that permuted ones do not destroy the mean?

    Wang, Yurochkin, Sun, Papailiopoulos, Khazaeni: Federated Learning with Matched Averaging, ICLR 2020,
    arXiv 2002.06440 (Algorithm 1; official code IBM/FedMA).

        for every hidden layer l in turn:
          client j:  layers < l are the global ones and stay;  R epochs of SGD on the others;  send the rows of layer l
          server:    match the rows of all clients (Beta-Bernoulli process, Hungarian method);  send the global rows,
                     and to client j the numbers pi_j of its own neurons among them
          client j:  the columns of layer l + 1 go to the places pi_j, zeros elsewhere
        last layer:  train it alone;  server: the mean of each class's row, weighted by samples of that class
        next round:  client j begins with its own neurons of the global network

    Departures:
    1. Networks of fully connected layers and convolutions (`mlp`, `dnn`, `cnn`, `lenet`); the paper also matches LSTMs.
    2. Global rows are the posterior means, which the prior shrinks, as in the official code; `shrink=False` averages.
    3. The prior's mean is 0; the official code takes 0.1 for biases.

    Identities: clients that are permutations of one network keep its width, and their mean is that network.
    """

    lr: LearningRate = 0.05  # learning rate; the official code takes 0.01
    epochs: Positive[int] = 2  # R: epochs a phase; the official code takes 20
    batch: int = 10  # batch size; the official code takes 64
    gamma: Annotated[float, Log(1.0, 1000.0)] = 7.0  # gamma: readiness for new neurons, as in the official code
    sigma: float = 1.0  # sigma: deviation of a client's neurons from the global ones, as in the official code
    # sigma_0: deviation of the global neurons from zero, as in the official code
    sigma0: Annotated[float, Log(0.1, 10.0)] = 1.0
    passes: int = 5  # rounds of matching again, as in the official code
    shrink: bool = True  # whether the prior's shrinkage stays in the global rows, as in the official code

    by_class = by_head = True
    refuses = {
        **dict.fromkeys(("cohort", "availability", "dropout", "lost", "deadline"), STEP),
        "secure": "the server matches every client's neurons",
        "attack=free_rider": "who did not work has no network to go on with",
        "attack=mimic": "clients' networks differ in width",
    }
    rough = True

    def setup(self, server, clients):
        assembled(server, rows_of(server.model))  # told now where a network cannot be matched
        server.counts = {up.client: up.counts for up in clients.call(self.census)}

    def round(self, server, cohort):
        classifier = server.model.select("head.*") if server.round > 1 else None
        layer, mine, layers = None, Each(dict.fromkeys(cohort)), []
        for number in range(len(layers_of(server.layout)) - 1):
            replies = cohort.call(self.phase, number=number, layer=layer, mine=mine, classifier=classifier)
            prior = {"gamma": self.gamma, "sigma": self.sigma, "sigma0": self.sigma0, "passes": self.passes}
            rows, found = match([up.rows for up in replies], server.rng("matching"), **prior)
            if not self.shrink:
                members = torch.bincount(torch.cat(found), minlength=len(rows)).double()[:, None]
                rows = rows * (members + (self.sigma / self.sigma0) ** 2) / members
            layer, classifier = rows.to(server.model.flat), None
            layers.append(layer)
            mine = Each({up.client: where for up, where in zip(replies, found, strict=True)})
        last = len(layers)
        replies = cohort.call(self.phase, number=last, layer=layer, mine=mine, classifier=classifier)
        share = torch.stack([server.counts[up.client] for up in replies]).to(replies[0].rows)
        share = torch.where(share.sum(0) > 0, share, 1.0)  # a class that nobody has is averaged plainly
        head = sum((n / share.sum(0))[:, None] * up.rows for n, up in zip(share, replies, strict=True))
        server.log(width=sum(map(len, layers)))
        server.model = assembled(server, [*layers, head])

    @client
    def census(self, client):
        return {"counts": torch.bincount(client.data.y, minlength=client.task.classes)}

    @client
    def phase(self, client, number, layer, mine, classifier):
        if number == 0:
            rows = self.begin(client, classifier)
        else:
            rows = client.state["rows"]
            rows = [*rows[: number - 1], layer, scattered(rows[number], mine, len(layer)), *rows[number + 1 :]]
            client.state["known"] = [*client.state["known"][: number - 1], mine]
        w = assembled(client, rows)
        names = layers_of(w.layout)
        alone = number == len(names) - 1 and number > 0  # 3 R epochs at a tenth of the rate
        w, _ = client.descend(
            w,
            lr=self.lr / 10 if alone else self.lr,
            epochs=self.epochs * (3 if alone else 1),
            batch=self.batch,
            only=tuple(f"{name}.*" for name in names[number:]),
        )
        client.state["rows"] = rows_of(w)
        return {"rows": client.state["rows"][number].clone()}

    def begin(self, client, classifier):
        """A client's own rows at the start of a round: its neurons of the global network, or the initial ones."""
        if classifier is None:
            client.state["known"] = []
            return rows_of(client.initial)
        wide, own = [*client.state["rows"][:-1], rows_of(classifier)[0]], []
        known = [None, *client.state["known"], None]
        for number, (before, mine) in enumerate(pairwise(known)):
            layer = wide[number]
            if before is not None:
                layer = inputs(layer, len(wide[number - 1]), before)
            own.append(layer if mine is None else layer[mine])
        return own

    @client
    def predict(self, client, model):
        assembled(client, rows_of(model))  # makes its network known here
        return model
