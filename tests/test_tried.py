"""Pictures of what a search or a sweep tried: rank correlations are scipy's, places on axes are counted by hand."""

import json
import math

import pytest
from scipy.stats import f_oneway, rankdata, spearmanr

import fedloom
from fedloom.comparison.layout import trials_file
from fedloom.comparison.results import Results
from fedloom.quality import ACCURACY, RMSE
from fedloom.random import numpy_stream
from fedloom.report import comparison
from fedloom.report.style import COLOURS
from fedloom.report.sweeps import attempts
from fedloom.report.trials import HOW, Tried, importance_figure, parallel_figure, two_figure
from fedloom.tasks.toy import Toy

RNG = numpy_stream(5, "tried")
LR = (10 ** RNG.uniform(-3, 0, 24)).tolist()
KIND = [["a", "b", "c"][k] for k in RNG.integers(0, 3, 24)]
DEPTH = RNG.integers(1, 5, 24).tolist()
SCORES = [0.1 * math.log10(lr) + {"a": 0.7, "b": 0.5, "c": 0.6}[kind] + 0.02 * float(RNG.normal())
          for lr, kind in zip(LR, KIND, strict=True)]  # fmt: skip
FIELDS = [{"lr": lr, "kind": k, "depth": d, "mu": 1.0} for lr, k, d in zip(LR, KIND, DEPTH, strict=True)]


def eta(kinds, scores):
    """The square root of the correlation ratio of the ranks, by way of the F statistic."""
    ranks = rankdata(scores)
    groups = [ranks[[kind == one for kind in kinds]] for one in sorted(set(kinds))]
    k, n = len(groups), len(ranks)
    f = f_oneway(*groups).statistic
    return math.sqrt(f * (k - 1) / (f * (k - 1) + n - k))


def test_importance_is_the_rank_correlation_and_of_choices_the_correlation_ratio():
    tried = Tried.of("digits", FIELDS, SCORES, ACCURACY, ["lr"])
    assert tried.moving == ["lr", "kind", "depth"] and tried.logs == {"lr"} and tried.failed == 0
    found = tried.importance()
    assert found == pytest.approx(
        {"lr": abs(spearmanr(LR, SCORES)[0]), "kind": eta(KIND, SCORES), "depth": abs(spearmanr(DEPTH, SCORES)[0])}
    )
    assert list(found.values()) == sorted(found.values(), reverse=True)
    low = Tried.of("digits", FIELDS, [-one for one in SCORES], RMSE)
    assert low.importance() == pytest.approx(found) and low.best == tried.best == SCORES.index(max(SCORES))
    falling = Tried.of("", [{"x": k, "y": k % 2 == 0} for k in range(6)], [-float(k) for k in range(6)], ACCURACY)
    assert falling.importance()["x"] == pytest.approx(1.0) and not falling.is_numeric("y")


def test_failed_trials_and_fields_that_stand_still_are_left_out():
    scores = [None, math.nan, *SCORES[2:]]
    tried = Tried.of("digits", FIELDS, scores, ACCURACY, ["lr", "mu", "kind"])
    assert tried.failed == 2 and len(tried.scores) == 22 and "mu" not in tried.moving and tried.logs == {"lr"}
    assert "2 trials failed" in tried.pictures()["parallel"].alt
    assert Tried.of("", FIELDS[:3], SCORES[:3], ACCURACY).pictures() == {}
    assert Tried.of("", FIELDS, [0.5] * 24, ACCURACY).pictures() == {}
    assert Tried.of("", [{"mu": 1}] * 24, SCORES, ACCURACY).pictures() == {}
    zero = [{"lr": 0.0 if k == 3 else lr} for k, lr in enumerate(LR)]
    assert Tried.of("", zero, SCORES, ACCURACY, ["lr"]).logs == frozenset()


@pytest.mark.parametrize("by", [ACCURACY, RMSE])
def test_lines_go_through_the_places_of_their_values(by):
    fields = [{"lr": 0.01, "kind": "a"}, {"lr": 0.1, "kind": "c"}, {"lr": 1.0, "kind": "b"}, {"lr": 0.1, "kind": "b"}]
    scores = [0.25, 0.75, 0.5, 0.25]
    axes = parallel_figure(Tried.of("", fields, scores, by, ["lr"])).axes[0]
    up = by is ACCURACY
    heights = [[0.0, 0.0, 0.0], [0.5, 1.0, 1.0], [1.0, 0.5, 0.5], [0.5, 0.5, 0.0]]
    heights = heights if up else [[*one[:2], 1 - one[2]] for one in heights]
    lines = [pytest.approx(list(line.get_ydata())) for line in axes.lines[:4]]
    assert lines == heights
    assert list(axes.lines[4].get_ydata()) == pytest.approx(heights[1 if up else 0])  # the best, in its own colour
    assert axes.lines[4].get_color() == COLOURS["personal"]
    depths = [line.get_alpha() for line in axes.lines[:4]]
    assert max(depths) == 1.0 and depths.index(1.0) == (1 if up else 0) and min(depths) == pytest.approx(0.15)
    names = [one.get_text() for one in axes.get_xticklabels()]
    assert names == ["lr, log", "kind", f"validation {by.words}"]
    ends = {(round(t.get_position()[0]), round(t.get_position()[1], 2)): t.get_text() for t in axes.texts}
    assert (ends[0, 0.0], ends[0, 1.0], ends[1, 0.0], ends[1, 0.5], ends[1, 1.0]) == ("0.01", "1", "a", "b", "c")
    assert (ends[2, 1.0], ends[2, 0.0]) == (("75.0 %", "25.0 %") if up else ("0.25", "0.75"))


def test_bars_and_dots_are_those_of_their_fields():
    tried = Tried.of("", FIELDS, SCORES, ACCURACY, ["lr"])
    axes = importance_figure(tried).axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(list(tried.importance().values()))
    assert [one.get_text() for one in axes.get_yticklabels()] == list(tried.importance())
    two = Tried.of("", [{"lr": lr, "depth": d} for lr, d in zip(LR, DEPTH, strict=True)], SCORES, ACCURACY, ["lr"])
    assert list(two.pictures()) == ["parallel", "importance", "two"] and "two" not in tried.pictures()
    axes = two_figure(two).axes[0]
    places = [tuple(dots.get_offsets()[0]) for dots in axes.collections]
    assert places[:-1] == [*zip(LR, DEPTH, strict=True)] and places[-1] == (LR[two.best], DEPTH[two.best])
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlabel(), axes.get_ylabel()) == (
        "log",
        "linear",
        "lr",
        "depth",
    )


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    over = {"mu": [0.1, 1.0], "lr": [0.001, 0.2]}
    return fedloom.sweep("fedprox", Toy(), over=over, seeds=1, rounds=1, out=tmp_path_factory.mktemp("tried") / "sweep")


def test_a_sweep_is_drawn_by_validation_and_a_search_by_its_trials(swept):
    setting = swept.settings[0]
    ((whose, tried),) = attempts(swept, setting)
    means = swept.validated(setting)
    assert whose == "" and tried.scores == [means[m] for m in swept.methods] and tried.logs == {"mu", "lr"}
    assert [one["lr"] for one in tried.fields] == [swept.spec.methods[m]["lr"] for m in swept.methods]
    drawn = comparison.pictures(swept)
    names = [name.rpartition("-")[2] for name in drawn]
    assert names[:3] == ["fields", "parallel", "importance"] and "two" not in names
    page = (swept.path / "report.html").read_text()
    assert HOW[:40].replace("'", "&#39;") in page and "which fields tell the order</figcaption>" in page
    method = swept.methods[1]
    file = trials_file(swept.path, setting, method)
    file.parent.mkdir(parents=True)
    tried = [
        {"number": k, "fields": {"lr": lr, "mu": mu}, "validation_rmse": value, "error": None}
        for k, (lr, mu, value) in enumerate([(0.1, 1.0, 3.0), (0.2, 0.5, 2.0), (0.3, 0.1, 5.0), (0.4, 0.2, 4.0)])
    ]
    file.write_text("".join(json.dumps(one) + "\n" for one in tried))
    ((whose, found),) = attempts(Results.read(swept.path), setting)
    assert (whose, found.by, found.best, list(found.scores)) == (method, RMSE, 1, [3.0, 2.0, 5.0, 4.0])
    assert found.title == f"{setting}, {method}"
    file.unlink()


def test_a_comparison_of_methods_has_none_of_it(tmp_path):
    made = fedloom.compare(["fedavg", "local"], Toy(), seeds=1, rounds=1, out=tmp_path / "c")
    assert attempts(made, made.settings[0]) == []
    assert HOW[:40].replace("'", "&#39;") not in (tmp_path / "c/report.html").read_text()
