"""FedKSeed: replay, span, bytes."""

import pytest
import torch
from problems import network, node, ran
from torch.nn import functional as F

from fedloom.errors import UsageError
from fedloom.methods.foundation.fedkseed import FedKSeed, noise
from fedloom.tasks.toy import Toy

LONE = Toy(sizes=(30,))


def up(made, field):
    lines = [
        li for li in made.record.ledger if li["field"] == field and li["direction"] == "up" and li["kind"] == "train"
    ]
    return {li["bytes"] for li in lines}


def test_the_server_rebuilds_the_model_of_a_lone_client():
    method = FedKSeed(steps=12, seeds=5)
    made = ran(method, LONE, rounds=1)
    client, w = node(made.site, 0), made.site.initial.params.flat.double()
    reply = method.local(client, torch.zeros(5), None, made.server.master)
    assert len(reply["index"]) == 12
    for k, g in zip(reply["index"].tolist(), reply["slope"].tolist(), strict=True):
        w = w - method.lr * g * noise(made.server.master, k, w)
    torch.testing.assert_close(made.server.model.flat.double(), w, rtol=1e-5, atol=1e-6)
    back = method.rebuilt(made.server.start, made.server.coefficients.float(), made.server.master)
    assert torch.equal(back.flat, made.server.model.flat)


def test_a_slope_is_the_gradient_along_the_noise():
    method = FedKSeed(steps=1, batch=0, seeds=3)
    made = ran(method, LONE, rounds=1)
    reply = method.local(node(made.site, 0), torch.zeros(3), None, made.server.master)
    client = node(made.site, 0)
    z = noise(made.server.master, int(reply["index"]), made.site.initial.params.flat)
    expected = float(client.grad(client.initial, client.data.all()).params.flat @ z)
    assert float(reply["slope"]) == pytest.approx(expected, rel=2e-2, abs=2e-2)


def test_all_models_lie_in_the_span_of_the_noises():
    steps = []
    for rounds in (1, 2, 3, 4):
        made = ran(FedKSeed(seeds=2, steps=5), Toy(), rounds=rounds)
        steps.append((made.server.model - made.site.initial).flat.double())
    basis = torch.stack([noise(made.server.master, k, steps[0]) for k in range(2)], 1)
    for step in steps:
        inside = basis @ torch.linalg.lstsq(basis, step[:, None]).solution
        assert float((inside[:, 0] - step).norm()) < 1e-5 * float(step.norm())
    assert torch.linalg.matrix_rank(torch.stack(steps), rtol=1e-4) <= 2


def test_bytes_are_4_k_down_and_6_tau_up_whatever_the_model():
    class Large(Toy):
        def network(self):
            return self.build("mlp:500,8")

    method = FedKSeed(lr=1e-4, seeds=4096, steps=200)  # with its own, the large one runs away: to where, rounding says
    small, large = (ran(method, task, rounds=1) for task in (Toy(sizes=(9, 9)), Large(sizes=(9, 9))))
    assert len(large.site.initial) > 50 * len(small.site.initial)
    totals = [made.record.metrics[0]["up_bytes"] + made.record.metrics[0]["down_bytes"] for made in (small, large)]
    assert totals[0] == totals[1]
    a_client = totals[0] / 2
    assert 4 * 4096 + 6 * 200 < a_client < 4 * 4096 + 6 * 200 + 250 < 18_000
    assert up(small, "index") == {next(iter(up(large, "index")))} and next(iter(up(small, "slope"))) < 4 * 200 + 30


def test_pro_draws_what_has_had_large_slopes():
    method = FedKSeed(pro=True, seeds=4)
    even = method.odds(torch.stack([torch.ones(4), torch.ones(4)]))
    torch.testing.assert_close(even, torch.full((4,), 0.25))
    odds = method.odds(torch.tensor([[0.0, 5.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]]))
    assert odds.argmax() == 1 and float(odds.max() / odds.min()) == pytest.approx(2.71828, rel=1e-3)
    made = ran(FedKSeed(pro=True, seeds=4, steps=10), Toy(), rounds=2)
    assert made.server.past[1].sum() == 4 + 2 * 4 * 10


@pytest.mark.parametrize("fields", [{"seeds": 0}, {"eps": 0.0}])
def test_fields_without_a_sense_are_refused(fields):
    with pytest.raises(UsageError, match="fedkseed"):
        FedKSeed(**fields)


def test_clients_count_by_their_samples():
    task, method = Toy(sizes=(10, 90)), FedKSeed(steps=7, seeds=16)
    made = ran(method, task, rounds=1)
    expected = torch.zeros(16, dtype=torch.float64)
    for k, share in enumerate((0.1, 0.9)):
        reply = method.local(node(made.site, k), torch.zeros(16), None, made.server.master)
        expected.index_add_(0, reply["index"].long(), share * reply["slope"].double())
    torch.testing.assert_close(made.server.coefficients, expected)


@pytest.mark.parametrize("eps", [5e-3, 0.6])
def test_slopes_are_central_differences_along_the_way(eps):
    method = FedKSeed(steps=5, batch=0, seeds=3, lr=0.03, eps=eps)
    made = ran(method, LONE, rounds=1)
    client, master = node(made.site, 0), made.server.master
    x, y = client.data.all()
    coefficients = torch.tensor([0.5, -0.2, 0.1])

    def loss(flat):
        w = type(made.site.initial)(flat.float(), made.site.initial.layout)
        return F.cross_entropy(network(made.task, w).eval()(x).double(), y).item()

    flat = made.site.initial.flat.double()
    z = [noise(master, k, flat) for k in range(3)]
    flat = flat - 0.03 * sum(a * one for a, one in zip(coefficients.tolist(), z, strict=True))
    reply = method.local(client, coefficients, None, master)
    for k, slope in zip(reply["index"].tolist(), reply["slope"].tolist(), strict=True):
        g = (loss(flat + eps * z[k]) - loss(flat - eps * z[k])) / (2 * eps)
        assert slope == pytest.approx(g, rel=1e-3, abs=1e-3)
        flat = flat - 0.03 * g * z[k]


def test_seeds_are_drawn_by_the_odds_that_came():
    method, made = FedKSeed(steps=40, seeds=6), ran(FedKSeed(steps=1, seeds=6), LONE, rounds=1)
    odds = torch.tensor([0.0, 0.7, 0.0, 0.0, 0.3, 0.0])
    drawn = method.local(node(made.site, 0), torch.zeros(6), odds, made.server.master)["index"]
    assert set(drawn.tolist()) == {1, 4} and (drawn == 1).sum() > (drawn == 4).sum()
    evenly = method.local(node(made.site, 0), torch.zeros(6), None, made.server.master)["index"]
    assert set(evenly.tolist()) == set(range(6))


def test_pro_remembers_the_lengths_of_slopes_and_scores_their_means():
    method = FedKSeed(pro=True, seeds=4, steps=10, clip=0.4)
    made = ran(method, Toy(), rounds=1)
    sums, numbers = torch.zeros(4), torch.ones(4)
    slopes = []
    for k in range(4):
        reply = method.local(node(made.site, k), torch.zeros(4), torch.full((4,), 0.25), made.server.master)
        for index, slope in zip(reply["index"].tolist(), reply["slope"].tolist(), strict=True):
            slopes.append(slope)
            sums[index] += min(abs(slope), 0.4)
            numbers[index] += 1
    assert min(slopes) < 0 < max(slopes) and max(map(abs, slopes)) > 0.4
    torch.testing.assert_close(made.server.past, torch.stack([sums, numbers]))
    mean = sums / numbers
    scaled = (mean - mean.min()) / (mean.max() - mean.min())
    torch.testing.assert_close(method.odds(made.server.past), scaled.exp() / scaled.exp().sum())
    assert method.odds(torch.tensor([[1.0, 8.0, 0.0, 0.0], [1.0, 16.0, 1.0, 1.0]])).argmax() == 0


class Gap(Toy):
    """One sample of client 0 is not there: what a network says of it is no number."""

    def __init__(self, sizes=(6,)):
        super().__init__(sizes)
        self.x[2] = torch.nan


def test_a_loss_that_is_no_number_skips_its_step():
    method = FedKSeed(steps=6, batch=1, seeds=9)
    made = ran(method, Gap(), rounds=1)
    reply = method.local(node(made.site, 0), torch.zeros(9), None, made.server.master)
    assert len(reply["index"]) == len(reply["slope"]) == 5 and reply["slope"].isfinite().all()
    assert made.server.model.flat.isfinite().all() and not torch.equal(made.server.model.flat, made.site.initial.flat)


def test_coefficients_are_kept_from_round_to_round():
    method = FedKSeed(steps=6, seeds=5)
    one, two = (ran(method, LONE, rounds=rounds) for rounds in (1, 2))
    reply = method.local(node(one.site, 0, round=2), one.server.coefficients.float(), None, one.server.master)
    expected = one.server.coefficients.clone().index_add_(0, reply["index"].long(), reply["slope"].double())
    torch.testing.assert_close(two.server.coefficients, expected)


def test_running_statistics_stay_as_they_were():
    made = ran(FedKSeed(steps=5), Toy(norm=True), rounds=2)
    assert torch.equal(made.server.model.buffers.flat, made.site.initial.buffers.flat)
    assert not torch.equal(made.server.model["body.1.weight"], made.site.initial["body.1.weight"])
