"""FedLabel."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch.nn import functional as F

from fedloom.data.augment import strong, weak
from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Linear, Log
from fedloom.task import Data


@dataclass(frozen=True)
class FedLabel(Method):
    """For a sample without a label, is the local or the global model the better teacher, and what if both agree?

    Cho, Joshi, Dimitriadis: Local or Global: Selective Knowledge Assimilation for Federated Learning with Limited
    Labels, ICCV 2023, arXiv 2307.08809.

        client k:  w_g = w;  w_l <- w;  tau steps, each on a labeled batch (x, y) and an unlabeled one u:
                     p_l, p_g: what w_l and w_g say of the weak view;  the expert e is the one of larger variance of p
                     accepted if max p_e >= beta:  yhat = argmax p_e
                     CE(w_l(x), y) + lambda_u mean over accepted of [ CE(w_l(strong u), yhat)
                        + lam h(p_o) / h(p_e) KL(p_o || w_l(strong u))  where the other model o says yhat too ]
                   send w_l - w
        server:    w <- w + weighted mean of the differences

    Departures:
    1. Labeled and unlabeled losses are mixed in every step, as third-party implementations do; the paper's text has
       tau labeled steps before tau' unlabeled ones.
    2. Clients weigh by all their samples; the third-party code weighs them equally.
    3. The local teacher judges in training mode, as in FixMatch; the global one in evaluation mode.

    Identities: beta above 1 is FedAvg on the labeled samples.
    """

    lr: LearningRate = 0.05  # learning rate, as in the third-party code
    steps: int = 5  # tau: local steps, as in the third-party code
    batch: int = 20  # samples of each kind in a step, as in the third-party code
    # beta: least confidence of an accepted pseudo-label, as in the third-party code
    beta: Annotated[float, Linear(0.6, 0.99)] = 0.95
    lam: float = 1.0  # lambda: weight of agreement at equal confidence, as in the third-party code
    # lambda_u: weight of the unlabeled loss; 1 in the third-party code
    unlabelled: Annotated[float, Log(0.1, 10.0)] = 1.0

    compressible = ("delta",)
    private = ("delta",)
    refuses = {
        "dp=sample": "unlabelled samples are in its loss beside those of the batch",
        "optimizer": "it takes single steps, between which an optimizer would forget",
    }
    needs = ("partial",)

    def round(self, server, cohort):
        up = cohort.mean(self.local, weight="n", model=server.model)
        server.model = server.model + up.delta

    @client
    def local(self, client, model):
        others = client.task.data(client.id, "unlabelled")
        more = client.batches(self.batch, steps=self.steps, data=others) if len(others) else iter(())
        w, draw = model, client.rng("views")
        for batch in client.batches(self.batch, steps=self.steps):
            loss, u = None, next(more, None)
            if u is not None:
                views = weak(u.x, draw), strong(u.x, draw)
                with torch.no_grad():
                    theirs = client.scores(model, views[0]).softmax(1)
                loss = partial(selective, task=client.task, views=views, theirs=theirs, rule=self)
            w, _ = client.descend(w, lr=self.lr, steps=1, loss=loss, data=Data.of(batch))
        return {"delta": w - model, "n": client.n + len(others)}


def selective(net, batch, task, views, theirs, rule):
    """The loss on a labeled batch and on two views of an unlabeled one, of which the global model says `theirs`."""
    with torch.no_grad():
        mine = net(views[0]).softmax(1)
        local = confidence(mine) >= confidence(theirs)
        expert, other = torch.where(local[:, None], mine, theirs), torch.where(local[:, None], theirs, mine)
        label = expert.argmax(1)
        accepted = (expert.max(1).values >= rule.beta).to(mine)
        agree = accepted * (other.argmax(1) == label)
        weight = rule.lam * confidence(other) / confidence(expert).clamp(min=1e-12)
    scores = net(views[1])
    taught = accepted * F.cross_entropy(scores, label, reduction="none")
    pulled = agree * weight * F.kl_div(scores.log_softmax(1), other, reduction="none").sum(1)
    extra = (taught + pulled).sum() / accepted.sum().clamp(min=1)
    return task.loss(net, batch) + rule.unlabelled * extra


def confidence(p):
    """h: the variance of the probabilities, [B]."""
    return (p - 1 / p.shape[1]).square().mean(1)
