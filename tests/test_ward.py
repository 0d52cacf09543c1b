"""Ward's clusters, beside scipy's."""

import pytest
import torch

from fedloom.ops.ward import cut, merges
from fedloom.random import stream

hierarchy = pytest.importorskip("scipy.cluster.hierarchy")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(2, 3), (9, 1), (12, 4), (30, 2)])
def test_heights_and_clusters_are_scipys(seed, shape):
    points = torch.randn(*shape, generator=stream(seed, "ward"), dtype=torch.float64)
    linkage = hierarchy.linkage(points.numpy(), method="ward", metric="euclidean")
    found = merges(points)
    assert [at for *_, at in found] == pytest.approx(linkage[:, 2].tolist())
    for height in (0.0, 0.5, 1.0, 2.0, 5.0, float("inf")):
        theirs = hierarchy.fcluster(linkage, height, "distance").tolist()
        mine = cut(found, len(points), height)
        first = {label: theirs.index(label) for label in theirs}  # each called by its first point
        assert mine == [first[label] for label in theirs]


def test_a_point_alone_and_two_in_one_place():
    assert merges(torch.zeros(1, 3)) == [] and cut([], 1, 0.0) == [0]
    assert merges(torch.ones(2, 3)) == [(0, 1, 0.0)] and cut([(0, 1, 0.0)], 2, 0.0) == [0, 0]
