"""Model extraction."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from fedloom.channels import channels
from fedloom.cohort import Each
from fedloom.errors import UsageError
from fedloom.message import Sparse
from fedloom.method import Method, client
from fedloom.ranges import LearningRate, Positive
from fedloom.vector import Vector


@dataclass(frozen=True)
class ModelExtraction(Method):
    """If every client trains only a part cut out of the global model, which parts and which average still converge?

    Zhou, Li, Ding, You, Qu, Zhu: Every Parameter Matters: Ensuring the Convergence of Federated Learning with Dynamic
    Heterogeneous Models Reduction, NeurIPS 2023, arXiv 2310.08670; its masks from HeteroFL (arXiv 2010.01264), FjORD
    (arXiv 2102.13451), FedRolex (arXiv 2212.01548) and PruneFL.

        server:    m_k <- mask(policy, level of client k, round);  send w[m_k]
        client k:  E epochs of SGD on the coordinates in m_k, all others being zero;  send (w_k - w)[m_k]
        server:    every coordinate moves by the mean over the clients that hold it; what nobody holds stays

    Departures:
    1. A part is trained inside the full network, whose other coordinates are zero: for channels with ReLU, also after
       BatchNorm, that is the narrow network exactly; with GroupNorm, whose groups then hold zeros, it is not. It costs
       the full network's time; a message has the part only, and a bit a coordinate.
    2. No masked logits, no statistics of BatchNorm recomputed on all data, and the head's rows count for all, unlike
       HeteroFL; no self-distillation, unlike FjORD. HeteroFL's scaler is an option: it divides what a part's hidden
       layers put out by the part's width, as inverted dropout does, so that the whole network fits. A narrow part is
       judged with it, as it was trained; HeteroFL, which judges the whole network only, has it off then.
    3. Channels are cut from chains of layers: networks with shortcuts are refused. Magnitude, which cuts single weights
       from all layers and no statistics, takes any network.
    4. A client of fixed channels (static, ordered) is judged by its own part, else by the whole network.

    Identities: levels of 1 are FedAvg with equal weights, to rounding; what nobody holds is bitwise unchanged.
    """

    lr: LearningRate = 0.05  # learning rate; HeteroFL takes 0.01 to 0.1 with momentum 0.9
    epochs: Positive[int] = 1  # local epochs; HeteroFL takes 5
    batch: int = 10  # batch size, as in HeteroFL
    levels: tuple[float, ...] = (1.0, 0.5)  # widths, dealt to the clients in turn; HeteroFL's go down to 0.0625
    policy: Literal["static", "ordered", "rolling", "random", "magnitude"] = "static"  # HeteroFL; FjORD; FedRolex; ...
    scaler: bool = False  # whether parts put out as much as the whole network; on in HeteroFL and FedRolex
    clip: float | None = None  # bound on the length of the gradient by the part; 1 in HeteroFL

    refuses = {"aggregate": "clients hold different coordinates, so that their replies are not alike"}

    def __post_init__(self):
        Method.__post_init__(self)
        if not self.levels or not all(0 < level <= 1 for level in self.levels):
            raise UsageError(f"model_extraction.levels are {self.levels}; each is a share above 0 and up to 1")
        if self.scaler and self.policy == "magnitude":
            raise UsageError("model_extraction.scaler divides by a part's width, and magnitude cuts no widths")

    def setup(self, server, clients):
        if self.policy != "magnitude":
            channels(server.model, 1.0)  # refuses networks that are no chains
            if server.site.buffers == "local" and len(server.model.buffers) and self.policy != "static":
                raise UsageError(
                    "model_extraction with buffers=local: channels come and go, and while one is away the statistics "
                    "that its client keeps would fade; take policy=static, or buffers=average"
                )

    def round(self, server, cohort):
        draw = server.rng("masks")
        masks = {k: self.mask(server.model, self.level(k), server.round, draw) for k in cohort}
        parts = Each({k: Sparse.of(server.model.flat, mask) for k, mask in masks.items()})
        up = cohort.mean(self.local, part=parts)
        moved = torch.zeros_like(server.model.flat)
        moved[up.delta.index] = up.delta.values
        held = torch.stack([masks[k] for k in cohort if k not in up.missing])
        kept = (held * server.model.flat.square()).sum(1) / server.model.flat.square().sum()
        server.log(coverage=held.sum(0).min(), noise=1 - kept.min())  # Gamma_min and delta^2
        server.model = server.model + Vector(moved, server.model.layout)

    @client
    def local(self, client, part):
        held = mask = torch.zeros(part.size, dtype=torch.bool, device=part.values.device)
        held[part.index] = True
        start = w = Vector(part.dense(), client.layout)
        draw, level = client.rng("widths"), self.level(client.id)
        narrower = [width for width in self.levels if width <= level]
        for batch in client.batches(self.batch, self.epochs):
            if self.policy == "ordered":  # the client draws its width at every step
                level = narrower[int(torch.randint(len(narrower), (), generator=draw))]
                mask = channels(w, level)
            factor = self.factor(w, mask, level)
            used = w * factor
            g = (client.grad(used, batch) * factor).params  # the chain rule: by what is held
            if self.clip is not None:
                g = g * torch.clamp(self.clip / g.norm(), max=1.0)
            w = used.merge(w.params - self.lr * g).where(mask, w)
        return {"delta": Sparse.of((w - start).flat, held)}

    @client
    def predict(self, client, model):
        if self.policy in ("static", "ordered"):
            level = self.level(client.id)
            return model * self.factor(model, channels(model, level), level)
        return model

    def factor(self, v, mask, level):
        """What a part in use is times: 1 where it has coordinates, 1 / level in hidden layers if there is a scaler."""
        factor = v.map(lambda _: mask.to(v.flat.dtype))
        owners = [name.rpartition(".")[0] for name in v if v[name].dim() > 1][:-1]
        if not self.scaler or not owners:
            return factor
        return factor.merge(factor.select(*(f"{owner}.*" for owner in owners)) * (1 / level))

    def level(self, k):
        """The width of client k."""
        return self.levels[k % len(self.levels)]

    def mask(self, model, level, round, draw):
        """The coordinates of a client's part, bool [size]; draws are made for every client, in the cohort's order."""
        if self.policy == "magnitude":
            order = model.params.flat.abs().argsort(descending=True, stable=True)
            mask = torch.ones_like(model.flat, dtype=torch.bool)  # every statistic is in use
            mask[order[math.ceil(level * len(order)) :]] = False
            return mask
        if self.policy == "random":
            return channels(model, level, lambda count: torch.randperm(count, generator=draw))
        if self.policy == "rolling":
            return channels(model, level, lambda count: (torch.arange(count) + round) % count)
        return channels(model, level)
