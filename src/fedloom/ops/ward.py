"""Agglomerative clustering by Ward's linkage, without a number of clusters to begin with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merges(points: Tensor) -> list[tuple[int, int, float]]:
    """The merges of points [K, D] in their order: two clusters, each called by its first point, and their height.

    The height of clusters A and B with means a and b is sqrt(2 |A| |B| / (|A| + |B|)) |a - b|, of two points their
    distance; it never falls. Ward: Hierarchical Grouping to Optimize an Objective Function, JASA 1963.
    """
    points = points.double()
    apart = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    apart.fill_diagonal_(math.inf)
    size, found = torch.ones(len(points), dtype=torch.float64, device=points.device), []
    for _ in range(len(points) - 1):
        one, other = sorted(divmod(int(apart.argmin()), len(points)))
        height = apart[one, other].clone()
        # Lance and Williams: the squared height of what is merged and any third cluster.
        third = (size[one] + size) * apart[one] + (size[other] + size) * apart[other] - size * height
        third = third / (size[one] + size[other] + size)
        third[[one, other]] = math.inf
        apart[one], apart[:, one] = third, third
        apart[other], apart[:, other] = math.inf, math.inf
        size[one] += size[other]
        found.append((one, other, math.sqrt(max(0.0, float(height)))))
    return found


def cut(merged: list[tuple[int, int, float]], points: int, height: float) -> list[int]:
    """The cluster of each of so many points, called by its first point, after all merges up to a height."""
    label = [*range(points)]
    for one, other, at in merged:
        if at <= height:
            label = [one if mine == other else mine for mine in label]
    return label
