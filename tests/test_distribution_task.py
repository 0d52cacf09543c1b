"""Targets that are distributions over classes: what is learned and judged, and what is refused."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import fedloom
from fedloom.cli import main
from fedloom.errors import UsageError
from fedloom.random import numpy_stream
from fedloom.task import Data
from fedloom.tasks.distribution import measures

SETTINGS = {"problem": "distribution", "partition": "iid", "clients": 3}
NAMES = ("cat", "dog", "other")


def votes(n=300):
    """Columns `a` and `b`, and the shares that a softmax of them gives."""
    x = numpy_stream(0, "test", "votes").normal(size=(n, 2))
    scores = np.stack([2 * x[:, 0], 2 * x[:, 1], np.zeros(n)], axis=1)
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return {"a": x[:, 0], "b": x[:, 1]} | dict(zip(NAMES, shares.T, strict=True))


def test_a_linear_model_learns_the_shares():
    run = fedloom.run("fedavg", votes(), label="cat,dog,other", model="linear", lr=0.5, rounds=30, **SETTINGS)
    assert run.final["global_test_kl"] < 0.01 and run.final["global_test_accuracy"] > 0.9
    columns = votes()
    found = run.predict({name: columns[name][:5] for name in "ab"})
    for row, said in enumerate(found):
        assert [*said] == [*NAMES] and sum(said.values()) == pytest.approx(1)
        assert [said[name] for name in NAMES] == pytest.approx([columns[name][row] for name in NAMES], abs=0.1)
    assert found == run.predict({name: columns[name][:5] for name in "ab"}, probabilities=True)
    baseline = run.partition["baseline"]
    assert run.final["global_test_kl"] < baseline["kl"] / 10


def test_hard_targets_are_classification():
    columns = votes()
    hard = np.eye(3)[np.stack([columns[name] for name in NAMES], 1).argmax(1)]
    soft = {"a": columns["a"], "b": columns["b"]} | dict(zip(NAMES, hard.T, strict=True))
    one = fedloom.problem(soft, label="cat,dog,other", **SETTINGS)
    other = fedloom.problem(
        {"a": columns["a"], "b": columns["b"], "label": hard.argmax(1)}, **SETTINGS | {"problem": "classification"}
    )
    batch, hot = other.data(0, "train").all(), one.data(0, "train").all()
    assert torch.equal(batch.x, hot.x) and torch.equal(batch.y, hot.y.argmax(1))
    outputs = torch.randn(len(batch), 3)
    assert one.criterion(outputs, hot).item() == pytest.approx(other.criterion(outputs, batch).item(), rel=1e-5)
    judged, plain = (
        one.judge(lambda x: outputs, one.data(0, "train")),
        other.judge(lambda x: outputs, other.data(0, "train")),
    )
    assert judged["accuracy"] == plain["accuracy"] and judged["kl"] == pytest.approx(judged["loss"])


def test_the_measures_in_plain_python():
    y = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    outputs = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [0.5, -1.0, 0.1]])
    found = measures(lambda x: outputs, Data(torch.zeros(3, 1), y))
    loss = kl = 0.0
    for row, target in zip(outputs.tolist(), y.tolist(), strict=True):
        total = sum(math.exp(value) for value in row)
        for value, share in zip(row, target, strict=True):
            p = math.exp(value) / total
            loss -= share * math.log(p) / 3
            kl += share * math.log(share / p) / 3 if share else 0.0
    assert found == {"n": 3, "loss": pytest.approx(loss), "kl": pytest.approx(kl), "accuracy": pytest.approx(2 / 3)}


def test_rows_of_numbers_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    columns = votes()
    shares = np.stack([columns[name] for name in NAMES], 1)
    of_columns = fedloom.problem(columns, label="cat,dog,other", **SETTINGS)
    of_rows = fedloom.problem((np.stack([columns["a"], columns["b"]], 1), shares), **SETTINGS)
    assert torch.allclose(of_columns.federation.y, of_rows.federation.y)
    assert torch.allclose(of_columns.federation.y.sum(1), torch.ones(300))
    with Path("votes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
    of_file = fedloom.problem("votes.csv", label="cat,dog,other", **SETTINGS)
    assert torch.allclose(of_columns.federation.y, of_file.federation.y, atol=1e-5)
    assert of_file.outputs() == {"kind": "shares", "classes": [*NAMES]}
    words = ["run", "fedavg", "--problem", "distribution", "--data", "votes.csv", "--label", "cat,dog,other"]
    assert main([*words, "--rounds", "1", "--clients", "3", "--out", "run"]) == 0
    assert len(fedloom.load("run").predict({"a": [0.0], "b": [1.0]})) == 1


def test_dirichlet_goes_by_the_largest_share():
    task = fedloom.problem(votes(), label="cat,dog,other", **SETTINGS | {"partition": "dirichlet:0.05"})
    shares = torch.stack([task.data(k, "train").y.mean(0) for k in range(3)])
    assert (shares.amax(0) - shares.amin(0)).max() > 0.3


def test_engines_agree_and_regularized_methods_run():
    runs = [
        fedloom.run(method, votes(), label="cat,dog,other", rounds=2, engine=engine, **SETTINGS)
        for method, engine in (("scaffold", "serial"), ("scaffold", "pool"), ("ditto", "serial"), ("moon", "serial"))
    ]
    assert torch.equal(runs[0].model.flat, runs[1].model.flat)


@pytest.mark.parametrize(
    ("change", "settings", "told"),
    [
        ({"cat": 1.0}, {}, "is no distribution in 300 of 300 rows"),
        ({"cat": -0.5}, {}, "is no distribution in"),
        ({}, {"label": "a"}, "distributions are columns of shares"),
        ({"cat": ["many"] * 300}, {}, "holds no numbers"),
        ({"cat": 1.0, "dog": 0.0, "other": 0.0}, {}, "is the same in every training row"),
        ({}, {"method": "fedproto"}, "fedproto needs classes"),
        ({}, {"loss": "focal"}, "has a loss of its own"),
        ({}, {"class_weights": "balanced"}, "has a loss of its own"),
        ({}, {"measures": "auc"}, "judged by measures of its own"),
    ],
)
def test_what_cannot_be_is_refused_in_words(change, settings, told):
    columns = votes()
    for name, value in change.items():
        columns[name] = value if isinstance(value, list) else np.full(300, value)
    settings = {"label": "cat,dog,other", "rounds": 1} | SETTINGS | settings
    with pytest.raises(UsageError, match=told):
        fedloom.run(settings.pop("method", "fedavg"), columns, **settings)
