"""Differential privacy: clipping, noise, the budget, and what voids it."""

import math

import dp_accounting
import pytest
import torch
from problems import node, ran

from manyhands.boundary.privacy import accountant
from manyhands.boundary.privacy.client_level import CLIP, Clipping
from manyhands.boundary.privacy.local import Noising
from manyhands.boundary.privacy.sample_level import Guard, per_sample
from manyhands.engines import Call
from manyhands.errors import RunError, UsageError
from manyhands.method import build
from manyhands.methods.optimize.fedavg import FedAvg
from manyhands.methods.optimize.scaffold import Scaffold
from manyhands.task import Data
from manyhands.tasks.toy import Toy
from manyhands.testing import Lab, difference, trace

CALL = Call("mean", "local", (0,), {}, {}, "train", 1, 0)
EQUAL = Toy(sizes=(20,) * 6)


def sent(layer, client, reply, **message):
    return layer.around(client, CALL, message, lambda: dict(reply))


@pytest.mark.parametrize("scale", [0.01, 1.0, 50.0])
def test_private_fields_are_clipped_together(scale):
    client = node(ran(FedAvg(), Toy(), rounds=1).site, 0)
    one = client.initial * scale
    reply = {"delta": one, "shift": torch.full((4,), scale), "n": 9}
    out = sent(Clipping(("delta", "shift"), adaptive=True), client, reply, _clip=0.7)
    before = math.sqrt(float(one.norm()) ** 2 + 4 * scale**2)
    after = math.sqrt(float(out["delta"].norm()) ** 2 + float(out["shift"].square().sum()))
    assert after <= 0.7 or after == pytest.approx(before)
    assert after == pytest.approx(min(before, 0.7), rel=1e-5) and "n" not in out
    torch.testing.assert_close(out["delta"].flat * before, one.flat * after)
    assert out["within"] == float(before <= 0.7)


def test_without_noise_and_with_a_wide_bound_it_is_the_plain_mean():
    private = ran(FedAvg(), EQUAL, rounds=3, dp="client:noise=0,clip=1e6")
    plain = ran(FedAvg(), EQUAL, rounds=3)
    torch.testing.assert_close(private.server.model.flat, plain.server.model.flat, rtol=1e-5, atol=1e-6)
    narrow = ran(FedAvg(), EQUAL, rounds=1, dp="client:noise=0,clip=0.001")
    assert float((narrow.server.model - narrow.site.initial).norm()) <= 0.001


def test_the_noise_on_the_sum_has_the_stated_deviation():
    method, z, bound = FedAvg(lr=1e-9), 3.0, 0.5
    steps = [
        (made := ran(method, EQUAL, rounds=1, seed=seed, dp=f"client:noise={z},clip={bound}")).server.model.flat
        - made.site.initial.flat
        for seed in range(8)
    ]
    noise = torch.cat(steps)
    assert float(noise.std()) == pytest.approx(z * bound / 6, rel=0.05)
    assert abs(float(noise.mean())) < 4 * z * bound / 6 / len(noise) ** 0.5


@pytest.mark.parametrize(
    ("settings", "event", "relation"),
    [
        ({}, lambda z: dp_accounting.GaussianDpEvent(z), "ADD_OR_REMOVE_ONE"),
        (
            {"cohort": 3, "participation": "poisson"},
            lambda z: dp_accounting.PoissonSampledDpEvent(0.5, dp_accounting.GaussianDpEvent(z)),
            "ADD_OR_REMOVE_ONE",
        ),
        (
            {"cohort": 3},
            lambda z: dp_accounting.SampledWithoutReplacementDpEvent(6, 3, dp_accounting.GaussianDpEvent(z / 2)),
            "REPLACE_ONE",
        ),
    ],
)
def test_epsilon_is_what_dp_accounting_says_of_the_same_events(settings, event, relation):
    made = ran(FedAvg(), EQUAL, rounds=5, dp="client:noise=1.3,clip=1,delta=1e-4", **settings)
    accountant_ = dp_accounting.rdp.RdpAccountant(
        list(accountant.ORDERS), getattr(dp_accounting.NeighboringRelation, relation)
    )
    rounds = sum(row["replies"] > 0 for row in made.record.metrics)  # nobody was drawn: nothing was released
    accountant_.compose(event(1.3), rounds)
    expected = accountant_.get_epsilon(1e-4)
    assert made.record.metrics[-1].get("dp/epsilon", expected) == pytest.approx(expected)
    assert f"epsilon {expected:.3g} at delta 0.0001" in made.manifest["dp"][0]


def test_noise_is_calibrated_to_the_budget_and_the_run_ends_before_it_is_exceeded():
    made = ran(FedAvg(), EQUAL, rounds=4, dp="client:noise=auto,clip=1,epsilon=6")
    assert len(made.record.metrics) == 4 and 5.9 < made.record.metrics[-1]["dp/epsilon"] <= 6
    short = ran(FedAvg(), EQUAL, rounds=50, dp="client:noise=2,clip=1,epsilon=6")
    spent = [row["dp/epsilon"] for row in short.record.metrics]
    assert len(spent) < 50 and spent[-1] <= 6 and "the privacy budget" in short.manifest["stopped_because"]
    one_more = accountant.epsilon(2.0, {1: len(spent) + 1}, 1e-5, "none", 6, 6)
    assert one_more > 6


def test_two_sums_of_a_round_count_twice():
    once = accountant.epsilon(1.5, {1: 4}, 1e-5, "poisson", 10, 100)
    twice = accountant.epsilon(1.5, {2: 4}, 1e-5, "poisson", 10, 100)
    assert twice > 1.2 * once
    assert (
        accountant.epsilon(1.5, {}, 1e-5, "none", 1, 1) == 0
        and accountant.epsilon(0, {1: 1}, 1e-5, "none", 1, 1) == math.inf
    )


def test_an_adaptive_bound_moves_to_the_quantile():
    made = ran(FedAvg(), Toy(sizes=(20,) * 30), rounds=40, dp="client:noise=0,clip=adaptive,quantile=0.5")
    lengths = torch.tensor(
        [
            float(
                (
                    node(made.site, k, 41).descend(made.server.model, lr=0.05, epochs=1, batch=10)[0]
                    - made.server.model
                ).norm()
            )
            for k in range(30)
        ]
    )
    assert 0.2 < float((lengths <= made.record.metrics[-1]["dp/clip"]).double().mean()) < 0.8


def test_what_is_not_declared_voids_the_guarantee_and_an_epsilon_is_refused():
    voided = ran(build("fednova"), Toy(), rounds=1, dp="client:noise=1") if build("fednova").private else None
    made = ran(Telling(), Toy(), rounds=1, dp="client:noise=1,clip=1")
    assert made.manifest["dp"] == [
        "No differential privacy: no guarantee, since local.secret leaves the clients unprotected."
    ]
    with pytest.raises(RunError, match=r"epsilon=3 was asked for, but local.secret leaves the clients unprotected"):
        ran(Telling(), Toy(), rounds=1, dp="client:noise=1,clip=1,epsilon=3")
    assert voided is None or voided.manifest["dp"]


class Telling(FedAvg):
    """Sends something that it does not declare."""

    def local(self, client, model):
        return {**FedAvg.local(self, client, model), "secret": float(client.data.x.mean())}

    local.__client__ = True


@pytest.mark.parametrize(
    ("dp", "settings", "complaint"),
    [
        ("client:noise=1", {"aggregate": "median"}, r"dp=client:... does not go with aggregate=median"),
        ("client:noise=1", {"compress": "topk:0.1"}, r"does not go with compress=topk:0.1"),
        ("clients", {}, r"unknown level of privacy 'clients'.*did you mean 'client'"),
        ("client:nois=1", {}, r"unexpected keyword argument 'nois'"),
        ("client:clip=-1", {}, r"clip is -1; expected a number above 0"),
        ("client:noise=auto", {}, r"noise=auto needs epsilon"),
        ("client:delta=2", {}, r"delta is 2; expected a probability"),
        ("local:laplace", {}, r"local privacy needs epsilon"),
        ("local:laplce,epsilon=1", {}, r"unknown mechanism 'laplce'"),
    ],
)
def test_what_makes_no_sense_is_refused(dp, settings, complaint):
    with pytest.raises(UsageError, match=complaint):
        ran(FedAvg(), Toy(), rounds=1, dp=dp, **settings)
    with pytest.raises(UsageError, match="local declares no reply field as private"):
        ran(build("local"), Toy(), rounds=1, dp="client:noise=1")


@pytest.mark.parametrize(
    "dp", ["client:noise=0.5,clip=adaptive", "sample:noise=0.5,clip=1", "local:laplace,epsilon=50,clip=2"]
)
@pytest.mark.parametrize("engine", ["loopback", "pool"])
def test_every_engine_gives_the_same_bits(dp, engine):
    lab = Lab(Scaffold())
    serial = trace(lab.experiment(dp=dp))
    other = trace(
        lab.experiment(dp=dp, engine=None, **{"workers": 2} if engine == "pool" else {})
        if engine == "serial"
        else _on(lab, engine, dp)
    )
    assert difference(serial, other) is None


def _on(lab, engine, dp):
    from manyhands.engines import build as build_engine

    return lab.experiment(engine=build_engine(engine, 2 if engine == "pool" else 0), dp=dp)


@pytest.mark.parametrize("dp", ["client:noise=1,clip=adaptive", "sample:noise=1", "local:gaussian,epsilon=5"])
def test_a_resumed_run_goes_on_with_its_budget(dp, tmp_path):
    import manyhands

    whole = manyhands.run(FedAvg(), EQUAL, rounds=3, dp=dp, report=False, out=tmp_path / "whole")
    manyhands.run(FedAvg(), EQUAL, rounds=2, dp=dp, report=False, out=tmp_path / "part")
    spec = tmp_path / "part" / "spec.yaml"
    spec.write_text(spec.read_text().replace("rounds: 2", "rounds: 3"))
    again = manyhands.resume(tmp_path / "part", EQUAL, report=False)
    assert again.metrics[-1].get("dp/epsilon") == whole.metrics[-1].get("dp/epsilon")
    assert torch.equal(again.model.flat, whole.model.flat) and again.manifest["dp"] == whole.manifest["dp"]


def test_per_sample_gradients_are_those_of_batches_of_one():
    client = node(ran(FedAvg(), Toy(), rounds=1).site, 0)
    net, batch = client.site.bench.net.train(), client.data.all()
    params = [p.requires_grad_() for p in client.site.bench.params]
    value, each = per_sample(net, params, client.task.loss, batch)
    torch.testing.assert_close(value, client.task.loss(net, batch).detach())
    for i in (0, 7, 29):
        one = Data(batch.x[i : i + 1], batch.y[i : i + 1]).all()
        for found, expected in zip(each, torch.autograd.grad(client.task.loss(net, one), params), strict=True):
            torch.testing.assert_close(found[i], expected)
    assert not net._forward_hooks and all(p.grad is None for p in params)


def test_a_guarded_gradient_is_clipped_by_sample_and_batches_are_poisson():
    client = node(ran(FedAvg(), Toy(sizes=(40,)), rounds=1).site, 0)
    client.guard = Guard(noise=0.0, clip=0.01)
    sizes = [len(batch) for _ in range(100) for batch in client.batches(10, epochs=1)]
    assert len(sizes) == 400 and len(set(sizes)) > 8 and sum(sizes) / 400 == pytest.approx(10, rel=0.1)
    batch = next(client.batches(10))
    g = client.grad(client.initial, batch)
    assert 0 < float(g.norm()) <= 0.01 * len(batch) / 10 + 1e-6
    client.guard = Guard(noise=2.0, clip=0.5)
    empty = Data(client.data.inputs[:0], client.data.labels[:0]).all()
    noise = torch.cat([client.grad(client.initial, empty).flat for _ in range(30)])
    assert float(noise.std()) == pytest.approx(2.0 * 0.5 / 10, rel=0.05)


def test_sample_level_epsilon_is_dp_accountings_of_the_steps_taken():
    made = ran(FedAvg(), EQUAL, rounds=3, dp="sample:noise=1.1,clip=1")
    independent = dp_accounting.rdp.RdpAccountant(list(accountant.ORDERS))
    event = dp_accounting.PoissonSampledDpEvent(0.5, dp_accounting.GaussianDpEvent(1.1))
    independent.compose(event, 3 * 2)
    assert f"level of samples: epsilon {independent.get_epsilon(1e-5):.3g}" in made.manifest["dp"][0]
    assert made.record.metrics[-1]["gradient_steps"] == 12


def test_batch_norm_is_refused_with_opacus_words():
    with pytest.raises(RunError, match="BatchNorm cannot support training with differential privacy"):
        ran(FedAvg(), Toy(norm=True), rounds=1, dp="sample:noise=1")


@pytest.mark.parametrize("mechanism", ["laplace", "gaussian"])
def test_local_noise_has_the_stated_scale(mechanism):
    client = node(ran(FedAvg(), Toy(), rounds=1).site, 0)
    layer = Noising(("delta",), mechanism, 0.5, 3.0)
    drawn = torch.cat([sent(layer, client, {"delta": torch.zeros(2000)})["delta"] for _ in range(10)])
    assert float(drawn.std()) == pytest.approx(3.0 * (2**0.5 if mechanism == "laplace" else 1), rel=0.05)
    norm = 1 if mechanism == "laplace" else 2
    clipped = sent(Noising(("delta",), mechanism, 0.5, 0.0), client, {"delta": torch.ones(50)})["delta"]
    assert float(clipped.norm(norm)) == pytest.approx(0.5, rel=1e-4) and float(clipped.norm(norm)) <= 0.5


def test_local_privacy_adds_up_over_the_calls():
    made = ran(FedAvg(), EQUAL, rounds=4, dp="local:laplace,epsilon=0.5,clip=1")
    assert made.record.metrics[-1]["dp/epsilon"] == 2.0
    ended = ran(FedAvg(), EQUAL, rounds=9, dp="local:laplace,epsilon=0.5,clip=1,budget=1.6")
    assert len(ended.record.metrics) == 3
    message = ran(FedAvg(), EQUAL, rounds=1, dp="client:noise=1").record.ledger
    assert CLIP in {line["field"] for line in message if line["direction"] == "down"}
