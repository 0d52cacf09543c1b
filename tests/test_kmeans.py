"""Clusters of points."""

import torch

from manyhands.kmeans import kmeans
from manyhands.random import stream


def test_clouds_that_lie_apart_are_found_whatever_their_order():
    truth = torch.arange(90) % 3
    points = 10.0 * torch.eye(3, 5)[truth] + 0.1 * torch.randn(90, 5, generator=stream(0, "test"))
    found = kmeans(points, 3, stream(1, "test"))
    assert found.dtype == torch.int64
    table = torch.nn.functional.one_hot(truth).T @ torch.nn.functional.one_hot(found)
    assert sorted(table.flatten().tolist()) == [0] * 6 + [30] * 3
    order = torch.randperm(90, generator=stream(2, "test"))
    again = kmeans(points[order], 3, stream(1, "test"))
    assert len(set(zip(found[order].tolist(), again.tolist(), strict=True))) == 3


def test_points_that_coincide_make_fewer_clusters():
    points = torch.tensor([[0.0], [0.0], [1.0], [1.0], [1.0]])
    assert len(kmeans(points, 4, stream(0, "test")).unique()) == 2
    assert kmeans(torch.zeros(3, 2), 3, stream(0, "test")).tolist() == [0, 0, 0]
