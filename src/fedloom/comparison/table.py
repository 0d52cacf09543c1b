"""The table of a comparison: for every setting and method what was measured, its interval, and its test."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fedloom import tasks
from fedloom.comparison import measures, statistics
from fedloom.comparison.results import Results
from fedloom.comparison.statistics import Interval, Paired, Ranks
from fedloom.errors import UsageError
from fedloom.quality import ACCURACY, Quality


@dataclass(frozen=True)
class Row:
    """One method under one setting. `score` and every measure are over its finished seeds."""

    setting: str
    method: str
    score: Interval
    seeds: tuple[int, ...]  # finished
    leads: bool  # the best mean, or not significantly below it
    test: Paired | None  # against the reference; None for the reference itself
    measures: dict[str, Interval]
    tuned: dict[str, Any]
    errors: dict[int, str]  # by seed
    unfinished: tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """All rows, by setting, then method; what they are compared by, and against which method."""

    rows: tuple[Row, ...]
    metric: str
    test: str
    references: dict[str, str]  # by setting
    targets: dict[str, float | None]  # by setting
    ranks: Ranks | None
    qualities: tuple[Quality, ...] = (ACCURACY,)  # the measures of the problem, the main one first

    def of(self, setting: str) -> list[Row]:
        """The rows of a setting."""
        return [row for row in self.rows if row.setting == setting]

    @property
    def measures(self) -> list[str]:
        """The names of all measures: those of the problem, then those that some run has with `@NAME` behind them."""
        return list(self.rows[0].measures)

    @property
    def metrics(self) -> list[str]:
        """The names of what methods can be compared by."""
        return [name for name in self.measures if name in measures.metrics_of(self.qualities)]

    def having(self, *names: str) -> list[str]:
        """Of some measures, and of those with `@NAME` behind them, the ones of which any row has a number."""
        wanted = [one for name in names for one in self.measures if one.partition("@")[0] == name]
        return [name for name in wanted if name != self.metric and any(row.measures[name].values for row in self.rows)]


def table(results: Results) -> Table:
    """Reads every finished cell and compares."""
    qualities = _qualities(results)
    main, test = qualities[0], statistics.which_test(results.spec.test)
    metric = measures.metric(results.spec.metric, qualities)
    better = measures.about(metric, qualities).better
    rows: list[Row] = []
    references, targets, means = {}, {}, {}
    whole: dict[str, dict[str, dict[int, dict[str, float | None]]]] = {}
    for setting in results.settings:
        target = targets[setting] = measures.target_of(
            results.validated(setting), results.spec.target, results.spec.baseline, main
        )
        whole[setting] = {
            method: {
                cell.seed: measures.measured(cell.run, target)
                for cell in results.of(setting, method)
                if cell.run is not None
            }
            for method in results.methods
        }
    columns = (name for found in whole.values() for runs in found.values() for one in runs.values() for name in one)
    names = [*measures.measures_of(qualities), *dict.fromkeys(measures.of_single_models(columns))]
    for setting, found in whole.items():
        scores: dict[str, dict[int, float]] = {}
        for method, runs in found.items():
            scores[method] = {seed: score for seed, one in runs.items() if (score := one.get(metric)) is not None}
        having = {method: by_seed for method, by_seed in scores.items() if by_seed}
        leading = statistics.leaders(having, test, better)
        tests: dict[str, Paired] = {}
        if having:
            reference = results.spec.baseline or statistics.best_of(having, better)
            references[setting] = reference
            if reference in having:
                tests = statistics.test_against(having, reference, test)
        for method, runs in found.items():
            rows.append(
                Row(
                    setting=setting,
                    method=method,
                    score=statistics.interval(list(scores[method].values())),
                    seeds=tuple(runs),
                    leads=method in leading,
                    test=tests.get(method),
                    measures={
                        name: statistics.interval([v for one in runs.values() if (v := one.get(name)) is not None])
                        for name in names
                    },
                    tuned=results.tuned(setting, method),
                    errors={c.seed: c.error for c in results.of(setting, method) if c.error is not None},
                    unfinished=tuple(c.seed for c in results.of(setting, method) if c.run is None and c.error is None),
                )
            )
        means[setting] = {m: sum(by_seed.values()) / len(by_seed) for m, by_seed in having.items()}
    return Table(tuple(rows), metric, test, references, targets, statistics.ranks(means, better), qualities)


def _qualities(results: Results) -> tuple[Quality, ...]:
    """The measures that the finished runs have, the main one first; raises UsageError where they have several."""
    if len(mains := results.mains) > 1:
        raise UsageError(
            f"the settings of {results.path} are judged by {' and '.join(one.words for one in mains)}, which do not "
            "compare; make a comparison of each"
        )
    runs = (cell.run for cell in results.cells if cell.run is not None)
    rows = [row for run in runs for row in run.metrics[-1:]]
    return measures.qualities_in(rows) if rows else tasks.qualities(results.spec.problems[0])


def summary(results: Results) -> dict[str, Any]:
    """The comparison's table for programs: rows with mean, interval, tests and measures; every number as it is."""
    made = table(results)
    rows = []
    for row in made.rows:
        test = None
        if row.test is not None:
            test = asdict(row.test) | {"difference": _plain(row.test.difference)}
        rows.append(
            {
                "setting": row.setting,
                "method": row.method,
                "score": _plain(row.score),
                "leads": row.leads,
                "test": test,
                "measures": {name: _plain(value) for name, value in row.measures.items()},
                "tuned": row.tuned,
                "errors": row.errors,
                "unfinished": row.unfinished,
            }
        )
    return {
        "metric": made.metric,
        "test": made.test,
        "alpha": statistics.ALPHA,
        "correction": "Holm, within a setting",
        "targets": made.targets,
        "references": made.references,
        "rows": rows,
        "ranks": None if made.ranks is None else asdict(made.ranks) | {"groups": made.ranks.groups},
    }


def _plain(value: Interval) -> dict[str, Any]:
    return asdict(value) | {"values": list(value.values)}
