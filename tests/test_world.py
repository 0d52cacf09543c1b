"""Who takes part and who fails: the right shares, independent of one another, the same in every repetition."""

import math
from itertools import pairwise

import pytest

from fedloom.errors import UsageError
from fedloom.world import World

ROUNDS = 2000
SIGMAS = 5  # of a binomial count: a fair draw leaves this bound once in two million counts


def within(count, trials, share):
    return abs(count - trials * share) <= SIGMAS * math.sqrt(trials * share * (1 - share)) + 1e-9


def test_cohorts_are_uniform_and_of_distinct_clients():
    world = World(population=12, cohort=4)
    chosen = [world.choose(round) for round in range(ROUNDS)]
    assert all(len(c) == 4 and all(a < b for a, b in pairwise(c)) and c[0] >= 0 and c[-1] < 12 for c in chosen)
    for client in range(12):
        assert within(sum(client in c for c in chosen), ROUNDS, 4 / 12)
        after = sum(client in one and client in other for one, other in pairwise(chosen))
        assert within(after, ROUNDS - 1, (4 / 12) ** 2), "taking part in a round says nothing about the next"
    for pair in ((0, 1), (0, 11), (5, 6)):
        assert within(sum(set(pair) <= set(c) for c in chosen), ROUNDS, 4 * 3 / (12 * 11))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("kind", ["dropout", "lost"])
def test_shares(kind, share):
    world = World(population=10, **{kind: share})
    fails = {"dropout": world.silent, "lost": world.loses}
    assert within(sum(fails[kind](r, 0, k) for r in range(ROUNDS // 5) for k in range(10)), ROUNDS * 2, share)
    other = fails["lost" if kind == "dropout" else "dropout"]
    assert not any(other(r, 0, k) for r in range(50) for k in range(10))


def test_failures_are_independent():
    world = World(population=2, dropout=0.5, lost=0.5)
    both = sum(world.silent(r, 0, 0) and world.loses(r, 0, 0) for r in range(ROUNDS))
    clients = sum(world.silent(r, 0, 0) and world.silent(r, 0, 1) for r in range(ROUNDS))
    calls = sum(world.silent(r, 0, 0) and world.silent(r, 1, 0) for r in range(ROUNDS))
    rounds = sum(world.silent(r, 0, 0) and world.silent(r + 1, 0, 0) for r in range(ROUNDS))
    assert all(within(count, ROUNDS, 0.25) for count in (both, clients, calls, rounds))


def test_the_same_seed_is_the_same_world_and_another_is_another():
    def seen(seed):
        world = World(50, 10, 0.3, 0.3, seed)
        return [(tuple(world.choose(r)), world.silent(r, 0, 0), world.loses(r, 0, 0)) for r in range(30)]

    assert seen(0) == seen(0) != seen(1)
    for part in zip(zip(*seen(0), strict=True), zip(*seen(1), strict=True), strict=True):
        assert part[0] != part[1], "cohorts, silence and losses alike are the seed's"


def test_worlds_are_nested():
    plain, little, much = (World(30, 10, share, share) for share in (0.0, 0.2, 0.6))
    for round in range(100):
        assert plain.choose(round) == little.choose(round) == much.choose(round), "failures do not change who is asked"
        for client in range(30):
            assert little.silent(round, 0, client) <= much.silent(round, 0, client), "more dropout adds to the silent"
            assert little.loses(round, 1, client) <= much.loses(round, 1, client)
    small, large = World(30, 10, 0.2), World(30, 20, 0.2)
    assert all(set(small.choose(r)) <= set(large.choose(r)) for r in range(50)), "a larger cohort adds clients"
    assert all(small.silent(r, 0, k) == large.silent(r, 0, k) for r in range(50) for k in range(30))


@pytest.mark.parametrize(
    ("cohort", "factor", "asked"), [(10, 1.0, 10), (50, 1.1, 55), (10, 1.15, 12), (9, 4 / 3, 12), (60, 2.0, 100)]
)
def test_over_selection_asks_so_many_times_the_cohort_rounded_up(cohort, factor, asked):
    assert len(World(100, cohort, overselect=factor).choose(1)) == asked  # 50 * 1.1 is a hair above 55


@pytest.mark.parametrize("availability", ["always", "bernoulli:0.5"])
def test_what_only_goes_by_rounds_goes_with_the_walls_clock_and_breaks_no_work(availability):
    world = World(5, clock="real", availability=availability, lost=0.1)
    assert not world.interrupts and world.has_failures
    assert World(5, availability="bernoulli:0.5,period=3").interrupts and not World(5).has_failures
    assert World(5, lost=0.1).has_failures and World(5, dropout=0.1).has_failures


@pytest.mark.parametrize("cohort", [None, 7])
def test_everybody(cohort):
    assert list(World(7, cohort).choose(3)) == list(range(7))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"cohort": 0}, "cohort is 0; there are 5 clients"),
        ({"cohort": 6}, "cohort is 6; there are 5 clients"),
        ({"dropout": -0.1}, "dropout is -0.1; it is a share"),
        ({"lost": 1.5}, "lost is 1.5; it is a share"),
        ({"lost": math.nan}, "lost is nan; it is a share"),
    ],
)
def test_impossible_worlds(settings, complaint):
    with pytest.raises(UsageError, match=complaint):
        World(5, **settings)
