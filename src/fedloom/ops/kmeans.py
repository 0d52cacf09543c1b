"""Points in clusters: k-means, alike on every machine and on any number of cores."""

from __future__ import annotations

import torch
from torch import Tensor


def kmeans(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The cluster of each of the points [N, D], int64 [N]: the best of ten starts; fewer where points coincide."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    seed = int(torch.randint(2**31, (), generator=generator))
    flat = points.detach().cpu().numpy()
    count = min(count, len(torch.unique(points.detach(), dim=0)))
    with threadpool_limits(1):  # more threads may add in another order
        labels = KMeans(count, n_init=10, random_state=seed).fit_predict(flat)
    return torch.from_numpy(labels).long().to(points.device)
