"""Model extraction."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from manyhands.cohort import Each
from manyhands.errors import UsageError
from manyhands.message import Sparse
from manyhands.method import Method, client
from manyhands.task import Data
from manyhands.vector import Vector


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
    1. A part is trained inside the full network, whose other coordinates are zero: for channels with ReLU that is the
       narrow network exactly. It costs the full network's time; a message has the part only, and a bit a coordinate.
    2. No masked logits, no statistics of BatchNorm recomputed on all data, and the head's rows count for all, unlike
       HeteroFL; no self-distillation, unlike FjORD. HeteroFL's scaler is an option: it divides what a part's hidden
       layers put out by the part's width, as inverted dropout does, so that the whole network fits.
    3. Networks are chains of layers: those with shortcuts are refused.

    Identities: levels of 1 are FedAvg with equal weights bitwise; what nobody holds is bitwise unchanged.
    """

    lr: float = 0.05  # learning rate; HeteroFL takes 0.01 to 0.1 with momentum 0.9
    epochs: int = 1  # local epochs; HeteroFL takes 5
    batch: int = 10  # batch size, as in HeteroFL
    levels: tuple[float, ...] = (1.0, 0.5)  # widths, dealt to the clients in turn; HeteroFL's go down to 0.0625
    policy: Literal["static", "ordered", "rolling", "random", "magnitude"] = "static"  # HeteroFL; FjORD; FedRolex; ...
    scaler: bool = False  # whether parts put out as much as the whole network; on in HeteroFL and FedRolex
    clip: float | None = None  # bound on the gradient's length; 1 in HeteroFL

    ranges = {"lr": (1e-3, 1.0, "log")}

    def __post_init__(self):
        Method.__post_init__(self)
        if not self.levels or not all(0 < level <= 1 for level in self.levels):
            raise UsageError(f"model_extraction.levels are {self.levels}; each is a share above 0 and up to 1")

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
        mask = torch.zeros(part.size, dtype=torch.bool, device=part.values.device)
        mask[part.index] = True
        start = w = Vector(part.dense(), client.layout)
        draw = client.rng("widths")
        narrower = [level for level in self.levels if level <= self.level(client.id)]
        for batch in client.batches(self.batch, self.epochs):
            now, level = mask, self.level(client.id)
            if self.policy == "ordered":  # the client draws its width at every step
                level = narrower[int(torch.randint(len(narrower), (), generator=draw))]
                now = channels(w, level)
            part = w.where(now)
            used = self.scaled(part, level)
            moved, _ = client.descend(used, lr=self.lr, steps=1, clip=self.clip, data=Data(*batch))
            if used is not part:  # the gradient by the part is the scaled one by what was used
                moved = part + self.scaled(moved - used, level)
            w = moved.where(now, w)
        return {"delta": Sparse.of((w - start).flat, mask)}

    @client
    def predict(self, client, model):
        if self.policy in ("static", "ordered"):
            level = self.level(client.id)
            return self.scaled(model.where(channels(model, level)), level)
        return model

    def scaled(self, v, level):
        """A part of width `level` in use: its hidden layers put out 1 / level times as much if there is a scaler."""
        owners = [name.rpartition(".")[0] for name in v if v[name].dim() > 1][:-1]
        if not self.scaler or level == 1 or not owners:
            return v
        return v.merge(v.select(*(f"{owner}.*" for owner in owners)) * (1 / level))

    def level(self, k):
        """The width of client k."""
        return self.levels[k % len(self.levels)]

    def mask(self, model, level, round, draw):
        """The coordinates of a client's part, bool [size]; draws are made for every client, in the cohort's order."""
        if self.policy == "magnitude":
            sizes = model.flat.abs()
            return sizes >= sizes.topk(math.ceil(level * len(sizes))).values[-1]
        if self.policy == "random":
            return channels(model, level, lambda count: torch.randperm(count, generator=draw))
        if self.policy == "rolling":
            return channels(model, level, lambda count: (torch.arange(count) + round) % count)
        return channels(model, level)


def channels(model, level, order=torch.arange):
    """The coordinates of a network of width `level`, bool [size]: the first channels of every layer in an `order`.

    A layer's inputs are the outputs chosen in the layer before; all of the data come in, all classes go out.
    """
    layout = model.layout
    mask = torch.zeros(layout.size, dtype=torch.bool)
    entries = dict(zip(layout.names, layout.views(mask), strict=True))
    last = [name for name, entry in entries.items() if entry.dim() > 1][-1]
    outputs, owners = torch.ones(0, dtype=torch.bool), {}
    for name, entry in entries.items():
        owner = name.rpartition(".")[0]
        if entry.dim() > 1:
            inputs = outputs if len(outputs) else torch.ones(entry.shape[1], dtype=torch.bool)
            if entry.shape[1] % len(inputs):
                raise UsageError(
                    f"{name} {list(entry.shape)} does not follow {len(inputs)} outputs: no chain of layers"
                )
            inputs = inputs.repeat_interleave(entry.shape[1] // len(inputs))  # a channel is a block once it is flat
            count = len(entry) if name == last else math.ceil(level * len(entry))
            outputs = torch.zeros(len(entry), dtype=torch.bool)
            outputs[order(len(entry))[:count]] = True
            entry[...] = (outputs[:, None] & inputs).view(*outputs.shape, *inputs.shape, *[1] * (entry.dim() - 2))
        else:
            its = owners.get(owner, outputs)  # statistics come after all weights
            if len(entry) != len(its):
                raise UsageError(f"{name} {list(entry.shape)} does not belong to a layer of {len(its)} outputs")
            entry[...] = its
        owners.setdefault(owner, outputs)
    return mask.to(model.flat.device, non_blocking=True)
