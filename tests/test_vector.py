"""A vector is what torch makes of flat tensors; a layout keeps the parts apart."""

import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedloom.errors import UsageError
from fedloom.random import stream
from fedloom.vector import Layout, Vector

NAMES = ("body.0.weight", "body.0.bias", "body.1.weight", "head.weight", "head.bias", "scale", "head.mean")
QUICK = settings(deadline=None, max_examples=60)
SHAPE = st.lists(st.integers(0, 3), max_size=5).map(tuple)


@st.composite
def layouts(draw):
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, min_size=1))
    shapes = draw(st.lists(SHAPE, min_size=len(names), max_size=len(names)))
    return Layout(tuple(names), tuple(shapes), draw(st.integers(0, len(names))))


def random(layout, key=0):
    return Vector(torch.randn(layout.size, generator=stream(0, "test", key)), layout)


vectors = layouts().map(random)


def same(one, other):
    return one.layout == other.layout and one.flat.dtype == other.flat.dtype and torch.equal(one.flat, other.flat)


class Odd(nn.Module):
    """Everything a layout must cope with: a 0-dim scalar, a tied parameter, float and integer buffers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3), nn.Conv2d(2, 3, (1, 2), bias=False))
        self.head = nn.Linear(3, 3)
        self.head.weight = self.body[0].weight
        self.scale = nn.Parameter(torch.tensor(2.0))


LAYOUT = Layout(("a.weight", "b", "a.mean"), ((2, 2), (), (3,)), 2)
U, V = random(LAYOUT, "u"), random(LAYOUT, "v")
ZERO_DIM = torch.tensor(3.0, dtype=torch.float64)  # takes part as a number: the result stays single precision

ARITHMETIC = [
    (lambda u, v: u + v, torch.add(U.flat, V.flat)),
    (lambda u, v: u - v, torch.sub(U.flat, V.flat)),
    (lambda u, v: u * v, torch.mul(U.flat, V.flat)),
    (lambda u, v: u / v, torch.div(U.flat, V.flat)),
    (lambda u, v: u + 2, U.flat + 2),
    (lambda u, v: 2 + u, U.flat + 2),
    (lambda u, v: 2 - u, 2 - U.flat),
    (lambda u, v: u - 0.1, U.flat - 0.1),
    (lambda u, v: 0.1 * u, U.flat * 0.1),
    (lambda u, v: u * ZERO_DIM, (U.flat * 3.0)),
    (lambda u, v: ZERO_DIM * u, (U.flat * 3.0)),
    (lambda u, v: u / 3, U.flat / 3),
    (lambda u, v: u**2, U.flat**2),
    (lambda u, v: -u, -U.flat),
    (lambda u, v: abs(u.norm()) * u, U.flat * torch.sqrt((U.flat**2).sum())),
    (lambda u, v: (u @ v) * u, U.flat * (U.flat * V.flat).sum()),
    (lambda u, v: u.abs().sqrt(), U.flat.abs().sqrt()),
    (lambda u, v: u.sign(), U.flat.sign()),
    (lambda u, v: u.map(torch.exp), U.flat.exp()),
    (lambda u, v: u.where(u.flat > 0), U.flat.clamp(min=0)),
    (lambda u, v: u.where(u.flat > 0, 7.0), torch.where(U.flat > 0, U.flat, 7.0)),
    (lambda u, v: u.where(u.flat > 0, v), torch.where(U.flat > 0, U.flat, V.flat)),
    (lambda u, v: sum([u, v], start=u.zeros_like()), U.flat + V.flat),
]


@pytest.mark.parametrize(("expression", "flat"), ARITHMETIC)
def test_arithmetic_is_that_of_flat_tensors(expression, flat):
    before = U.flat.clone(), V.flat.clone()
    result = expression(U, V)
    assert result.layout == LAYOUT and result.flat.dtype == torch.float32
    torch.testing.assert_close(result.flat, flat, rtol=1e-6, atol=0)
    assert torch.equal(U.flat, before[0]) and torch.equal(V.flat, before[1])
    assert result.flat.data_ptr() not in (U.flat.data_ptr(), V.flat.data_ptr())


OTHERS = [
    Layout(("a.weight", "b", "a.var"), LAYOUT.shapes, 2),  # another name
    Layout(LAYOUT.names, ((4,), (), (3,)), 2),  # another shape of the same size
    Layout(LAYOUT.names, LAYOUT.shapes, 3),  # a buffer that became a parameter
    Layout(("b", "a.weight", "a.mean"), ((), (2, 2), (3,)), 2),  # another order
]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("operation", [operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul])
def test_different_layouts_do_not_mix_and_both_are_named(operation, other):
    with pytest.raises(UsageError) as refused:
        operation(U, random(other))
    assert str(LAYOUT) in str(refused.value) and str(other) in str(refused.value)
    assert LAYOUT.digest != other.digest


@pytest.mark.parametrize("stranger", ["1", None, [1.0], torch.ones(8)])
def test_no_arithmetic_with_strangers(stranger):
    with pytest.raises(TypeError):
        U + stranger


@pytest.mark.parametrize("flat", [torch.ones(7), torch.ones(8, dtype=torch.int64), torch.ones(2, 4)])
def test_a_flat_tensor_that_does_not_fit_its_layout_is_refused(flat):
    with pytest.raises(UsageError, match=r"needs a float tensor \[8\], got"):
        Vector(flat, LAYOUT)


def test_of_a_network():
    net = Odd()
    v = Vector.of(net)
    parameters = ["scale", "body.0.weight", "body.1.weight", "body.1.bias", "body.2.weight", "head.bias"]
    buffers = ["body.1.running_mean", "body.1.running_var"]
    assert list(v) == [*parameters, *buffers], "a tied parameter once, and no integer buffer"
    assert len(v) == v.layout.size == 1 + 9 + 3 + 3 + 12 + 3 + 3 + 3
    state = net.state_dict()
    assert all(torch.equal(v[name], state[name]) and v[name].shape == state[name].shape for name in v)
    assert v["scale"].shape == () and v.layout.split == 31
    v.flat.zero_()
    assert net.scale.item() == 2.0, "a copy"
    assert list(v.params) == parameters and list(v.buffers) == buffers


def test_what_is_frozen_is_no_part_of_the_model():
    net = Odd()
    net.head.bias.requires_grad_(False)
    v = Vector.of(net)
    assert "head.bias" not in list(v) and len(v) == len(Vector.of(Odd())) - 3


def test_entries_with_four_axes_lie_channels_last():
    kernel = torch.randn(5, 4, 3, 2, generator=stream(0, "kernel"))
    layout = Layout(("kernel", "b"), ((5, 4, 3, 2), (1,)), 2)
    flat = layout.flatten([kernel, torch.ones(1)])
    assert torch.equal(flat[:-1], kernel.permute(0, 2, 3, 1).flatten())
    assert torch.equal(Vector(flat, layout)["kernel"], kernel)
    rows = torch.stack([flat, 2 * flat])
    assert torch.equal(layout.views(rows)[0], torch.stack([kernel, 2 * kernel])), "and so does a stack of them"


@QUICK
@given(vectors)
def test_params_and_buffers_are_views_that_make_up_the_whole(v):
    assert list(v.params) + list(v.buffers) == list(v)
    assert torch.equal(torch.cat([v.params.flat, v.buffers.flat]), v.flat)
    v.params.flat.fill_(1.0)
    v.buffers.flat.fill_(2.0)
    assert torch.equal(v.flat, torch.tensor([1.0] * v.layout.split + [2.0] * (len(v) - v.layout.split)))


@QUICK
@given(vectors, st.data())
def test_select_and_drop_part_a_vector_and_merge_joins_it(v, data):
    pattern = data.draw(st.sampled_from([*v, "*"]))
    inside, outside = v.select(pattern), v.drop(pattern)
    assert sorted([*inside, *outside]) == sorted(v)
    assert all(torch.equal(part[name], v[name]) for part in (inside, outside) for name in part)
    assert inside.layout.parameters == sum(list(v).index(name) < v.layout.parameters for name in inside)
    assert same(v.zeros_like().merge(inside).merge(outside), v)
    untouched = v.clone()
    merged = v.merge(inside * 0 + 1)
    assert all(bool((merged[name] == 1).all()) for name in inside)
    assert all(torch.equal(merged[name], v[name]) for name in outside)
    inside.flat.zero_()
    assert same(v, untouched), "parts are copies"


@QUICK
@given(vectors, st.data())
def test_take_and_put(v, data):
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(v), max_size=len(v))), dtype=torch.bool)
    index = mask.nonzero().squeeze(1)
    assert torch.equal(v.take(mask), v.take(index)) and torch.equal(v.take(mask), v.flat[mask])
    assert same(v.put(index, v.take(index)), v)
    doubled = v.put(mask, 2 * v.take(mask))
    assert same(doubled, v.put(index, 2 * v.take(index)))
    assert same(doubled, (2 * v).where(mask, v)) and same(doubled, v.where(~mask, 2 * v))


@QUICK
@given(layouts(), layouts())
def test_a_digest_names_a_layout(one, other):
    assert (one.digest == other.digest) == (one == other)


PATTERNS = [
    (("body.1.*",), ["body.1.weight", "body.1.bias", "body.1.running_mean", "body.1.running_var"]),
    (("*bias", "scale"), ["scale", "body.1.bias", "head.bias"]),
    (("body.[!0]*running*",), ["body.1.running_mean", "body.1.running_var"]),
    ((), []),
]


@pytest.mark.parametrize(("patterns", "names"), PATTERNS)
def test_patterns(patterns, names):
    v = Vector.of(Odd())
    assert list(v.select(*patterns)) == names
    assert list(v.drop(*patterns)) == [name for name in v if name not in names]


REFUSED = [
    (lambda v: v["heed.bias"], "did you mean 'head.bias'"),
    (lambda v: v.select("tail.*"), "unknown part of a model 'tail.*'"),
    (lambda v: v.drop("body.*", "tail.*"), "unknown part of a model 'tail.*'"),
    (lambda v: v.merge(Vector(torch.ones(2), Layout(("head.bias",), ((2,),), 1))), r"'head.bias' has shape \[3\]"),
    (lambda v: v.merge(Vector(torch.ones(2), Layout(("tail",), ((2,),), 1))), "unknown part of a model 'tail'"),
    (lambda v: v.map(lambda flat: flat[1:]), "needs a float tensor"),
]


@pytest.mark.parametrize(("action", "complaint"), REFUSED)
def test_what_is_not_there_is_refused_in_one_line(action, complaint):
    with pytest.raises(UsageError, match=complaint) as refused:
        action(Vector.of(Odd()))
    assert "\n" not in str(refused.value)


def test_readonly_marks_what_came_and_nothing_made_of_it():
    came = Vector(U.flat, LAYOUT, readonly=True)
    made = [came + 1, came.clone(), came.select("b"), came.merge(came), came.put(torch.tensor([0]), torch.ones(1))]
    assert came.readonly and not U.readonly and not any(v.readonly for v in made)
    assert all(v.flat.data_ptr() != came.flat.data_ptr() for v in made)


def test_entries_share_memory_with_the_vector():
    v = U.clone()
    v["a.weight"].zero_()
    assert v.flat[:4].eq(0).all() and torch.equal(v.flat[4:], U.flat[4:])
    assert [view.shape for view in LAYOUT.views(v.flat)] == [(2, 2), (), (3,)]


@QUICK
@given(layouts())
def test_flattened_entries_are_the_flat_tensor_again(layout):
    flat = random(layout).flat
    assert torch.equal(layout.flatten(layout.views(flat)), flat)
    assert [tuple(view.shape) for view in layout.views(flat)] == list(layout.shapes)
    assert all(
        torch.equal(a, b)
        for a, b in zip(layout.views(flat), map(random(layout).__getitem__, layout.names), strict=True)
    )
