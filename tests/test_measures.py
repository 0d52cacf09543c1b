"""What is read off one run."""

import json

import pytest

import fedloom
from fedloom.comparison import measures
from fedloom.comparison.measures import jain, measured, running, target_of, to_target, total, worst_share
from fedloom.errors import UsageError
from fedloom.runs.record import Run
from fedloom.tasks.toy import Toy

COSTS = {"seconds": 1.0, "virtual_seconds": 2.0, "up_bytes": 10, "down_bytes": 20, "peer_bytes": 1,
         "gradient_steps": 8, "eval_up_bytes": 999, "eval_down_bytes": 999}  # fmt: skip


def written(folder, validation, test, chosen=None):
    """A run's folder with these validation and test accuracies, a round each; four clients."""
    folder.mkdir()
    (folder / "spec.yaml").write_text("clients: 4\nmethod: {name: fedavg}\n")
    rows = [
        {"round": i + 1, "validation_accuracy": v, "global_test_accuracy": t, "personal_test_accuracy": t,
         "worst_client_accuracy": t, "personal_test_accuracy_std": 0.0, **COSTS}
        for i, (v, t) in enumerate(zip(validation, test, strict=True))
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if chosen:
        (folder / "chosen.json").write_text(json.dumps(chosen))
    return Run(folder)


def test_the_reported_round_is_that_of_the_validation_data_not_the_best_test(tmp_path):
    found = measured(written(tmp_path / "run", [0.2, 0.8, 0.5], [0.99, 0.6, 0.7]))
    assert (found["round"], found["personal_test_accuracy"], found["global_test_accuracy"]) == (2, 0.6, 0.6)
    assert found["rounds"] == 3
    assert found["drop"] == pytest.approx(0.3)


def test_costs_are_of_training_to_the_end(tmp_path):
    found = measured(written(tmp_path / "run", [0.2, 0.8, 0.5], [0.1, 0.1, 0.1]))
    assert (found["up_bytes"], found["down_bytes"], found["peer_bytes"]) == (30, 60, 3)
    assert (found["seconds"], found["virtual_seconds"], found["steps_per_client"]) == (3.0, 6.0, 6.0)


@pytest.mark.parametrize(("target", "round"), [(0.1, 1), (0.2, 1), (0.5, 2), (0.8, 2), (0.81, None), (None, None)])
def test_costs_to_a_target_end_with_the_first_round_that_reaches_it(tmp_path, target, round):
    rows = written(tmp_path / "run", [0.2, 0.8, 0.5], [0.1, 0.1, 0.1]).metrics
    found = to_target(rows, target)
    assert found["rounds_to_target"] == round
    assert found["bytes_to_target"] == (None if round is None else 31 * round)
    assert found["virtual_seconds_to_target"] == (None if round is None else 2.0 * round)


def test_of_a_stream_only_rounds_of_the_last_stage_reach_a_target():
    rows = [{"round": r, "validation_accuracy": v, "stage": g, "up_bytes": 1} for r, v, g in
            ((1, 0.9, 0), (2, 0.3, 1), (3, None, 1), (4, 0.8, 1))]  # fmt: skip
    assert (to_target(rows, 0.7)["rounds_to_target"], to_target(rows, 0.7)["bytes_to_target"]) == (4, 4)
    assert to_target(rows, 0.85)["rounds_to_target"] is None


def test_the_running_sum_has_each_rounds_own_share():
    rows = [{"up_bytes": 3, "down_bytes": 1}, {"up_bytes": None, "down_bytes": 5}, {}, {"up_bytes": 2}]
    assert running(rows, "up_bytes", "down_bytes") == [4, 9, 9, 11]
    assert running(rows, "up_bytes")[-1] == total(rows, "up_bytes") == 5


@pytest.mark.parametrize(
    ("target", "baseline", "expected"),
    [(0.7, "poor", 0.7), (None, "poor", 0.95 * 0.4), (None, "absent", None), (None, None, 0.95 * 0.8)],
)
def test_the_target_is_what_was_asked_for_or_most_of_the_references_accuracy(target, baseline, expected):
    """Of the baseline, or of the best method where there is none."""
    found = target_of({"poor": 0.4, "best": 0.8, "fair": 0.6}, target, baseline)
    assert found is None if expected is None else found == pytest.approx(expected)
    if baseline is target is None:
        assert target_of({}, target, baseline) is None


def test_old_runs_have_no_virtual_time(tmp_path):
    rows = [{"round": 1, "validation_accuracy": 0.5, "up_bytes": 1}]
    assert to_target(rows, 0.5)["virtual_seconds_to_target"] is None
    run = written(tmp_path / "run", [0.2], [0.1])
    (run.path / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert measured(Run(run.path))["virtual_seconds"] is None


def test_fairness_is_of_the_chosen_round(tmp_path):
    chosen = {"round": 2, "clients": [{"id": i, "accuracy": a, "n": 5} for i, a in enumerate([0.2, 0.8, 0.8, 0.8])]}
    run = written(tmp_path / "run", [0.2, 0.8, 0.5], [0.1, 0.1, 0.1], chosen)
    (run.path / "clients.json").write_text(json.dumps({"round": 3, "clients": [{"id": 0, "accuracy": 0.0, "n": 5}]}))
    found = measured(run)
    assert found["worst_decile_accuracy"] == 0.2
    assert found["jain_index"] == pytest.approx(2.6**2 / (4 * (0.04 + 3 * 0.64)))


def test_without_the_chosen_clients_there_is_no_fairness(tmp_path):
    found = measured(written(tmp_path / "run", [0.2, 0.8], [0.1, 0.1]))
    assert found["worst_decile_accuracy"] is None and found["jain_index"] is None


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (9, 1), (10, 1), (11, 2), (20, 2), (30, 3), (70, 7)])
def test_the_worst_tenth(count, kept):
    assert worst_share([float(i) for i in reversed(range(count))]) == sum(range(kept)) / kept


def test_a_share_of_the_clients_is_no_more_than_it_by_a_rounding():
    assert 0.07 * 100 > 7 and worst_share([float(i) for i in range(100)], 0.07) == sum(range(7)) / 7


def test_jains_index_ends():
    assert jain([0.3] * 5) == pytest.approx(1) and jain([0, 0, 0, 0.7]) == pytest.approx(1 / 4)
    assert jain([]) is None and jain([0.0, 0.0]) is None


def test_a_run_keeps_the_clients_of_its_chosen_round(tmp_path):
    run = fedloom.run("fedavg", Toy(), out=tmp_path / "run", rounds=5, report=False)
    kept, chosen = run.chosen_clients, run.selected
    assert kept["round"] == chosen["round"]
    rows = sum(client["n"] for client in kept["clients"])
    mean = sum(client["accuracy"] * client["n"] for client in kept["clients"]) / rows
    assert mean == pytest.approx(chosen["personal_test_accuracy"])
    found = measured(run, target=0.0)
    assert found.keys() <= measures.MEASURES.keys() and found["rounds_to_target"] == 1


def test_the_default_metric_is_what_every_method_has():
    assert measures.metric(None) == "personal_test_accuracy"
    with pytest.raises(UsageError, match="unknown metric 'accuracy'"):
        measures.metric("accuracy")
