"""Streams of every kind: when samples come, among which classes they are judged, and what a run has kept."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import ran, stopped_and_resumed

import fedloom
from fedloom import tasks
from fedloom.comparison.measures import measured
from fedloom.errors import UsageError
from fedloom.methods.continual.fot import FOT
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.runs.continual import continual, matrices
from fedloom.runs.spec import Spec
from fedloom.task import Batch, Data
from fedloom.tasks.stream import Stream
from fedloom.tasks.toy import Toy
from fedloom.testing.lab import difference, trace

KINDS = ("classes", "missions", "drift", "samples")


def small(by: str, tasks: int = 3, lasting: int = 1) -> Stream:
    """Three clouds, of which each comes by itself where classes come."""
    return Stream(Toy(), tasks, lasting, by=by, known=False if by in KINDS[:2] else None)


def built(options: str, **settings: object):
    given = {"clients": 4, "partition": "iid", "rounds": 10} | settings
    return tasks.build(Spec(problem=f"stream:5,rounds=2{options}", **given))


def plain(**settings: object):
    return tasks.build(Spec(**({"clients": 4, "partition": "iid"} | settings)))


@pytest.mark.parametrize("by", KINDS)
def test_every_training_sample_comes_once_and_only_its_task_is_trained_on(by):
    task, whole = built(f",by={by}"), plain()
    for k in range(4):
        parts = [task.at(round).data(k, "train").rows for round in (1, 3, 5, 7, 9)]
        assert all(torch.equal(task.at(2 * t + 2).data(k, "train").rows, part) for t, part in enumerate(parts))
        assert torch.equal(torch.cat(parts).sort().values, whole.data(k, "train").rows)
        assert all(len(part) for part in parts[:2])
        for split in ("validation", "test"):
            seen = [set(task.at(round).data(k, split).rows.tolist()) for round in (1, 3, 5, 7, 9)]
            assert all(one <= other for one, other in pairwise(seen))
            assert seen[-1] == set(whole.data(k, split).rows.tolist()), "in the end everything is judged"
            assert (len(seen[0]) < len(seen[-1])) == (by != "samples")
    assert torch.equal(task.at(10).global_test().rows, whole.global_test().rows)


@pytest.mark.parametrize("by", KINDS)
def test_a_stream_of_one_task_is_the_problem_itself(by):
    one, whole = (ran(FedAvg(), task, 2, eval_every=1) for task in (Stream(Toy(), 1, 2, by=by, known=None), Toy()))
    assert torch.equal(one.server.model.flat, whole.server.model.flat)
    names = ("global_test_accuracy", "global_test_loss", "personal_test_accuracy", "validation_accuracy")
    for row, other in zip(one.record.metrics, whole.record.metrics, strict=True):
        assert [row[name] for name in names] == pytest.approx([other[name] for name in names], rel=1e-6)


def test_without_a_task_told_one_softmax_has_all_classes_so_far():
    told, untold = (built(f",known={known}").at(5) for known in ("true", "false"))
    seen = untold.classes_of[:3].any(0)
    assert torch.equal(untold.seen, seen) and torch.equal(untold.old, untold.classes_of[:2].any(0))
    scores = torch.zeros(2, 10)
    scores[:, ~seen] = 100.0
    labels = torch.tensor([int(untold.classes_of[t].nonzero()[0]) for t in (2, 0)])
    assert float(untold.criterion(scores, Batch(torch.zeros(2), labels))) == pytest.approx(math.log(6))
    assert float(told.criterion(scores, Batch(torch.zeros(2), labels))) == pytest.approx(math.log(2))


@pytest.mark.parametrize("known", ["true", "false"])
def test_a_sample_of_an_old_task_may_be_taken_for_one_of_a_new_task_if_its_task_is_not_told(known):
    task = built(f",known={known}").at(3)
    first, second, unseen = (task.classes_of[t].nonzero().flatten() for t in (0, 1, 4))

    def answer(x):
        out = torch.zeros(len(x), 10)
        out[:, first[0]], out[:, second[0]], out[:, unseen[0]] = 1.0, 2.0, 3.0
        return out

    data = task.global_test()
    found, share = task.judge(answer, data), float((data.y[torch.isin(data.y, first)] == first[0]).double().mean())
    assert found["task1"] == (pytest.approx(share) if known == "true" else 0.0)
    own = data.y[torch.isin(data.y, second)]
    assert found["task2"] == pytest.approx(float((own == second[0]).double().mean()))
    assert found["accuracy"] == pytest.approx(
        sum(found[f"task{t + 1}"] * int(torch.isin(data.y, g).sum()) for t, g in enumerate((first, second))) / len(data)
    )
    assert set(found) == {"n", "loss", "accuracy", "task1", "task2"}
    assert math.isfinite(found["loss"]) and found["loss"] < 100


def test_a_flipped_label_may_be_of_a_class_that_has_not_come():
    task = built(",known=false").at(3)
    label = int((~task.seen).nonzero()[0])
    loss = task.criterion(torch.zeros(1, 10), Batch(torch.zeros(1), torch.tensor([label])))
    assert float(loss) == pytest.approx(math.log(5))
    run = fedloom.run(
        "fedavg", problem="stream:5,rounds=1,known=false", rounds=5, clients=4, attack="label_flip:0.5", report=False
    )
    assert all(row["train_loss"] < 100 for row in run.metrics)


def test_when_samples_come_is_found_out_once():
    task = built(",by=missions")
    assert task.at(3).plan is task.plan and task.at(9).at(3).plan is task.plan


def test_in_missions_every_client_has_the_groups_in_an_order_of_its_own():
    task = built(",by=missions", clients=6)
    orders = []
    for k in range(6):
        came = [task.at(2 * t + 1).data(k, "train").y.unique() for t in range(5)]
        groups = [next(g for g in range(5) if torch.equal(task.classes_of[g].nonzero().flatten(), y)) for y in came]
        assert sorted(groups) == [0, 1, 2, 3, 4]
        orders.append(tuple(groups))
    assert len(set(orders)) > 3
    assert torch.equal(task.classes_of, built("", clients=6).classes_of), "the same groups"
    for t in range(5):
        now, seen = task.at(2 * t + 1), {group for order in orders for group in order[: t + 1]}
        assert torch.equal(now.seen, task.classes_of[sorted(seen)].any(0))
        assert torch.equal(now.global_test().y.unique(), now.seen.nonzero().flatten()), "what anybody has met"
        own = set(orders[0][: t + 1])
        assert torch.equal(now.data(0, "test").y.unique(), task.classes_of[sorted(own)].any(0).nonzero().flatten()), (
            "a client's own test has what it has met itself"
        )
    found = task.at(3).judge(lambda x: torch.zeros(len(x), 10), task.at(3).data(0, "test"))
    assert {"task1", "task2"} <= found.keys() and "task3" not in found
    assert "task1" not in task.at(3).judge(lambda x: torch.zeros(len(x), 10), task.at(3).global_test())


def test_in_missions_a_sample_whose_task_is_told_is_learned_among_its_own_group():
    task = built(",by=missions").at(3)
    label = int(task.classes_of[3].nonzero()[0])
    scores = torch.zeros(1, 10)
    scores[:, ~task.classes_of[3]] = 100.0
    assert float(task.criterion(scores, Batch(torch.zeros(1), torch.tensor([label])))) == pytest.approx(math.log(2))


def test_newcomers_change_nobodys_order_and_are_not_among_those_who_have_met_a_class():
    few, more = (Stream(Toy((20, 20), newcomers=late), 3, 1, by="missions", known=False) for late in ((), (20,) * 9))
    for task in (few, more):
        first = torch.stack([task.plan.places[k] for k in range(2)])
        assert torch.equal(task.plan.first, first.amin(0)[task.plan.group])
    assert torch.equal(few.plan.places, more.plan.places[:2])


@pytest.mark.parametrize("alpha", [0.1, 1.0, 1e6])
def test_a_drift_deals_each_class_in_proportion_to_two_draws_that_it_goes_between(alpha):
    task, whole = built(f",by=drift,alpha={alpha}"), plain()
    for k in range(4):
        draw = fedloom.random.numpy_stream(0, "data", "drift", k)
        start, end = draw.dirichlet([alpha] * 10, size=2)
        parts = np.array([(1 - t / 4) * start + t / 4 * end + 1e-9 for t in range(5)])
        for split in ("train", "test"):
            total = torch.bincount(whole.data(k, split).y, minlength=10).numpy()
            seen = [torch.bincount(task.at(2 * t + 1).data(k, split).y, minlength=10).numpy() for t in range(5)]
            counts = np.array(seen) if split == "train" else np.diff(np.array(seen), axis=0, prepend=0)
            assert (np.abs(counts - total * parts / parts.sum(0)) <= 1 + 1e-6).all()
    a, b = (task.at(round).data(0, "train").y.double().mean() for round in (1, 9))
    if alpha < 1:
        assert abs(a - b) > 0.2, "the mixture has moved"


def test_which_samples_of_a_class_come_early_in_a_drift_is_drawn():
    whole = plain().data(0, "train")
    label = int(whole.y.bincount().argmax())
    own = whole.rows[whole.y == label]
    came = torch.isin(own, built(",by=drift,alpha=100000").data(0, "train").rows).nonzero().flatten()
    assert 0 < len(came) < len(own) and not torch.equal(came, torch.arange(len(came)))


def test_samples_come_in_even_parts_that_are_drawn_for_each_client():
    task = built(",by=samples")
    for k in range(4):
        sizes = [len(task.at(round).data(k, "train")) for round in (1, 3, 5, 7, 9)]
        assert max(sizes) - min(sizes) <= 1
    whole = plain().data(0, "train").rows
    places = torch.isin(whole, task.data(0, "train").rows).nonzero().flatten()
    assert not torch.equal(places, torch.arange(len(places)))
    other = torch.isin(plain().data(1, "train").rows, task.data(1, "train").rows).nonzero().flatten()
    assert places[:20].tolist() != other[:20].tolist()
    assert [task.stage(round) for round in (1, 3, 9)] == [None] * 3, "what is judged stays, so all rounds compare"
    assert [built(",by=drift").stage(round) for round in (1, 3, 9)] == [1, 2, 5]
    assert "task1" not in task.judge(lambda x: torch.zeros(len(x), 10), task.global_test())


@dataclass
class Told:
    """A record whose accuracies are given: `rows[i][j]` of task j after task i."""

    rows: list[list[float]]
    test: str = "global_test"
    lasting: int = 2

    @property
    def partition(self):
        return {"tasks": [[0]] * len(self.rows), "rounds_per_task": self.lasting}

    @property
    def metrics(self):
        found = []
        for i, row in enumerate(self.rows):
            early = {f"{self.test}_task{j + 1}": 0.01 for j in range(len(row))}
            late = {f"{self.test}_task{j + 1}": value for j, value in enumerate(row)}
            found += [{"round": 2 * i + 1} | early, {"round": 2 * i + 2} | late]
        return found


ROWS = [[0.9], [0.95, 0.8], [0.7, 0.85, 0.6], [0.5, 0.9, 0.2, 0.75]]


@pytest.mark.parametrize("test", ["global_test", "personal_test"])
def test_what_was_kept_by_hand(test):
    found = continual(Told(ROWS, test))
    assert found["incremental_accuracy"] == pytest.approx((0.9 + 1.75 / 2 + 2.15 / 3 + 2.35 / 4) / 4)
    assert found["forgetting"] == pytest.approx(((0.95 - 0.5) + (0.85 - 0.9) + (0.6 - 0.2)) / 3)
    assert found["backward_transfer"] == pytest.approx(((0.5 - 0.9) + (0.9 - 0.8) + (0.2 - 0.6)) / 3)
    accuracy, lost = matrices(Told(ROWS, test))
    assert accuracy[2, :3].tolist() == ROWS[2] and math.isnan(accuracy[2, 3])
    assert lost.tolist() == pytest.approx([0.4, -0.1, 0.4, 0.0])


def test_where_a_task_was_never_measured_nothing_is_said():
    assert continual(Told([[0.9], [], [0.7, 0.85, 0.6]])) == {}
    assert continual(Told([[0.9]])) == {"incremental_accuracy": 0.9}
    assert continual(fedloom.run("fedavg", rounds=1, clients=4, report=False)) == {}


def test_a_run_tells_what_it_kept(tmp_path, capsys):
    from fedloom.cli import main

    settings = ["--problem", "stream:3,rounds=2,known=false", "--rounds", "6", "--clients", "4", "--partition", "iid"]
    assert main(["run", "fedavg", *settings, "--out", str(tmp_path / "run")]) in (0, None)
    run = fedloom.Run(tmp_path / "run")
    found = continual(run)
    assert set(found) == {"incremental_accuracy", "forgetting", "backward_transfer"}
    assert f"forgetting {100 * found['forgetting']:.1f} %" in capsys.readouterr().out
    assert found.items() <= measured(run).items()
    assert found["forgetting"] > 0.5, "one softmax forgets the old classes of plain averaging"
    assert run.partition["stream"] == {"by": "classes", "known": False}


def test_methods_compare_by_what_they_keep(tmp_path):
    results = fedloom.compare(
        ["fedavg", "fot"],
        "digits",
        seeds=1,
        jobs=1,
        rounds=4,
        clients=3,
        metric="incremental_accuracy",
        settings={"told": {"problem": "stream:2,rounds=2"}, "untold": {"problem": "stream:2,rounds=2,known=false"}},
        out=tmp_path / "out",
    )
    assert all(cell.error is None for cell in results.cells), [cell.error for cell in results.cells]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "accuracy on the tasks so far" in text and "forgetting" in text
    scores = {(c.setting, c.method): continual(c.run)["incremental_accuracy"] for c in results.cells}
    assert all(scores["told", m] > scores["untold", m] + 0.1 for m in ("fedavg", "fot"))


@pytest.mark.parametrize("by", KINDS)
def test_a_method_for_streams_does_something_in_every_kind(by):
    made, other = (ran(method, small(by), 3, eval_every=1) for method in (FOT(), FedAvg()))
    assert not torch.equal(made.server.model.flat, other.server.model.flat)
    assert made.server.protected == 3


@pytest.mark.parametrize("by", KINDS)
def test_stopped_in_the_middle_of_a_task_and_resumed_no_bit_differs(by, tmp_path):
    task, method = small(by, 3, 2), FOT()
    spec = Spec.of({"method": method.to_spec(), "partition": "given", "rounds": 6})
    whole = ran(method, task, 6, eval_every=1)
    for after in (3, 4):
        again = stopped_and_resumed(spec, task, method, tmp_path / str(after), after)
        assert difference(trace(whole), trace(again)) is None
    assert [row["stage"] for row in whole.record.metrics if "stage" in row] in ([1, 1, 2, 2, 3, 3], [])


@pytest.mark.parametrize("by", KINDS)
def test_clients_of_different_tasks_train_together(by):
    task = Stream(Toy((12, 12, 12)), 3, 1, by=by, known=False if by in KINDS[:2] else None)
    one, other = (ran(FedAvg(), task, 3, engine=engine).server.model.flat for engine in ("serial", "vectorized"))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        ("stream:5,by=drift,known=false", "has known=false, and by=drift all classes are there from the start"),
        ("stream:5,by=samples,known=true", "has known=true, and by=samples all classes"),
        ("stream:5,alpha=0.1", "has alpha=0.1; it is a number above 0, and of a stream by=drift alone"),
        ("stream:5,by=drift,alpha=0", "has alpha=0"),
        ("stream:5,by=drft", "unknown kind of stream 'drft'; did you mean 'drift'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_data_are_read(problem, told):
    with pytest.raises(UsageError, match=told):
        tasks.build(Spec(problem=problem, data="there/is/no/such.csv"))


def test_tasks_of_one_class_are_refused_where_the_task_is_told():
    with pytest.raises(UsageError, match=r"6 tasks over 10 classes has 2 with one class each.*take fewer tasks, or kn"):
        tasks.build(Spec(problem="stream:6,rounds=2", rounds=12))
    assert tasks.build(Spec(problem="stream:6,rounds=2,known=false", rounds=12)).tasks == 6


def test_streams_over_problems_that_have_no_classes():
    from problems import Quadratics

    with pytest.raises(UsageError, match="of which Quadratics has not one each; take by=samples"):
        Stream(Quadratics(), 2, 1)
    made = ran(FedAvg(), Stream(Quadratics(), 2, 1, by="samples"), 2)
    assert made.record.metrics[-1]["gradient_steps"] > 0
    with pytest.raises(UsageError, match="0 tasks of 3 rounds; expected at least one task"):
        Stream(Quadratics(), 0, 3, by="samples")


def test_labels_of_another_source_are_judged_without_tasks():
    task = replace(built(",known=false"), now=4)
    data = task.global_test()
    found = task.judge(lambda x: torch.zeros(len(x), 10), Data(data.x, data.y))
    assert set(found) == {"n", "loss", "accuracy"}


def test_clients_whose_tasks_are_told_train_together():
    task = built(",by=missions")
    one, other = (ran(FedAvg(), task, 3, engine=engine).server.model.flat for engine in ("serial", "vectorized"))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
