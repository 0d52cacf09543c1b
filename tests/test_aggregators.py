"""Aggregation rules: against plain Python, against the package byzfl, and under attack."""

import importlib
import importlib.util
import itertools
import math
import statistics
import sys
import types
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import ran

from fedloom.aggregators import RULES, Context, Piece, apply, build, options, wrappers
from fedloom.errors import UsageError
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.random import stream
from fedloom.tasks.toy import Toy


def rows(k, d, seed=0, scale=1.0):
    return scale * torch.randn(k, d, generator=stream(seed, "test", "rows"))


def aggregate(rule, stack, **context):
    return build(rule)(stack, Context(generator=stream(0, "test", "rule"), **context))


# The rules once more, in plain Python on lists of floats.


def mean(xs, weights=None):
    weights = weights or [1 / len(xs)] * len(xs)
    return [sum(w * x[j] for w, x in zip(weights, xs, strict=True)) for j in range(len(xs[0]))]


def distance2(x, y):
    return sum((a - b) ** 2 for a, b in zip(x, y, strict=True))


def median(xs):
    return [statistics.median(column) for column in zip(*xs, strict=True)]


def trimmed_mean(xs, f):
    return [statistics.fmean(sorted(column)[f : len(xs) - f]) for column in zip(*xs, strict=True)]


def krum_order(xs, f):
    def score(i):
        others = sorted(distance2(xs[i], xs[j]) for j in range(len(xs)) if j != i)
        return sum(others[: max(len(xs) - f - 2, 1)])

    return sorted(range(len(xs)), key=score)


def multi_krum(xs, f, m):
    return mean([xs[i] for i in krum_order(xs, f)[:m]])


def bulyan(xs, f):
    left, chosen = list(xs), []
    while len(chosen) < len(xs) - 2 * f:
        chosen.append(left.pop(krum_order(left, f)[0]))
    out = []
    for column in zip(*chosen, strict=True):
        middle = statistics.median(column)
        nearest = sorted(column, key=lambda x: (abs(x - middle), x))
        out.append(statistics.fmean(nearest[: len(chosen) - 2 * f]))
    return out


def clipped(x, radius):
    length = math.sqrt(distance2(x, [0] * len(x)))
    return [a * min(1, radius / length) for a in x] if length else x


def centred_clip(xs, tau, steps, centre):
    for _ in range(steps):
        offsets = [clipped([a - c for a, c in zip(x, centre, strict=True)], tau) for x in xs]
        centre = [c + o for c, o in zip(centre, mean(offsets), strict=True)]
    return centre


def norm_bound(xs, bound, weights):
    return mean([clipped(x, bound) for x in xs], [w / sum(weights) for w in weights])


def fltrust(xs, trusted):
    length = math.sqrt(distance2(trusted, [0] * len(trusted)))
    trust, scaled = [], []
    for x in xs:
        own = math.sqrt(distance2(x, [0] * len(x)))
        trust.append(max(sum(a * b for a, b in zip(x, trusted, strict=True)) / (own * length), 0))
        scaled.append([a * length / own for a in x])
    return mean(scaled, [t / sum(trust) for t in trust]) if sum(trust) else [0.0] * len(trusted)


def nnm(xs, f):
    return [mean(sorted(xs, key=lambda y, x=x: distance2(x, y))[: len(xs) - f]) for x in xs]


def gas(xs, f, pieces, rule):
    score = [0.0] * len(xs)
    for piece in pieces:
        parts = [[x[j] for j in piece] for x in xs]
        value = rule(parts)
        score = [s + math.sqrt(distance2(part, value)) for s, part in zip(score, parts, strict=True)]
    kept = sorted(range(len(xs)), key=score.__getitem__)[: len(xs) - f]
    return mean([xs[i] for i in sorted(kept)])


@st.composite
def problems(draw, least=1):
    """(rows [K, D], f, a second draw): small, of floats that hardly ever tie."""
    f = draw(st.integers(0, 2))
    k, d = least(f) + draw(st.integers(0, 4)), draw(st.integers(1, 6))
    return rows(k, d, draw(st.integers(0, 10**6))), f


def agree(value, expected):
    assert torch.allclose(value.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


exact = partial(settings, max_examples=40, deadline=None, derandomize=True)


@exact()
@given(problems(lambda f: 2 * f + 1))
def test_coordinate_rules_are_exact(problem):
    stack, f = problem
    xs = stack.tolist()
    agree(aggregate("median", stack).value, median(xs))
    agree(aggregate(f"trimmed_mean:{f}", stack).value, trimmed_mean(xs, f))


@exact()
@given(problems(lambda f: 2 * f + 3), st.integers(1, 3))
def test_krum_is_exact(problem, m):
    stack, f = problem
    xs = stack.tolist()
    value, weight = aggregate(f"krum:f={f},m={m}", stack)
    agree(value, multi_krum(xs, f, m))
    assert set(weight.nonzero().flatten().tolist()) == set(krum_order(xs, f)[:m])
    agree(aggregate(f"multi_krum:f={f}", stack).value, multi_krum(xs, f, len(xs) - f))


@exact()
@given(problems(lambda f: 4 * f + 3))
def test_bulyan_is_exact(problem):
    stack, f = problem
    value, weight = aggregate(f"bulyan:f={f}", stack)
    agree(value, bulyan(stack.tolist(), f))
    assert (weight > 0).sum() == len(stack) - 2 * f


@pytest.mark.parametrize("column", [[-2.0, -2.0, 0.0, 1.0, 3.0, 9.0, 9.5], [0.0] * 7, [1, 1, 1, 2, 3, 3, 3.0]])
def test_bulyans_nearest_values_among_equals(column):
    # Far apart in a second coordinate, so that Krum's choice is plain; in the first there are ties.
    stack = torch.tensor([[x, 0.001 * i] for i, x in enumerate(column)])
    agree(aggregate("bulyan:f=1", stack).value, bulyan(stack.tolist(), 1))


@exact()
@given(problems(lambda f: 2 * f + 3))
def test_the_geometric_median_is_where_the_sum_of_distances_is_least(problem):
    stack, _ = problem
    value, weight = aggregate("geometric_median:nu=1e-9", stack)
    assert weight.sum().item() == pytest.approx(1)

    def cost(z):
        return (stack.double() - z).norm(dim=1).sum()

    found = cost(value.double())
    for seed, reach in itertools.product(range(10), (1e-3, 1e-1)):
        assert found <= cost(value.double() + reach * rows(1, stack.shape[1], seed)[0].double()) * (1 + 1e-7)


def test_a_step_of_the_geometric_median_is_weiszfelds():
    stack, weights = rows(6, 3), torch.tensor([1.0, 2, 3, 4, 5, 6])
    z = mean(stack.tolist(), (weights / 21).tolist())
    beta = [w / max(math.sqrt(distance2(x, z)), 0.5) for w, x in zip(weights.tolist(), stack.tolist(), strict=True)]
    expected = mean(stack.tolist(), [b / sum(beta) for b in beta])
    agree(aggregate("geometric_median:nu=0.5,steps=1,weighted=true", stack, weights=weights).value, expected)


@exact()
@given(problems(lambda f: 3), st.integers(1, 3))
def test_centred_clipping_is_exact_and_remembers_its_centre(problem, steps):
    stack, _ = problem
    memory, centre = {}, [0.0] * stack.shape[1]
    for shift in (0.0, 0.5):
        centre = centred_clip((stack + shift).tolist(), 0.8, steps, centre)
        value = aggregate(f"centred_clip:tau=0.8,steps={steps}", stack + shift, memory=memory).value
        agree(value, centre)
        assert torch.equal(memory["centre"], value)


@exact()
@given(problems(lambda f: 3))
def test_norm_bounding_and_fltrust_are_exact(problem):
    stack, _ = problem
    xs, weights = stack.tolist(), torch.arange(1.0, len(stack) + 1)
    agree(aggregate("norm_bound:0.7", stack, weights=weights).value, norm_bound(xs, 0.7, weights.tolist()))
    agree(aggregate("mean", stack, weights=weights).value, mean(xs, (weights / weights.sum()).tolist()))
    trusted = rows(1, stack.shape[1], 99)[0]
    agree(aggregate("fltrust", stack, trusted=trusted).value, fltrust(xs, trusted.tolist()))


@exact()
@given(problems(lambda f: 2 * f + 3))
def test_mixing_is_exact(problem):
    stack, f = problem
    xs = stack.tolist()
    agree(aggregate(f"nnm+trimmed_mean:{f}", stack).value, trimmed_mean(nnm(xs, f), f))
    order = torch.randperm(len(xs), generator=stream(0, "test", "rule")).tolist()
    buckets = [mean([xs[i] for i in order[at : at + 2]]) for at in range(0, len(xs), 2)]
    agree(aggregate("bucketing:2+median", stack).value, median(buckets))


@exact()
@given(problems(lambda f: 2 * f + 3), st.integers(1, 8))
def test_gas_is_exact(problem, p):
    stack, f = problem
    xs, d = stack.tolist(), stack.shape[1]
    order = torch.randperm(d, generator=stream(0, "test", "rule"))
    pieces = [piece.tolist() for piece in order.tensor_split(min(p, d))]
    agree(aggregate(f"gas:p={p},f={f}+median", stack).value, gas(xs, f, pieces, median))
    agree(aggregate(f"gas:p={p}+krum:f={f}", stack).value, gas(xs, f, pieces, partial(multi_krum, f=f, m=1)))


# The public package, without its __init__, which asks for torchvision.


@pytest.fixture(scope="module")
def byzfl():
    if importlib.util.find_spec("byzfl") is None:
        pytest.skip("the package byzfl is not installed (pip install --no-deps byzfl)")
    pytest.importorskip("scipy", reason="byzfl needs scipy")
    package = types.ModuleType("byzfl")
    package.__path__ = list(importlib.util.find_spec("byzfl").submodule_search_locations)
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "byzfl"}
    sys.modules["byzfl"] = package
    yield importlib.import_module("byzfl.aggregators")
    for name in [name for name in sys.modules if name.split(".")[0] == "byzfl"]:
        del sys.modules[name]
    sys.modules.update(before)


# Its Krum adds up n - f - 1 distances where the paper's has n - f - 2: f here is one less.
PAIRS = {
    "mean": lambda b: b.Average(),
    "median": lambda b: b.Median(),
    "trimmed_mean:3": lambda b: b.TrMean(3),
    "krum:f=2": lambda b: b.Krum(3),
    "multi_krum:f=2,m=12": lambda b: b.MultiKrum(3),
    "geometric_median:nu=0.1": lambda b: b.GeometricMedian(nu=0.1, T=500),
    "centred_clip:tau=2.5,steps=3": lambda b: b.CenteredClipping(L=3, tau=2.5),
    "norm_bound:2": lambda b: lambda x: b.Clipping(2.0)(x.clone()).mean(0),
    "nnm:f=3+mean": lambda b: lambda x: b.NNM(3)(x).mean(0),
    "nnm:f=3+median": lambda b: lambda x: b.Median()(b.NNM(3)(x)),
    "nnm:f=3+trimmed_mean:3": lambda b: lambda x: b.TrMean(3)(b.NNM(3)(x)),
    "bucketing:s=5+mean": lambda b: lambda x: b.Average()(b.Bucketing(5)(x)),
}


@pytest.mark.parametrize("rule", PAIRS)
@pytest.mark.parametrize("outliers", [0, 3])
def test_agrees_with_byzfl(byzfl, rule, outliers):
    stack = rows(15, 40)
    stack[:outliers] *= 30
    assert torch.allclose(aggregate(rule, stack).value, PAIRS[rule](byzfl)(stack.clone()), rtol=1e-4, atol=1e-5)


# What holds for every rule, or for all that resist.

EVERY = ["mean", "norm_bound", "median", "trimmed_mean", "krum", "multi_krum", "bulyan", "geometric_median"]
EVERY += ["centred_clip", "fltrust", "nnm:f=0.2+median", "nnm+krum", "gas:p=10,f=4+median", "gas:p=10+bulyan"]
ROBUST = [rule for rule in EVERY if rule not in ("mean", "norm_bound", "centred_clip", "fltrust")]


def test_every_rule_of_the_folder_is_here():
    tried = {part.split(":")[0] for rule in EVERY for part in rule.split("+")}
    assert tried | {"bucketing", "ida", "l_dawa"} == set(RULES), "the last two are tried in test_divergence"
    assert all(comment for name in RULES for *_, comment in options(name))


@pytest.mark.parametrize("rule", EVERY)
def test_the_order_of_the_replies_does_not_matter(rule):
    stack, order = rows(19, 50), torch.randperm(19, generator=stream(1, "test"))
    trusted = rows(1, 50, 3)[0]
    value, weight = aggregate(rule, stack, trusted=trusted)
    again, theirs = aggregate(rule, stack[order], trusted=trusted)
    assert torch.allclose(value, again, rtol=0, atol=1e-6)
    assert weight is None or torch.allclose(weight[order], theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rule", [*EVERY, "bucketing+median", "bucketing:3+krum:f=1"])
def test_replies_that_agree_are_the_aggregate_and_none_is_changed(rule):
    one = rows(1, 30)[0]
    stack = one.repeat(19, 1)
    before = stack.clone()
    assert torch.allclose(aggregate(rule, stack, trusted=2 * one).value, (2 if rule == "fltrust" else 1) * one)
    assert torch.equal(stack, before)


@pytest.mark.parametrize("far", [1e2, 1e6, 1e30])
@pytest.mark.parametrize("rule", ROBUST)
def test_a_fifth_of_malicious_replies_cannot_move_a_robust_rule_far(rule, far):
    stack = rows(20, 30)
    stack[:3] = far * rows(3, 30, 5).sign()
    value = aggregate(rule, stack).value
    honest = stack[3:]
    reach = (honest - honest.mean(0)).norm(dim=1).max()
    assert (value - honest.mean(0)).norm() <= reach
    assert (aggregate("mean", stack).value - honest.mean(0)).norm() > reach


@pytest.mark.parametrize("far", [1e2, 1e30])
def test_bounded_rules_move_by_no_more_than_the_malicious_share_of_the_bound(far):
    stack = rows(20, 30)
    honest = stack.clone()
    honest[:4] = 0
    stack[:4] = far
    for rule in ("norm_bound:2", "centred_clip:tau=2"):
        moved = aggregate(rule, stack).value - aggregate(rule, honest).value
        assert moved.norm() <= 4 / 20 * 2 * (1 + 1e-5)
    trusted = honest[4:].mean(0)
    assert aggregate("fltrust", stack, trusted=trusted).value.norm() <= trusted.norm() * (1 + 1e-5)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum", "multi_krum", "bulyan", "gas+krum", "norm_bound"])
def test_a_reply_of_nan_or_infinity_does_not_get_through(rule):
    stack = rows(20, 30)
    stack[4], stack[7, 3] = float("nan"), float("inf")
    assert aggregate(rule, stack).value.isfinite().all()


def test_selected_clients_are_the_honest_ones():
    stack = rows(20, 100)
    stack[:4] = 5 + rows(4, 100, 7)
    for rule in ("krum:f=4", "multi_krum:f=4", "nnm+multi_krum:f=4", "gas:p=20,f=4+median", "gas+krum:f=4"):
        weight = aggregate(rule, stack).weight
        assert weight[:4].max() == 0 and weight.sum().item() == pytest.approx(1), rule


def test_identities():
    stack, weights = rows(13, 70), torch.arange(1.0, 14)
    plain = aggregate("mean", stack).value
    assert torch.equal(aggregate("trimmed_mean:0", stack).value, plain)
    assert torch.equal(aggregate("multi_krum:f=3,m=13", stack).value, plain)
    assert torch.equal(aggregate("multi_krum:f=0", stack).value, plain)
    assert torch.equal(aggregate("krum:f=3,m=13", stack).value, plain)
    assert torch.allclose(aggregate("bulyan:f=0", stack).value, plain, atol=1e-7)
    assert torch.equal(aggregate("norm_bound:1e9", stack, weights=weights).value, weighted(stack, weights))
    assert torch.allclose(aggregate("centred_clip:tau=1e9", stack).value, plain, atol=1e-7)
    assert torch.allclose(aggregate("bucketing:s=13+median", stack).value, plain, atol=1e-7)
    assert torch.equal(aggregate("bucketing:s=1+median", stack).value, aggregate("median", stack).value)
    assert torch.allclose(aggregate("nnm:f=0+krum:f=0", stack).value, plain, atol=1e-7)
    for p in (1, 5, 1000):
        for inner in ("median", "krum", "bulyan"):
            assert torch.equal(aggregate(f"gas:p={p},f=0+{inner}", stack).value, plain)
    assert torch.equal(aggregate("krum:f=3,m=1", stack).value, stack[krum_order(stack.tolist(), 3)[0]])


def weighted(stack, weights):
    return aggregate("mean", stack, weights=weights).value


def test_gas_in_one_piece_does_not_depend_on_the_draw_and_in_many_it_is_redrawn():
    stack = rows(12, 60)
    rule = build("gas:p=1,f=4+median")
    one, other = (rule(stack, Context(generator=stream(s, "test"))) for s in range(2))
    assert torch.equal(one.value, other.value)
    generator = stream(0, "test")
    many = [build("gas:p=12,f=4+krum")(stack, Context(generator=generator)).weight for _ in range(20)]
    assert all((weight > 0).sum() == 8 for weight in many)
    assert any(not torch.equal(weight, many[0]) for weight in many)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean:4", "bulyan:f=4"])
def test_gas_brings_its_rule_nearer_to_the_honest_mean_when_a_little_is_enough(rule):
    # ALIE: the malicious agree on a point inside the spread of honest replies, which differ.
    honest = rows(1, 4000, 1) + rows(16, 4000, 2) * rows(1, 4000, 3).exp()
    stack = torch.cat([(honest.mean(0) - 1.5 * honest.std(0)).repeat(4, 1), honest])
    option = "" if "4" in rule else ",f=4"
    bare, split = (aggregate(r, stack) for r in (rule, f"gas:p=100{option}+{rule}"))
    assert (split.value - honest.mean(0)).norm() < 0.9 * (bare.value - honest.mean(0)).norm()
    assert split.weight[:4].max() == 0


def test_a_tied_vote_of_two_halves_is_between_them():
    stack = torch.cat([torch.zeros(4, 3), torch.ones(4, 3)])
    assert torch.equal(aggregate("median", stack).value, torch.full((3,), 0.5))


def test_a_share_is_of_the_replies_also_behind_buckets():
    stack = rows(20, 9)
    assert torch.equal(aggregate("krum:f=0.29", rows(100, 9)).value, aggregate("krum:f=29", rows(100, 9)).value)
    # Four malicious replies of twenty can be in four buckets of ten.
    one = aggregate("bucketing:2+trimmed_mean:0.2", stack).value
    assert torch.equal(one, aggregate("bucketing:2+trimmed_mean:4", stack).value)


def test_many_columns_are_taken_in_blocks(monkeypatch):
    from fedloom.aggregators import stacked

    stack, trusted = rows(15, 1000), rows(1, 1000, 3)[0]
    whole = {rule: aggregate(rule, stack, trusted=trusted).value for rule in EVERY}
    monkeypatch.setattr(stacked, "COLUMNS", 77)
    for rule, value in whole.items():
        assert torch.allclose(aggregate(rule, stack, trusted=trusted).value, value, rtol=0, atol=1e-6), rule


def test_the_server_says_no_to_everybody():
    stack = rows(5, 8).abs()
    value, trust = aggregate("fltrust", stack, trusted=-stack[0])
    assert torch.equal(value, torch.zeros(8)) and trust.max() == 0
    with pytest.raises(UsageError, match="own data"):
        aggregate("fltrust", stack)


def test_what_a_rule_needs_is_known_before_a_run():
    assert build("gas:f=4+fltrust").needs_trusted and not build("gas+krum").needs_trusted
    assert build("nnm:f=4+centred_clip").remembers and not build("median").remembers
    assert build("nnm+krum:f=4").malicious(20) == 4
    assert build("bucketing+krum:f=3").check(18) == 3
    assert set(wrappers()) == {"bucketing", "gas", "nnm"}


@pytest.mark.parametrize(
    ("rule", "replies", "complaint"),
    [
        ("krum:f=4", 10, r"krum with f=4 needs at least 2f \+ 3 = 11 replies and has 10"),
        ("krum:f=0.4", 10, r"2f \+ 3 = 11"),
        ("trimmed_mean:3", 6, r"2f \+ 1 = 7"),
        ("bulyan:f=2", 10, r"4f \+ 3 = 11"),
        ("bucketing:s=2+krum:f=4", 20, r"11 replies and has 10 \(made of 20 replies\)"),
        ("gas+multi_krum:f=4", 10, r"multi_krum with f=4 needs at least 2f \+ 3"),
        ("gas:f=5+median", 10, r"gas with f=5 needs at least 2f \+ 1"),
        ("krum:f=1,m=11", 10, "krum:m is 11"),
    ],
)
def test_too_few_replies_are_refused_with_what_to_do(rule, replies, complaint):
    with pytest.raises(UsageError, match=complaint):
        aggregate(rule, rows(replies, 4))
    with pytest.raises(UsageError, match=complaint):
        build(rule).check(replies)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("krumm", "did you mean 'krum'"),
        ("krum:g=4", "unknown option of krum 'g'"),
        ("krum:1,2,3", "got 3 values without a name; its options are f, m"),
        ("krum:1,f=2", "krum got f twice"),
        ("krum:f=1,f=2", "twice"),
        ("krum:f=1,2", "has no name"),
        ("median:3", "it has no options"),
        ("krum:f=-1", "at least 0"),
        ("krum:f=1.5", "it is a number of replies, or below 1 a share"),
        ("krum:f=many", "it must be of type"),
        ("krum+nnm", "nnm in 'krum\\+nnm' goes before a rule"),
        ("krum+median", "krum in 'krum\\+median' is a rule by itself"),
        ("gas:f=1+centred_clip", "no rule behind it can remember"),
        ("gas+nnm:f=1+centred_clip", "no rule behind it can remember"),
        ("gas:p=0+krum", "gas:p is 0"),
        ("nnm+median", "nnm needs its f, for median has none"),
        ("gas+bucketing+median", "gas needs its f"),
        ("bucketing:s=0+median", "bucketing:s is 0"),
        ("", "unknown aggregation rule"),
    ],
)
def test_a_text_that_names_no_rule_is_refused(text, complaint):
    with pytest.raises(UsageError, match=complaint):
        build(text)


@pytest.mark.parametrize("name", [name for name in RULES if name not in wrappers()])
def test_running_statistics_decide_nothing_and_follow_the_verdict(name):
    """Whatever statistics the replies have, the rule judges the same; a variance stays between those that were sent."""
    draw = stream(0, "statistics")
    learned = torch.arange(12) < 8
    stack = torch.randn(9, 12, generator=draw)
    wild = stack.clone()
    wild[:, 8:] = 1000 * torch.rand(9, 4, generator=draw)
    rule = build(f"{name}:f=1") if "f" in {option for option, *_ in options(name)} else build(name)
    trusted = torch.randn(12, generator=draw)

    pieces = (Piece("delta", "w", (8,), slice(0, 8), "difference"),)

    def judged(rows):
        context = Context(trusted=trusted, generator=stream(1, "rule"), pieces=pieces, sent=trusted)
        return apply(rule, rows, context, learned)

    calm, other = judged(stack), judged(wild)
    assert torch.equal(calm.value[learned], other.value[learned])
    context = Context(trusted=trusted[:8], generator=stream(1, "rule"), pieces=pieces, sent=trusted[:8])
    alone = rule(stack[:, :8], context)
    assert torch.equal(calm.value[:8], alone.value)
    low, high = wild[:, 8:].amin(0), wild[:, 8:].amax(0)
    assert ((other.value[8:] >= low * (1 - 1e-5)) & (other.value[8:] <= high * (1 + 1e-5))).all()
    if other.weight is None:
        middles = [statistics.median(column) for column in wild[:, 8:].t().tolist()]
        torch.testing.assert_close(other.value[8:], torch.tensor(middles), rtol=1e-5, atol=1e-3)
    elif other.weight.sum() > 0:
        share = other.weight / other.weight.sum()
        torch.testing.assert_close(other.value[8:], (share.float() @ wild[:, 8:]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rule", ["krum:f=1", "median", "geometric_median", "centred_clip", "nnm+krum:f=1"])
def test_a_network_with_batch_norm_keeps_variances_under_rules_and_attackers(rule):
    task = Toy(norm=True, sizes=(30, 20, 25, 35, 28, 22, 26))
    made = ran(FedAvg(lr=0.1), task, 8, aggregate=rule, attack="gaussian:1,std=3")
    model = made.server.model
    assert all((model[name] > 0).all() for name in model if name.endswith("running_var"))


def test_claimed_weights_move_the_geometric_median_only_if_asked():
    stack, claims = rows(7, 5), torch.tensor([1.0, 1.0, 50.0, 1.0, 1.0, 1.0, 1.0])
    plain = aggregate("geometric_median", stack).value
    assert torch.equal(aggregate("geometric_median", stack, weights=claims).value, plain)
    claimed = aggregate("geometric_median:weighted=true", stack, weights=claims).value
    assert (claimed - stack[2]).norm() < 1e-3 < (plain - stack[2]).norm(), "half of all the weight is one reply's"


def test_the_default_bound_is_the_median_length():
    stack = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 2.0], [-10.0, 0.0], [0.0, 4.0]])  # lengths 3 1 2 10 4
    expected = (stack * torch.tensor([1.0, 1.0, 1.0, 0.3, 0.75])[:, None]).mean(0)
    torch.testing.assert_close(aggregate("norm_bound", stack).value, expected)


def test_a_reply_weighs_what_its_mixtures_weigh():
    stack = torch.tensor([[0.0], [0.1], [0.2], [0.3], [5.0]])
    # Each is the mean of its four nearest: 0 to 3 all get the same mixture, and Krum takes one of these.
    verdict = aggregate("nnm+krum:f=1", stack)
    torch.testing.assert_close(verdict.weight.float(), torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0]))
    torch.testing.assert_close(verdict.value, torch.tensor([0.15]))


def test_bulyan_scores_anew_after_every_choice():
    draws = [rows(11, 4, seed=seed) for seed in range(20)]
    for stack in draws:
        left, chosen = stack.tolist(), []
        for _ in range(11 - 2 * 2):
            near = [sorted(distance2(x, y) for y in left)[1 : 1 + max(len(left) - 2 - 2, 1)] for x in left]
            chosen.append(left.pop(min(range(len(left)), key=lambda k: sum(near[k]))))
        weight = aggregate("bulyan:f=2", stack).weight
        assert {k for k in range(11) if weight[k]} == {stack.tolist().index(x) for x in chosen}
