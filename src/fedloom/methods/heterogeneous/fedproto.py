"""FedProto."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch.nn import functional as F

from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Log, Positive
from fedloom.variety import of_one_head, own

UNKNOWN = -1e6  # score of a class that has no prototype yet


@dataclass(frozen=True)
class FedProto(Method):
    """Can clients with models of their own learn together by sharing nothing but a mean feature for every class?

    Tan, Long, Liu, Zhou, Lu, Jiang, Zhang: FedProto: Federated Prototype Learning across Heterogeneous Clients,
    AAAI 2022, arXiv 2105.00243 (Algorithm 1; official code yuetan031/FedProto).

        client i:  w_i <- E epochs of SGD on  CE + lambda MSE(features, global prototype of the sample's class)
                   C_i^j <- mean feature of its samples of class j;     send the prototypes, keep w_i
        server:    C^j <- mean of C_i^j over the clients that have class j
        predict:   the class whose prototype is nearest to the sample's features

    Departures:
    1. The mean over clients is plain, as in the official code (the paper's equation 6 weights by samples and divides by
       the number of clients once more, which would shrink the prototypes).
    2. Prototypes are taken after local training in evaluation mode, not gathered on the way.
    3. Before the first prototypes a client predicts with its own head; then among all classes that have a prototype, as
       in the paper (the official code: among the client's own classes).
    4. The prototype of a class that nobody in the cohort has stays. All clients that run one network start from the
       same weights. Running statistics never leave their client.

    Identities: lambda=0 trains as local training does, bitwise; no weight of a model ever leaves a client.
    """

    lr: LearningRate = 0.05  # eta: learning rate; the paper takes 0.01 with momentum 0.5
    epochs: Positive[int] = 1  # E: local epochs, as in the paper
    batch: int = 10  # batch size; the paper takes 8
    # lambda: weight of the prototypes; the paper takes 1 on MNIST and FEMNIST, 0.1 on CIFAR-10
    lam: Annotated[float, Log(0.01, 10.0)] = 1.0
    models: tuple[str, ...] = ()  # networks by name, dealt to the clients in turn; none: the task's for everybody

    by_class = by_head = True
    global_model = False
    refuses = {"aggregate": "clients send prototypes of their own classes, so that replies are not alike"}

    def setup(self, server, clients):
        of_one_head(server, self.models)
        server.protos = {}

    def round(self, server, cohort):
        up = cohort.mean(self.local, protos=server.protos)
        server.protos = {**server.protos, **up.protos}

    @client
    def local(self, client, protos):
        loss = partial(pulled, criterion=client.task.criterion, protos=protos, lam=self.lam)
        w = client.state.get("model", own(client, self.models))
        w, _ = client.descend(w, lr=self.lr, epochs=self.epochs, batch=self.batch, loss=loss)
        client.state["model"] = w
        x, y = client.data.all()
        features = client.features(w, x)
        return {"protos": {int(c): features[y == c].mean(0) for c in y.unique()}}

    @client
    def predict(self, client, protos):
        w = client.state.get("model", own(client, self.models))
        if not protos:
            return w
        classes, centres = stacked(protos)

        def scores(x):
            distances = torch.cdist(client.features(w, x), centres)
            all_scores = distances.new_full((len(x), client.task.classes), UNKNOWN)
            all_scores[:, classes] = -distances
            return all_scores

        return scores


def pulled(net, batch, criterion, protos, lam):
    """CE + lambda MSE(features, prototypes); a sample whose class has no prototype adds nothing to the second part."""
    z = net.body(batch.x)
    value = criterion(net.head(z), batch)
    if not protos:
        return value
    classes, centres = stacked(protos)
    hits = batch.y[:, None] == classes
    target = torch.where(hits.any(1, keepdim=True), centres[hits.int().argmax(1)], z.detach())
    return value + lam * F.mse_loss(z, target)


def stacked(protos):
    """Classes [P] and their prototypes [P, D]."""
    centres = torch.stack(list(protos.values()))
    return torch.tensor(list(protos)).to(centres.device, non_blocking=True), centres
