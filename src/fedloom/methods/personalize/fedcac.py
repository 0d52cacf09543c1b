"""FedCAC."""

from dataclasses import dataclass
from typing import Annotated

import torch

from fedloom.cohort import Each
from fedloom.errors import UsageError
from fedloom.message import Packed
from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Linear, Log, Positive
from fedloom.vector import Vector


@dataclass(frozen=True)
class FedCAC(Method):
    """Which weights are sensitive to skewed data, and may even these be shared with clients that share the mask?

    Wu, Liu, Niu, Zhu, Tang: Bold but Cautious: Unlocking the Potential of Personalized Federated Learning through
    Cautiously Aggressive Collaboration, ICCV 2023, arXiv 2309.11103 (authors' group's code kxzxvbk/Fling).

        client i:  theta_i <- E epochs of SGD from s_i;  c = |(theta_i - s_i) theta_i|
                   m_i <- the tau largest of c in every tensor;  send theta_i, m_i, n_i
        server:    g <- sum_i n_i theta_i / sum_i n_i;  O_ij = 1 - |m_i - m_j|_1 / (2 |m_i|)
                   C_i = {i} and those j with O_ij >= O_avg + t / beta (O_max - O_avg)
                   s_i <- m_i mean_{j in C_i} theta_j + (1 - m_i) g

    Departures:
    1. Masks live on parameters. Running statistics are those of the run's policy; the authors' code keeps them local.
    2. O is taken over the cohort; who is away keeps the s_i of the round in which it replied last.
    3. After beta rounds nobody joins anybody, as is the formula's intent; by it, where all O are equal (as for two
       clients), all would join for ever.
    4. Ties at the threshold of c are broken by place, so that all masks have one size and O is symmetric.

    Identities: tau=0 is FedAvg, to rounding; after beta rounds a client gets its own sensitive weights back bitwise.
    """

    lr: LearningRate = 0.05  # learning rate; the authors take 0.1 with momentum 0.9
    epochs: Positive[int] = 1  # E: local epochs; the authors take 5
    batch: int = 10  # batch size; the authors take 100
    # tau: share of every tensor that is sensitive; the authors' value on CIFAR-10
    tau: Annotated[float, Linear(0.1, 0.9)] = 0.5
    # beta: rounds after which sensitive weights are nobody else's; the authors' value on CIFAR-10
    beta: Annotated[int, Log(1, 200)] = 100

    updates = {"model": "start"}
    refuses = {"aggregate": "every client has a mean of its own, over those who share its sensitive weights"}

    def __post_init__(self):
        Method.__post_init__(self)
        if self.tau > 1 or self.beta < 1:
            raise UsageError(f"fedcac.tau is {self.tau}, a share up to 1; fedcac.beta is {self.beta}, at least 1 round")

    def setup(self, server, clients):
        server.starts = {}  # s_i of the clients that have replied

    def round(self, server, cohort):
        replies = cohort.call(self.local, model=Each({k: server.starts.get(k, server.model) for k in cohort}))
        server.model = replies.mean("model", weight="n").model
        masks = torch.stack([up.mask.values for up in replies])
        models = torch.stack([up.model.params.flat for up in replies])
        joined = partners(overlaps(masks), server.round / self.beta).to(models.dtype)
        joint = joined @ models / joined.sum(1, keepdim=True)
        mean = server.model.params
        starts = torch.where(masks, joint, mean.flat)
        server.starts = server.starts | {
            up.client: server.model.merge(Vector(start, mean.layout)) for up, start in zip(replies, starts, strict=True)
        }

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch)
        client.state["model"] = w
        sensitivity = (w - model).params * w.params
        return {"model": w, "mask": Packed(largest(sensitivity, self.tau), 1), "n": client.n}

    @client
    def predict(self, client, model):
        return client.state.get("model", model)


def largest(v, share):
    """Where the floor(share * size) largest entries by size of each tensor of `v` are, bool [size]."""
    mask = torch.zeros(len(v), dtype=torch.bool, device=v.flat.device)
    for start, size in zip(v.layout.offsets, v.layout.sizes, strict=False):
        order = v.flat[start : start + size].abs().argsort(descending=True, stable=True)
        mask[start + order[: int(share * size)]] = True
    return mask


def overlaps(masks):
    """O [K, K] of masks [K, P]: the share of its sensitive weights that a client has in common with another."""
    numbers = masks.double()
    differing = torch.cdist(numbers, numbers, p=1)
    return 1 - differing / (2 * numbers.sum(1, keepdim=True)).clamp(min=1)


def partners(overlap, progress):
    """Whose sensitive weights go into whose mean, bool [K, K], at `progress` t / beta."""
    own = torch.eye(len(overlap), dtype=torch.bool, device=overlap.device)
    others = overlap[~own]
    if not len(others) or progress > 1:
        return own
    top = others.max()
    threshold = torch.lerp(others.mean(), top, progress).clamp(max=top)  # at beta it is O_max, however it is rounded
    return own | (overlap >= threshold)
