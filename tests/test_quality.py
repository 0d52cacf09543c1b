"""What a problem is judged by: which of two numbers is better, and what those of several clients make together."""

import dataclasses
import json
import math

import numpy as np
import pytest

from fedloom.comparison import measures, statistics, trials
from fedloom.comparison.grid import Comparison
from fedloom.comparison.layout import trials_file
from fedloom.errors import UsageError
from fedloom.quality import ACCURACY, KNOWN, MAE, R2, RMSE, Quality, evaluated, main_of
from fedloom.random import numpy_stream
from fedloom.runs.choice import chosen
from fedloom.runs.evaluation import personal, pooled
from fedloom.tasks._given import sound
from fedloom.tasks.toy import Toy


def test_errors_of_clients_make_the_error_of_all_samples_together():
    draw = numpy_stream(0, "tests", "quality")
    errors = [draw.normal(size=n) * (n + 1) for n in (1, 7, 30)]
    tests = [
        {"n": len(e), "rmse": float(np.sqrt((e**2).mean())), "mae": float(abs(e).mean()), "loss": 0.0, "r2": 0.5}
        for e in errors
    ]
    whole = np.concatenate(errors)
    row = personal("personal_test", tests, RMSE)
    assert row["personal_test_rmse"] == pytest.approx(np.sqrt((whole**2).mean()))
    assert row["personal_test_mae"] == pytest.approx(abs(whole).mean())
    assert row["personal_test_rmse_std"] == pytest.approx(np.std([test["rmse"] for test in tests]))
    assert "personal_test_r2" not in row and "personal_test_loss" not in row, "which no measures of clients give"
    assert pooled([{"n": 1, "rmse@a": 3.0}, {"n": 1, "rmse@a": 4.0}], "rmse@a") == pytest.approx(math.sqrt(12.5))


def test_of_errors_the_least_is_best_and_no_number_is_the_worst():
    values = [3.0, math.nan, 1.0, math.inf, 2.0]
    assert RMSE.best(values) == 1.0 and math.isnan(RMSE.worst([1.0, math.nan])) and RMSE.worst([1.0, 3.0, 2.0]) == 3.0
    assert ACCURACY.best([0.2, math.nan, 0.4]) == 0.4 and ACCURACY.worst([0.2, 0.4]) == 0.2


def row(number, value, name="validation_rmse"):
    return {"round": number, name: value, "up_bytes": 1, "down_bytes": 0, "peer_bytes": 0}


def test_validation_chooses_the_round_of_the_least_error():
    rows = [row(1, math.nan), row(2, 5.0), row(3, 4.0), row(4, 4.0), row(5, 6.0)]
    assert main_of(rows) == RMSE and main_of({"validation_mae": None}) == MAE and main_of([]) == ACCURACY
    assert chosen(rows)["round"] == 3
    assert measures.to_target(rows, 5.0) == {
        "rounds_to_target": 2, "bytes_to_target": 2, "virtual_seconds_to_target": None
    }  # fmt: skip
    assert measures.to_target(rows, 3.9)["rounds_to_target"] is None
    assert evaluated({"global_test_rmse": None}) and not evaluated({"validation_rmse": 1.0})


def test_targets_and_tails_of_errors_lie_on_the_other_side():
    assert measures.target_of({"a": 4.0, "b": 2.0}, None, None, RMSE) == 2.0 / measures.SHARE
    assert measures.target_of({"a": 4.0, "b": 2.0}, None, "a", RMSE) == 4.0 / measures.SHARE
    assert measures.worst_share([float(i) for i in range(20)], main=RMSE) == 18.5


LEVELS = {"a": 1.0, "b": 1.02, "c": 2.0}


def test_statistics_of_errors_are_those_of_accuracies_turned_round():
    draw = numpy_stream(1, "tests", "quality")
    scores = {m: {s: float(level + 0.1 * draw.normal()) for s in range(8)} for m, level in LEVELS.items()}
    turned = {m: {s: -v for s, v in one.items()} for m, one in scores.items()}
    assert statistics.best_of(scores, "low") == statistics.best_of(turned) == "a"
    assert statistics.leaders(scores, "t", "low") == statistics.leaders(turned, "t") == ("a", "b")
    by_setting = {str(s): {m: one[s] for m, one in scores.items()} for s in range(8)}
    back = {s: {m: -v for m, v in one.items()} for s, one in by_setting.items()}
    assert statistics.ranks(by_setting, "low") == statistics.ranks(back)
    tests = statistics.test_against(scores, "a", "t")
    assert statistics.worse(tests["c"], "low") and not statistics.worse(tests["c"])


def test_tuning_takes_the_trial_of_the_least_error(tmp_path):
    lines = [
        {"number": k, "fields": {"lr": lr}, "validation_rmse": value, "error": None}
        for k, (lr, value) in enumerate([(0.1, 3.0), (0.2, 2.0), (0.3, None), (0.4, 2.0)])
    ]
    file = trials_file(tmp_path, "one", "fedavg")
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert trials.best_fields(tmp_path, "one", "fedavg") == {"lr": 0.2}
    assert trials.score_of(lines[0]) == -3.0 and trials.score_of(lines[2]) is None


def test_what_a_comparison_goes_by_is_a_measure_of_its_problem():
    regression = {"methods": ["fedavg"], "problem": "regression", "data": "diabetes"}
    Comparison.of(regression | {"metric": "global_test_r2"}).check()
    for wrong in ("personal_test_accuracy", "personal_test_r2", "worst_decile_mae"):
        with pytest.raises(UsageError, match=f"unknown metric '{wrong}'"):
            Comparison.of(regression | {"metric": wrong}).check()
    with pytest.raises(UsageError, match="judged by RMSE and accuracy, which do not compare"):
        Comparison.of(regression | {"settings": {"a": {}, "b": {"problem": "classification"}}}).check()
    assert measures.metric(None, (RMSE, MAE, R2)) == "personal_test_rmse"
    assert measures.about("worst_decile_rmse").better == measures.about("personal_test_rmse@a").better == "low"


def test_a_task_is_judged_by_what_a_record_can_have():
    task = Toy()
    for qualities, told in (((Quality("rmse", "other"),), "unknown measure"), ((), "empty")):
        task.qualities = qualities
        with pytest.raises(UsageError, match=told):
            sound(task)
    task.qualities = (dataclasses.replace(KNOWN["score"]),)
    sound(task)
