"""Which classes are taken for which: counted once more by hand, and one with the accuracies that runs record."""

import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support

import fedloom
from fedloom import UsageError
from fedloom.cli import main
from fedloom.random import numpy_stream
from fedloom.report.page import render
from fedloom.report.picture import Picture
from fedloom.runs.confusion import FILE, Confusion
from fedloom.runs.counting import counted
from fedloom.runs.outline import by_client
from fedloom.tasks.toy import Toy


@pytest.fixture(scope="module")
def ditto(tmp_path_factory):
    return fedloom.run("ditto", "digits", clients=4, rounds=3, out=tmp_path_factory.mktemp("confusion") / "run")


def by_hand(net, data):
    """(true, said) of rows one by one, counted."""
    return Counter((int(y), int(net(x[None]).argmax())) for x, y in zip(data.x, data.y, strict=True))


def cells(found):
    return {(i, j): int(n) for (i, j), n in np.ndenumerate(found.matrix) if n}


def test_a_matrix_is_what_the_models_say_of_the_rows_one_by_one(ditto):
    task = fedloom.problem("digits", clients=4)
    assert cells(ditto.confusion()) == by_hand(ditto.module(), task.global_test())
    for split in ("train", "validation", "test"):
        own = by_hand(ditto.client_module(2), task.data(2, split))
        assert cells(ditto.confusion(2, split)) == own and len(ditto.confusion(2, split)) == len(task.data(2, split))
    everybody = sum((by_hand(ditto.client_module(k), task.data(k, "test")) for k in range(4)), Counter())
    assert cells(ditto.confusion("all")) == everybody
    held_out = sum((by_hand(ditto.module(), task.data(k, "validation")) for k in range(4)), Counter())
    assert cells(ditto.confusion(split="validation")) == held_out
    last = by_hand(ditto.module("last"), task.global_test())
    assert cells(ditto.confusion(which="last")) == last


@pytest.mark.parametrize(
    ("method", "settings"),
    [("fedavg", {}), ("fedavg", {"problem": "stream:2,rounds=1,known=false"}), ("apfl", {}), ("local", {})],
)
def test_right_is_what_the_record_says(method, settings, tmp_path):
    run = fedloom.run(method, clients=4, rounds=2, out=tmp_path / "run", report=False, **settings)
    row, run = run.selected, fedloom.load(tmp_path / "run")
    if row["global_test_accuracy"] is None:
        with pytest.raises(UsageError, match="no global model"):
            run.confusion()
    else:
        found = run.confusion()
        assert found.matrix.trace() / len(found) == row["global_test_accuracy"]
    found = run.confusion("all")
    assert found.matrix.trace() / len(found) == pytest.approx(row["personal_test_accuracy"], abs=1e-15)
    for client in run.chosen_clients["clients"]:
        own = run.confusion(client["id"])
        assert (own.matrix.trace() / len(own), len(own)) == (client["accuracy"], client["n"])


def test_what_the_folder_has_is_what_is_counted_again(ditto, tmp_path):
    before = ditto.confusion(), ditto.confusion("all")
    kept = (ditto.path / FILE).read_text()
    (ditto.path / FILE).unlink()
    try:
        again = ditto.confusion(), ditto.confusion("all")
    finally:
        (ditto.path / FILE).write_text(kept)
    for one, other in zip(before, again, strict=True):
        assert one.classes == other.classes and (one.matrix == other.matrix).all()
    assert json.loads(kept)["round"] == ditto.selected["round"]
    assert (before[0].matrix != before[1].matrix).any()


def test_class_by_class_is_scikit_learns():
    rng = numpy_stream(3, "confusion")
    true, said = rng.integers(0, 5, 400), rng.integers(0, 4, 400)
    true[true == 2] = 3  # a class without rows, and one that is never said
    matrix = np.zeros((5, 5), dtype=int)
    for pair in zip(true, said, strict=True):
        matrix[pair] += 1
    found = Confusion(matrix, tuple("abcde")).per_class()
    expected = precision_recall_fscore_support(true, said, labels=range(5), zero_division=np.nan)
    for c, one in enumerate(found):
        have = [one["precision"], one["recall"], one["f1"], one["support"]]
        for mine, its in zip(have, expected, strict=True):
            assert (mine is None and np.isnan(its[c])) or mine == pytest.approx(its[c], abs=1e-15)
    assert found[2]["recall"] is None and found[4]["precision"] is None and found[2]["support"] == 0


def test_names_stand_in_tables_and_arrays_are_counts(ditto):
    found = ditto.confusion()
    assert np.asarray(found).dtype == np.int64 and np.asarray(found).sum() == len(found) == 359
    table = found.frame()
    assert list(table.index) == list(table.columns) == [str(c) for c in range(10)]
    assert (table.index.name, table.columns.name) == ("true", "said")
    assert (table.to_numpy() == found.matrix).all()
    html = Confusion(np.array([[3, 1], [0, 2]]), ("<b>", "é\x1b"))._repr_html_()
    assert "<tr><th>&lt;b&gt;</th><td>3</td><td>1</td></tr>" in html and "\x1b" not in html
    restored = Confusion.restored(json.loads(json.dumps(found.stored())), list(found.classes))
    assert (restored.matrix == found.matrix).all()


def test_tables_of_a_run(ditto):
    assert len(ditto.frame()) == 3 and list(ditto.frame()["round"]) == [1, 2, 3]
    classes = ditto.frame("classes")
    assert list(classes.columns) == ["class", "recall", "precision", "f1", "support"]
    assert classes["support"].sum() == 359 and (classes["recall"] * classes["support"]).sum() / 359 == pytest.approx(
        ditto.selected["global_test_accuracy"]
    )
    clients = ditto.frame("clients")
    last = clients[clients["round"] == 3]
    judged = {one["id"]: one["accuracy"] for one in ditto.clients["clients"]}
    assert dict(zip(last["client"], last["accuracy"], strict=True)) == judged and len(clients) == 12
    lines = [{"round": 2, "id": [3, 7], "accuracy": [0.5, None], "n": [4, 0]}, {"round": 4, "id": []}, {"round": 5}]
    assert by_client(SimpleNamespace(lines=lambda name: lines if name == "clients.jsonl" else [])) == [
        {"round": 2, "client": 3, "accuracy": 0.5, "n": 4},
        {"round": 2, "client": 7, "accuracy": None, "n": 0},
    ]
    with pytest.raises(UsageError, match=r"unknown table of a run 'class'; did you mean 'classes'"):
        ditto.frame("class")


def test_what_has_no_classes_or_no_such_rows_is_told(ditto, tmp_path):
    for wrong, said in (
        ({"split": "testing"}, "unknown split 'testing'; did you mean 'test'"),
        ({"which": "best"}, "unknown round of a model 'best'"),
        ({"client": "everybody"}, "client is 'everybody'; it is a number, 'all'"),
        ({"client": 9}, "has no client 9; they are numbered from 0 to 3"),
    ):
        with pytest.raises(UsageError, match=said):
            ditto.confusion(**wrong)
    run = fedloom.run("fedavg", "diabetes", problem="regression", clients=3, rounds=1, out=tmp_path / "amount")
    assert not (run.path / FILE).exists() and "Class by class" not in render(run)
    with pytest.raises(UsageError, match="problems with one class a row; this is a Regression"):
        run.confusion()
    with pytest.raises(UsageError, match="keeps no measures class by class"):
        run.frame("classes")
    with pytest.raises(UsageError, match="no models of clients: what is judged is a function"):
        fedloom.run("fedproto", clients=3, rounds=1).confusion("all")


def test_data_that_only_python_has_are_given_again_and_are_the_same(tmp_path):
    rng = numpy_stream(0, "confusion")
    x = rng.normal(size=(120, 3))
    y = (x[:, 0] > 0).astype(int)
    run = fedloom.run("fedavg", (x, y), partition="iid", clients=3, rounds=1, out=tmp_path / "run", report=False)
    found = run.confusion(1, "train")  # this process still has them
    there = fedloom.load(tmp_path / "run")
    assert (there.confusion().matrix == run.confusion().matrix).all()  # which the folder has
    with pytest.raises(UsageError, match=r"give them again: run.confusion\(..., task=...\)"):
        there.confusion(1, "train")
    assert (there.confusion(1, "train", task=(x, y)).matrix == found.matrix).all()
    with pytest.raises(UsageError, match="are not what is given now"):
        there.confusion(1, "train", task=(x + 1, y))
    task = Toy()
    toy = fedloom.run("fedavg", task, rounds=1, out=tmp_path / "toy", report=False)
    row, again = toy.selected, fedloom.load(tmp_path / "toy")
    assert again.confusion().matrix.trace() / len(task.global_test()) == row["global_test_accuracy"]
    assert toy.confusion(0, "train").matrix.sum() == len(task.data(0, "train"))


def test_a_file_that_changed_is_not_counted_on(tmp_path):
    rng = numpy_stream(0, "confusion")
    lines = [f"{a:.3f},{b:.3f},{'yes' if a > 0 else 'no'}" for a, b in rng.normal(size=(90, 2))]
    (tmp_path / "rows.csv").write_text("\n".join(["a,b,label", *lines]))
    run = fedloom.run("fedavg", tmp_path / "rows.csv", clients=3, partition="iid", rounds=1, out=tmp_path / "run")
    assert run.confusion(0).classes == ("no", "yes")
    (tmp_path / "rows.csv").write_text("\n".join(["a,b,label", *lines[:-1]]))
    with pytest.raises(UsageError, match="changed since"):
        run.confusion(0)


def test_outputs_that_are_not_by_class_are_not_counted():
    task = Toy()
    data = task.global_test()
    assert counted(task, lambda x: torch.zeros(len(x), 1), data) is None
    assert counted(task, lambda x: torch.zeros(len(x), task.classes), data)[:, 0].sum() == len(data)
    assert counted(task, lambda x: None, fedloom.Data(data.inputs[:0], data.labels[:0])).sum() == 0


def test_the_page_shows_it_and_a_tuning_trial_keeps_nothing(ditto, tmp_path):
    page = render(ditto)
    section = page[page.index('id="classes"') :].partition("</section>")[0]
    rows = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td>\s*<td>(.*?)</td><td>(.*?)</td>', section)
    each = [*ditto.confusion().per_class(), *ditto.confusion("all").per_class()]
    assert [row[0] for row in rows] == [one["class"] for one in each] and len(rows) == 20
    assert [row[4] for row in rows] == [str(one["support"]) for one in each]
    assert [row[1] for row in rows] == [f"{100 * one['recall']:.1f} %" for one in each]
    assert "<figcaption>Which classes the global model takes for which</figcaption>" in page
    assert "<figcaption>Which classes clients&#39; models take for which</figcaption>" in page.replace("'", "&#39;")
    blind = fedloom.run("fedavg", clients=3, rounds=1, blind=True, out=tmp_path / "blind", report=False)
    assert not (blind.path / FILE).exists()


def test_pictures_show_themselves_and_are_files(ditto, tmp_path):
    loss = ditto.plot("loss")
    assert isinstance(loss, Picture) and "training" in loss.alt and ditto.plot().title == "Accuracy"
    drawn = ET.fromstring(loss._repr_svg_())
    assert drawn.tag.endswith("svg") and drawn.get("role") == "img" and drawn.get("aria-label") == loss.alt
    assert float(drawn.get("width")) == pytest.approx(4.2 * 72) and drawn[0].get("fill") == "#fff"
    assert "var(--" not in loss._repr_svg_()
    counts = ditto.plot("confusion")
    axes = counts.figure.axes[0]
    found = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}
    matrix = ditto.confusion().matrix
    shares = {(i, j): f"{100 * n / matrix[i].sum():.1f}" for (i, j), n in np.ndenumerate(matrix) if n}
    assert found == shares and axes.get_ylabel() == "true" and axes.get_xlabel().startswith("said")
    for form, magic in (("svg", b"<svg"), ("pdf", b"%PDF"), ("png", b"\x89PNG")):
        one, other = tmp_path / f"one.{form}", tmp_path / f"other.{form}"
        assert loss.save(one) == one and one.read_bytes().startswith(magic)
        assert ditto.plot("loss").save(str(other)).read_bytes() == one.read_bytes()
        assert b"Date" not in one.read_bytes() and b"matplotlib" not in other.read_bytes()[:200]
    with pytest.raises(UsageError, match=r"cannot make a picture .*loss.jpg; take a file that ends in .svg, .pdf"):
        loss.save(tmp_path / "loss.jpg")
    with pytest.raises(UsageError, match="cannot write"):
        loss.save(tmp_path / "nowhere" / "loss.svg")
    with pytest.raises(UsageError, match="unknown picture of a run 'los'; did you mean 'loss'"):
        ditto.plot("los")
    page = render(ditto)
    for name, picture in ditto.pictures.items():
        assert re.fullmatch("[a-z-]+", name) and picture.alt and f'aria-label="{picture.alt[:20]}' in page


def test_the_command_writes_the_pictures_of_a_run_and_of_a_comparison(ditto, tmp_path, capsys):
    assert main(["report", str(ditto.path), "--pictures", str(tmp_path / "drawn")]) == 0
    told = capsys.readouterr().out.split()
    assert told[-1] == str(ditto.path / "report.html")
    assert told[:-1] == [str(tmp_path / "drawn" / f"{name}.svg") for name in ditto.pictures]
    grid = {"mu": [0.1, 1.0], "lr": [0.1, 0.2]}
    fedloom.sweep("fedprox", Toy(), over=grid, seeds=1, rounds=1, out=tmp_path / "swept")
    assert main(["report", str(tmp_path / "swept"), "--pictures", str(tmp_path / "more"), "--format", "pdf"]) == 0
    files = {path.name for path in (tmp_path / "more").iterdir()}
    one = "a-Toy-given-in-Python"
    assert {f"{one}-{kind}.pdf" for kind in ("fields", "scores", "clients", "round")} <= files, files
    assert (tmp_path / f"more/{one}-fields.pdf").read_bytes().startswith(b"%PDF")
    (ditto.path / "report.html").unlink()
    assert main(["report", str(ditto.path), "--pictures", str(tmp_path / "x"), "--format", "gif"]) == 2
    assert "unknown format of pictures 'gif'" in capsys.readouterr().err and not (tmp_path / "x").exists()
    assert not (ditto.path / "report.html").exists()
