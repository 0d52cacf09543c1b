"""Traces of pure functions: bitwise what the function gives, and only where that is so."""

import pytest
import torch
from torch.func import grad_and_value, vmap

from fedloom.engines import heap
from fedloom.engines.traced import AFTER, AT_MOST, Traced


def arguments(clients=5, samples=3):
    draw = torch.Generator().manual_seed(clients * samples)
    return [torch.randn(clients, 4, 2, generator=draw)], torch.randn(clients, samples, 4, generator=draw)


def value(weights, x):
    return (x @ weights[0]).tanh().square().sum()


def test_a_trace_takes_over_and_changes_no_bit():
    calls = []

    def counted(weights, x):
        calls.append(1)
        return value(weights, x)

    slope = vmap(grad_and_value(counted))
    traced = Traced(slope)
    for shape in [(5, 3), (7, 2)] * AFTER + [(5, 3), (7, 2)]:
        weights, x = arguments(*shape)
        (its,), values = traced(weights, x)
        (same,), likewise = vmap(grad_and_value(value))(weights, x)
        assert torch.equal(its, same)
        assert torch.equal(values, likewise)
    assert len(traced.traces) == 2
    assert len(calls) == 2 * (AFTER + 1)  # each form's calls, its trace, and none since


def test_new_numbers_of_a_form_are_used_and_views_are_another_form():
    traced = Traced(lambda a, b: a.reshape(-1) * b)
    for _ in range(AFTER):
        traced(torch.ones(2, 3), torch.ones(6))
    a, b = torch.randn(3, 2).T, torch.randn(6)
    assert torch.equal(traced(a, b), a.reshape(-1) * b)
    assert torch.equal(traced(a.contiguous(), b), a.reshape(-1) * b)


def test_numbers_of_another_type_are_another_form():
    traced = Traced(lambda a: a.double().square().to(a.dtype))
    for _ in range(AFTER + 1):
        traced(torch.ones(3))
    a = torch.rand(3, dtype=torch.float64)
    assert traced(a).dtype == torch.float64 and torch.equal(traced(a), a.square())


def branching(a):
    return a * 2 if a.sum().item() > 0 else a


def shifting():
    calls = []

    def function(a):
        calls.append(1)
        return a + len(calls)

    return function


@pytest.mark.parametrize(("make", "expected"), [(lambda: branching, lambda n, a: 2 * a), (shifting, None)])
def test_what_has_no_faithful_trace_is_called_as_ever(make, expected):
    traced, a = Traced(make()), torch.ones(3)
    for n in range(2 * AFTER):
        out = traced(a)
        if expected is not None:
            assert torch.equal(out, expected(n, a))
    if expected is None:
        assert out[0] >= 1 + 2 * AFTER
    assert list(traced.traces.values()) == [None]


def test_a_trace_is_faithful_in_every_part_of_its_result():
    calls = []

    def function(a):
        calls.append(1)
        return a + 1, a + len(calls)

    traced, a = Traced(function), torch.ones(3)
    for _ in range(AFTER + 5):
        traced(a)
    assert list(traced.traces.values()) == [None]
    assert len(calls) == AFTER + 5 + 1, "it was traced once"


def test_traces_do_not_grow_without_end():
    traced = Traced(lambda a: a + 1)
    for size in range(AT_MOST + 5):
        for _ in range(AFTER):
            traced(torch.ones(size + 1))
    assert len(traced.traces) == AT_MOST


def test_the_heap_is_kept_where_there_is_a_glibc_and_left_alone_elsewhere(monkeypatch):
    heap.keep()
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    heap.keep()
