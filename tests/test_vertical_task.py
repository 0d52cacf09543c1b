"""Columns instead of rows: parties, aligned samples, labels at the server."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import ran

import fedloom
from fedloom import tasks
from fedloom.data.load import load
from fedloom.errors import UsageError
from fedloom.methods.structure.one_shot_vfl import OneShotVFL
from fedloom.methods.structure.split_learning import SplitLearning
from fedloom.random import seeded
from fedloom.runs.spec import Spec
from fedloom.tasks.classification import Classification
from fedloom.tasks.vertical import cuts, toy


def built(problem: str = "vertical:0.2", **settings: object):
    return tasks.build(Spec(problem=problem, **settings))


def test_strips_of_images_make_the_image():
    task = built(clients=3)
    whole = Classification.load("digits", partition="iid", clients=1)
    assert [tuple(part.shape[1:]) for part in task.parts] == [(1, 8, 3), (1, 8, 3), (1, 8, 2)]
    assert torch.equal(torch.cat(task.parts, -1), whole.federation.x)
    assert torch.equal(task.truth, whole.federation.y)


def test_every_column_of_a_table_is_with_one_party():
    task, other = built(data="breast_cancer", clients=4), built(data="breast_cancer", clients=4, seed=1)
    whole = Classification.load("breast_cancer", partition="iid", clients=1).federation.x
    columns = {tuple(column.tolist()) for column in whole.T}
    mine = [tuple(column.tolist()) for part in task.parts for column in part.T]
    assert len(mine) == 30 and set(mine) == columns
    assert [part.shape[1] for part in task.parts] == [8, 8, 7, 7]
    assert not torch.equal(task.parts[0].mean(0), other.parts[0].mean(0)), "dealt anew with another seed"


def test_what_a_column_became_stays_together(tmp_path: Path):
    rows = [f"{i % 5},{'abc'[i % 3]},{'xy'[i % 2]},{i * i},{i % 2}" for i in range(40)]
    (tmp_path / "t.csv").write_text("one,two,three,four,label\n" + "\n".join(rows))
    source = load(str(tmp_path / "t.csv"))
    assert source.widths == (1, 3, 2, 1) and source.train.x.shape[1] == 7
    for seed in range(10):
        parties = [set(places.tolist()) for places in cuts(source, 2, seed)]
        assert set.union(*parties) == set(range(7)) and sum(map(len, parties)) == 7
        for group in ({1, 2, 3}, {4, 5}):
            assert sum(group <= party for party in parties) == 1


@pytest.mark.parametrize(("aligned", "count"), [(0.1, 130), (50, 50), (1.0, 1295)])
def test_who_has_which_samples(aligned, count):
    task = built(f"vertical:{aligned}", clients=2)
    assert len(task.aligned) == len(task.data(0, "train")) == len(task.labels) == count
    shares = [task.aligned, *task.alone, task.validation, task.test]
    assert torch.equal(torch.cat(shares).sort().values, torch.arange(len(task.truth))), "each sample is in one of these"
    assert abs(len(task.alone[0]) - len(task.alone[1])) <= 1
    for k in range(2):
        assert torch.equal(task.data(k, "alone").x, task.parts[k][task.alone[k]])
        assert torch.equal(task.data(k, "judged").x, task.parts[k][torch.cat([task.validation, task.test])])


def test_labels_are_at_the_server_only():
    task = built()
    for k in range(2):
        for split in ("train", "alone", "judged"):
            assert len(task.data(k, split)) and (task.data(k, split).y == -1).all()
        assert not len(task.data(k, "validation")) and not len(task.data(k, "test"))
    assert torch.equal(task.labels, task.truth[task.aligned]) and (task.labels >= 0).all()
    assert torch.equal(task.global_test().y, task.truth[task.test])
    assert torch.equal(task.global_validation().y, task.truth[task.validation])


def test_features_of_who_is_silent_are_zeros():
    task = toy()
    features = {1: torch.ones(5, 8), 3: torch.full((5, 8), 2.0)}
    joined = task.joined(features)
    assert joined.shape == (5, 32)
    assert joined[0].view(4, 8).mean(1).tolist() == [0, 1, 0, 2]
    assert torch.equal(task.joined({}, 5), torch.zeros(5, 32))


def test_asking_for_widths_moves_no_stream():
    def drawn(task):
        with seeded(0, "test"):
            return task.network().head.weight.detach().clone()

    fresh, known = toy(), toy()
    assert known.widths == (8, 8, 8, 8)
    assert torch.equal(drawn(fresh), drawn(known))


@pytest.mark.parametrize("method", [OneShotVFL(epochs=2), SplitLearning()])
def test_the_server_judges_what_parties_send(method):
    task = toy()
    made = ran(method, task, rounds=1)
    nets = [copy.deepcopy(task.build(f"party:{k}")).eval() for k in range(4)]
    for k, net in enumerate(nets):
        w = made.engine.states[k]["model"]
        net.load_state_dict({name: w[name] for name in w})
    weight, bias = (made.server.model[f"head.{name}"] for name in ("weight", "bias"))
    for rows, name in ((task.test, "global_test_accuracy"), (task.validation, "validation_accuracy")):
        features = torch.cat([net.body(part[rows]) for net, part in zip(nets, task.parts, strict=True)], 1)
        right = (features @ weight.T + bias).argmax(1) == task.truth[rows]
        assert made.record.final[name] == pytest.approx(right.double().mean().item())
    judged = [line for line in made.record.ledger if line["kind"] == "evaluate" and line["field"] == "features"]
    assert sum(len(line["clients"]) for line in judged) == 4


def test_a_blind_run_validates_but_does_not_test():
    final = fedloom.run("split_learning", problem="vertical:50", rounds=1, blind=True).final
    assert final["validation_accuracy"] is not None and final["global_test_accuracy"] is None


def test_an_engine_is_chosen_though_no_step_can_be_timed():
    made = fedloom.run("split_learning", problem="vertical:50", rounds=1, engine="auto")
    assert made.spec.engine == "serial" and "no step can be timed" in made.manifest["engine"]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"partition": "iid"}, "deals columns and does not read partition=iid"),
        ({"public": 0.1}, "does not read public"),
        ({"problem": "vertical:0"}, "expected a share of the training samples"),
        ({"problem": "vertical:5000"}, "aligns 5000 samples; digits has"),
        ({"clients": 9}, "digits has 8 columns, fewer than 9 parties"),
        ({"model": "cnn"}, "pixels"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, complaint):
    with pytest.raises(UsageError, match=complaint):
        built(**{"problem": "vertical:0.1", **settings})


def test_texts_have_no_columns(tmp_path: Path):
    lines = "\n".join(f"{word} is what we say here,{i % 2}" for i, word in enumerate(np.arange(40).astype(str)))
    (tmp_path / "t.csv").write_text(f"text,label\n{lines}")
    with pytest.raises(UsageError, match="is text, which has no columns to deal"):
        built(data=str(tmp_path / "t.csv"))


def test_methods_for_rows_are_refused():
    with pytest.raises(UsageError, match="fedavg cannot learn a problem of the kind vertical; take one_shot"):
        fedloom.run("fedavg", problem="vertical:0.1")
    with pytest.raises(UsageError, match="one_shot_vfl needs a problem of the kind vertical"):
        fedloom.run("one_shot_vfl")
