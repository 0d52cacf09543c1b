"""The mean of replies, against exact fractions; the tree's bits, however it is cut; its memory."""

import gc
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom import encoding, message
from fedloom import mean as means
from fedloom.encoding import same
from fedloom.errors import RunError
from fedloom.mean import Sum, Tree, split_weight
from fedloom.message import Packed, Seed, Sparse
from fedloom.random import stream
from fedloom.testing import difference
from fedloom.vector import Layout, Vector

QUICK = settings(deadline=None, max_examples=80)
LAYOUT = Layout(("w", "m"), ((2,), (1,)), 1)
EVEN = st.floats(-1000, 1000, width=32)


def floats(count):
    return st.lists(EVEN, min_size=count, max_size=count).map(torch.tensor)


@st.composite
def sparse(draw):
    index = sorted(draw(st.sets(st.integers(0, 4))))
    values = draw(st.lists(EVEN, min_size=2 * len(index), max_size=2 * len(index)))
    return Sparse(torch.tensor(index, dtype=torch.int64), torch.tensor(values).view(-1, 2), 5)


# Every field may be absent, and so may every key of the dict and every coordinate of the Sparse.
REPLY = st.fixed_dictionaries(
    {},
    optional={
        "number": st.one_of(EVEN, st.integers(-9, 9), st.booleans()),
        "tensor": floats(3),
        "counts": st.lists(st.integers(0, 9), min_size=2, max_size=2).map(torch.tensor),
        "vector": floats(3).map(lambda flat: Vector(flat, LAYOUT)),
        "sparse": sparse(),
        "protos": st.dictionaries(st.integers(0, 3), floats(2), max_size=3),
        "nested": st.fixed_dictionaries(
            {"pair": st.tuples(EVEN, floats(1))}, optional={"list": st.lists(EVEN, max_size=3)}
        ),
    },
)
WEIGHTED = st.lists(
    st.tuples(REPLY, st.one_of(st.integers(0, 50), st.floats(0.125, 8, width=16))), min_size=1, max_size=9
)


def coordinates(value, path=()):
    """(path with coordinate, exact number) of everything a reply or a mean holds."""
    if isinstance(value, Vector):
        value = value.flat
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from coordinates(inner, (*path, key))
    elif isinstance(value, Sparse):
        for place, row in zip(value.index.tolist(), value.values.tolist(), strict=True):
            yield from (((*path, place, column), Fraction(x)) for column, x in enumerate(row))
    elif isinstance(value, torch.Tensor):
        yield from (((*path, place), Fraction(x)) for place, x in enumerate(value.flatten().tolist()))
    else:
        yield path, Fraction(value)


def oracle(weighted):
    """The weighted mean of each coordinate over those that sent it."""
    totals, weights = {}, {}
    for reply, weight in weighted:
        for where, number in coordinates(reply):
            totals[where] = totals.get(where, 0) + Fraction(weight) * number
            weights[where] = weights.get(where, 0) + Fraction(weight)
    return {where: totals[where] / weights[where] for where in totals if weights[where]}


def summed(weighted):
    tree = Tree()
    for item in weighted:
        tree.push(None if item is None else Sum.of(item[0], float(item[1])))
    return tree.total()


def mean(*weighted):
    return summed(weighted).mean()


@QUICK
@given(WEIGHTED)
def test_against_exact_fractions(weighted):
    before = message.copy([reply for reply, _ in weighted])
    total = summed(weighted)
    found, expected = dict(coordinates(total.mean())), oracle(weighted)
    assert found.keys() == expected.keys()
    for where, number in expected.items():
        assert math.isclose(found[where], number, rel_tol=1e-6, abs_tol=1e-3 * 2**-24), where
    assert total.count == len(weighted) and total.weight == sum(weight for _, weight in weighted)
    assert difference(before, [reply for reply, _ in weighted]) is None, "replies are not modified"


FORMS = [
    (torch.ones(2), torch.ones(2)),
    (torch.ones(2, 1, dtype=torch.bfloat16), torch.ones(2, 1, dtype=torch.bfloat16)),
    (torch.tensor(4), torch.tensor(4.0)),  # whole numbers have a fractional mean
    (torch.tensor([True]), torch.tensor([1.0])),
    (Vector(torch.ones(3, dtype=torch.float16), LAYOUT), Vector(torch.ones(3, dtype=torch.float16), LAYOUT)),
    (3, 3.0),
    (True, 1.0),
    ((1.0, [2.0]), (1.0, [2.0])),
    ({}, {}),
    ([], []),
    ({"a": {}, 2: ()}, {"a": {}, 2: ()}),
]


@pytest.mark.parametrize(("sent", "back"), FORMS, ids=lambda value: type(value).__name__)
def test_a_mean_has_the_form_of_what_was_sent(sent, back):
    assert difference({"x": back}, mean(({"x": sent}, 1), ({"x": sent}, 3))) is None


@QUICK
@given(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.integers(1, 10**6), st.integers(0, 2**31))
def test_the_mean_of_one_reply_is_that_reply_bitwise(dtype, weight, key):
    bits = torch.randint(-(2**15), 2**15, (64,), generator=stream(key, "bits")).to(torch.int16)
    tensor = bits.view(dtype)
    tensor = torch.where(tensor.isfinite(), tensor, torch.ones((), dtype=dtype))
    reply = {"x": tensor, "v": Vector(tensor, Layout(("w",), (tuple(tensor.shape),), 1)), "p": {3: tensor}}
    assert difference(reply, mean((reply, weight))) is None
    half = Sparse(torch.arange(0, 2 * len(tensor), 2), tensor, 2 * len(tensor))
    back = mean(({"s": half}, weight))["s"]
    assert torch.equal(back.index, half.index) and torch.equal(back.values, half.values) and back.size == half.size


def test_the_mean_of_one_reply_in_double_precision_is_off_by_a_rounding_at_most():
    numbers = torch.randn(1000, generator=stream(0, "doubles"), dtype=torch.float64)
    for weight in (1.0, 3.0, 7.0, 49.0, 1e6):
        back = mean(({"x": numbers}, weight))["x"]
        assert bool(((back - numbers).abs() <= 2**-52 * numbers.abs()).all())
    assert torch.equal(mean(({"x": numbers}, 1.0))["x"], numbers)


def test_what_nobody_contributed_stays_bitwise():
    server = Vector(torch.randn(6, generator=stream(0, "server")), Layout(("w",), ((6,),), 1))
    one = {"part": Sparse(torch.tensor([0, 3]), torch.tensor([1.0, 2.0]), 6)}
    two = {"part": Sparse(torch.tensor([3, 5]), torch.tensor([4.0, -1.0]), 6)}
    silent = {"part": Sparse(torch.tensor([], dtype=torch.int64), torch.tensor([]), 6)}
    weightless = {"part": Sparse(torch.tensor([1]), torch.tensor([9.0]), 6)}
    part = mean((one, 1), (two, 3), (silent, 7), (weightless, 0))["part"]
    assert part.index.tolist() == [0, 3, 5] and part.values.tolist() == [1.0, 3.5, -1.0]
    moved = server.put(part.index, part.values)
    assert moved.flat.tolist() == [1.0, *server.flat[1:3].tolist(), 3.5, server.flat[4].item(), -1.0]


def first_of(size):
    return Sparse(torch.tensor([0]), torch.ones(1), size)


LONGER = Layout(("w", "m"), ((3,), (1,)), 1)
DIFFER = [
    (torch.ones(2), torch.ones(3), r"tensor \[2\] and tensor \[3\]"),
    (torch.ones(1), 1.0, r"tensor \[1\] and number"),
    (Vector(torch.ones(3), LAYOUT), Vector(torch.ones(4), LONGER), r"w\[2\].*w\[3\]"),
    (Vector(torch.ones(3), LAYOUT), torch.ones(3), "vector .* and tensor"),
    (first_of(3), first_of(4), r"sparse \[3\] and sparse \[4\]"),
    (first_of(3), torch.ones(3), "sparse .* and tensor"),
    ({"a": 1.0}, 1.0, "dict and number"),
    (1.0, {"a": 1.0}, "number .* and dict"),
    ([1.0], (1.0,), "list and tuple"),
    ([1.0], {0: 1.0}, "list and dict"),
]


@pytest.mark.parametrize(("one", "other", "complaint"), DIFFER)
def test_replies_of_different_forms_have_no_mean(one, other, complaint):
    with pytest.raises(RunError, match=complaint) as refused:
        mean(({"deep": {"x": one}}, 1), ({"deep": {"x": other}}, 1))
    assert "'deep.x'" in str(refused.value) and "\n" not in str(refused.value)


STRANGERS = [
    (None, "NoneType"),
    ("word", "str"),
    (b"bytes", "bytes"),
    (Seed(3), "Seed"),
    (Packed(torch.tensor([True]), 1), "Packed"),
    (torch.ones(2, dtype=torch.complex64), "tensor of torch.complex64"),
]


@pytest.mark.parametrize(("value", "kind"), STRANGERS, ids=lambda value: str(value)[:9])
def test_what_has_no_mean_is_refused(value, kind):
    with pytest.raises(RunError, match=rf"'x\.0', a {kind}"):
        mean(({"x": [value]}, 1))


def test_only_weightless_replies_leave_the_field_out():
    assert mean(({"x": 1.0}, 2), ({"x": 5.0, "y": 1.0, "z": {"a": 1.0}}, 0)) == {"x": 1.0, "z": {}}


def leaves(seed, count, absent=()):
    """Sums in double precision, where every order of adding leaves its own bits."""
    drawn = torch.randn(count, 5, generator=stream(seed, "leaves"), dtype=torch.float64).exp()
    replies = [{"x": row, "n": row[0].item(), "s": Sparse.of(row[:, None], row > 1)} for row in drawn]
    return [None if place in absent else (reply, drawn[place, 1].item()) for place, reply in enumerate(replies)]


def content(total):
    return None if total is None else encoding.encode(total.packed())


ABSENT = st.sets(st.integers(0, 36))


@QUICK
@given(st.integers(0, 37), ABSENT, st.integers(0, 5), st.data())
def test_blocks_reduced_apart_and_joined_in_any_order_give_the_same_bits(count, absent, level, data):
    weighted = leaves(1, count, absent)
    whole = content(summed(weighted))
    tree = Tree()
    for index in data.draw(st.permutations(range(-(-count >> level)))):
        block = Tree()
        span = [place for place in range(index << level, min(count, (index + 1) << level)) if place not in absent]
        for place in data.draw(st.permutations(span)):
            block.put(0, place, Sum.of(weighted[place][0], weighted[place][1]))
        part = block.total()
        over_a_wire = None if part is None else encoding.decode(encoding.encode(part.packed()))
        tree.put(level, index, None if part is None else Sum.unpacked(over_a_wire, torch.device("cpu")))
    assert content(tree.total()) == whole
    assert tree.total() is None, "empty afterwards"


def test_the_shape_of_the_tree_is_pairs_and_pairs_of_pairs():
    numbers = [1e16, 1.0, -1e16, 1.0, 1.0, 3.0, 0.5]
    total = summed([({"x": number}, 1) for number in numbers])
    pairs = ((1e16 + 1.0) + (-1e16 + 1.0)) + ((1.0 + 3.0) + 0.5)
    assert total.leaves["x",].total == pairs
    lost = summed([({"x": 1e16}, 1), None, None, ({"x": 1.0}, 1), ({"x": -1e16}, 1)])
    assert lost.leaves["x",].total == (1e16 + 1.0) + -1e16, "a lost reply leaves the others where they are"
    alone = summed([({"x": 1e16}, 1), None, ({"x": 1.0}, 1), ({"x": 1.0}, 1)])
    assert alone.leaves["x",].total == 1e16 + (1.0 + 1.0) != (1e16 + 1.0) + 1.0


@pytest.mark.parametrize("count", [1, 2, 64, 1000])
def test_memory_grows_with_the_logarithm(count):
    tree = Tree()
    most = 0
    for _ in range(count):
        tree.push(Sum.of({"x": 1.0}, 1.0))
        most = max(most, sum(node is not None for node in tree.nodes.values()))
    assert most <= count.bit_length()
    assert tree.total().leaves["x",].total == count


def test_a_sum_holds_no_reply():
    reply = {"x": torch.ones(1000), "v": Vector(torch.ones(3), LAYOUT)}
    total = Sum.of(reply, 1.0)
    total.add(Sum.of(reply, 1.0))
    gc.collect()
    storages = {leaf.total.untyped_storage().data_ptr() for leaf in total.leaves.values()}
    assert not storages & {reply["x"].untyped_storage().data_ptr(), reply["v"].flat.untyped_storage().data_ptr()}
    assert reply["x"].eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_reply_stays_what_it_was(dtype):
    reply = {"t": torch.ones(2, dtype=dtype), "v": Vector(torch.ones(3, dtype=dtype), LAYOUT)}
    Sum.of(reply, 3.0).add(Sum.of(reply, 2.0))
    assert reply["t"].eq(1).all() and reply["v"].flat.eq(1).all()


def test_the_order_of_the_fields_is_that_of_the_places_whatever_comes_first():
    replies = [{"a": 1.0, "b": {}}, {"c": 2.0}, {"d": 3.0, "a": 1.0}]
    whole = content(summed([(reply, 1) for reply in replies]))
    for order in ((2, 1, 0), (1, 0, 2), (0, 2, 1)):
        tree = Tree()
        for place in order:
            tree.put(0, place, Sum.of(replies[place], 1.0))
        assert content(tree.total()) == whole


ANY = {
    "v": Vector(torch.tensor([1.5, -2.0, 4.0]), LAYOUT),
    "n": 3.0,
    "t": torch.tensor([[0.5], [8.0]], dtype=torch.bfloat16),
    "s": Sparse(torch.tensor([2]), torch.tensor([5.0], dtype=torch.float16), 4),
    "p": [(1, {})],
}


def test_the_sum_of_a_worker_has_the_mean_of_the_replies_in_it():
    over_a_wire = encoding.decode(encoding.encode(summed([(ANY, 2), (ANY, 3)]).packed()))
    back = Sum.unpacked(over_a_wire, torch.device("cpu"))
    assert (back.weight, back.count) == (5, 2)
    assert difference(mean((ANY, 2), (ANY, 3)), back.mean()) is None


WHOLE = {name: value for name, value in ANY.items() if name != "s"}


def test_a_row_has_the_numbers_in_the_order_of_another_sum():
    first = Sum.of(WHOLE, 1.0)
    other = Sum.of({name: WHOLE[name] for name in reversed(WHOLE)}, 1.0)
    row = [1.5, -2.0, 4.0, 3.0, 0.5, 8.0, 1.0]
    assert first.row(first).tolist() == other.row(first).tolist() == row
    assert first.row(other).tolist() == [1.0, 0.5, 8.0, 3.0, 1.5, -2.0, 4.0]
    assert first.learned(torch.device("cpu")).tolist() == [True, True, False, True, True, True, True], "m is a buffer"


def test_what_a_rule_makes_of_rows_has_the_form_of_the_replies():
    first = Sum.of(WHOLE, 1.0)
    made = first.filled(2 * first.row(first), 7.0, 3)
    doubled = {"v": 2 * WHOLE["v"], "n": 6.0, "t": 2 * WHOLE["t"], "p": [(2.0, {})]}
    assert (made.weight, made.count) == (7.0, 3) and difference(doubled, made.mean()) is None


@pytest.mark.parametrize("other", [{"v": WHOLE["v"]}, WHOLE | {"n": torch.ones(1)}, WHOLE | {"more": 1.0}, ANY])
def test_a_rule_takes_replies_that_are_whole_and_alike_only(other):
    with pytest.raises(RunError, match="a robust rule needs replies that are whole and alike"):
        Sum.of(other, 1.0).row(Sum.of(WHOLE, 1.0))


def test_a_weight_is_a_field_of_the_reply_that_is_not_averaged():
    reply = {"x": 1.0, "n": 0, "w": -1.0}
    assert split_weight("mean", 3, reply, None) == (reply, 1.0)
    assert split_weight("mean", 3, reply, "n") == ({"x": 1.0, "w": -1.0}, 0.0)
    for weight, told in (("w", r"client 3 sent -1\.0; a weight is a number"), ("z", "client 3 has no such field")):
        with pytest.raises(RunError, match=told):
            split_weight("mean", 3, reply, weight)
    with pytest.raises(RunError, match="a weight is a number"):
        split_weight("mean", 3, {"n": torch.ones(1)}, "n")


# Large tensors are taken piece by piece: here pieces are small


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(means, "PIECE", 3)


def large(seed, turned=False):
    """A reply of tensors that are larger than a piece, in a dtype each."""
    g = stream(seed, "large")
    w = torch.randn(20, generator=g)
    t = torch.randn(5, 4, generator=g, dtype=torch.float64)
    return {
        "w": Vector(w, Layout(("w",), ((20,),), 1)),
        "t": t.T.contiguous().T if turned else t,
        "n": torch.randint(99, (7,), generator=g),
        "h": torch.randn(8, generator=g).bfloat16(),
    }


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_replies_that_are_lent_have_the_mean_of_those_that_are_copied(small_pieces, count, turned):
    replies = [large(seed, turned and seed % 2) for seed in range(count)]
    weights = [0.1 + seed for seed in range(count)]
    before = [message.copy(reply) for reply in replies]
    found = {}
    for lent in (False, True):
        tree = Tree()
        for reply, weight in zip(replies, weights, strict=True):
            tree.push(Sum.of(reply, weight, lent))
        found[lent] = tree.total().mean()
    assert same(found[True], found[False])
    assert all(map(same, replies, before))
    wanted = sum(r["t"] * weight for r, weight in zip(replies, weights, strict=True)) / sum(weights)
    assert torch.allclose(found[True]["t"], wanted, rtol=1e-14)
    assert [found[True][name].dtype for name in "tnh"] == [torch.float64, torch.float32, torch.bfloat16]


def test_a_sum_in_the_tree_shares_no_memory_with_a_reply(small_pieces):
    reply, tree = large(0), Tree()
    tree.push(Sum.of(reply, 2.0, lent=True))
    wanted = Sum.of(large(0), 2.0).mean()
    for value in (reply["w"].flat, reply["t"], reply["n"], reply["h"]):
        value.zero_()
    assert same(tree.total().mean(), wanted)


def test_a_reply_is_lent_only_to_who_asks_for_it(small_pieces):
    for lent in (False, True):
        reply = large(0)
        one = Sum.of(reply, 2.0, lent)
        assert (one.leaves["t",].value is reply["t"]) == lent


def test_a_lent_reply_is_added_before_all_of_it_is_doubles(monkeypatch):
    made, times = [], means._times
    monkeypatch.setattr(means, "PIECE", 3)
    monkeypatch.setattr(means, "_times", lambda value, weight: made.append(value) or times(value, weight))
    tree = Tree()
    for seed in range(2):
        tree.push(Sum.of(large(seed), 1.0, lent=True))
    assert [len(value.view(-1)) > 3 for value in made].count(True) == 4  # the first reply's


def test_a_reply_that_is_as_large_as_the_rest_is_lent_in_a_tree_of_lost_ones(small_pieces):
    tree = Tree()
    for place in range(8):
        tree.push(Sum.of(large(5), 3.0, lent=True) if place == 5 else None)
    assert same(tree.total().mean(), Sum.of(large(5), 3.0).mean())
