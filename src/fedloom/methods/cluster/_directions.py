"""How far apart the directions of clients' updates are, and clusters of them."""

import math

import torch
from torch.nn import functional as F


def directions(replies):
    """The updates without running statistics, double precision [n, D]."""
    return torch.stack([up.delta.params.flat for up in replies]).double()


def distances(rows):
    """The cosine distances [n, n] of rows [n, D]: 0 on the diagonal, 1 from a row of zeros."""
    unit = F.normalize(rows, dim=1)
    return (1 - unit @ unit.T).clamp(0, 2).fill_diagonal_(0)


def temperature(apart):
    """T: 0 if all updates have one direction, 1 if all were opposite."""
    n = len(apart)
    return float(apart.norm()) / math.sqrt(4 * n * (n - 1))


def joined(labels, apart):
    """The labels [n], numbered from 0, with each noise point (-1) in the cluster that is nearest by mean distance."""
    found = labels[labels >= 0].unique()
    if not len(found):
        return torch.zeros_like(labels)
    to_each = torch.stack([apart[:, labels == c].mean(1) for c in found.tolist()], dim=1)  # [n, C]
    return torch.where(labels < 0, to_each.argmin(1), torch.searchsorted(found, labels))
