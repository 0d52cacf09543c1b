"""FedStale and FedVARP: what the memory adds, that it is affine in beta, and without bias."""

from itertools import product

import pytest
import torch
from problems import ran

from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.participate._intervals import Intervals
from fedloom.methods.participate.fedstale import FedStale
from fedloom.methods.participate.fedvarp import FedVARP
from fedloom.tasks.toy import Toy

DRIFT = {"lr": 0.1, "epochs": 2}


@pytest.mark.parametrize("method", [FedStale(**DRIFT), FedStale(beta=0.0, **DRIFT), FedVARP(**DRIFT)])
def test_everybody_in_every_round_is_fedavg(method):
    task = Toy(norm=True)
    assert torch.allclose(
        ran(method, task, 3).server.model.flat, ran(FedAvg(**DRIFT), task, 3).server.model.flat, rtol=0, atol=5e-6
    )


@pytest.mark.parametrize("rates", ["estimated", "cohort"])
def test_a_step_is_affine_in_beta(rates):
    """After one common round with everybody, in which the memory counts for nothing, two clients come."""
    task = Toy()

    def ended(beta):
        settings = {"availability": "bernoulli:0.5,1.0", "seed": 1}
        return ran(FedStale(beta=beta, rates=rates, **DRIFT), task, 2, **settings)

    made = {beta: ended(beta) for beta in (0.0, 0.4, 1.0)}
    ends = {beta: one.server.model.flat for beta, one in made.items()}
    assert made[0.0].record.metrics[1]["replies"] < 4
    assert torch.allclose(ends[0.4], 0.6 * ends[0.0] + 0.4 * ends[1.0], rtol=0, atol=1e-6)
    assert (ends[0.0] - ends[1.0]).norm() > 1e-3


def test_fedvarp_step_by_hand():
    task = Toy()
    before, after = (ran(FedVARP(**DRIFT), task, r, cohort=2) for r in (3, 4))
    kept, new = before.server.stale, after.server.stale
    came = [k for k in new if k not in kept or not torch.equal(new[k].flat, kept[k].flat)]
    assert len(came) == 2 and set(kept) - set(came)
    share = before.server.share
    zero = before.server.model.zeros_like()
    step = sum((share[k] * h for k, h in kept.items()), zero)
    for k in came:
        step = step + share[k] * 4 / 2 * (new[k] - kept.get(k, zero))
    assert torch.allclose((after.server.model - before.server.model).flat, step.flat, rtol=0, atol=1e-6)


def test_the_stale_part_has_mean_zero_over_who_comes():
    """The formula of the docstring, enumerated over all sets of three clients."""
    rates, alpha = [1.0, 0.5, 0.2], [0.5, 0.3, 0.2]
    h, delta = torch.tensor([1.0, -2.0, 4.0]), torch.tensor([3.0, 1.0, -1.0])
    fresh = stale = 0.0
    for came in product([False, True], repeat=3):
        chance = torch.tensor([p if c else 1 - p for p, c in zip(rates, came, strict=True)]).prod()
        a = torch.tensor([c * w / p for c, w, p in zip(came, alpha, rates, strict=True)])
        fresh += chance * (a * delta).sum()
        stale += chance * ((torch.tensor(alpha) * h).sum() - (a * h).sum())
    assert fresh.item() == pytest.approx((torch.tensor(alpha) * delta).sum().item(), abs=1e-6)
    assert stale.item() == pytest.approx(0.0, abs=1e-6)


def test_a_round_in_which_nobody_comes_leaves_everything():
    made = ran(FedStale(), Toy(), 2, lost=1.0)
    assert torch.equal(made.server.model.flat, made.site.initial.flat) and made.server.stale == {}


@pytest.mark.parametrize(("beta", "rate"), [(0.5, 0.7), (1.0, 1.0), (0.0, 1.3)])
def test_a_later_step_by_hand_with_estimated_rates(beta, rate):
    """fresh + beta stale, with one over FedAU's mean interval for 1 / p, as it was before this round."""
    fields = {"beta": beta, "server_lr": rate, **DRIFT}
    before, after = (ran(FedStale(**fields), Toy(), r, cohort=2, seed=3) for r in (6, 7))
    kept, new = before.server.stale, after.server.stale
    came = [k for k in new if k not in kept or not torch.equal(new[k].flat, kept[k].flat)]
    assert len(came) == 2 and set(kept) - set(came), "somebody stays away, and is remembered"
    assert all(torch.equal(new[k].flat, kept[k].flat) for k in set(kept) - set(came))
    sizes = torch.tensor([30.0, 20.0, 25.0, 35.0])
    share = (sizes / sizes.sum()).tolist()
    over = Intervals(*before.server.intervals).mean.tolist()
    assert any(over[k] > 1 for k in came)
    zero = before.server.model.params.zeros_like()
    fresh = sum((share[k] * over[k] * new[k] for k in came), zero)
    stale = sum((share[k] * h for k, h in kept.items()), zero)
    stale = stale - sum((share[k] * over[k] * kept.get(k, zero) for k in came), zero)
    step = rate * (fresh + beta * stale)
    assert torch.allclose((after.server.model - before.server.model).flat, step.flat, rtol=0, atol=2e-6)
