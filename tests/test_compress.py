"""Compression: each family against its definition, exact bytes, error feedback, and the same bits on every engine."""

import itertools
import math
import tracemalloc
from dataclasses import dataclass

import pytest
import torch
from problems import ran as ran_on
from problems import stopped_and_resumed

from fedloom import encoding, message
from fedloom.boundary.compress import MARK, STAGES, Compress, pipeline, quantize
from fedloom.boundary.compress.compressor import Desk, packed, unpacked
from fedloom.boundary.compress.lossless import Zstd, library
from fedloom.boundary.compress.sparse import placed, places
from fedloom.calls import Call, ClientError
from fedloom.engines import build
from fedloom.errors import CodecError, UsageError
from fedloom.method import Method, client
from fedloom.methods.heterogeneous.fedproto import FedProto
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.scaffold import Scaffold
from fedloom.methods.personalize.fedbn import FedBN
from fedloom.node import Client
from fedloom.random import stream
from fedloom.registry import catalogue
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.site import Site
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab, difference, trace
from fedloom.vector import Layout, Vector

CALL = Call("mean", "local", (0,), {}, {}, "train", 1, 0)
SITE = Site(Toy(), seed=0)


def normal(n, seed=0, heavy=False):
    x = torch.randn(n, generator=stream(seed, "test"))
    return x**3 if heavy else x


def fresh(round=1, state=None):
    return Client(SITE, 0, state or {}, "train", round, 0)


def through(text, x, client=None):
    """What the server makes of a difference, and the reply that travels."""
    layer = Compress.of(text, FedAvg())
    sent = layer.around(client or fresh(), CALL, {}, lambda: {"delta": x, "n": 3})
    got = layer.arrive(CALL, 0, encoding.decode(encoding.encode(sent)))
    assert got["n"] == 3 and type(got["delta"]) is type(x)
    return got["delta"], sent


def square(x):
    return float((x.double() ** 2).sum())


# The definitions.

UNBIASED = {  # text -> the bound omega on E|Q(x) - x|^2 / |x|^2, for n = 700 numbers in blocks of 64 where it matters
    "randk:0.25,ef=false": 3.0,
    "qsgd:4,block=64": min(64 / 7**2, 8 / 7),
    "qsgd:2,block=64": 8.0,
    "qsgd:3,block=0": math.sqrt(700) / 3,
    "randk:0.25,ef=false+qsgd:4,block=64": 3 + 4 * 8 / 7,
}


def drawn(text, x, times):
    """What the server makes of x in so many rounds, [times, n]."""
    layer = Compress.of(text, FedAvg())
    sent = (layer.around(fresh(round), CALL, {}, lambda: {"delta": x}) for round in range(times))
    return torch.stack([layer.arrive(CALL, 0, reply)["delta"] for reply in sent]).double()


def unbiased(draws, x):
    """Requires that the mean of the draws is x but for chance: in three directions and, more coarsely, everywhere."""
    times, off = len(draws), draws - x
    for direction in (x, x.sign(), torch.ones_like(x)):
        along = off @ direction.double()
        assert along.mean().abs() <= 5 * along.std() / math.sqrt(times) + 1e-4
    rare = 20 * draws.abs().max() / times  # what happens in a few draws only has no variance yet
    assert (off.mean(0).abs() <= 5 * (draws.var(0) / times).sqrt() + rare).all()


@pytest.mark.parametrize("text", UNBIASED)
def test_unbiased_with_the_variance_that_the_paper_bounds(text):
    x = normal(700, heavy=True)
    draws = drawn(text, x, 400)
    unbiased(draws, x)
    assert 0 < float(draws.var(0).sum()) <= UNBIASED[text] * square(x) * 1.1


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_uniform_is_unbiased_and_off_by_less_than_a_level(bits):
    x = normal(300, heavy=True)
    levels = torch.cat([(block.max() - block.min()).expand(len(block)) for block in x.split(64)]) / (2**bits - 1)
    draws = drawn(f"uniform:{bits},block=64", x, 400)
    unbiased(draws, x)
    assert ((draws - x).abs() <= levels * 1.0001).all()
    assert (draws.var(0) <= levels.double() ** 2 / 4 * 1.01).all()
    nearest, _ = through(f"uniform:{bits},block=64,rounding=nearest,ef=false", x)
    assert ((nearest - x).abs() <= levels * 0.5001).all()


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_top_k_keeps_the_largest_and_contracts(share, heavy):
    x = normal(1000, heavy=heavy)
    got, _ = through(f"topk:{share}", x)
    kept = got != 0
    assert int(kept.sum()) == share * 1000 and torch.equal(got[kept], x[kept])
    assert x[kept].abs().min() >= x[~kept].abs().max()
    assert square(got - x) <= (1 - share) * square(x)


def test_rand_k_contracts_on_average_where_errors_are_fed_back():
    x = normal(500, heavy=True)
    errors = [square(through("randk:0.2", x, fresh(round))[0] - x) for round in range(600)]
    assert sum(errors) / len(errors) == pytest.approx(0.8 * square(x), rel=0.05)


def test_sign_is_the_sign_times_the_mean_size():
    x = normal(1000, heavy=True)
    x[3] = 0.0
    got, _ = through("sign:block=0", x)
    assert torch.equal(got[x != 0].sign(), x[x != 0].sign())
    assert torch.allclose(got.abs(), x.abs().mean().expand(1000))
    assert square(got - x) == pytest.approx(square(x) - float(x.double().abs().sum()) ** 2 / 1000, rel=1e-5)
    blocks, _ = through("sign:block=300", x)
    assert torch.allclose(blocks[900:].abs(), x[900:].abs().mean().expand(100)), "the last block is a smaller one"


EVERY = ["topk:0.05", "randk:0.3", "sign", "lowrank:1", "fp16:ef=true", "bf16:ef=true"]
EVERY += [f"uniform:{bits},ef=true,rounding={how}" for bits in (1, 3, 8) for how in ("nearest", "stochastic")]
EVERY += ["qsgd:2,ef=true", "qsgd:4,ef=true,norm=max", "topk:0.1+qsgd:2", "topk:0.1+sign", "randk:0.5+uniform:1"]
EVERY += ["topk:0.2+uniform:2,block=16", "lowrank:2+bf16"]


@pytest.mark.parametrize("text", EVERY)
def test_whatever_feeds_errors_back_contracts(text):
    """Otherwise what is left would grow without bound."""
    layout = Layout(("a", "b", "c"), ((40, 30), (7,), (6, 4, 3, 3)), 3)
    for seed in range(20):
        x = Vector(normal(layout.size, seed, heavy=seed % 2 == 0), layout)
        got, _ = through(text, x, fresh(seed))
        assert square(got.flat - x.flat) < square(x.flat)


def test_an_all_zero_difference_stays_zero():
    for text in EVERY:
        got, _ = through(text, torch.zeros(2000))
        assert torch.equal(got, torch.zeros(2000)), text


def test_low_rank_finds_a_matrix_of_low_rank_and_warms_up_on_others():
    generator = stream(0, "test")
    thin = torch.randn(60, 2, generator=generator) @ torch.randn(2, 40, generator=generator)
    assert torch.allclose(through("lowrank:2", thin)[0], thin, atol=1e-4)
    full = torch.randn(60, 40, generator=generator)
    best = square(full) - float((torch.linalg.svdvals(full.double()) ** 2)[:3].sum())
    errors, state = [], {}
    for round in range(40):
        client = fresh(round, state)
        errors.append(square(through("lowrank:3,ef=false", full, client)[0] - full))
        state = client.state.values_
    assert errors[-1] <= 1.02 * best < errors[0], "the power iteration goes on from round to round"
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))


def test_low_rank_leaves_vectors_and_small_matrices_alone():
    layout = Layout(("w", "bias", "small", "kernel"), ((50, 20), (20,), (2, 2), (8, 4, 3, 3)), 4)
    x = Vector(normal(layout.size), layout)
    got, _ = through("lowrank:1", x)
    assert torch.equal(got["bias"], x["bias"]) and torch.equal(got["small"], x["small"])
    kernel = got["kernel"].permute(0, 2, 3, 1).reshape(8, -1)
    assert torch.linalg.matrix_rank(kernel, atol=1e-4) == torch.linalg.matrix_rank(got["w"], atol=1e-4) == 1


@pytest.mark.parametrize(("text", "relative"), [("fp16", 2**-11), ("bf16", 2**-8)])
def test_halves_round_to_the_nearest(text, relative):
    x = normal(1000)
    got, _ = through(text, x)
    assert ((got - x).abs() <= relative * x.abs() + 1e-7).all() and not torch.equal(got, x)
    huge, _ = through(text, torch.full((1000,), 1e6))
    assert huge.isfinite().all()


@pytest.mark.parametrize("n", [1, 2, 9, 64, 1000, 4097])
def test_places_come_back_in_fewer_bits_than_any_mask_or_list(n):
    for k in {1, 2, max(1, n // 100), n // 10, n // 3, n - 1, n}:
        if not 1 <= k <= n:
            continue
        index = torch.randperm(n, generator=stream(n, "test", k))[:k].sort().values
        wire = places(index, n)
        assert torch.equal(placed(wire, k, n), index)
        bits = sum(part.values.numel() * part.bits for part in (wire if isinstance(wire, list) else [wire]) if part)
        assert bits <= n + 15
        if k == n // 100 and n > 4000:
            assert bits <= k * (math.log2(n / k) + 2) + 16 < k * math.log2(n), "Elias-Fano"


def along(text, x, feedback=False, seed=0, warm=()):
    """What the stages of a text make of x, however long it is on the wire."""
    stages, _ = pipeline(text)
    desk, shapes = Desk(lambda: stream(seed, "test"), list(warm), feedback), ((len(x),),)
    return unpacked(stages, packed(stages, x, shapes, desk), shapes)


@pytest.mark.parametrize(
    ("share", "n", "k"), [(0.07, 100, 7), (0.29, 100, 29), (0.01, 150, 2), (0.34, 3, 2), (1e-12, 9, 1)]
)
@pytest.mark.parametrize("name", ["topk", "randk"])
def test_k_is_the_least_number_that_is_at_least_the_share_and_not_nothing(name, share, n, k):
    assert int((along(f"{name}:{share}", normal(n)) != 0).sum()) == k


def test_random_coordinates_are_others_in_every_round():
    kept = torch.stack([through("randk:0.1", torch.ones(1000), fresh(round))[0] != 0 for round in range(50)])
    assert (kept.sum(1) == 100).all() and kept.any(0).float().mean() > 0.95


@pytest.mark.parametrize("norm", ["l2", "max"])
def test_a_qsgd_level_is_a_share_of_the_norm(norm):
    x = normal(200, heavy=True)
    length = x.norm() if norm == "l2" else x.abs().max()
    levels = along(f"qsgd:4,block=0,norm={norm}", x) / length * 7
    assert torch.allclose(levels, levels.round(), atol=1e-4) and levels.unique().numel() > 3
    assert ((levels - x / length * 7).abs() < 1 + 1e-4).all(), "one of the two levels around it"


def test_a_last_block_is_one_of_its_own():
    """A block of one number is its own norm and its own range."""
    x = torch.cat([normal(64), torch.tensor([0.25])])
    for text in ("qsgd:4,block=64", "qsgd:2,block=64,norm=max", "uniform:2,block=64", "sign:block=64"):
        assert along(text, x)[64] == 0.25, text
    far = 100 + normal(70)
    assert torch.allclose(along("sign:block=64", far)[64:], far[64:].mean(), rtol=1e-6), "of six numbers"
    width = (far[64:].max() - far[64:].min()) / 3
    assert ((along("uniform:2,block=64", far)[64:] - far[64:]).abs() <= 1.0001 * width).all()


def test_the_numbers_of_a_block_are_rounded_apart():
    levels = along("qsgd:4,block=64", torch.ones(64)) != 0
    assert levels.any() and not levels.all(), "|x_i| / |x| = 1/8 lies between two levels"


@pytest.mark.parametrize("text", ["qsgd:4,norm=max,block=0", "qsgd:8,norm=max,block=0", "uniform:4", "uniform:8"])
def test_the_largest_draw_lifts_no_number_over_the_highest_level(text, monkeypatch):
    monkeypatch.setattr(quantize, "uniform", lambda like, desk: torch.full_like(like, 1 - 2**-24))
    x = torch.linspace(-1, 1, 100)
    got = along(text, x)
    assert got[-1] == 1 and got.abs().max() == 1


FEW = ["qsgd:2", "qsgd:4,norm=max", "uniform:1", "uniform:3", "uniform:2,rounding=nearest", "sign"]


@pytest.mark.parametrize("text", FEW)
def test_the_scale_of_every_block_is_the_least_squares_one(text):
    """What is left of a block is orthogonal to what is sent of it."""
    x = 0.3 + normal(50, heavy=True)
    text += ("," if ":" in text else ":") + "block=16"
    got = along(text, x, True)
    for sent, left in zip(got.double().split(16), (x - got).double().split(16), strict=True):
        assert abs(sent @ left) <= 1e-6 * (1 + sent @ sent)
        assert square(left) <= square(left + sent) * (1 + 1e-6)


def test_bfloat16_has_the_range_of_single_precision():
    x = torch.tensor([3e38, -1e-30, 1e6])
    assert torch.allclose(along("bf16", x), x, rtol=2**-8, atol=0)


def test_the_warm_start_of_every_matrix_is_its_own():
    layout = Layout(("a", "b"), ((30, 20), (30, 20)), 2)
    x, state = Vector(normal(layout.size), layout), {}
    for round in range(40):
        client = fresh(round, state)
        got, _ = through("lowrank:2,ef=false", x, client)
        state = client.state.values_
    for name in layout.names:
        best = float((torch.linalg.svdvals(x[name].double()) ** 2)[2:].sum())
        assert square(got[name] - x[name]) <= 1.02 * best, name


def elias_fano(listed, n, low):
    """The code of places: their low bits, and the mask that has its i-th one at h_i + i."""
    high = torch.zeros(len(listed) + ((n - 1) >> low), dtype=torch.bool)
    high[torch.tensor([(place >> low) + i for i, place in enumerate(listed)])] = True
    return [message.Packed(torch.tensor([place % (1 << low) for place in listed]), low), message.Packed(high, 1)]


def test_places_are_in_elias_fano_code_and_forged_ones_are_refused():
    k, n = 4, 1000
    made = places(torch.tensor([0, 5, 700, 999]), n)
    low = made[0].bits
    assert encoding.same(made, elias_fano([0, 5, 700, 999], n, low)) and n % (1 << low)
    few, masks = elias_fano([0, 5, 700], n, low)[1].values, [torch.arange(n) < ones for ones in (3, 5)]
    short = torch.zeros(len(made[1].values), dtype=torch.bool)
    short[: len(few)] = few
    forged = [elias_fano([0, 5, 700, n], n, low), elias_fano([0, 5, 5, 999], n, low)]
    forged += [[made[0], message.Packed(short, 1)], *(message.Packed(mask, 1) for mask in masks)]
    forged += [[message.Packed(made[0].values, low + 1), made[1]]]
    for wire in forged:
        with pytest.raises(CodecError):
            placed(wire, k, n)


@pytest.mark.parametrize(("k", "n"), [(4, 1024), (10, 2560), (3, 3 << 12)])
def test_elias_fano_takes_no_bit_more_than_its_definition(k, n):
    lower, upper = places(torch.arange(k), n)
    assert upper.values.numel() == k + (n - 1) // 2**lower.bits


# Error feedback.


def remembered(client):
    kept = client.state.get("_compress", {})
    return kept.get("local.delta", {}).get("left")


@pytest.mark.parametrize("text", ["topk:0.05", "randk:0.1", "sign", "qsgd:3,ef=true", "topk:0.1+qsgd:4", "lowrank:2"])
def test_what_was_sent_and_what_is_left_add_up_to_the_true_differences(text):
    layout = Layout(("a", "b"), ((30, 20), (50,)), 2)
    state, true, sent = {}, torch.zeros(layout.size).double(), torch.zeros(layout.size).double()
    for round in range(12):
        client, x = fresh(round, state), Vector(normal(layout.size, round), layout)
        got, _ = through(text, x, client)
        true += x.flat
        sent += got.flat
        state = client.state.values_
        left = remembered(client).flat
        assert torch.allclose(sent + left, true, rtol=0, atol=2e-5)
    assert square(left) > 0


def test_with_top_k_the_sum_is_exact():
    client, x = fresh(), normal(1000)
    got, _ = through("topk:0.1", x, client)
    assert torch.equal(got + remembered(client), x)
    again, _ = through("topk:0.1", torch.zeros(1000), client)
    assert torch.equal(got + again + remembered(client), x), "what was left is sent next"
    assert int((again != 0).sum()) == 100


@pytest.mark.parametrize("text", ["qsgd:4", "topk:0.1,ef=false", "uniform:8", "fp16"])
def test_without_error_feedback_nothing_is_kept(text):
    client = fresh()
    through(text, normal(1000), client)
    assert dict(client.state) == {}


def test_what_was_left_of_another_layout_is_forgotten():
    client = fresh()
    through("topk:0.1", normal(1000), client)
    got, _ = through("topk:0.1", normal(500, seed=1), client)
    kept = got != 0
    assert torch.equal(got[kept], normal(500, seed=1)[kept]) and len(remembered(client)) == 500


def apart(**replies):
    """A client that is asked for each function's reply twice, and what the server has of it in all."""
    client, layer, got = fresh(), Compress.of("topk:0.1", FedAvg()), {}
    for name, reply in [*replies.items()] * 2:
        call = Call("mean", name, (0,), {}, {}, "train", 1, 0)
        got.setdefault(name, []).append(
            layer.arrive(call, 0, layer.around(client, call, {}, lambda r=reply: r))["delta"]
        )
    return got


def test_what_is_left_belongs_to_a_function_and_a_place_in_its_reply():
    x, y = normal(1000), normal(1000, seed=1)
    alone = apart(one={"delta": x})["one"]
    together = apart(one={"delta": x}, other={"delta": y})["one"]
    nested = apart(one={"delta": {"a": x, "c": y, "b": [x, y]}})["one"]
    for both in (together, [got["a"] for got in nested], [got["b"][0] for got in nested]):
        assert encoding.same(both, alone)


def test_a_sum_that_travels_as_it_is_leaves_nothing():
    """Whether zstd makes a value shorter depends on its numbers."""
    text, client = "topk:0.97+zstd", fresh()
    bits = torch.randint(-(2**31), 2**31, (1000,), generator=stream(0, "rough")).to(torch.int32)
    rough = bits.view(torch.float32).nan_to_num(1.0, 1.0, 1.0)
    _, sent = through(text, torch.linspace(1, 2, 1000), client)
    left = remembered(client)
    assert isinstance(sent["delta"], dict) and left.any()
    got, sent = through(text, rough, client)
    assert not isinstance(sent["delta"], dict), "random bits are as long as before"
    assert torch.equal(got, rough + left)
    assert remembered(client) is None, "all of it was sent"


def test_halves_are_calculated_with_in_single_precision():
    x = (1000 + normal(1000)).half()
    got, _ = through("sign:block=0", x)
    assert got.dtype == torch.float16 and torch.allclose(got.float(), x.float().mean(), rtol=1e-3)
    client = fresh()
    got, _ = through("sign:block=0", x, client)
    assert torch.equal((got + remembered(client)), x)


# Bytes.

PACKED = {  # text -> bytes of numbers alone, for n numbers
    "topk:0.01": lambda n: 4 * n // 100 + (n // 100 * 6 + 7) // 8 + (n // 100 + (n - 1) // 64 + 7) // 8,
    "randk:0.02": lambda n: 4 * n // 50,
    "qsgd:4": lambda n: n // 2 + 4 * -(-n // 512),
    "qsgd:2,block=0": lambda n: n // 4 + 4,
    "uniform:5": lambda n: (5 * n + 7) // 8 + 8 * -(-n // 512),
    "sign": lambda n: n // 8 + 4 * -(-n // 512),
    "fp16": lambda n: 2 * n,
    "bf16": lambda n: 2 * n,
    "randk:0.1+qsgd:4": lambda n: n // 20 + 4 * -(-n // 5120),
    "topk:0.5+sign:block=0": lambda n: n // 8 + n // 16 + 4,
}


@pytest.mark.parametrize("text", PACKED)
def test_bytes_are_those_of_the_formula(text):
    for n in (20_000, 100_000):
        _, sent = through(text, normal(n))
        numbers = PACKED[text](n)
        whole = encoding.sizes(sent)["delta"]
        assert len(encoding.encode(sent)) == sum(encoding.sizes(sent).values())
        assert numbers < whole <= numbers + 120, "names, shapes and lengths come to a hundred bytes at most"


def test_low_rank_bytes():
    layout = Layout(("w", "bias"), ((300, 200), (77,)), 2)
    _, sent = through("lowrank:4", Vector(normal(layout.size), layout))
    numbers = 4 * (4 * (300 + 200) + 77)
    assert numbers < encoding.sizes(sent)["delta"] <= numbers + 120


@pytest.mark.parametrize("text", ["topk:1.0", "topk:0.9", "sign", "qsgd:8", "lowrank:4", "topk:0.5+fp16"])
def test_never_longer_than_without(text):
    for n in (1, 2, 5, 40):
        _, sent = through(text, normal(n))
        assert encoding.sizes(sent)["delta"] <= encoding.sizes({"delta": normal(n)})["delta"]


@pytest.mark.parametrize("engine", ["serial", "loopback"])
def test_the_ledger_counts_the_encoded_bytes(engine):
    sizes = []

    class Weighing(type(build(engine))):
        def run(self, call, clients):
            for outcome in super().run(call, clients):
                if call.kind == "train":
                    sizes.append(len(encoding.encode(outcome.reply)))
                yield outcome

    made = Lab(Scaffold).experiment(engine=Weighing(), compress="topk:0.1+qsgd:4")
    assert sum(row["up_bytes"] for row in made.record.metrics) == sum(sizes)
    fields = {line["field"] for line in made.record.ledger if line["direction"] == "up" and line["kind"] == "train"}
    assert fields == {"delta", "shift", "envelope"}
    plain = Lab(Scaffold).experiment()
    assert sum(sizes) < 0.8 * sum(row["up_bytes"] for row in plain.record.metrics)


# Whole runs.


def results(made):
    return {part: value for part, value in trace(made).items() if part in ("server", "states")}


@pytest.mark.parametrize("text", ["topk:1.0", "topk:1.0,ef=false", "zstd", "randk:1.0"])
@pytest.mark.parametrize("method", [FedAvg, Scaffold, FedBN], ids=lambda m: m.__name__)
def test_all_of_it_is_the_plain_run_bitwise(method, text):
    lab, task = Lab(method), Toy(norm=True, sizes=(30, 20, 25, 35))
    assert difference(results(lab.experiment(task)), results(lab.experiment(task, compress=text))) is None


HARD = "lowrank:1+fp16+zstd"


@pytest.mark.parametrize("engine", ["loopback", "pool", "vectorized"])
@pytest.mark.parametrize("text", ["topk:0.1+qsgd:4+zstd", "randk:0.2", "lowrank:1", "sign", HARD])
def test_every_engine_gives_the_bits_of_serial(text, engine):
    settings = {"compress": text, "lost": 0.2, "dropout": 0.2, "rounds": 3}
    serial = trace(Lab(Scaffold).experiment(**settings))
    other = trace(
        Lab(Scaffold).experiment(engine=build(engine, workers=0 if engine == "vectorized" else 2), **settings)
    )
    assert difference(serial, other, nearly=1e-3 if engine == "vectorized" else 0.0) is None


@pytest.mark.parametrize("text", ["topk:0.05", "lowrank:2"])
def test_a_resumed_run_feeds_the_same_errors_back(tmp_path, text):
    method, task = FedAvg(), Toy()
    spec = Spec.of({"method": method.to_spec(), "partition": "given", "rounds": 3, "compress": text})
    whole = Experiment(spec, task, method).begin(None)
    whole.go()
    again = stopped_and_resumed(spec, task, method, tmp_path / "run")
    assert "_compress" in again.states[0]
    assert difference(trace(whole), trace(again)) is None


@pytest.mark.parametrize("name", [entry.name for entry in catalogue()])
def test_every_method_runs_compressed_or_says_why_not(name):
    lab = Lab(next(entry for entry in catalogue() if entry.name == name).load(Method))
    if not lab.method.compressible:
        with pytest.raises(
            UsageError,
            match=f"{name} declares no field of its replies to be a difference|those of {name} do nothing there",
        ):
            lab.experiment(compress="topk:0.2")
        return
    made, plain = lab.experiment(compress="topk:0.2"), lab.serial
    up, before = (sum(row["up_bytes"] for row in rows) for rows in (made.record.metrics, plain["metrics"]))
    assert up < 0.8 * before, "a declared field is one that is sent"
    assert all(vector.flat.isfinite().all() for vector in made.server.values.values() if isinstance(vector, Vector))


@pytest.mark.parametrize("text", ["topk:0.05", "sign:block=0"])
def test_error_feedback_reaches_a_minimum_that_bias_alone_misses(text):
    """Descent on the mean of |x - c_k|^2 / 2 for clients whose c_k differ."""
    centres = [normal(200, seed=k) for k in range(4)]
    best = sum(centres) / 4
    off = {}
    for option in ("ef=true", "ef=false"):
        layer = Compress.of(f"{text},{option}", FedAvg())
        x, states, steps = torch.zeros(200), [{} for _ in centres], 250
        for round in range(steps):
            step, mean = 0.1 * (1 - round / steps) + 1e-3, torch.zeros(200)
            for k, centre in enumerate(centres):
                client = Client(SITE, k, states[k], "train", round, 0)
                difference = step * (centre - x)
                sent = layer.around(client, CALL, {}, lambda sent=difference: {"delta": sent})
                mean += layer.arrive(CALL, k, sent)["delta"] / 4
                states[k] = client.state.values_
            x = x + mean
        off[option] = float((x - best).norm() / best.norm())
    assert off["ef=true"] < 0.15 and off["ef=true"] < off["ef=false"] / 2, off


def test_one_percent_of_the_digits_is_enough():
    import fedloom

    settings = {"rounds": 12, "eval_every": 12, "report": False}
    plain, sparse = (fedloom.run("fedavg", "digits", compress=text, **settings) for text in (None, "topk:0.01"))
    up, less = (sum(row["up_bytes"] for row in made.metrics) for made in (plain, sparse))
    assert less < up / 40 and sparse.final["global_test_accuracy"] > 0.7


# What is refused.


@dataclass(frozen=True)
class Gossip(FedAvg):
    def round(self, server, cohort):
        cohort.exchange(self.local, self.mix, {k: [k] for k in cohort}, model=server.model)

    @client
    def mix(self, client, inbox, model):
        return {}


REFUSED = [
    ("tipk:0.1", "unknown compression 'tipk'; did you mean 'topk'"),
    ("topk:1.5", "a share over 0, at most 1"),
    ("topk:0", "a share over 0, at most 1"),
    ("qsgd:1", "it takes 2 to 8 bits"),
    ("uniform:9", "it takes 1 to 8 bits"),
    ("sign:2", "a sign is one bit"),
    ("lowrank:0", "a rank is at least 1"),
    ("zstd:99", "the level is from 1 to 22"),
    ("topk:share=x", "must be of type float"),
    ("topk:part=0.1", "unknown option of compress: topk 'part'"),
    ("fp16:3", "fp16 has nothing to choose"),
    ("topk:0.1,share=0.2", "one twice"),
    ("qsgd:4+topk:0.1", "topk:0.1 stands too late"),
    ("topk:0.1+randk:0.1", "stands too late"),
    ("zstd+topk:0.1", "stands too late"),
    ("lowrank:2+sign", "factors bear fp16 or bf16"),
    ("topk:0.1,ef=true+qsgd:4,ef=false", "asks for error feedback and another for none"),
    ("uniform:8,rounding=up", "unknown compress: uniform: rounding 'up'"),
    ("qsgd:4,block=-1", "a number of numbers"),
]


@pytest.mark.parametrize(("text", "complaint"), REFUSED)
def test_a_text_that_makes_no_sense_is_refused(text, complaint):
    with pytest.raises(UsageError) as told:
        Compress.of(text, FedAvg())
    assert complaint in str(told.value)


def test_models_are_never_compressed():
    with pytest.raises(UsageError, match=r"fedproto declares no field .* \(it sends protos\); only differences"):
        Compress.of("topk:0.1", FedProto())
    with pytest.raises(UsageError, match="masks make every number as long"):
        Lab(FedAvg).experiment(compress="topk:0.1", secure="bonawitz")
    with pytest.raises(ClientError, match="only what goes up is compressed"):
        Lab(Gossip()).experiment(compress="topk:0.1")


def test_only_floats_of_declared_fields_are_touched():
    reply = {
        "delta": {"a": normal(1000), "b": [torch.arange(1000), 3, "x", torch.ones(0)], "c": (normal(900).double(),)},
        "other": normal(1000),
    }
    layer = Compress.of("topk:0.1", FedAvg())
    sent = layer.around(fresh(), CALL, {}, lambda: reply)
    assert sent["other"] is reply["other"] and encoding.same(sent["delta"]["b"], reply["delta"]["b"])
    got = layer.arrive(CALL, 0, sent)
    assert int((got["delta"]["a"] != 0).sum()) == 100
    assert got["delta"]["c"][0].dtype == torch.float64 and int((got["delta"]["c"][0] != 0).sum()) == 90


def test_numbers_that_are_not_finite_are_told_as_without_compression():
    reply = {"delta": torch.tensor([1.0, math.nan] * 100)}
    assert Compress.of("topk:0.1", FedAvg()).around(fresh(), CALL, {}, lambda: reply)["delta"] is reply["delta"]


PIPELINES = ["topk:0.1", "topk:0.4+qsgd:4", "randk:0.1+sign", "uniform:3", "bf16", "lowrank:2", "topk:0.1+zstd"]


@pytest.mark.parametrize("text", PIPELINES)
def test_forged_values_are_turned_away(text):
    """Whatever part of the wire form is another thing: a CodecError, or a value of the outline that was claimed."""
    layout = Layout(("a", "b"), ((40, 30), (7,)), 2)
    layer = Compress.of(text, FedAvg())
    sent = layer.around(fresh(), CALL, {}, lambda: {"delta": Vector(normal(layout.size), layout)})
    strange = [None, 1, -1, "x", b"raw", [], {}, torch.ones(3), torch.ones(1207), message.Seed(1), [1, 2], ()]
    strange += [message.Packed(torch.ones(1207, dtype=torch.bool), 1), 2**50, [2**50, 2**50], [[2**40]], [[-1]]]
    refused = 0

    def forged(value):
        for other in strange:
            yield other
        if isinstance(value, list | tuple):
            for place, inner in enumerate(value):
                for other in forged(inner):
                    yield type(value)([*value[:place], other, *value[place + 1 :]])

    for form in forged(sent["delta"]["~"]):
        try:
            got = layer.arrive(CALL, 7, {"delta": {"~": form}})["delta"]
            assert isinstance(got, torch.Tensor | Vector)
        except CodecError as error:
            assert str(error).startswith("reply of client 7 to local: ") and "\n" not in str(error)
            refused += 1
    assert refused > 50


def forms(text, x):
    """What travels in place of x: dtype, outline and wire form."""
    return Compress.of(text, FedAvg()).around(fresh(), CALL, {}, lambda: {"delta": x})["delta"][MARK]


def refuses(text, form, told=None):
    with pytest.raises(CodecError, match=told):
        Compress.of(text, FedAvg()).arrive(CALL, 7, {"delta": {MARK: form}})


def test_codes_that_lie_beyond_the_scale_are_refused():
    """Otherwise 8 bits in place of 4 were 16 times as large, and one scale stood for all."""
    dtype, outline, (codes, scales) = forms("qsgd:4", normal(2000))
    refuses("qsgd:4", [dtype, outline, [message.Packed(codes.values + 100, 8), scales]], "codes")
    refuses("qsgd:4", [dtype, outline, [codes, scales[:1]]], "scales")


def test_an_outline_that_contradicts_itself_is_refused():
    layout = Layout(("a", "b"), ((40, 30), (7,)), 1)
    dtype, (names, shapes, parameters), wire = forms("topk:0.1", Vector(normal(layout.size), layout))
    refuses("topk:0.1", [dtype, [["a", "a"], shapes, parameters], wire], "shapes")
    refuses("topk:0.1", [dtype, [names, shapes, 3], wire], "parameters")
    refuses("topk:0.1", [dtype, [names, shapes, -1], wire], "parameters")


def peak(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_short_string_that_expands_to_much_is_refused_before_it_does():
    squeezed, many = library().compress(bytes(2**26), 3), 2**26
    bombs = [
        [squeezed, "uint8", 0, [many]],
        [squeezed, "int64", 1, [many]],
        [squeezed, "uint8", 0, [100]],
        [squeezed, "float32", 0, [2**40]],
    ]
    for bomb in bombs:
        wire = [None, tuple(bomb)]
        assert peak(lambda wire=wire: refuses("topk:0.1+zstd", ["float32", [100], wire])) < 2**21
    small = (library().compress(bytes(2**15), 3), "uint8", 0, [2**15])
    assert peak(lambda: refuses("topk:0.1+zstd", ["float32", [100], [small] * 1000])) < 2**22, "in all"


def test_a_string_holds_exactly_the_numbers_of_its_shape():
    data = library().compress(bytes(range(100)), 3)
    assert Zstd().expand((data, "uint8", 0, [4, 25])).tolist()[0] == [*range(25)]
    for extent in (99, 101, 0):
        with pytest.raises(CodecError):
            Zstd().expand((data, "uint8", 0, [extent]))


def test_all_values_of_a_reply_together_hold_no_more_numbers_than_one_may():
    made = ran_on(FedAvg(), Toy(), 1, compress="sign")
    call = Call("mean", "local", (0,), {"model": made.server.model}, {}, "train", 1, 0)
    layer, bound = made.site.layers[0], 4 * 2 * made.site.initial.layout.size + 2**16
    form = forms("sign", torch.ones(bound // 8))
    layer.arrive(call, 0, {"delta": [{MARK: form}] * 8}, made.site)
    with pytest.raises(CodecError, match="shape"):
        layer.arrive(call, 0, {"delta": [{MARK: form}] * 9}, made.site)


def test_zstd_keeps_codes_of_any_bits_and_every_number():
    for text in ("topk:0.001", "topk:0.1+qsgd:4", "uniform:1", "bf16"):
        x = normal(400_000)
        plain, packed_ = (through(f"{text}{more}", x, fresh())[0] for more in ("", "+zstd"))
        assert torch.equal(plain, packed_), text
    wire = [
        torch.arange(5.0).repeat(100),
        message.Packed(torch.arange(300) % 2 * 511, 9),
        torch.ones(500).double(),
        None,
    ]
    assert encoding.same(Zstd().expand(Zstd().squeeze(wire)), wire)
    assert [type(part) for part in Zstd().squeeze(wire)[:3]] == [tuple] * 3


def test_zstd_makes_no_part_longer():
    for n in range(1, 120):
        for wire in (torch.zeros(n), normal(n), message.Packed(torch.arange(n) % 2, 1)):
            assert len(encoding.encode({"x": Zstd().squeeze(wire)})) <= len(encoding.encode({"x": wire}))
    assert Zstd(22).level == 22


def test_every_family_has_a_pipeline():
    assert {type(stage) for text in STAGES for stage in pipeline(text)[0]} == {
        cls for name, cls in STAGES.items() if name != "zstd"
    }


def test_the_door_compares_forms_without_compression():
    """zstd shortens some clients' numbers and not others'; that is no reason to turn anybody away."""
    lab = Lab(FedAvg(batch=0))
    settings = {"compress": "topk:0.9+zstd", "rounds": 2}
    doored = lab.experiment(faults="duplicate:0.3", **settings)
    assert difference(dict(doored.server.values), dict(lab.experiment(**settings).server.values)) is None


@pytest.mark.parametrize("faults", ["corrupt:0.3", "truncate:0.3", "oversize:0.2"])
def test_replies_that_were_damaged_on_their_way_are_survived(faults):
    made = Lab(FedAvg()).experiment(compress="topk:0.2+qsgd:4", faults=faults, rounds=4)
    assert made.server.model.flat.isfinite().all() and made.record.final["replies"] >= 0


@pytest.mark.parametrize("text", ["qsgd:4", "sign", "topk:0.5", "randk:0.3+sign", "uniform:8", "lowrank:2", "fp16"])
def test_an_outline_of_nothing_is_refused_and_so_is_one_of_more_than_could_be_meant(text):
    made = ran_on(FedAvg(), Toy(), 1, compress=text)
    layer, call = made.site.layers[0], Call("mean", "local", (0,), {"model": made.server.model}, {}, "train", 1, 0)
    form, _ = layer._through(torch.ones(64), Desk(lambda: torch.Generator(), [], False))
    name, _, wire = form[MARK]
    with pytest.raises(CodecError):
        layer.arrive(call, 0, {"delta": {MARK: [name, [0], wire]}}, made.site)
    size = made.site.initial.layout.size
    with pytest.raises(CodecError, match="shape"):  # before any of them exists
        layer.arrive(call, 0, {"delta": {MARK: [name, [2**28], wire]}}, made.site)
    with pytest.raises(CodecError, match="shape"):
        layer.arrive(call, 0, {"delta": {MARK: [name, [8 * size + 2**16 + 1], wire]}}, made.site)
