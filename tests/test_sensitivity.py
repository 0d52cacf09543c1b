"""What one client, or one sample, can do to what is released: measured, without noise; and what the noise then costs.

Epsilon is computed a second time here, from the densities, without the accountant's library.
"""

import math

import pytest
import torch
from problems import node
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

from fedloom.boundary.privacy import accountant
from fedloom.boundary.privacy.base import Privacy
from fedloom.boundary.privacy.local import Local, Noising
from fedloom.calls import Call
from fedloom.method import Method
from fedloom.registry import catalogue
from fedloom.runs.spec import Spec
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab

CLIP = 0.05  # far below what clients send, so that the bound binds
SIZES = (20, 12, 25, 16)
FROM = {"fed_sb": 2}  # the first round whose noise shows in its size: of round 1 this one takes signs
PRIVATE = [entry.name for entry in catalogue() if entry.load(Method).private]


def lab_of(name, **fields):
    cls = next(entry for entry in catalogue() if entry.name == name).load(Method)
    known = {field: value for field, value in fields.items() if field in cls().fields()}
    return Lab(cls(**known))


def supported(name, setting, kind):
    lab = lab_of(name)
    verbs = {call.verb for call in lab.method.plan if call.kind == "train"}
    if f"dp={setting}" in lab.method.refuses or set(lab.cls.needs) & {"several", "graph", "vertical"}:
        return False
    return kind != "mean" or verbs == {"mean"}


def first_sums(lab, sizes, setting):
    """The private fields of the first mean of a run, times what it was divided by: the sum that noise would go on."""
    made = lab.begun(lab.toy(sizes=sizes), rounds=1, dp=setting)
    privacy, seen = made.pipeline.one(Privacy), []
    honest = type(privacy).mean

    def mean(self, books, call, mean):
        out = honest(self, books, call, mean)
        seen.append({name: out.fields[name] * self.size for name in self.private if name in out.fields})
        return out

    object.__setattr__(privacy, "mean", mean.__get__(privacy))
    made.go()
    return seen[0]


def distance(one, other):
    moves = (one[name] - other[name] for name in one)
    squares = sum(float(getattr(move, "params", move).norm()) ** 2 for move in moves)
    return math.sqrt(squares)


@pytest.mark.parametrize("name", [name for name in PRIVATE if supported(name, "client", "mean")])
def test_a_client_more_or_less_moves_the_sum_by_no_more_than_the_bound(name):
    lab = lab_of(name, lr=0.5)
    with_it, without = (first_sums(lab, sizes, f"client:noise=0,clip={CLIP}") for sizes in (SIZES, SIZES[:-1]))
    moved = distance(with_it, without)
    assert 0.5 * CLIP < moved <= CLIP * (1 + 1e-5), "the bound binds, and holds"


class Less(Toy):
    """The toy without the last training sample of client 0, whose number of samples stays public as it was."""

    def data(self, client, split):
        data = super().data(client, split)
        if client or split != "train":
            return data
        return type(data)(data.inputs, data.labels, data.rows[:-1])


@pytest.mark.parametrize("name", [name for name in PRIVATE if supported(name, "sample", "gradient")])
def test_a_sample_more_or_less_moves_a_gradient_sum_by_no_more_than_the_bound(name, monkeypatch):
    """Of all samples at once, the first gradient of client 0: summed, without noise."""
    from fedloom.boundary.privacy import sample_level

    lab = lab_of(name, batch=0, epochs=1, steps=1)
    if lab.cls.needs:
        pytest.skip("its small problem is another")
    sums = []
    honest = sample_level.Guard.gradient

    def gradient(self, node, net, params, loss, batch):
        value, found = honest(self, node, net, params, loss, batch)
        if node.id == 0 and len(sums[-1]) < 1:
            sums[-1].append(torch.cat([g.flatten() * len(batch) for g in found]))
        return value, found

    begun = [lab.begun(task, rounds=1, dp=f"sample:noise=0,clip={CLIP}") for task in (Toy(SIZES), Less(SIZES))]
    monkeypatch.setattr(sample_level.Guard, "gradient", gradient)
    for made in begun:
        sums.append([])
        made.go()
    moved = float((sums[0][0] - sums[1][0]).norm())
    assert 0.5 * CLIP < moved <= CLIP * (1 + 1e-4), "the bound binds, and holds"


@pytest.mark.parametrize("mechanism", ["laplace", "gaussian"])
@pytest.mark.parametrize("each", [0.5, 2.0, 8.0])
def test_local_noise_covers_any_two_replies(mechanism, each):
    """Two clipped replies are at most twice the bound apart; the densities around them then differ by epsilon."""
    layer = Local.made(Spec(), lab_of("fedavg").method, Toy(), 1e-5, mechanism, epsilon=each, clip=CLIP).at_clients()[0]
    client = node(lab_of("fedavg").experiment(rounds=1).site, 0)
    call = Call("mean", "local", (0,), {}, {}, "train", 1, 0)
    still = Noising(layer.private, layer.mechanism, layer.clip, 0.0)
    order = 1 if mechanism == "laplace" else 2
    big = torch.randn(50, generator=torch.Generator().manual_seed(0))
    one, other = (still.around(client, call, {}, lambda v=v: {"delta": v})["delta"] for v in (big, -big))
    apart = float((one - other).norm(order))
    assert 1.9 * CLIP < apart <= 2 * CLIP * (1 + 1e-5)
    if mechanism == "laplace":  # log density ratio of Laplace noise at distance d in the 1-norm: d / scale
        assert 0.9 * each < apart / layer.scale <= each * (1 + 1e-5)
    else:
        assert 0.5 * 1e-5 ** (1 / 0.9) < gaussian_delta(apart / layer.scale, each) <= 1e-5, "not far above, never below"
    drawn = torch.cat([layer.around(client, call, {}, lambda: {"delta": torch.zeros(4000)})["delta"] for _ in range(5)])
    spread = layer.scale * (math.sqrt(2) if mechanism == "laplace" else 1.0)
    assert float(drawn.std()) == pytest.approx(spread, rel=0.05)


def gaussian_delta(ratio, epsilon):
    """delta(epsilon) of the Gaussian mechanism with sensitivity `ratio` deviations [Balle, Wang 2018, Theorem 8]."""
    return norm.cdf(ratio / 2 - epsilon / ratio) - math.exp(epsilon) * norm.cdf(-ratio / 2 - epsilon / ratio)


def exact_epsilon(ratio, delta):
    return brentq(lambda eps: gaussian_delta(ratio, eps) - delta, 0.0, 200.0)


@pytest.mark.parametrize("noise", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("rounds", [1, 10, 100])
def test_composed_gaussians_cost_at_least_what_their_densities_say_and_little_more(noise, rounds):
    """Without sampling T rounds are one Gaussian of sqrt(T) times the sensitivity: exactly known."""
    stated = accountant.epsilon(noise, {1: rounds}, 1e-5, "none", 1, 1)
    true = exact_epsilon(math.sqrt(rounds) / noise, 1e-5)
    assert true <= stated <= 1.35 * true + 0.05


def sampled_delta(q, noise, epsilon):
    """Of one Gaussian over a Poisson sample, by integrating where one density exceeds e^epsilon times the other."""

    def without(x):
        return norm.pdf(x, 0, noise)

    def mixed(x):
        return (1 - q) * norm.pdf(x, 0, noise) + q * norm.pdf(x, 1, noise)

    span = (-30 * noise, 1 + 30 * noise)

    def beyond(p, r):
        return quad(lambda x: max(0.0, p(x) - math.exp(epsilon) * r(x)), *span, limit=500, points=(0, 0.5, 1))[0]

    return max(beyond(without, mixed), beyond(mixed, without))


@pytest.mark.parametrize(("q", "noise"), [(0.1, 1.0), (0.5, 1.0), (0.01, 0.8)])
def test_a_poisson_sampled_gaussian_costs_at_least_what_its_densities_say(q, noise):
    stated = accountant.epsilon(noise, {1: 1}, 1e-5, "poisson", int(q * 1000), 1000)
    assert sampled_delta(q, noise, stated) <= 1e-5
    assert sampled_delta(q, noise, stated / 5) > 1e-5, "the statement is not far too large either"


def test_a_replaced_client_costs_as_much_as_noise_of_half_the_size():
    """Neighbours of a fixed-size sample differ by a client replaced: twice the bound (and here everybody is drawn)."""
    lab = lab_of("fedavg")
    made = lab.begun(Toy(sizes=(9,) * 8), cohort=4, rounds=1, dp="client:noise=4.0,clip=1.0")
    privacy = made.pipeline.one(Privacy)
    assert privacy.sampling == "fixed"
    stated = privacy.spending({"sums": {"1": 1}})
    assert stated == accountant.epsilon(2.0, {1: 1}, privacy.delta, "fixed", 4, 8)
    assert stated <= accountant.epsilon(2.0, {1: 1}, privacy.delta, "none", 1, 1)


@pytest.mark.parametrize("name", [name for name in PRIVATE if supported(name, "client", "mean")])
def test_with_huge_noise_the_private_fields_move(name):
    lab = lab_of(name)
    rounds = FROM.get(name, 1)
    quiet, loud = (lab.begun(lab.toy(), rounds=rounds, dp=f"client:noise={z},clip=0.1") for z in (0, 1000.0))
    quiet.go()
    loud.go()
    moved = [
        float((a - b).norm())
        for a, b in ((quiet.server.values[v], loud.server.values[v]) for v in quiet.server.values)
        if hasattr(a, "layout")
    ]
    assert max(moved) > 10, "what is declared private is what the server uses"
