"""Clusters of points."""

import torch

from fedloom.ops.kmeans import kmeans
from fedloom.random import stream


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


def test_the_best_of_many_starts_and_other_streams_start_elsewhere():
    truth = torch.arange(160) % 8
    centres = 3.0 * torch.randn(8, 2, generator=stream(4, "test"))
    points = centres[truth] + 0.3 * torch.randn(160, 2, generator=stream(5, "test"))

    def spread(found):
        return float(sum((points[found == c] - points[found == c].mean(0)).square().sum() for c in found.unique()))

    least = spread(truth)
    assert all(spread(kmeans(points, 8, stream(seed, "starts"))) < 1.01 * least for seed in range(12))
    orders = {tuple(kmeans(points, 8, stream(seed, "starts")).tolist()) for seed in range(4)}
    assert len(orders) > 1


def test_points_that_coincide_are_counted_as_points():
    points = torch.tensor([[0.0, 5.0], [5.0, 0.0], [0.0, 5.0]])
    assert kmeans(points, 3, stream(0, "test")).unique().tolist() == [0, 1]
    square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    assert len(kmeans(square, 4, stream(0, "test")).unique()) == 4
