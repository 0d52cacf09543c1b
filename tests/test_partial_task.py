"""Partly labelled data, and views of samples."""

import pytest
import torch

from manyhands import tasks
from manyhands.data.augment import cut, noisy, shifted, strong, weak
from manyhands.errors import UsageError
from manyhands.random import stream
from manyhands.spec import Spec


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
    moved = shifted(x, 4, stream(0, "test"))
    places = {tuple(one[0].nonzero()[0].tolist()) for one in moved}
    assert len(places) > 10 and all(2 <= a <= 6 and 2 <= b <= 6 for a, b in places)
    assert torch.equal(moved[:, 0], moved[:, 1]) and (moved.sum((1, 2, 3)) == 2).all()


def test_a_square_is_cut_out():
    holes = (cut(torch.ones(40, 3, 9, 9), stream(0, "test")) == 0)[:, 0]
    assert (holes.sum((1, 2)) == 9).all() and len({tuple(h.flatten().tolist()) for h in holes}) > 5


@pytest.mark.parametrize("shape", [(64, 1, 8, 8), (64, 12)])
def test_the_strong_view_is_farther_away(shape):
    x = torch.randn(shape, generator=stream(0, "test"))
    near, far = (view(x, stream(1, "test")) for view in (weak, strong))
    assert near.shape == far.shape == x.shape and not torch.equal(near, x)
    assert (far - x).norm() > 1.3 * (near - x).norm() or len(shape) == 4
    with pytest.raises(UsageError, match="views of text"):
        noisy(torch.ones(3, 4, dtype=torch.int64), 0.1, stream(0, "test"))
