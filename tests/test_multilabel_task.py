"""Several labels a row: each is there or not, learned by binary cross-entropy, judged label by label."""

import csv

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fedloom
from fedloom import tasks
from fedloom.comparison.table import table
from fedloom.data.load import load
from fedloom.errors import UsageError
from fedloom.report.page import render
from fedloom.site import Site
from fedloom.tasks.multilabel import average_precisions, measures

NAMES = ("sport", "news", "art")


def columns(rows=400):
    from sklearn.datasets import make_multilabel_classification

    return make_multilabel_classification(rows, 8, n_classes=3, n_labels=2, random_state=0)


@pytest.fixture
def labelled(tmp_path):
    x, y = columns()
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(f"f{k}" for k in range(8)), *NAMES])
        writer.writerows([*a, b[0], "true" if b[1] else "false", f"{b[2]}.0"] for a, b in zip(x, y, strict=True))
    return str(tmp_path / "rows.csv")


def settings(labelled, **more):
    return {"problem": "multilabel", "data": labelled, "label": "sport,news,art", "clients": 4} | more


def test_columns_of_any_spelling_become_labels_of_their_rows(labelled):
    x, y = columns()
    source = load(labelled, "sport,news,art", target="labels")
    assert source.labels == NAMES and source.train.x.shape[1] == 8, "no label is a feature"
    found = {tuple(row): tuple(labels) for part in (source.train, source.test)
             for row, labels in zip(part.x.int().tolist(), part.y.int().tolist(), strict=True)}  # fmt: skip
    assert found == {tuple(a): tuple(b) for a, b in zip(x.astype(int).tolist(), y.tolist(), strict=True)}


def test_rows_of_numbers_are_labels_too(tmp_path):
    x, y = columns()
    np.savez(tmp_path / "rows.npz", x=x.astype(np.float32), labels=y)
    source = load(str(tmp_path / "rows.npz"), target="labels")
    assert source.labels == ("labels 0", "labels 1", "labels 2") and source.train.y.shape[1] == 3
    assert torch.cat([source.train.y, source.test.y]).sum(0).tolist() == y.sum(0).tolist()


def test_sets_of_labels_are_dealt_like_classes(labelled):
    task = tasks.build(fedloom.Spec(**settings(labelled, partition="dirichlet:0.1")))
    f = task.federation
    told = f.table()
    assert "sport+news+art" in told["classes"] and "other sets" in told["classes"]
    for name, place in zip(f.classes[:-1], range(len(f.classes)), strict=False):
        rows = f.y[f.strata == place]
        assert {"+".join(n for n, v in zip(NAMES, row, strict=True) if v) or "none" for row in rows.tolist()} == {name}
    means = torch.stack([f.y[f.train[k]].mean(0) for k in range(4)])
    alike = tasks.build(fedloom.Spec(**settings(labelled, partition="iid"))).federation
    assert means.std(0).max() > 2 * torch.stack([alike.y[alike.train[k]].mean(0) for k in range(4)]).std(0).max()


def test_measures_are_those_of_scikit_learn():
    from sklearn.metrics import accuracy_score, average_precision_score, f1_score, log_loss

    draw = torch.Generator().manual_seed(0)
    outputs = torch.randn(200, 4, generator=draw).round(decimals=1)  # with ties
    y = (outputs + 2 * torch.randn(200, 4, generator=draw) > 0.5).float()
    found = measures(lambda x: outputs, fedloom.Data(torch.zeros(200, 1), y))
    said, truth = (outputs > 0).int().numpy(), y.int().numpy()
    assert found["n"] == 200
    assert found["macro_f1"] == pytest.approx(f1_score(truth, said, average="macro"))
    assert found["exact_match"] == pytest.approx(accuracy_score(truth, said))
    assert found["average_precision"] == pytest.approx(average_precision_score(truth, outputs.numpy(), average="macro"))
    losses = [log_loss(truth[:, k], outputs[:, k].double().sigmoid().numpy()) for k in range(4)]
    assert found["loss"] == pytest.approx(np.mean(losses))


def test_labels_that_nobody_has_say_nothing():
    y = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    data = fedloom.Data(torch.zeros(2, 1), y)
    quiet = measures(lambda x: torch.tensor([[1.0, -1.0], [-1.0, -1.0]]), data)
    assert (quiet["macro_f1"], quiet["average_precision"], quiet["exact_match"]) == (1.0, 1.0, 1.0)
    loud = measures(lambda x: torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), data)
    assert (loud["macro_f1"], loud["average_precision"], loud["exact_match"]) == (0.5, 1.0, 0.5)
    assert average_precisions(torch.tensor([[0.0], [0.0]]), torch.tensor([[True], [False]])).tolist() == [0.5], "a tie"


def test_a_step_is_that_of_one_logistic_regression_a_label(labelled):
    task = tasks.build(fedloom.Spec(**settings(labelled, clients=1, partition="iid", model="linear", validation=0.0)))
    run = fedloom.run("fedavg", task, rounds=1, lr=0.5, batch=0, epochs=1)
    first, data = Site(task, 0).initial, task.data(0, "train")
    w, b = first["head.weight"].double(), first["head.bias"].double()
    off = torch.sigmoid(data.x.double() @ w.T + b) - data.y.double()
    after = w - 0.5 * (off.T @ data.x.double()) / off.numel()
    assert torch.allclose(run.model["head.weight"].double(), after, atol=1e-6)
    assert torch.allclose(run.model["head.bias"].double(), b - 0.5 * off.sum(0) / off.numel(), atol=1e-6)
    assert float(F.binary_cross_entropy_with_logits(data.x @ w.T.float() + b.float(), data.y)) > 0


def test_it_learns_more_than_how_frequent_labels_are(labelled):
    run = fedloom.run("scaffold", rounds=30, lr=0.3, **settings(labelled))
    final, always = run.final, run.partition["baseline"]
    assert final["global_test_macro_f1"] > always["macro_f1"] + 0.05
    assert final["global_test_average_precision"] > always["average_precision"] + 0.05
    assert final["global_test_exact_match"] > always["exact_match"]
    judged = [(row["validation_macro_f1"], -row["round"]) for row in run.metrics]
    assert run.selected["round"] == -max(judged)[1]
    f, shares = tasks.build(fedloom.Spec(**settings(labelled))).federation, run.partition["labels"]
    assert list(shares) == list(NAMES)
    assert list(shares.values()) == pytest.approx(f.y[f.train.rows].mean(0).tolist())
    page = render(run)
    assert "Global model, test macro F1" in page and "mean average precision" in page and "exact match" in page
    assert "Always predicting the training shares has" in page


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"label": "sport,nope"}, "no column 'nope'"),
        ({"label": "sport,sport"}, "names the column 'sport' twice"),
        ({"label": "f0,sport"}, "the label 'f0' of .* holds"),
        ({"label": "sport"}, "several labels a row are columns of 0 and 1"),
        ({"partition": "iid+flip:0.1"}, "this target has none"),
        ({"attack": "backdoor:0.3"}, "needs one class a sample"),
    ],
)
def test_what_cannot_be_is_refused_in_words(labelled, change, told):
    with pytest.raises(UsageError, match=told):
        fedloom.run("fedavg", rounds=1, **settings(labelled) | change)


def test_a_label_that_is_always_there_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x,a,b\n" + "1.5,1,0\n2.5,1,1\n" * 30)
    with pytest.raises(UsageError, match=r"the label .a. of .* is the same in every training row"):
        load(str(tmp_path / "a.csv"), "a,b", target="labels")
    (tmp_path / "b.csv").write_text("x,a,b\n" + "1.5,1,0\n2.5,,1\n3.5,0,1\n" * 30)
    with pytest.raises(UsageError, match="missing values"):
        load(str(tmp_path / "b.csv"), "a,b", target="labels")
    assert len(load(str(tmp_path / "b.csv"), "a,b", target="labels", missing="drop").train.y) == 48


def test_methods_by_class_refuse_and_engines_agree(labelled):
    with pytest.raises(UsageError, match="fedproto needs classes"):
        fedloom.run("fedproto", rounds=1, **settings(labelled))
    plain, pool, together = (
        fedloom.run("fedprox", rounds=2, engine=engine, **settings(labelled)).model.flat
        for engine in ("serial", "pool", "vectorized")
    )
    assert torch.equal(plain, pool) and torch.allclose(plain, together, atol=1e-5)
    private = fedloom.run("fedavg", rounds=1, dp="sample:noise=1.0,clip=1.0", **settings(labelled))
    assert private.final["global_test_macro_f1"] is not None


def test_comparisons_go_by_macro_f1(labelled, tmp_path):
    done = fedloom.compare(["fedavg", "local"], out=tmp_path / "c", seeds=2, rounds=2, **settings(labelled))
    made = table(done)
    assert made.metric == "personal_test_macro_f1"
    assert {"personal_test_exact_match", "global_test_average_precision"} <= set(made.metrics)
    assert "personal_test_average_precision" not in made.metrics, "which clients' measures do not give"
