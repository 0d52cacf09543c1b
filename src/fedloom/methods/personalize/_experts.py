"""A mixture of experts and the gate that weighs them, on features of a common expert."""

import torch
from torch import nn
from torch.nn import functional as F


class Gate(nn.Module):
    """From the common expert's features [B, D] to one score for each expert [B, M]."""

    def __init__(self, width, hidden, experts):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, experts))

    def forward(self, features):
        return self.layers(features)


def name(expert):
    """What an expert is called among the networks of a loss."""
    return f"expert{expert}"


def number(called):
    """Which expert is called so."""
    return int(called.removeprefix("expert"))


def experts_of(nets):
    """The names of the experts among the networks of a loss."""
    return [one for one in nets if one.startswith("expert")]


def features(common, x):
    """What the common expert, which is frozen and in evaluation mode, makes of inputs: features [B, D]."""
    return common.eval().get_submodule("body")(x).detach()


def mixed(nets, batch):
    """The negative log of the chance that the experts, weighed by the gate, give the label."""
    names = experts_of(nets)
    scores = nets["gate"](features(nets["common"], batch.x))[:, [number(one) for one in names]]
    logs = torch.stack([nets[one](batch.x).log_softmax(1) for one in names], 1)
    return F.nll_loss((scores.log_softmax(1)[:, :, None] + logs).logsumexp(1), batch.y)


def routed(node, experts, gate, common):
    """The function from inputs to the scores of the expert that the gate gives the largest score."""
    nets, gate, common = [node.net(w) for w in experts], node.net(gate), node.net(common)

    def scores(x):
        chosen = gate(features(common, x)).argmax(1)
        outputs = torch.stack([net(x) for net in nets])
        return outputs[chosen, torch.arange(len(x), device=x.device)]

    return scores


def unlike(histograms, count):
    """Up to `count` clients, of label shares [C] by id, that overlap least with each other: client -> its place."""
    clients = sorted(histograms)
    found = [max(clients, key=lambda k: (float(histograms[k].max()), -k))]
    while len(found) < min(count, len(clients)):
        overlap = {
            k: max(float(torch.minimum(histograms[k], histograms[f]).sum()) for f in found)
            for k in clients
            if k not in found
        }
        found.append(min(overlap, key=lambda k: (overlap[k], k)))
    return {k: place for place, k in enumerate(found)}
