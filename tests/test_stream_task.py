"""A stream of tasks: what is trained on, what is judged, and the matrices."""

import math

import pytest
import torch

import manyhands
from manyhands import tasks
from manyhands.errors import UsageError
from manyhands.spec import Spec
from manyhands.task import Batch
from manyhands.tasks.stream import matrices

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
    run = manyhands.run(
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


def test_clients_without_samples_of_a_task_sit_out():
    task = tasks.build(Spec(clients=10, problem="stream:5,rounds=1", partition="classes:2"))
    there = [[k for k in range(10) if task.at(round).present(k)] for round in range(1, 6)]
    assert all(0 < len(ids) < 10 for ids in there)
    run = manyhands.run("fedavg", problem="stream:5,rounds=1", partition="classes:2", clients=10, rounds=5)
    assert [row["cohort"] for row in run.metrics] == list(map(len, there))


@pytest.mark.parametrize("problem", ["stream:11", "stream:0", "stream:2,rounds=0"])
def test_streams_that_do_not_fit_are_refused(problem):
    with pytest.raises(UsageError, match="expected 1 to 10 tasks"):
        tasks.build(Spec(problem=problem))
