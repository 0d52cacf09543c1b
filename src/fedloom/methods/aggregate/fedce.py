"""FedCE."""

from dataclasses import dataclass
from typing import Literal

import torch

from fedloom.cohort import Each
from fedloom.errors import NobodyReplied
from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Positive

FLOOR = 1e-3  # the least share, before shares are scaled; official


@dataclass(frozen=True)
class FedCE(Method):
    """Can one estimate of what each client contributes, by its gradient and by its data, be its weight as well?

    Jiang, Roth, Li, Yang, Zhao, Nath, Xu, Dou, Xu: Fair Federated Medical Image Segmentation via Client Contribution
    Estimation, CVPR 2023, arXiv 2303.16520 (official code NVIDIA/NVFlare, research/fed-ce).

        client k, round t:  u <- (w - c_k w_k) / (1 - c_k), w_k its model of the round before: the others' mean
                            m_t <- accuracy of u on its validation data (m_0 = 0);   s_k <- 1 - mean(m_0 .. m_t)
                            w_k <- E epochs of SGD from w;   send w_k - w and s_k
        server:             v <- sum_k c_k (w_k - w);   cos_k <- cos(w_k - w, v - c_k (w_k - w)), over all rounds so far
                            G <- shares of 1 - mean cos_k;   M <- shares of s_k
                            c <- shares of G + M, or of G M;   w <- w + sum_k c_k (w_k - w)

    Departures:
    1. Shares that are raised to the least are scaled again to sum 1; the official code leaves their sum above.
    2. With a part of the clients in a round, c is 1 / N for all at first, and then shared anew among those heard, who
       keep together what they had together. Who was not heard in the round before has no u, and its mean stays.
    3. A client without validation data has no u, and its s_k stays 1. With none at all, only G tells clients apart.
    4. The main measure of the problem takes the place of Dice, and where that is no share of 1, 1 / (1 + the loss).

    Identities: c_k w_k + (1 - c_k) u = w; equal updates and equal scores give equal weights.
    """

    lr: LearningRate = 0.05  # eta: local learning rate; the official Adam takes 1e-3
    epochs: Positive[int] = 1  # E: local epochs; official
    batch: int = 10  # B: local batch size; official: 8
    mode: Literal["plus", "times"] = "plus"  # how G and M are joined; official: plus

    refuses = {
        "aggregate": "the server weighs every update by what its client contributes",
        "dp=sample": "clients tell how well a model does on their validation data, which no gradient's noise protects",
        "dp=client": "the server weighs every update by what its client contributes",
    }
    compressible = ("delta",)
    private = ("delta",)

    def setup(self, server, clients):
        server.contribution = [1 / server.population] * server.population  # c
        server.entered = {}  # c_k with which updates of the last round are in the model
        server.cosines = {}  # sum over rounds, and their number

    def round(self, server, cohort):
        shares = Each({k: server.entered.get(k, 0.0) for k in cohort})
        replies = cohort.call(self.local, model=server.model, share=shares)
        if not replies:
            raise NobodyReplied(f"none of the {len(cohort)} clients replied to local in round {server.round}")
        ids = [reply.client for reply in replies]
        steps = torch.stack([reply.delta.params.flat for reply in replies]).double()
        held = steps.new_tensor([server.contribution[k] for k in ids])
        c = held / held.sum()
        others = c @ steps - c[:, None] * steps
        cosines = torch.cosine_similarity(steps, others, eps=1e-30).tolist()
        known = {k: server.cosines.get(k, [0.0, 0]) for k in ids}
        server.cosines = server.cosines | {
            k: [known[k][0] + cosine, known[k][1] + 1] for k, cosine in zip(ids, cosines, strict=True)
        }
        g = shared(steps.new_tensor([1 - server.cosines[k][0] / server.cosines[k][1] for k in ids]))
        m = shared(steps.new_tensor([reply.score for reply in replies]))
        c = shared(g + m if self.mode == "plus" else g * m).tolist()
        server.entered = dict(zip(ids, c, strict=True))
        total = held.sum().item()
        server.contribution = [
            server.entered[k] * total if k in server.entered else old for k, old in enumerate(server.contribution)
        ]
        for reply in replies:
            server.model = server.model + server.entered[reply.client] * reply.delta

    @client
    def local(self, client, model, share):
        scores, count = client.state.get("scores", [0.0, 1])  # of all rounds with m_0
        if 0 < share < 1 and "model" in client.state:
            measured = client.evaluate((1 / (1 - share)) * (model - share * client.state["model"]), "validation")
            if measured["n"]:
                scores, count = scores + quality(client.task.qualities[0], measured), count + 1
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch)
        client.state["model"], client.state["scores"] = w, [scores, count]
        return {"delta": w - model, "score": 1 - scores / count}


def quality(main, measured):
    """How good measures are, from 0 to 1."""
    if main.unit == "share" and main.better == "high":
        return measured[main.name]
    return 1 / (1 + max(measured["loss"], 0.0))


def shared(values):
    """Numbers [K] that are not negative as shares of their sum (equal ones where that is 0), none below the least."""
    total = values.sum()
    shares = values / total if total > 0 else torch.full_like(values, 1 / len(values))
    shares = shares.clamp(min=FLOOR)
    return shares / shares.sum()
