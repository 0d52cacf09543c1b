"""Whether a difference is real: intervals over seeds, paired tests with Holm's correction, ranks over settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedloom.errors import unknown

ALPHA = 0.05
# The first is the default: with five seeds it is the only one that can tell anything.
TESTS = {
    "t": "paired t-test (two-sided; it takes the differences to be about normal)",
    "wilcoxon": "Wilcoxon signed-rank test (two-sided, exact; it takes nothing but symmetry)",
}
LEAST = {"t": 3, "wilcoxon": 6}  # pairs; Wilcoxon's smallest two-sided p is 2 / 2^n, 0.0625 at five
EXACT = 12  # pairs, up to which all 2^n signs are tried, ties and all


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % t interval; below two seeds there is no interval, without any no mean."""

    values: tuple[float, ...]
    mean: float | None
    low: float | None
    high: float | None

    @property
    def half(self) -> float | None:
        """Half the interval's width."""
        return None if self.mean is None or self.high is None else self.high - self.mean


@dataclass(frozen=True)
class Paired:
    """One method less another at the same seeds. `p` is None where `why` says why; `holm`: p corrected."""

    other: str
    difference: Interval
    effect: float | None  # Hedges' g of the differences: their mean in standard deviations, corrected for few pairs
    p: float | None
    why: str | None
    holm: float | None = None


@dataclass(frozen=True)
class Ranks:
    """Mean ranks over settings (1 is best), the Friedman test, and the critical difference of Nemenyi's test.

    `groups`: which methods, in the order of their ranks, no test tells apart. `why`: what these settings cannot tell.
    """

    means: dict[str, float]
    settings: int
    critical: float
    p: float | None
    why: str | None

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The longest runs of methods whose ranks lie closer than the critical difference."""
        order = sorted(self.means, key=lambda method: self.means[method])
        found: list[tuple[str, ...]] = []
        for start, first in enumerate(order):
            run = [m for m in order[start:] if self.means[m] - self.means[first] < self.critical]
            if len(run) > 1 and not any(set(run) <= set(other) for other in found):
                found.append(tuple(run))
        return found


def which_test(name: str | None) -> str:
    """The name of the paired test; None is the default. Raises UsageError."""
    chosen = next(iter(TESTS)) if name is None else name
    if chosen not in TESTS:
        raise unknown("test", chosen, TESTS)
    return chosen


def interval(values: Sequence[float], level: float = 1 - ALPHA) -> Interval:
    """The mean of `values` [n] and its t interval."""
    from scipy import stats

    kept = tuple(float(value) for value in values)
    n = len(kept)
    if not n:
        return Interval(kept, None, None, None)
    mean = math.fsum(kept) / n
    if n < 2:
        return Interval(kept, mean, None, None)
    error = math.sqrt(math.fsum((x - mean) ** 2 for x in kept) / (n - 1) / n)
    reach = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    return Interval(kept, mean, mean - reach, mean + reach)


def paired(mine: Mapping[int, float], theirs: Mapping[int, float], other: str, test: str) -> Paired:
    """`mine` less `theirs`, by seed, over the seeds that both have."""
    from scipy import stats

    differences = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
    n = len(differences)
    found = Paired(other, interval(differences), effect(differences) if n >= LEAST["t"] else None, None, None)
    nonzero = sum(d != 0 for d in differences)
    if n < LEAST[test]:
        return replace(found, why=f"too few seeds: {n} pairs, and this test takes at least {LEAST[test]}")
    if not nonzero:
        return replace(found, p=1.0)
    if test == "wilcoxon":
        if nonzero < LEAST[test]:
            why = f"too few seeds: {nonzero} pairs that differ, and the smallest p is then {2 / 2**nonzero:.3g}"
            return replace(found, why=why)
        how = stats.PermutationMethod(n_resamples=2**EXACT + 1) if n <= EXACT else "auto"
        return replace(found, p=float(stats.wilcoxon(differences, method=how).pvalue))
    if found.effect is None:
        return replace(found, why="the difference is the same at every seed, so there is nothing to test it by")
    return replace(found, p=float(stats.ttest_1samp(differences, 0.0).pvalue))


def effect(differences: Sequence[float]) -> float | None:
    """Hedges' g of paired differences: Cohen's d_z with the exact correction for few pairs (Hedges 1981).

    None where the differences do not vary beyond rounding, or are fewer than two.
    """
    n = len(differences)
    if n < 2:
        return None
    mean = math.fsum(differences) / n
    deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    if deviation <= 1e-12 * max(1.0, abs(mean)):
        return None
    free = n - 1
    correction = 1.0  # at one degree of freedom it has no finite value
    if free > 1:
        correction = math.exp(math.lgamma(free / 2) - math.lgamma((free - 1) / 2)) / math.sqrt(free / 2)
    return correction * mean / deviation


def correct_by_holm(tests: Mapping[str, Paired]) -> dict[str, Paired]:
    """The tests with Holm's correction over those of them that gave a p-value."""
    from statsmodels.stats.multitest import multipletests

    given = {name: one.p for name, one in tests.items() if one.p is not None}
    if not given:
        return dict(tests)
    adjusted = dict(zip(given, multipletests(list(given.values()), alpha=ALPHA, method="holm")[1], strict=True))
    return {name: replace(one, holm=float(adjusted[name])) if name in given else one for name, one in tests.items()}


def test_against(scores: Mapping[str, Mapping[int, float]], reference: str, test: str) -> dict[str, Paired]:
    """Every other method tested against one; `scores`: by method, by seed."""
    others = {
        method: paired(by_seed, scores[reference], reference, test)
        for method, by_seed in scores.items()
        if method != reference and by_seed
    }
    return correct_by_holm(_reachable(others) if test == "wilcoxon" else others)


def _reachable(tests: dict[str, Paired]) -> dict[str, Paired]:
    """Without the p-values of Wilcoxon tests that Holm's correction keeps above ALPHA whatever the data."""
    pairs = {name: sum(d != 0 for d in one.difference.values) for name, one in tests.items() if one.p is not None}
    found = dict(tests)
    for name, n in pairs.items():
        least = len(pairs) * 2 / 2**n
        if n and least > ALPHA:
            why = f"too few seeds: {n} pairs and {len(pairs)} tests; a corrected p cannot fall below {least:.3g}"
            found[name] = replace(tests[name], p=None, why=why)
    return found


def leaders(scores: Mapping[str, Mapping[int, float]], test: str, better: str = "high") -> tuple[str, ...]:
    """The method with the best mean, and every one that the test does not find worse; none where it cannot tell."""
    having = {method: by_seed for method, by_seed in scores.items() if by_seed}
    if not having:
        return ()
    best = best_of(having, better)
    tests = test_against(having, best, test)
    if any(one.p is None for one in tests.values()):
        return ()
    return tuple(m for m in having if m == best or not worse(tests[m], better))


def sign(better: str) -> int:
    """What a number is multiplied with to be larger where it is better (`high`, `low`)."""
    return -1 if better == "low" else 1


def worse(test: Paired, better: str = "high") -> bool:
    """Whether a method is significantly worse than the one it was tested against."""
    mean = test.difference.mean
    return test.holm is not None and test.holm < ALPHA and mean is not None and sign(better) * mean < 0


def best_of(scores: Mapping[str, Mapping[int, float]], better: str = "high") -> str:
    """The method with the best mean over its seeds."""
    return max(scores, key=lambda method: sign(better) * math.fsum(scores[method].values()) / len(scores[method]))


def ranks(scores: Mapping[str, Mapping[str, float]], better: str = "high") -> Ranks | None:
    """Ranks of methods over settings: `scores` by setting, by method. None below two of either.

    Nemenyi's critical difference as in Demsar (2006, JMLR 7): q sqrt(k (k + 1) / 6N). Only methods that every setting
    has a score of are ranked.
    """
    from scipy import stats

    shared = [m for m in next(iter(scores.values()), {}) if all(m in one for one in scores.values())]
    n, k = len(scores), len(shared)
    if n < 2 or k < 2:
        return None
    placed = [stats.rankdata([-sign(better) * one[m] for m in shared]) for one in scores.values()]
    means = {m: float(sum(row[i] for row in placed) / n) for i, m in enumerate(shared)}
    quantile = float(stats.studentized_range.ppf(1 - ALPHA, k, math.inf)) / math.sqrt(2)
    critical = quantile * math.sqrt(k * (k + 1) / (6 * n))
    p, why = None, None
    if critical > k - 1:
        why = f"{n} settings are too few for {k} methods: even always first and always last could not be told apart"
    elif k < 3:
        why = "the Friedman test takes at least three methods"
    elif all(len(set(row)) == 1 for row in placed):  # every method ties everywhere
        p = 1.0
    else:
        p = float(stats.friedmanchisquare(*([one[m] for one in scores.values()] for m in shared)).pvalue)
    return Ranks(means, n, critical, p, why)
