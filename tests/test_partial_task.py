"""Partly labelled data, and views of samples."""

import pytest
import torch

from fedloom import tasks
from fedloom.data.augment import add_noise, cut_out, shift, strong, weak
from fedloom.errors import UsageError
from fedloom.random import stream
from fedloom.runs.spec import Spec


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_labelled_and_other_samples_are_those_of_the_client(share):
    plain, task = tasks.build(Spec(clients=5)), tasks.build(Spec(clients=5, problem=f"partial:{share}"))
    for k in range(5):
        whole, labelled, others = plain.data(k, "train"), task.data(k, "train"), task.data(k, "unlabelled")
        assert len(labelled) == max(1, round(share * len(whole)))
        assert torch.equal(torch.cat([labelled.rows, others.rows]).sort().values, whole.rows)
        assert (others.y == -1).all() and (labelled.y >= 0).all(), "a label that is gone cannot be used"
        assert torch.equal(task.data(k, "test").rows, plain.data(k, "test").rows)
    assert task.offers == {"partial"} and plain.offers == frozenset()
    assert torch.equal(task.global_test().rows, plain.global_test().rows)


def test_other_seeds_label_other_samples():
    one, other = (
        tasks.build(Spec(clients=3, problem="partial:0.2", seed=seed)).data(0, "train").rows for seed in (0, 1)
    )
    assert one.tolist() != other.tolist()


@pytest.mark.parametrize("share", [0, 1.5])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(UsageError, match=f"a share of {share} keeps its labels"):
        tasks.build(Spec(problem=f"partial:{share}"))


def test_a_shift_moves_every_image_by_itself():
    x = torch.zeros(50, 2, 8, 8)
    x[:, :, 4, 4] = 1.0
    moved = shift(x, 4, stream(0, "test"))
    places = {tuple(one[0].nonzero()[0].tolist()) for one in moved}
    assert len(places) > 10 and all(2 <= a <= 6 and 2 <= b <= 6 for a, b in places)
    assert torch.equal(moved[:, 0], moved[:, 1]) and (moved.sum((1, 2, 3)) == 2).all()


def test_a_square_is_cut_out():
    holes = (cut_out(torch.ones(40, 3, 9, 9), stream(0, "test")) == 0)[:, 0]
    assert (holes.sum((1, 2)) == 9).all() and len({tuple(h.flatten().tolist()) for h in holes}) > 5


def test_an_edge_is_repeated_where_an_image_moves_away_from_it():
    x = torch.arange(8.0).expand(200, 1, 8, 8)  # a column's number
    moved = shift(x, 4, stream(0, "test"))
    by = moved[:, 0, 0, 4] - 4
    assert set(by.tolist()) == {-2, -1, 0, 1, 2}
    assert torch.equal(moved[:, 0, 0], (torch.arange(8.0) + by[:, None]).clamp(0, 7))


def test_views_of_images_are_moved_and_the_strong_one_is_disturbed():
    x = torch.zeros(300, 1, 16, 16)
    x[:, :, 8] = 10.0  # a bright row: how far it moves, and how bright it is afterwards
    near, far = (view(x, stream(1, "test")) for view in (weak, strong))
    moved = (near[:, 0].sum(2).argmax(1) - 8).tolist()
    assert set(moved) == set(range(-2, 3)) and set(near.unique().tolist()) == {0.0, 10.0}
    assert set((far[:, 0].sum(2).argmax(1) - 8).tolist()) == set(range(-4, 5))
    bright = far[:, 0].amax((1, 2)) / 10
    assert 0.5 < bright.min() < 0.65 and 1.35 < bright.max() < 1.6, "contrast is between a half and three halves"
    assert ((far == 0).sum((1, 2, 3)) == 25).all(), "a square of 16 / 3 pixels is cut out, all else has noise"
    dark = far[:, 0, :3][far[:, 0, :3] != 0]
    assert float(dark.std()) == pytest.approx(0.2, rel=0.05)


def test_views_of_numbers_have_noise_and_the_strong_one_gaps():
    x = torch.full((400, 50), 3.0)
    near, far = (view(x, stream(1, "test")) - 3 for view in (weak, strong))
    assert float(near.std()) == pytest.approx(0.1, rel=0.05) and float(near.mean()) == pytest.approx(0, abs=0.01)
    gaps = far == -3
    assert float(gaps.double().mean()) == pytest.approx(0.2, abs=0.01)
    assert float(far[~gaps].std()) == pytest.approx(0.4, rel=0.05)


@pytest.mark.parametrize("shape", [(64, 1, 8, 8), (64, 12)])
def test_the_strong_view_is_farther_away(shape):
    x = torch.randn(shape, generator=stream(0, "test"))
    near, far = (view(x, stream(1, "test")) for view in (weak, strong))
    assert near.shape == far.shape == x.shape and not torch.equal(near, x)
    assert (far - x).norm() > (near - x).norm()
    with pytest.raises(UsageError, match="views of text"):
        add_noise(torch.ones(3, 4, dtype=torch.int64), 0.1, stream(0, "test"))
