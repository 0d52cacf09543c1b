"""FedRef: which means pull the model how much, and when."""

import numpy as np
import pytest
import torch
from problems import Quadratics, ran

from fedloom.errors import UsageError
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.fedref import FedRef
from fedloom.tasks.toy import Toy


def by_hand(task, rounds, lr, steps, p, last, ref):
    """The models and the means of rounds, newest last; clients of unequal sizes descend on all of their rows."""
    w, means, models = np.zeros(2), [], []
    shares = task.sizes.numpy() / task.sizes.sum().item()
    for _ in range(rounds):
        reached = []
        for k in range(2):
            v = w
            for _ in range(steps):
                v = v - lr * task.gradient(k, torch.from_numpy(v)).numpy()
            reached.append(v)
        means.append(shares @ np.stack(reached))
        w = means[-1]
        if len(means) > p:
            ages = np.arange(p)
            r = sum((p - j) / (p * (p + 1) / 2) * means[-1 - j] for j in ages)
            w = (means[-1] + last * means[-2] + ref * r) / (1 + last + ref)
        models.append(w)
    return models, means


@pytest.mark.parametrize(("p", "last", "ref"), [(3, 0.1, 0.4), (2, 0.0, 0.7), (2, 0.5, 0.0), (1, 0.3, 0.2)])
def test_the_model_is_drawn_toward_the_mean_before_and_the_weighted_means(p, last, ref):
    task = Quadratics()
    models, means = by_hand(task, 6, 0.05, 2, p, last, ref)
    made = ran(FedRef(lr=0.05, epochs=2, batch=0, window=p, lam_last=last, lam_ref=ref), task, rounds=6)
    assert made.server.model.flat.numpy() == pytest.approx(models[-1], abs=1e-12)
    assert len(made.server.means) == p + 1, "no more is kept, however many rounds there were"
    for kept, mean in zip(made.server.means, reversed(means), strict=False):
        assert kept.flat.numpy() == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize(("settings", "rounds"), [({"lam_last": 0.0, "lam_ref": 0.0}, 6), ({"window": 4}, 4)])
@pytest.mark.parametrize("world", [{}, {"lost": 0.4}, {"cohort": 2}])
def test_without_a_pull_and_until_there_are_enough_means_it_is_fedavg(settings, rounds, world):
    here, there = (ran(m, Toy(norm=True), rounds, **world) for m in (FedRef(**settings), FedAvg()))
    assert torch.equal(here.server.model.flat, there.server.model.flat)
    more = ran(FedRef(**{**settings, "lam_ref": 0.5}), Toy(norm=True), rounds + 1, **world)
    plain = ran(FedAvg(), Toy(norm=True), rounds + 1, **world)
    assert not torch.equal(more.server.model.flat, plain.server.model.flat)


def test_the_model_lies_between_the_means():
    made = ran(FedRef(window=2, lam_last=0.3, lam_ref=0.9), Toy(), 5)
    means = torch.stack([one.flat for one in made.server.means])
    assert (made.server.model.flat <= means.amax(0) + 1e-6).all()
    assert (made.server.model.flat >= means.amin(0) - 1e-6).all()


def test_with_an_endless_pull_it_is_the_reference():
    made = ran(FedRef(window=2, lam_last=0.0, lam_ref=1e9), Quadratics(), 4)
    newest, before, _ = made.server.means
    assert made.server.model.flat.numpy() == pytest.approx((2 * newest.flat + before.flat).numpy() / 3, abs=1e-7)


def test_running_statistics_are_those_of_the_mean():
    made = ran(FedRef(window=1, lam_ref=0.9), Toy(norm=True), 3)
    assert torch.equal(made.server.model.buffers.flat, made.server.means[0].buffers.flat)
    assert not torch.equal(made.server.model.params.flat, made.server.means[0].params.flat)


@pytest.mark.parametrize("field", [{"window": 0}, {"lam_last": -0.1}, {"lam_ref": -1.0}])
def test_what_makes_no_sense_is_refused(field):
    name = next(iter(field))
    with pytest.raises(UsageError, match=rf"fedref\.{name} is "):
        FedRef(**field)
