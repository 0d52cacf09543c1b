"""Intervals, tests and ranks against brute force and published tables."""

import itertools
import math
import statistics as plain
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.comparison import statistics as s
from fedloom.comparison.statistics import Paired, Ranks
from fedloom.errors import UsageError

T_975 = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262}  # Student's t, any textbook's table
Q_05 = {2: 1.960, 3: 2.343, 4: 2.569, 5: 2.728, 6: 2.850, 10: 3.164}  # Demsar 2006, table 5(a)


def by_seed(values):
    return dict(enumerate(values))


def differing(differences, test):
    return s.paired(by_seed(differences), by_seed([0.0] * len(differences)), "other", test)


def signed_ranks(differences):
    """Wilcoxon's two-sided p by trying every sign."""
    kept = [d for d in differences if d]
    order = sorted(abs(d) for d in kept)
    ranks = [plain.mean(i + 1 for i, o in enumerate(order) if o == abs(d)) for d in kept]
    middle = sum(ranks) / 2
    seen = abs(sum(r for r, d in zip(ranks, kept, strict=True) if d > 0) - middle)
    signs = list(itertools.product((0, 1), repeat=len(kept)))
    far = sum(abs(sum(r for r, on in zip(ranks, sign, strict=True) if on) - middle) >= seen - 1e-9 for sign in signs)
    return far / len(signs)


def holm(p):
    """Holm 1979, step by step: the ith smallest times what is left, never below the one before."""
    found, highest = [0.0] * len(p), 0.0
    for step, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - step) * p[i]))
        found[i] = highest
    return found


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_interval_is_students(n):
    values = [0.5 + 0.01 * i * i for i in range(n)]
    found = s.interval(values)
    assert found.mean == pytest.approx(plain.mean(values))
    assert found.half == pytest.approx(T_975[n - 1] * plain.stdev(values) / math.sqrt(n), rel=1e-3)


def test_below_two_seeds_there_is_no_interval():
    assert (s.interval([0.4]).mean, s.interval([0.4]).half) == (0.4, None)
    assert s.interval([]).mean is None and s.interval([]).half is None


@given(st.lists(st.integers(-5, 5), min_size=6, max_size=9))
@settings(max_examples=40, deadline=None)
def test_wilcoxon_is_exact_with_ties_and_zeros(differences):
    found = differing(differences, "wilcoxon")
    nonzero = sum(d != 0 for d in differences)
    if nonzero >= 6:
        assert found.p == pytest.approx(signed_ranks(differences))
    elif nonzero:
        assert found.p is None and "too few seeds" in found.why
    else:
        assert found.p == 1.0


@pytest.mark.parametrize("n", [10, 11, s.EXACT])
def test_wilcoxon_tries_all_signs_of_up_to_so_many_pairs(n):
    differences = [(-1) ** (i * i // 3) * (1 + i // 2) for i in range(n)]  # in ties of two
    assert differing(differences, "wilcoxon").p == pytest.approx(signed_ranks(differences), rel=1e-12)


@pytest.mark.parametrize(("n", "test"), [(5, "wilcoxon"), (2, "t"), (1, "t"), (0, "wilcoxon")])
def test_too_few_seeds_says_so_instead_of_a_p_value(n, test):
    found = differing([0.1 + 0.01 * i for i in range(n)], test)
    assert found.p is None and found.why.startswith(f"too few seeds: {n} pairs")
    assert s.correct_by_holm({"a": found})["a"].holm is None


def test_the_least_number_of_pairs_is_the_least_that_can_reach_significance():
    assert signed_ranks([1, 2, 3, 4, 5, 6]) < s.ALPHA < signed_ranks([1, 2, 3, 4, 5])
    assert differing([1, 2, 3, 4, 5, 6], "wilcoxon").p == pytest.approx(2 / 2**6)


def test_wilcoxons_pairs_are_those_that_differ():
    found = differing([1, 2, 3, 4, 5, 0], "wilcoxon")
    assert found.p is None and found.why.startswith("too few seeds: 5 pairs that differ")


def test_the_paired_t_test_by_hand():
    # differences 1, 2, 3: t = 2 / (1 / sqrt 3); with two degrees of freedom p = 1 - t / sqrt(2 + t^2)
    t = 2 * math.sqrt(3)
    assert differing([1, 2, 3], "t").p == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_pairs_are_by_seed_and_only_shared_seeds_count():
    found = s.paired({0: 1.0, 1: 2.0, 2: 9.0}, {2: 1.0, 1: 1.5, 7: 0.0}, "other", "t")
    assert found.difference.values == (0.5, 8.0)


@pytest.mark.parametrize("test", list(s.TESTS))
def test_the_same_numbers_are_not_different(test):
    assert differing([0.0] * 8, test).p == 1.0


def test_a_constant_difference_cannot_be_tested_by_its_spread():
    found = differing([0.25] * 5, "t")
    assert found.p is None and found.effect is None and "the same at every seed" in found.why


def test_the_effect_is_hedges_g():
    differences = [1.0, 2.0, 3.0, 6.0]
    n = len(differences)
    usual = 1 - 3 / (4 * (n - 1) - 1)  # Hedges' approximation of the exact factor
    found = s.effect(differences)
    assert found == pytest.approx(usual * plain.mean(differences) / plain.stdev(differences), rel=0.01)
    assert s.effect([-d for d in differences]) == -found


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_holm_step_by_step(p):
    tests = {str(i): Paired("other", s.interval([1, 2]), None, one, None) for i, one in enumerate(p)}
    with mock.patch("gc.collect"):  # `multipletests` collects at each call all that earlier tests left
        found = s.correct_by_holm(tests)
    assert [found[str(i)].holm for i in range(len(p))] == pytest.approx(holm(p))


def test_those_that_cannot_be_tested_do_not_count_in_the_correction():
    some = Paired("other", s.interval([1, 2]), None, 0.02, None)
    none = Paired("other", s.interval([1, 2]), None, None, "too few seeds")
    found = s.correct_by_holm({"a": some, "b": none})
    assert found["a"].holm == 0.02 and found["b"].holm is None


def test_methods_without_a_score_are_not_tested_and_none_against_itself():
    scores = {"a": by_seed([0.9, 0.8, 0.7]), "none": {}, "b": by_seed([0.5, 0.6, 0.1])}
    assert s.test_against(scores, "a", "t").keys() == {"b"}


def test_worse_is_below_and_significant_after_the_correction():
    def judged(values, p, holm):
        return s.worse(Paired("other", s.interval(values), None, p, None, holm))

    assert judged([-1, -2], 0.001, 0.01)
    assert not judged([1, 2], 0.001, 0.01) and not judged([-1, -2], 0.01, 0.2) and not judged([-1, -2], None, None)


def test_the_best_has_the_highest_mean_however_many_seeds_it_has():
    assert s.best_of({"many": by_seed([0.5] * 3), "few": by_seed([0.9])}) == "few"


def test_what_rounding_leaves_of_a_constant_difference_is_no_spread():
    differences = [0.1, 0.3 - 0.2, 0.4 - 0.3]
    assert len(set(differences)) == 3 and s.effect(differences) is None


def test_leaders_share_the_mark():
    noise = [0.0, 0.004, -0.004, 0.002, -0.002, 0.001, 0.003, -0.003]
    scores = {
        "best": by_seed([0.9 + x for x in noise]),
        "tied": by_seed([0.899 - x for x in noise]),
        "behind": by_seed([0.7 + 2 * x for x in noise]),
    }
    for test in s.TESTS:
        assert s.leaders(scores, test) == ("best", "tied")


def test_what_correction_makes_unreachable_is_too_few_seeds():
    better = {str(m): by_seed([0.5 + 0.01 * i + 0.1 * m for i in range(6)]) for m in range(3)}
    two = {m: better[m] for m in "01"}
    assert s.test_against(two, "0", "wilcoxon")["1"].holm == pytest.approx(2 / 2**6)
    found = s.test_against(better, "0", "wilcoxon")
    assert all(one.p is None and "too few seeds: 6 pairs and 2 tests" in one.why for one in found.values())
    assert s.leaders(better, "wilcoxon") == ()


def test_without_a_test_nobody_is_marked():
    scores = {"best": by_seed([0.9, 0.91]), "behind": by_seed([0.1, 0.15])}
    assert s.leaders(scores, "t") == ()
    assert s.leaders({}, "t") == ()


@pytest.mark.parametrize("k", list(Q_05))
def test_the_critical_difference_is_demsars(k):
    n = 20
    scores = {str(i): {f"m{j}": ((i * 7 + j * 3) % 11) / 11 for j in range(k)} for i in range(n)}
    found = s.ranks(scores)
    assert found.critical == pytest.approx(Q_05[k] * math.sqrt(k * (k + 1) / (6 * n)), rel=1e-3)
    assert sum(found.means.values()) == pytest.approx(k * (k + 1) / 2)


def test_demsars_own_example_is_ranked():
    # Three methods, always in the same order, on 8 data sets: Friedman's statistic is 2 N = 16 with 2 degrees.
    found = s.ranks({str(i): {"a": 0.9, "b": 0.8, "c": 0.7} for i in range(8)})
    assert found.means == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert found.p == pytest.approx(math.exp(-8))
    assert found.groups == [("a", "b"), ("b", "c")]


def test_two_settings_are_too_few_for_five_methods():
    found = s.ranks({x: {m: i / 10 for i, m in enumerate("abcde")} for x in ("one", "two")})
    assert found.p is None and "too few" in found.why


def test_methods_that_some_setting_lacks_are_not_ranked():
    found = s.ranks({"one": {"a": 1.0, "b": 0.5, "c": 0.2}, "two": {"a": 0.1, "b": 0.5}})
    assert found.means == {"a": 1.5, "b": 1.5}
    assert s.ranks({"one": {"a": 1.0, "b": 0.5}}) is None


def test_a_group_inside_another_is_not_told():
    assert Ranks({"a": 1.0, "b": 1.5, "c": 1.9}, 5, 1.0, None, None).groups == [("a", "b", "c")]


def test_unknown_tests_are_told():
    assert s.which_test(None) == "t"
    with pytest.raises(UsageError, match=r"unknown test 'wilcoxn'.*wilcoxon"):
        s.which_test("wilcoxn")


def test_methods_that_tie_share_the_mean_of_their_ranks():
    found = s.ranks({"one": {"a": 0.9, "b": 0.9, "c": 0.2}, "two": {"a": 0.9, "b": 0.5, "c": 0.2}})
    assert found.means == {"a": 1.25, "b": 1.75, "c": 3.0}, "1.5, 1.5 and 3; then 1, 2 and 3"


def test_methods_a_critical_difference_apart_differ():
    # Demsar, section 3.2.2: significantly different if the ranks differ by at least the critical difference.
    assert s.Ranks({"a": 1.0, "b": 2.0}, 9, 1.0, None, None).groups == []
    assert s.Ranks({"a": 1.0, "b": 1.9}, 9, 1.0, None, None).groups == [("a", "b")]
