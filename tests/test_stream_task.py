"""A stream of tasks: what is trained on, what is judged, and the matrices."""

import math
from dataclasses import replace

import pytest
import torch

import fedloom
from fedloom import tasks
from fedloom.comparison.measures import measured, to_target
from fedloom.errors import UsageError
from fedloom.report.words import how_chosen
from fedloom.runs.choice import chosen, comparable
from fedloom.runs.continual import matrices
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.task import Batch

SPEC = Spec(clients=4, problem="stream:5,rounds=2", partition="iid")


def test_every_task_has_its_own_classes_and_all_rows_come_once():
    task = tasks.build(SPEC)
    assert task.classes_of.sum(0).tolist() == [1] * 10 and task.classes_of.sum(1).tolist() == [2] * 5
    whole = tasks.build(Spec(clients=4, partition="iid"))
    for k in range(4):
        parts = [task.at(round).data(k, "train") for round in (1, 3, 5, 7, 9)]
        assert torch.equal(torch.cat([p.rows for p in parts]).sort().values, whole.data(k, "train").rows)
        for t, part in enumerate(parts):
            assert set(part.y.tolist()) == set(task.classes_of[t].nonzero().flatten().tolist())
    assert [len(task.at(round).global_test()) for round in (1, 2, 3, 10, 99)] == sorted(
        len(task.at(round).global_test()) for round in (1, 2, 3, 10, 99)
    )
    assert torch.equal(task.at(10).global_test().rows, whole.global_test().rows), "in the end everything is judged"
    assert [round for round in range(1, 13) if task.ends(round)] == [2, 4, 6, 8, 10]
    assert [task.at(round).now for round in (1, 2, 3, 10, 11, 12, 13, 99)] == [0, 0, 1, 4, 4, 4, 4, 4], (
        "the last one stays"
    )
    groups = [tasks.build(replace(SPEC, seed=seed)).classes_of for seed in (0, 1, 2)]
    assert not groups[0].equal(groups[1]) and not groups[1].equal(groups[2]), "dealt by the seed"
    assert task.at(1) is task and task.at(3).at(1).now == 0


def test_a_task_is_learned_and_judged_among_its_own_classes():
    task = tasks.build(SPEC).at(3)
    mine, others = task.classes_of[1], ~task.classes_of[1]
    scores = torch.zeros(2, 10)
    scores[:, others] = 100.0
    label = int(mine.nonzero()[0])
    loss = task.criterion(scores, Batch(torch.zeros(2), torch.tensor([label, label])))
    assert float(loss) == pytest.approx(math.log(2)), "two classes, alike"
    data = task.global_test()

    def answer(x):
        out = torch.full((len(x), 10), 5.0)
        out[:, label] = 6.0
        return out

    measured = task.judge(answer, data)
    own = torch.isin(data.y, mine.nonzero().flatten())
    assert measured["task2"] == pytest.approx(float((data.y[own] == label).double().mean()))
    assert set(measured) == {"n", "loss", "accuracy", "task1", "task2"}


def test_matrices_of_a_run(tmp_path):
    run = fedloom.run(
        "fedavg",
        out=tmp_path / "run",
        report=False,
        rounds=6,
        problem="stream:3,rounds=2",
        clients=4,
        partition="iid",
        fields={"lr": 0.1},
    )
    accuracy, forgetting = matrices(run)
    assert torch.isnan(accuracy[0, 1:]).all() and not torch.isnan(accuracy[2]).any()
    assert (
        accuracy[2, 1] == run.metrics[5]["global_test_task2"] and accuracy[0, 0] == run.metrics[1]["global_test_task1"]
    )
    assert forgetting[2] == 0 and forgetting[0] == accuracy[0, 0] - accuracy[2, 0]
    assert (accuracy.diagonal() > 0.85).all(), "each task is learned while it is there"


def row(round: int, accuracy: float | None, stage: int) -> dict:
    return {"round": round, "validation_accuracy": accuracy, "stage": stage, "global_test_accuracy": 0.5}


def test_a_round_is_chosen_among_those_that_are_judged_on_the_tasks_of_the_last():
    rows = [row(1, 0.99, 1), row(2, 0.98, 1), row(3, 0.6, 2), row(4, 0.7, 2), row(5, 0.7, 2), row(6, None, 2)]
    assert chosen(rows)["round"] == 4 and chosen(rows[:3])["round"] == 3 and chosen(rows[:2])["round"] == 1
    assert [one["round"] for one in comparable(rows)] == [3, 4, 5]
    assert comparable([]) == [] and chosen([row(1, None, 1)]) is None
    found = to_target(rows, 0.65)
    assert found["rounds_to_target"] == 4, "what was reached on the first task alone is not the target"


def test_the_result_of_a_run_has_seen_all_tasks(tmp_path):
    settings = {"problem": "stream:3,rounds=3", "clients": 4, "partition": "iid", "fields": {"lr": 0.3}}
    run = fedloom.run("fedavg", out=tmp_path / "a", report=False, rounds=9, **settings)
    assert [one["stage"] for one in run.metrics] == [1 + k // 3 for k in range(9)]
    early = max(run.metrics, key=lambda one: one["validation_accuracy"])
    assert early["stage"] < 3, "some round is better on fewer tasks, or this tests nothing"
    last = run.metrics[6:]
    assert run.selected == max(last, key=lambda one: one["validation_accuracy"])
    assert run.chosen_clients["round"] == run.selected["round"]
    n = sum(client["n"] for client in run.chosen_clients["clients"])
    task = tasks.build(Spec(problem="stream:3,rounds=3", clients=4, partition="iid"))
    assert n == len(task.at(9).global_test()) > len(task.at(3).global_test())
    assert measured(run)["drop"] == pytest.approx(
        max(one["validation_accuracy"] for one in last) - last[-1]["validation_accuracy"]
    )
    assert "chosen by validation after task 3 had come" in how_chosen(run.selected)


def test_stopped_in_a_later_task_and_resumed_it_chooses_alike(tmp_path):
    settings = {
        "problem": "stream:3,rounds=3",
        "clients": 4,
        "partition": "iid",
        "fields": {"lr": 0.3},
        "report": False,
    }
    whole = fedloom.run("fedavg", out=tmp_path / "a", rounds=9, **settings)
    part = fedloom.run("fedavg", out=tmp_path / "b", rounds=8, **settings)
    resumed = Experiment(replace(part.spec, rounds=9)).take_up(part).go()
    assert resumed.selected["round"] == whole.selected["round"]
    assert resumed.chosen_clients == whole.chosen_clients != {}


def test_a_stream_whose_last_task_never_comes_is_refused():
    with pytest.raises(
        UsageError, match=r"5 tasks of 10 rounds, but rounds is 40.*set rounds=50, or stream:5,rounds=8"
    ):
        tasks.build(Spec(problem="stream:5,rounds=10", rounds=40))
    assert tasks.build(Spec(problem="stream:5,rounds=10", rounds=41)).tasks == 5


def test_clients_without_samples_of_a_task_sit_out():
    task = tasks.build(Spec(clients=10, problem="stream:5,rounds=1", partition="classes:2"))
    there = [[k for k in range(10) if task.at(round).present(k)] for round in range(1, 6)]
    assert all(0 < len(ids) < 10 for ids in there)
    run = fedloom.run("fedavg", problem="stream:5,rounds=1", partition="classes:2", clients=10, rounds=5)
    assert [row["cohort"] for row in run.metrics] == list(map(len, there))


@pytest.mark.parametrize("problem", ["stream:11", "stream:0", "stream:2,rounds=0"])
def test_streams_that_do_not_fit_are_refused(problem):
    with pytest.raises(UsageError, match="expected 1 to 10 tasks"):
        tasks.build(Spec(problem=problem))
