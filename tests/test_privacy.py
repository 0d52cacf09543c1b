"""Differential privacy: clipping, noise, the budget, and what voids it."""

import itertools
import math
from dataclasses import dataclass, replace

import dp_accounting
import pytest
import torch
from problems import node, ran

from fedloom import nets
from fedloom.bench import Bench
from fedloom.boundary.privacy import accountant
from fedloom.boundary.privacy.client_level import shared
from fedloom.boundary.privacy.clip import BOUND, Clipping, limited
from fedloom.boundary.privacy.local import Noising
from fedloom.boundary.privacy.per_sample import per_sample
from fedloom.boundary.privacy.sample_level import Guard, Sealed, rounded
from fedloom.calls import Call
from fedloom.errors import RunError, UsageError
from fedloom.method import Method, build, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.scaffold import Scaffold
from fedloom.random import stream
from fedloom.registry import entry_of
from fedloom.task import Data
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab, difference, trace

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


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_no_precision_rounds_a_clipped_reply_beyond_its_bound(dtype, order):
    for n in range(2, 400):  # equal entries all round the same way
        entries, _ = limited({"a": torch.ones(n, dtype=dtype), "b": torch.ones(1)}, 0.7, order)
        length = float(torch.cat([t.double() for t in entries.values()]).norm(order))
        assert 0.98 * 0.7 < length <= 0.7


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


def test_every_round_has_noise_of_its_own():
    models = [ran(FedAvg(lr=1e-9), EQUAL, rounds=n, dp="client:noise=3,clip=1").server.model.flat for n in range(1, 5)]
    drawn = torch.stack([after - before for before, after in itertools.pairwise(models)])
    assert drawn.std(1).min() > 0.3, "there is noise"
    assert (drawn.corrcoef() - torch.eye(3)).abs().max() < 0.5, "of which nothing comes again, to cancel what it hides"


def three_digits(number):
    """Rounded up: epsilon is a promise."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 2)
    return f"{math.ceil(number / unit) * unit:.3g}"


@pytest.mark.parametrize("noise", [0.6, 0.8, 1.1, 1.5, 2.5, 4.0])
def test_what_is_stated_is_never_less_than_what_was_spent(noise):
    made = ran(FedAvg(), EQUAL, rounds=1, dp=f"client:noise={noise},clip=1")
    spent, stated = made.record.metrics[-1]["dp/epsilon"], float(made.manifest["dp"][0].split()[8])
    assert spent <= stated < 1.01 * spent


def test_what_is_spent_in_round_numbers_is_stated_so():
    told = ran(FedAvg(), EQUAL, rounds=3, dp="local:laplace,epsilon=0.1").manifest["dp"][0]
    assert "epsilon 0.3 at delta" in told, "three times 0.1, whatever floating point makes of it"


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
    assert f"epsilon {three_digits(expected)} at delta 0.0001" in made.manifest["dp"][0]


@pytest.mark.parametrize("settings", [{}, {"cohort": 3}])
def test_noise_is_calibrated_to_the_budget(settings):
    made = ran(FedAvg(), EQUAL, rounds=4, dp="client:noise=auto,clip=1,epsilon=6", **settings)
    assert len(made.record.metrics) == 4 and 5.9 < made.record.metrics[-1]["dp/epsilon"] <= 6


def test_the_run_ends_before_its_budget_is_exceeded():
    short = ran(FedAvg(), EQUAL, rounds=50, dp="client:noise=2,clip=1,epsilon=6")
    spent = [row["dp/epsilon"] for row in short.record.metrics]
    assert len(spent) < 50 and spent[-1] <= 6 and "the privacy budget" in short.manifest["stopped_because"]
    one_more = accountant.epsilon(2.0, {1: len(spent) + 1}, 1e-5, "none", 6, 6)
    assert one_more > 6
    assert all(a < b for a, b in itertools.pairwise(spent)), "no client works for a round that is given up"


def test_two_sums_of_a_round_count_twice():
    once = accountant.epsilon(1.5, {1: 4}, 1e-5, "poisson", 10, 100)
    twice = accountant.epsilon(1.5, {2: 4}, 1e-5, "poisson", 10, 100)
    assert twice > 1.2 * once
    assert (
        accountant.epsilon(1.5, {}, 1e-5, "none", 1, 1) == 0
        and accountant.epsilon(0, {1: 1}, 1e-5, "none", 1, 1) == math.inf
    )


@pytest.mark.parametrize(("noise", "size"), [(1.0, 6), (3.0, 24), (0.3, 1000), (8.0, 100)])
def test_the_bit_of_an_adaptive_bound_has_its_share_of_the_budget(noise, size):
    on_sum, on_count = shared(noise, size)
    # A half is how far one client moves the count. Two Gaussian releases cost what one does with this noise.
    assert (on_sum**-2 + (on_count / 0.5) ** -2) ** -0.5 == pytest.approx(noise)
    assert on_count >= size / 20 and noise < on_sum < 1.2 * noise


def test_the_count_within_an_adaptive_bound_is_noised():
    method, start = FedAvg(lr=1e-9), 0.1  # everybody is within
    clips = []
    for seed in range(60):
        made = ran(method, EQUAL, rounds=2, seed=seed, dp="client:noise=2,clip=adaptive,quantile=0.5")
        clips.append(made.record.metrics[-1]["dp/clip"])
    counted = 6 * (torch.tensor(clips, dtype=torch.float64) / start).log() / -0.2
    assert float(counted.std()) == pytest.approx(shared(2.0, 6)[1], rel=0.3)
    assert float(counted.mean()) == pytest.approx(6 * 0.5, abs=4 * 2.0 / 60**0.5)


class Counting(FedAvg):
    """Looks at what a mean tells beside its fields."""

    def round(self, server, cohort):
        up = cohort.mean(self.local, weight="n", model=server.model)
        server.model = server.model + up.delta
        server.log(count=up.count, weight=up.weight, missing=len(up.missing))


def test_an_empty_poisson_sample_is_a_secret_and_so_is_the_number_of_replies():
    settings = {"cohort": 1, "participation": "poisson", "dp": "client:noise=1,clip=1"}
    made = ran(Counting(), EQUAL, rounds=12, **settings)
    replies = [row["replies"] for row in made.record.metrics]
    first = next(place for place, count in enumerate(replies) if count)
    assert any("rounds before the first reply" in said for said in made.manifest["dp"])
    later = made.record.metrics[first:]
    assert 0 in replies[first:] and max(replies) > 1
    assert {(row["server/count"], row["server/weight"], row["server/missing"]) for row in later} == {(1.0, 1.0, 0.0)}
    spent = [row["dp/epsilon"] for row in later]
    assert all(a < b for a, b in itertools.pairwise(spent))
    empty = first + replies[first:].index(0)
    assert empty > first
    before, after = (ran(Counting(), EQUAL, rounds=n, **settings).server.model for n in (empty, empty + 1))
    moved = (after - before).flat
    assert float(moved.std()) == pytest.approx(1.0, rel=0.3)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"availability": "bernoulli:0.9"}, "availability=bernoulli:0.9 decides"),
        ({"overselect": 1.5}, "overselect=1.5 favours"),
        ({"participation": "weighted"}, "participation=weighted is no uniform draw"),
        ({"availability": "bernoulli:0.9", "participation": "poisson"}, "availability=bernoulli:0.9 decides"),
    ],
)
def test_nothing_is_amplified_where_clients_are_not_drawn_uniformly_from_all(settings, why):
    made = ran(FedAvg(), EQUAL, rounds=2, cohort=3, dp="client:noise=2,clip=1", **settings)
    plain = accountant.epsilon(2.0, {1: 2}, 1e-5, "none", 1, 1)
    assert made.record.metrics[-1]["dp/epsilon"] == plain and why in made.manifest["dp"][1]


class Choosing(FedAvg):
    """Asks the first three clients in every round."""

    def select(self, server, clients):
        return clients.where([0, 1, 2])


@pytest.mark.parametrize("participation", ["uniform", "poisson"])
def test_nothing_is_amplified_where_the_method_chooses_who_takes_part(participation):
    made = ran(Choosing(), EQUAL, rounds=2, cohort=3, participation=participation, dp="client:noise=2,clip=1")
    # Client 0 is in every sum: two Gaussian releases.
    two = dp_accounting.rdp.RdpAccountant(list(accountant.ORDERS)).compose(dp_accounting.GaussianDpEvent(2.0), 2)
    assert made.record.metrics[-1]["dp/epsilon"] == pytest.approx(two.get_epsilon(1e-5))
    assert "the method chooses who takes part" in made.manifest["dp"][1]


@dataclass(frozen=True)
class Calling(FedAvg):
    """Asks the clients of some numbers, whoever was drawn."""

    numbers: tuple[int, ...] = tuple(range(6))

    def round(self, server, cohort):
        up = cohort.clients_by_id(self.numbers).mean(self.local, weight="n", model=server.model)
        server.model = server.model + up.delta


@pytest.mark.parametrize("participation", ["uniform", "poisson"])
def test_a_sum_of_clients_that_were_not_drawn_voids_what_sampling_promises(participation):
    settings = {"rounds": 2, "participation": participation, "dp": "client:noise=2,clip=1"}
    told = ran(Calling(), EQUAL, cohort=3, **settings).manifest["dp"][0]
    assert "no guarantee, since local of clients that were not drawn leaves the clients unprotected" in told
    with pytest.raises(RunError, match="local of clients that were not drawn"):
        ran(Calling(), EQUAL, cohort=3, **settings | {"dp": "client:noise=2,clip=1,epsilon=90"})
    everybody = ran(Calling(), EQUAL, **settings).record.metrics[-1]["dp/epsilon"]
    assert everybody == accountant.epsilon(2.0, {1: 2}, 1e-5, "none", 6, 6), "where all are drawn nothing is promised"


class Halving(FedAvg):
    """Asks the drawn clients in two parts."""

    def round(self, server, cohort):
        for part in cohort.split(2):
            server.model = server.model + part.mean(self.local, weight="n", model=server.model).delta


def test_parts_of_those_who_were_drawn_are_drawn_too():
    told = ran(Halving(), EQUAL, rounds=2, cohort=4, dp="client:noise=4,clip=1").manifest["dp"]
    assert "epsilon" in told[0] and "drawn without replacement" in told[1]


class Partial(FedAvg):
    """Only some clients send what is private."""

    @client
    def local(self, client, model):
        sent = FedAvg.local(self, client, model)
        return sent if client.id else {"n": sent["n"]}


def test_a_private_field_that_only_some_replies_have_is_refused():
    with pytest.raises(RunError, match="only some replies to local have the private field 'delta'"):
        ran(Partial(), EQUAL, rounds=1, dp="client:noise=1,clip=1")


def test_what_reaches_the_server_too_long_is_clipped_there():
    layer = Clipping(("delta",), adaptive=True)
    call = replace(CALL, shared={BOUND: 0.5})
    found = layer.arrive(call, 0, {"delta": torch.full((9,), 4.0), "within": 1e9, "n": 5})
    assert float(found["delta"].norm()) == pytest.approx(0.5, rel=1e-5) and found["within"] == 0.0 and "n" not in found
    assert not layer.arrive(call, 0, {"delta": torch.full((9,), math.nan), "within": 1.0})["delta"].any()
    short = {"delta": torch.full((4,), 0.1), "within": 1.0}
    assert layer.arrive(call, 0, short)["delta"] is short["delta"]


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
    made = ran(Telling(), Toy(), rounds=1, dp="client:noise=1,clip=1")
    assert made.manifest["dp"] == [
        "No differential privacy: no guarantee, since local.secret leaves the clients unprotected."
    ]
    assert "dp/epsilon" not in made.record.metrics[-1] and made.manifest["membership"]["bound"] == 1.0
    with pytest.raises(UsageError, match=r"epsilon=3 was asked for, but local.secret leaves the clients unprotected"):
        ran(Telling(), Toy(), rounds=1, dp="client:noise=3,clip=1,epsilon=3")
    assert "since local.a leaves" in ran(build("fednova"), Toy(), rounds=1, dp="client:noise=1").manifest["dp"][0]
    assert "there is no noise" in ran(FedAvg(), Toy(), rounds=1, dp="client:noise=0").manifest["dp"][0]
    with pytest.raises(UsageError, match=r"the first round alone costs epsilon 4\.73, over the budget of 3"):
        ran(FedAvg(), Toy(), rounds=1, dp="client:noise=1,clip=1,epsilon=3")


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
    from fedloom.engines import build as build_engine

    return lab.experiment(engine=build_engine(engine, 2 if engine == "pool" else 0), dp=dp)


@pytest.mark.parametrize("dp", ["client:noise=1,clip=adaptive", "sample:noise=1", "local:gaussian,epsilon=5"])
def test_a_resumed_run_goes_on_with_its_budget(dp, tmp_path):
    import fedloom

    whole = fedloom.run(FedAvg(), EQUAL, rounds=3, dp=dp, report=False, out=tmp_path / "whole")
    fedloom.run(FedAvg(), EQUAL, rounds=2, dp=dp, report=False, out=tmp_path / "part")
    spec = tmp_path / "part" / "spec.yaml"
    spec.write_text(spec.read_text().replace("rounds: 2", "rounds: 3"))
    again = fedloom.resume(tmp_path / "part", EQUAL, report=False)
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


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize(
    ("model", "shape"), [("lenet:3,5", (1, 28, 28)), ("lenet:3,5", (3, 28, 28)), ("resnet:1,group", (3, 16, 16))]
)
def test_per_sample_gradients_of_convolutions_are_those_of_batches_of_one(model, shape, last):
    x = torch.randn(5, *shape, generator=stream(0, "test"))
    bench = Bench(nets.build(model, shape, 3), torch.device("cpu"))
    data = Data(x.to(memory_format=torch.channels_last) if last else x, torch.tensor([0, 1, 2, 0, 1]))
    held = bench.flat.clone()

    def loss(net, batch):
        return torch.nn.functional.cross_entropy(net(batch.x), batch.y)

    _, each = per_sample(bench.net.train(), bench.params, loss, data.all(), whole=True)
    for i in range(5):
        one = Data(data.x[i : i + 1], data.y[i : i + 1]).all()
        for found, expected in zip(each, torch.autograd.grad(loss(bench.net, one), bench.params), strict=True):
            torch.testing.assert_close(found[i], expected, rtol=1e-3, atol=1e-5)
    bench.flat.zero_()
    assert all(not p.any() for p in bench.net.parameters()), "they are views of the vector again"
    assert held.any()


@pytest.mark.parametrize("share", [0.25, 0.75, 2.0])
def test_gradients_longer_than_the_bound_are_shortened_to_it_and_others_stay_as_they_are(share):
    client = node(ran(FedAvg(), EQUAL, rounds=1).site, 0)
    rows = client.own.all()
    alone = [client.grad(client.initial, Data(rows.x[i : i + 1], rows.y[i : i + 1]).all()).flat for i in range(20)]
    lengths = torch.stack([g.norm() for g in alone])
    bound = share * float(lengths.max())
    assert (lengths > bound).any() == (share < 1), "and at 2 none is"
    client.guard = Guard(noise=0.0, clip=bound)
    found = client.grad(client.initial, next(client.batches(None)))
    by_hand = sum(g * min(1.0, bound / float(g.norm())) for g in alone) / 20
    torch.testing.assert_close(found.flat, by_hand, rtol=1e-4, atol=1e-6)


def test_a_guarded_gradient_is_clipped_by_sample_and_batches_are_poisson():
    client = node(ran(FedAvg(), Toy(sizes=(40,)), rounds=1).site, 0)
    client.guard = Guard(noise=0.0, clip=0.01)
    sizes = [len(batch.opened()) for _ in range(100) for batch in client.batches(10, epochs=1)]
    assert len(sizes) == 400 and len(set(sizes)) > 8 and sum(sizes) / 400 == pytest.approx(10, rel=0.1)
    batch = next(client.batches(10))
    g = client.grad(client.initial, batch)
    assert 0 < float(g.norm()) <= 0.01 * len(batch.opened()) / 10 + 1e-6 and len(batch) == 10
    with pytest.raises(UsageError, match=r"one gradient of every batch .* this method takes another"):
        client.grad(client.initial, batch)
    with pytest.raises(UsageError, match=r"one gradient of every batch .* this method takes another"):
        client.grad(client.initial, client.own.all())
    client.guard = Guard(noise=2.0, clip=0.5)
    draws = []
    for _ in client.batches(10, steps=30):
        client.guard.drawn = Sealed(client.own.at(client.own.taken(None)[:0]), 10)  # nobody was drawn
        draws.append(client.grad(client.initial, client.guard.drawn).flat)
    noise = torch.cat(draws)
    assert not torch.equal(draws[0], draws[1])
    assert float(noise.std()) == pytest.approx(2.0 * 0.5 / 10, rel=0.05)


def test_sample_level_epsilon_is_dp_accountings_of_the_steps_taken():
    made = ran(FedAvg(), EQUAL, rounds=3, dp="sample:noise=1.1,clip=1")
    independent = dp_accounting.rdp.RdpAccountant(list(accountant.ORDERS))
    event = dp_accounting.PoissonSampledDpEvent(0.5, dp_accounting.GaussianDpEvent(1.1))
    independent.compose(event, 3 * 2)
    assert f"level of samples: epsilon {three_digits(independent.get_epsilon(1e-5))} at" in made.manifest["dp"][0]
    assert made.record.metrics[-1]["gradient_steps"] == 12
    assert made.record.metrics[-1]["dp/epsilon"] == pytest.approx(independent.get_epsilon(1e-5))
    two = FedAvg(epochs=2)
    cost = [accountant.epsilon(1.1, {1: 4 * rounds}, 1e-5, "poisson", 10, 20) for rounds in (1, 2, 3)]
    ended = ran(two, EQUAL, rounds=9, dp=f"sample:noise=1.1,clip=1,epsilon={(cost[1] + cost[2]) / 2}")
    assert [row["dp/epsilon"] for row in ended.record.metrics] == pytest.approx(cost[:2])
    many = dict.fromkeys(range(100, 400), 50)
    fewer = rounded(many)
    assert len(fewer) < 80 and rounded({7: 3}) == {7: 3}
    assert all(any(low <= n < 1.03 * low for low in fewer) for n in many)


def test_what_one_sample_could_do_beyond_its_clipped_gradient_is_refused():
    client = node(ran(FedAvg(), EQUAL, rounds=1).site, 0)
    client.guard = Guard(noise=1.0, clip=1.0)

    def mixing(net, batch):
        return client.task.loss(net, batch) * batch.x.mean().abs()

    with pytest.raises(UsageError, match="this one mixes the samples of a batch"):
        client.grad(client.initial, next(client.batches(10)), loss=mixing)
    client.grad(client.initial, next(client.batches(10)))
    net, params = client.site.bench.net, client.site.bench.params
    client.guard = Guard(noise=0.0, clip=1.0)
    batch = next(client.batches(None))
    batch.opened().x[3] = math.inf
    found = client.guard.gradient(client, net, [p.requires_grad_() for p in params], client.task.loss, batch)[1]
    assert all(g.isfinite().all() for g in found) and any(g.any() for g in found)


@pytest.mark.parametrize("only", [None, "head.*"])
def test_a_loss_with_a_part_that_no_sample_has_is_refused_rather_than_trained_without_it(only):
    client = node(ran(FedAvg(), EQUAL, rounds=1).site, 0)

    def penalised(net, batch):
        return client.task.loss(net, batch) + 0.05 * sum(p.square().sum() for p in net.head.parameters())

    by_sample = client.grad(client.initial, client.own.all(), only=only).flat
    client.guard = Guard(noise=0.0, clip=1e6)
    torch.testing.assert_close(client.grad(client.initial, next(client.batches(None)), only=only).flat, by_sample)
    with pytest.raises(UsageError, match=r"uses parameters beside them .* hand that to descend as `correct`"):
        client.grad(client.initial, next(client.batches(None)), loss=penalised, only=only)


@dataclass(frozen=True)
class Peeping(FedAvg):
    """Looks at its data beside the gradients that are accounted for."""

    at: str = ""

    @client
    def local(self, client, model):
        for batch in client.batches(self.batch):
            look = {
                "data": lambda: client.data,
                "batch.x": lambda b=batch: b.x,
                "x, y": lambda b=batch: list(b),
                "task": lambda: client.task.data(client.id, "validation"),
                "evaluate": lambda: client.evaluate(model, "train"),
                "another": lambda b=batch: [client.grad(model, b) for _ in range(2)],
                "loss": lambda b=batch: client.grad(
                    model, b, loss=lambda net, _: client.task.loss(net, client.data.all())
                ),
                "data=": lambda: client.descend(
                    model, lr=0.1, steps=1, batch=self.batch, data=Data(client.own.x, client.own.y)
                ),
                "larger batches": lambda: client.descend(model, lr=0.1, steps=1, batch=self.batch + 1),
            }[self.at]
            look()
        return {"delta": model.zeros_like(), "n": client.n}


@pytest.mark.parametrize(
    "at", ["data", "batch.x", "x, y", "task", "evaluate", "another", "loss", "data=", "larger batches"]
)
def test_under_privacy_of_samples_a_method_reads_no_data_but_through_gradients(at):
    with pytest.raises(UsageError, match="dp at the level of samples accounts for"):
        ran(Peeping(at=at), EQUAL, rounds=1, dp="sample:noise=1")
    ran(Peeping(at=at), EQUAL, rounds=1)


@pytest.mark.parametrize("name", ["apfl", "fedspeed", "fedlabel", "fedast"])
def test_methods_that_read_more_than_is_accounted_for_refuse_before_the_first_round(name):
    lab = Lab(entry_of(name).load(Method))
    with pytest.raises(UsageError, match="sample"):
        lab.begun(dp="sample:noise=1,clip=0.5")


@pytest.mark.parametrize("dp", ["client:noise=1.0,clip=0.5", "local:gaussian,epsilon=2", "local:laplace,epsilon=2"])
def test_no_noise_touches_running_statistics_and_none_leaves_a_client(dp):
    task = Toy(norm=True, sizes=(30, 20, 25, 35))
    with pytest.raises(UsageError, match=r"running statistics .*, which no noise can protect; set buffers=ignore"):
        ran(FedAvg(), task, rounds=1, dp=dp)
    for buffers in ("ignore", "local"):
        made = ran(FedAvg(lr=0.01), task, rounds=70, dp=dp, buffers=buffers)
        assert torch.equal(made.server.model.buffers.flat, made.site.initial.buffers.flat)
        assert made.server.model.flat.isfinite().all()
        for state in made.engine.states.values():
            for statistics in (value for name, value in state.items() if "running_statistics" in name):
                assert statistics.isfinite().all()


class Measuring(FedAvg):
    """Sends statistics of its own data along with its parameters, whatever the policy for buffers."""

    @client
    def local(self, client, model):
        delta = FedAvg.local(self, client, model)["delta"]
        return {"delta": delta.merge(delta.buffers.zeros_like() + client.data.x.mean()), "n": client.n}


@pytest.mark.parametrize("dp", ["client:noise=1,clip=1", "local:gaussian,epsilon=2", "local:laplace,epsilon=2"])
def test_statistics_that_a_method_puts_into_a_private_vector_stay_behind(dp):
    settings = {"rounds": 1, "buffers": "ignore"}
    made = ran(Measuring(), Toy(norm=True), dp=dp, **settings)
    assert torch.equal(made.server.model.buffers.flat, made.site.initial.buffers.flat)
    open_ = ran(Measuring(), Toy(norm=True), **settings).server.model
    assert not torch.equal(open_.buffers.flat, made.site.initial.buffers.flat), "and would be sent without privacy"


def test_privacy_of_clients_is_refused_where_nothing_is_summed():
    for name in ("mud_hog", "rffl"):
        with pytest.raises(UsageError, match=f"{name} does not go with dp=client"):
            ran(build(name), Toy(), rounds=1, dp="client:noise=1")
    for name in ("fedbuff", "fedstale"):
        with pytest.raises(UsageError, match=f"{name} asks for each reply of local by (call|submit)"):
            ran(build(name), Toy(), rounds=1, dp="client:noise=1")
    with pytest.raises(UsageError, match="oort asks clients for judge by call in train, which this mechanism does not"):
        ran(build("oort"), Toy(), rounds=1, dp="client:noise=1,epsilon=50")


def test_a_budget_is_refused_at_once_where_finish_sends_what_nothing_protects():
    task = Toy()
    with pytest.raises(
        UsageError, match="ccvr asks clients for moments by mean in finish, which this mechanism does not"
    ):
        ran(build("ccvr"), task, rounds=2, dp="client:noise=1,clip=1,epsilon=100")
    made = ran(build("ccvr"), task, rounds=1, dp="client:noise=1,clip=1")
    assert "no guarantee, since moments" in made.record.manifest["dp"][0]


@pytest.mark.parametrize("dp", ["client:noise=1", "sample:noise=1", "local:gaussian,epsilon=2"])
def test_every_statement_says_that_the_number_of_samples_is_public(dp):
    said = " ".join(ran(FedAvg(), Toy(), rounds=1, dp=dp).record.manifest["dp"])
    assert "How many samples a client has is taken to be public" in said


def test_batch_norm_is_refused_with_opacus_words():
    with pytest.raises(UsageError, match="BatchNorm cannot support training with differential privacy"):
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
    assert "n" not in {line["field"] for line in ended.record.ledger if line["function"] == "local"}
    told = ran(build("fedbuff"), EQUAL, rounds=1, dp="local:laplace,epsilon=0.5").manifest["dp"][0]
    assert "since local.n leaves the clients unprotected" in told
    message = ran(FedAvg(), EQUAL, rounds=1, dp="client:noise=1").record.ledger
    assert BOUND in {line["field"] for line in message if line["direction"] == "down"}
