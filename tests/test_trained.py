"""What was trained is of use: the folder `model/`, the network of plain PyTorch in it, and predictions on raw rows."""

import csv
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import fedloom
from fedloom import Each, Method, Once
from fedloom.cli import main
from fedloom.cli.using import table_of
from fedloom.errors import RunError, UsageError
from fedloom.random import numpy_stream
from fedloom.runs import checkpoint, export
from fedloom.runs.record import Run
from fedloom.tasks.toy import Toy

SEEN = numpy_stream(5, "trained")


def written(path, rows, separator=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        table.writeheader()
        table.writerows(rows)


def patients(count, comma=False):
    """Rows with an age, a pressure with gaps, a ward, and an outcome that hangs on all of them."""
    rows = []
    for _ in range(count):
        age, pressure, ward = SEEN.normal(60, 12), SEEN.normal(130, 15), SEEN.choice(["Süd", "west", "nord"])
        ill = (age - 60) / 12 + (pressure - 130) / 15 + {"Süd": 1.0, "west": -1.0, "nord": 0.0}[ward] > 0
        cells = {"age": f"{age:.1f}", "pressure": "?" if SEEN.random() < 0.1 else f"{pressure:.2f}", "ward": ward}
        if comma:
            cells = {name: cell.replace(".", ",") for name, cell in cells.items()}
        rows.append(cells | {"outcome": "ill" if ill else "well"})
    return rows


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A run on a table with gaps, categories, semicolons and decimal commas, and its test rows."""
    folder = tmp_path_factory.mktemp("table")
    train, test = patients(400, comma=True), patients(90, comma=True)
    test[7]["ward"] = "ost"  # which no training row has
    written(folder / "data" / "train.csv", train, ";")
    written(folder / "data" / "test.csv", test, ";")
    how = {"label": "outcome", "missing": "mean", "clients": 4, "rounds": 8, "partition": "iid", "report": False}
    return fedloom.run("fedavg", folder / "data", lr=0.3, out=folder / "run", **how), test, folder


def share(found, right):
    return sum(one == other for one, other in zip(found, right, strict=True)) / len(right)


def test_predictions_on_raw_test_rows_are_as_right_as_the_record_says(table):
    run, test, folder = table
    labels = [row["outcome"] for row in test]
    with pytest.warns(UserWarning, match="column 'ward' has the value 'ost', which no training row had"):
        found = run.predict(folder / "data" / "test.csv")
    assert share(found, labels) == run.selected["global_test_accuracy"] > 0.8
    with pytest.warns(UserWarning, match="'ost'"):
        last = run.predict(str(folder / "data" / "test.csv"), which="last")
    assert share(last, labels) == run.final["global_test_accuracy"]
    chances = [run.predict([row | {"ward": "west"}], probabilities=True)[0] for row in american(test[:5])]
    assert all(set(one) == {"ill", "well"} and sum(one.values()) == pytest.approx(1) for one in chances)


def american(rows):
    """The same rows with decimal points, as Python has them."""
    return [{name: cell.replace(",", ".") for name, cell in row.items()} for row in rows]


def test_rows_are_the_same_in_whatever_form_they_come(table, tmp_path):
    run, test, _ = table
    rows = [row for row in american(test) if row["ward"] != "ost"]
    expected = run.predict(rows)
    names = ("age", "pressure", "ward")
    columns = {name: [row[name] for row in rows] for name in names}
    numbers = {name: [np.nan if cell == "?" else float(cell) for cell in columns[name]] for name in names[:2]}
    frame = pd.DataFrame(columns | numbers)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_parquet(tmp_path / "rows.parquet")
    forms = [
        columns,
        frame,
        frame[["ward", "pressure", "age"]].assign(more=1),  # another order, and a column beside
        frame.astype({"ward": "category"}),
        pa.table(columns),
        columns | {name: torch.tensor(column) for name, column in numbers.items()},
        tmp_path / "rows.csv",
        str(tmp_path / "rows.parquet"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(run.predict(form) == expected for form in forms)
        assert [run.predict(row)[0] for row in rows[:9]] == expected[:9]


def test_a_gap_is_filled_with_what_training_rows_had_on_average(table):
    run, *_ = table
    train = pd.DataFrame(american(json_rows(run)))
    with_gap = {"age": 61.0, "pressure": None, "ward": "west"}
    chance = run.predict(with_gap, probabilities=True)
    columns = json.loads((run.path / "model" / "model.json").read_text())["preprocessing"]["columns"]
    (mean,) = columns[1]["fill"]
    assert mean == pytest.approx(pd.to_numeric(train["pressure"], errors="coerce").mean(), abs=3)
    assert run.predict(with_gap | {"pressure": mean}, probabilities=True) == chance
    assert run.predict(with_gap | {"pressure": "n/a"}, probabilities=True) == chance
    known = {"age": 61.0, "pressure": 130.0}
    marked = [run.predict(known | {"ward": ward}, probabilities=True) for ward in ("?", None, " n/a ")]
    commonest = train["ward"].value_counts().index[0]
    assert marked == 3 * [run.predict(known | {"ward": commonest}, probabilities=True)]
    assert len(columns[0]["fill"]) == 1, "also a column that had no gap in training may have one later"


def json_rows(run):
    with (run.path.parent / "data" / "train.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter=";"))


WRONG = {
    "a column that is not there": ({"age": [1.0], "ward": ["west"]}, "lacks the column 'pressure', which the model"),
    "words for numbers": ({"age": ["old"], "pressure": [1], "ward": ["west"]}, "'age' holds 1 value that is no num"),
    "numbers and words": ({"age": [3, "old"], "pressure": [1, 2], "ward": ["a", "b"]}, "no common type|such as 'old'"),
    "infinity": ({"age": [float("inf")], "pressure": [1], "ward": ["west"]}, "'age' has 1 rows with infinite values"),
    "lists": ({"age": [[1, 2]], "pressure": [1], "ward": ["west"]}, "column 'age' has 2 numbers a row, not 1"),
    "lists of words": ({"age": [["a"]], "pressure": [1], "ward": ["west"]}, "1 value that is no number, such as 'a'"),
    "no string for a category": ({"age": [1], "pressure": [1], "ward": [[1, 2]]}, "reads strings there, such as 'Süd'"),
    "nothing": ([], "no numbers|reads categories"),
    "no rows": ({"age": [], "pressure": [], "ward": []}, "has no rows"),
    "an array": (np.zeros((2, 3)), "reads categories, which an array has no place for; give columns by name"),
    "a number": (3, "reads categories|no numbers"),
    "no file": ("there.csv", "no file or folder 'there.csv'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_rows_that_the_model_does_not_read_are_told(table, case):
    rows, words = WRONG[case]
    with pytest.raises(UsageError, match=words):
        table[0].predict(rows)


def test_settings_that_do_not_fit_are_told(table, tmp_path):
    run, _, folder = table
    with pytest.raises(UsageError, match="unknown round of a model 'best'"):
        run.predict({}, which="best")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match="is plain text, and no table"):
        run.predict(tmp_path / "notes.txt")
    with pytest.raises(UsageError, match="is a folder; the model reads rows"):
        run.predict(folder)


def test_a_gap_that_training_had_no_way_with_is_refused(tmp_path):
    rows = [row | {"pressure": "120"} if row["pressure"] == "?" else row for row in patients(80)]
    written(tmp_path / "d.csv", rows)
    run = fedloom.run("fedavg", tmp_path / "d.csv", label="outcome", clients=2, rounds=1)
    with pytest.raises(
        UsageError, match=r"gaps, of 'age' in row '1'.*missing=refuse: it knows nothing to fill them in"
    ):
        run.predict({"age": [1.0, None], "pressure": [1, 2], "ward": ["west", "west"]})


def test_pictures_of_files_and_arrays_are_seen_as_in_training(tmp_path):
    files, labels = [], []
    for split, count in (("train", 40), ("test", 12)):
        for place in range(count):
            kind = ("bright", "dark")[place % 2]
            pixels = SEEN.integers(90, 220, (8, 8)) if kind == "bright" else SEEN.integers(20, 150, (8, 8))
            path = tmp_path / "data" / split / kind / f"{place:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            if split == "test":
                files.append(path)
                labels.append(kind)
    run = fedloom.run("fedavg", tmp_path / "data", lr=0.1, clients=2, rounds=4, partition="iid", model="mlp:8")
    found = run.predict(files)
    assert share(found, labels) == run.selected["global_test_accuracy"] > 0.7
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    forms = [
        pixels,
        pixels.astype(np.int64),
        torch.tensor(pixels) / 255,
        [Image.open(f) for f in files],
        pixels[:, None],
    ]
    assert [run.predict(form) == found for form in forms] == [True] * 5
    chances = [run.predict(form, probabilities=True) for form in (files, pixels)]
    assert chances[0] == chances[1]
    assert run.predict(tmp_path / "data" / "test" / "dark") == [f for f, l in zip(found, labels) if l == "dark"]  # noqa: B905, E741
    assert run.predict(files[0]) == run.predict(pixels[0]) == run.predict(Image.open(files[0])) == found[:1]
    for wrong, words in {
        "size": (np.zeros((2, 9, 8)), r"rows of shape \[1, 9, 8\], and the model reads \[1, 8, 8\]"),
        "range": (pixels * 100.5, "the model reads 8-bit ones"),
        "colour": (np.zeros((2, 8, 8, 3), dtype=np.uint8), r"shape \[3, 8, 8\], and the model reads \[1, 8, 8\]"),
        "unlike": ([pixels[0], pixels[0][:4]], "differ in size"),
    }.values():
        with pytest.raises(UsageError, match=words):
            run.predict(wrong)


def test_arrays_whose_pixels_were_taken_as_they_were():
    run = fedloom.run("fedavg", "digits", clients=4, rounds=3)
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, names = digits.images / 16, [str(y) for y in digits.target]
    assert share(run.predict(x), names) == pytest.approx(run.selected["global_test_accuracy"], abs=0.1)
    out = run.module()(((torch.tensor(x, dtype=torch.float32) - 0.30636677) / 0.37672296)[:, None])
    assert [str(y) for y in out.argmax(1).tolist()] == run.predict(x)


def test_texts_are_read_by_the_words_of_the_training_rows(tmp_path):
    good, bad, rest = ["bright", "fine", "lovely"], ["dull", "grim", "awful"], ["a", "film", "very", "plot", "seen"]

    def texts(count):
        rows = []
        for place in range(count):
            words = [*SEEN.choice(good if place % 2 else bad, 2), *SEEN.choice(rest, 3 + place % 4)]
            rows.append({"review": " ".join(SEEN.permutation(words)).capitalize(), "label": ("no", "yes")[place % 2]})
        return rows

    test = texts(40)
    test[3]["review"] += " unheard-of words"
    written(tmp_path / "data" / "train.csv", texts(120))
    written(tmp_path / "data" / "test.csv", test)
    run = fedloom.run(
        "fedavg", tmp_path / "data", clients=3, rounds=6, lr=0.5, partition="iid", model="transformer:8,1"
    )
    found = run.predict(tmp_path / "data" / "test.csv")
    assert share(found, [row["label"] for row in test]) == run.selected["global_test_accuracy"] > 0.7
    assert run.predict([row["review"] for row in test]) == found == run.predict(pd.DataFrame(test))
    assert run.predict("A lovely fine film") == ["yes"]
    for wrong, words in (
        ([3, 4], "the model reads texts"),
        ({"review": ["fine", None]}, "no text in 'review' in row '1'"),
    ):
        with pytest.raises(UsageError, match=words):
            run.predict(wrong)


def test_amounts_come_in_the_unit_of_the_data(tmp_path):
    def houses(count):
        sizes = SEEN.uniform(40, 200, count)
        return [
            {"size": f"{s:.1f}", "rooms": int(s // 30), "target": f"{1000 * s + SEEN.normal(0, 500):.0f}"}
            for s in sizes
        ]

    test = houses(30)
    written(tmp_path / "data" / "train.csv", houses(150))
    written(tmp_path / "data" / "test.csv", test)
    how = {"problem": "regression", "clients": 3, "rounds": 6, "partition": "iid"}
    run = fedloom.run("fedavg", tmp_path / "data", lr=0.05, **how)
    errors = np.array(run.predict(tmp_path / "data" / "test.csv")) - [float(row["target"]) for row in test]
    assert np.sqrt((errors**2).mean()) == pytest.approx(run.selected["global_test_rmse"], rel=1e-5)
    assert run.selected["global_test_rmse"] < 20_000
    with pytest.raises(UsageError, match="predicts amounts, of which it has no probabilities"):
        run.predict(tmp_path / "data" / "test.csv", probabilities=True)


def test_several_labels_come_by_name(tmp_path):
    def rows(count):
        x = SEEN.normal(size=(count, 2))
        return [{"u": f"{u:.3f}", "v": f"{v:.3f}", "warm": int(u > 0), "wet": int(v > 0.3)} for u, v in x]

    test = rows(40)
    written(tmp_path / "data" / "train.csv", rows(200))
    written(tmp_path / "data" / "test.csv", test)
    how = {"problem": "multilabel", "label": "warm,wet", "clients": 3, "rounds": 6, "partition": "iid"}
    run = fedloom.run("fedavg", tmp_path / "data", lr=0.5, **how)
    right = [[name for name in ("warm", "wet") if row[name]] for row in test]
    assert share(run.predict(tmp_path / "data" / "test.csv"), right) == run.selected["global_test_exact_match"] > 0.5
    chances = run.predict({"u": [3], "v": [-3]}, probabilities=True)[0]
    assert chances["warm"] > 0.5 > chances["wet"] and run.predict({"u": [3], "v": [-3]}) == [["warm"]]


# The network


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 6).requires_grad_(False), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.body(x)).relu())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.head, self.decode.weight = nn.Linear(6, 3), self.encode.weight

    def forward(self, x):
        return self.head(self.decode(self.encode(x).relu()).relu())


def toy_of(net):
    class Mine(Toy):
        def network(self):
            return net()

    return Mine()


@pytest.mark.parametrize("net", [Frozen, Tied])
def test_weights_are_whole_so_that_a_strict_load_works(net, tmp_path):
    task = toy_of(net)
    run = fedloom.run("fedavg", task, rounds=3, out=tmp_path / "run", report=False, lr=0.2)
    for file, row in {"model/chosen": run.selected, "model/last": run.final, "model": run.final}.items():
        plain = net()
        plain.load_state_dict(load_file(run.path / f"{file}.safetensors"))
        test = task.global_test()
        right = (plain.eval()(test.x).argmax(1) == test.y).double().mean().item()
        assert right == pytest.approx(row["global_test_accuracy"])
    assert torch.equal(run.module("last")(test.x), plain(test.x)), "the process that trained it knows the network"
    with pytest.raises(UsageError, match="made in Python or by its method, and no recipe builds it"):
        Run(run.path).module()
    filled = Run(run.path).module("last", into=net())
    assert all(
        torch.equal(a, b) for a, b in zip(filled.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    assert not filled.training and not any(param.requires_grad for param in filled.parameters())
    with pytest.raises(UsageError, match="do not fit the network"):
        run.module(into=nn.Linear(6, 3))
    assert set(run.model) == {name for name, p in plain.named_parameters() if p.requires_grad} | {
        name for name, b in plain.named_buffers() if b.is_floating_point()
    }


ROUGH = {"clients": 5, "lr": 0.5, "batch": 3, "partition": "dirichlet:0.1", "validation": 0.3, "report": False}


def test_the_chosen_model_is_that_of_its_round_and_the_last_that_of_the_last(tmp_path):
    run = fedloom.run("fedavg", "breast_cancer", rounds=9, out=tmp_path / "run", **ROUGH)
    best = run.selected["round"]
    assert 1 < best < 9, "a curve with its best round inside"
    shorter = fedloom.run("fedavg", "breast_cancer", rounds=best, out=tmp_path / "shorter", **ROUGH)
    chosen, last = (run.module(which).state_dict() for which in ("chosen", "last"))
    assert all(torch.equal(weight, shorter.module("last").state_dict()[name]) for name, weight in chosen.items())
    assert any(not torch.equal(weight, last[name]) for name, weight in chosen.items())
    assert all(torch.equal(run.model[name], last[name]) for name in last)
    sizes = {which: (run.path / "model" / f"{which}.safetensors").stat().st_size for which in ("chosen", "last")}
    assert sizes["chosen"] < sizes["last"] + 8
    assert sorted(path.name for path in (run.path / "model").iterdir()) == [
        "chosen.safetensors",
        "last.safetensors",
        "model.json",
    ]


def test_without_validation_the_last_round_is_chosen():
    run = fedloom.run("fedavg", "digits", clients=4, rounds=2, validation=0)
    told = json.loads((run.path / "model" / "model.json").read_text())["weights"]
    assert told["chosen"]["round"] == told["last"]["round"] == 2 == run.selected["round"]
    chosen, last = (run.module(which).state_dict() for which in ("chosen", "last"))
    assert all(torch.equal(chosen[name], last[name]) for name in last)


def left(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "model").iterdir())}


@pytest.mark.parametrize("stopped", range(1, 9))
def test_a_resumed_run_leaves_the_same_model_folder(tmp_path, monkeypatch, stopped):
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)
    how = ROUGH | {"rounds": 9}
    whole = fedloom.run("fedavg", "breast_cancer", out=tmp_path / "whole", **how)

    def stop(row):
        if row["round"] == stopped:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedloom.run("fedavg", "breast_cancer", out=tmp_path / "run", on_round=stop, **how)
    with pytest.raises(UsageError, match=r"has no model yet.*fedloom resume"):
        Run(tmp_path / "run").module()
    fedloom.resume(tmp_path / "run", report=False)
    assert left(tmp_path / "run") == left(tmp_path / "whole")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == left(tmp_path / "whole")["last.safetensors"]
    assert fedloom.resume(tmp_path / "run", report=False).module() is not None
    assert left(tmp_path / "run") == left(tmp_path / "whole"), "resumed when nothing is left"
    assert 1 < whole.selected["round"] < 9


def test_a_method_without_a_global_model_says_so(tmp_path):
    run = fedloom.run("local", "digits", clients=4, rounds=1, out=tmp_path / "run", report=False)
    told = json.loads((run.path / "model" / "model.json").read_text())["weights"]
    assert told["chosen"]["file"] is None and told["last"]["why"] == "local learns no global model"
    assert not (run.path / "model.safetensors").exists(), "its untrained start would be taken for the result"
    for use in (run.module, lambda: run.predict(torch.zeros(1, 8, 8)), lambda: run.model):
        with pytest.raises(UsageError, match="has no global model: local learns no global model"):
            use()


def test_a_damaged_folder_is_told(tmp_path):
    run = fedloom.run("fedavg", "digits", clients=4, rounds=1, out=tmp_path / "run", report=False)
    (run.path / "model" / "chosen.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(RunError, match=r"chosen.safetensors is damaged"):
        run.module()
    (run.path / "model" / "model.json").write_text("{}")
    with pytest.raises(RunError, match="damaged"):
        run.module()
    (run.path / "model" / "model.json").write_text("[")
    with pytest.raises(RunError, match="damaged"):
        run.predict(torch.zeros(1, 8, 8))


def test_a_task_given_in_python_predicts_from_tensors(tmp_path):
    task = fedloom.Classification.load("digits", clients=4)
    run = fedloom.run("fedavg", task, rounds=2, out=tmp_path / "run", report=False)
    assert run.module() is not None, "its network is the library's"
    toy = fedloom.run("fedavg", Toy(), rounds=1)
    with pytest.raises(UsageError, match="knows nothing of raw rows; give a tensor"):
        toy.predict({"a": [1]})


def test_the_users_random_numbers_are_left_alone():
    run = fedloom.run("fedavg", "digits", clients=4, rounds=1)
    torch.manual_seed(3)  # noqa: TID251
    expected = torch.rand(3)
    torch.manual_seed(3)  # noqa: TID251
    run.module()
    assert torch.equal(torch.rand(3), expected)


# What clients would use


PERSONAL = ["ditto", "local", "fedrep", "fedbn", "per_fedavg", "ifca", "apfl", "pfedme"]


@pytest.mark.parametrize("method", PERSONAL)
def test_the_models_of_clients_are_as_right_as_the_record_says(method, tmp_path):
    task = fedloom.Classification.load("digits", clients=4, model="mlp:16", validation=0.3)
    run = fedloom.run(method, task, rounds=5, out=tmp_path / "run", report=False, lr=0.1)
    assert len(run.chosen_clients["clients"]) == 4
    for which, measured in (("chosen", run.chosen_clients), ("last", run.clients)):
        for client in measured["clients"]:
            net, test = Run(run.path).client_module(client["id"], which), task.data(client["id"], "test")
            assert not net.training
            assert (net(test.x).argmax(1) == test.y).double().mean().item() == client["accuracy"], (which, client)
    with pytest.raises(UsageError, match="has no client 4; they are numbered from 0 to 3"):
        run.client_module(4)
    with pytest.raises(UsageError, match="unknown round of a model 'first'"):
        run.client_module(0, "first")


def test_clients_without_models_of_their_own_use_the_global_one(tmp_path):
    run = fedloom.run("fedavg", "digits", clients=4, rounds=2)
    for which in ("chosen", "last"):
        whole, own = run.module(which).state_dict(), run.client_module(2, which).state_dict()
        assert all(torch.equal(whole[name], own[name]) for name in whole)
    with pytest.raises(UsageError, match="has no client -1"):
        run.client_module(-1)


def test_a_client_predicts_by_its_own_model():
    run = fedloom.run("local", "digits", clients=3, rounds=2, partition="classes:4")
    from sklearn.datasets import load_digits

    images = load_digits().images / 16
    said = [run.predict(images, client=k) for k in range(3)]
    for k, client in enumerate(run.partition["clients"]):
        assert {*said[k]} <= {name for name, n in zip("0123456789", client["labels"], strict=True) if n}


def test_statistics_that_stay_at_clients_are_in_their_models(tmp_path):
    task = toy_of(Frozen)
    run = fedloom.run("ditto", task, rounds=3, buffers="local", out=tmp_path / "run", report=False)
    names = sorted(path.name for path in (run.path / "model").iterdir())
    assert "chosen-network-0-frozen.safetensors" in names and "last-client-3.safetensors" in names
    frozen = load_file(run.path / "model" / "last-network-0-frozen.safetensors")
    assert {*frozen} == {"body.weight", "body.bias"}, "what is frozen is written once"
    for client in run.clients["clients"]:
        test = task.data(client["id"], "test")
        for net in (
            run.client_module(client["id"], "last"),
            Run(run.path).client_module(client["id"], "last", Frozen()),
        ):
            right = (net(test.x).argmax(1) == test.y).double().mean().item()
            assert right == pytest.approx(client["accuracy"])
    means = [run.client_module(k, "last").norm.running_mean for k in range(4)]
    assert not torch.equal(means[0], means[1])


def test_a_method_that_judges_functions_says_so():
    run = fedloom.run("fedproto", "digits", clients=4, rounds=1)
    with pytest.raises(UsageError, match=r"has no model of client 0: what is judged is a function of more than one"):
        run.client_module(0)


@pytest.mark.parametrize("method", ["ditto", "local"])
def test_a_resumed_run_leaves_the_same_models_of_clients(method, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)
    how = {"clients": 4, "rounds": 6, "partition": "dirichlet:0.1", "validation": 0.3, "lr": 0.3, "report": False}
    whole = fedloom.run(method, "breast_cancer", out=tmp_path / "whole", **how)
    for stopped in (2, 5):

        def stop(row, stopped=stopped):
            if row["round"] == stopped:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fedloom.run(method, "breast_cancer", out=tmp_path / f"{stopped}", on_round=stop, **how)
        fedloom.resume(tmp_path / f"{stopped}", report=False)
        assert left(tmp_path / f"{stopped}") == left(tmp_path / "whole")
    assert len(left(tmp_path / "whole")) == 1 + 2 * 4 + (2 if method == "ditto" else 0)
    assert whole.ledger is not None


def test_models_of_clients_are_no_messages(tmp_path):
    """What is kept of clients is booked nowhere, and moves no bit of what is learned."""
    from fedloom.runs import keeping

    how = {"clients": 4, "rounds": 3, "report": False}
    kept = fedloom.run("per_fedavg", "digits", **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping, "personalises", lambda method: False)
        plain = fedloom.run("per_fedavg", "digits", **how)
    assert list(kept.ledger) == list(plain.ledger)
    assert torch.equal(kept.model.flat, plain.model.flat)


# Commands, other forms, and the page


@pytest.fixture(scope="module")
def clinic(tmp_path_factory):
    """The run of the page on using a model, with raw rows in a file, and what they are."""
    from sklearn.datasets import load_breast_cancer

    folder = tmp_path_factory.mktemp("clinic")
    rows = load_breast_cancer(as_frame=True).frame.drop(columns="target").rename(columns=lambda n: n.replace(" ", "_"))
    rows[:40].to_csv(folder / "new.csv", index=False)
    run = fedloom.run("ditto", "breast_cancer", clients=5, rounds=3, out=folder / "runs" / "clinic", report=False)
    return run, folder, rows[:40]


def test_the_page_uses_a_model_without_this_library(clinic, monkeypatch, capsys):
    run, folder, rows = clinic
    monkeypatch.chdir(folder)
    page = (Path(__file__).parents[1] / "docs" / "using.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (text,) = [block for block in blocks if "load_state_dict" in block]
    assert "fedloom" not in text and len([line for line in text.splitlines() if "import" not in line]) <= 10
    exec(compile(text, "using.md", "exec"), {})  # noqa: S102 - our own page
    assert capsys.readouterr().out == f"{run.predict(rows)[0]}\n"
    whole = fedloom.run
    monkeypatch.setattr(fedloom, "run", lambda *given, out, **settings: whole(*given, **settings))
    exec(compile("\n".join(block for block in blocks if block != text), "using.md", "exec"), {})  # noqa: S102


def test_the_command_predicts_as_python_does(clinic, monkeypatch, capsys, tmp_path):
    run, folder, rows = clinic
    monkeypatch.chdir(folder)
    assert main(["predict", "runs/clinic", "new.csv"]) == 0
    said = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [line["prediction"] for line in said] == run.predict(rows) and said[3]["row"] == "3"
    out = tmp_path / "p.csv"
    asked = ["predict", "runs/clinic", "new.csv", "--client", "2", "--which", "last"]
    assert main([*asked, "--probabilities", "--out", str(out)]) == 0
    chances = run.predict(rows, client=2, which="last", probabilities=True)
    found = list(csv.DictReader(out.read_text().splitlines()))
    assert [float(line["probability benign"]) for line in found] == [one["benign"] for one in chances]
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["predictions"] == [
        line["prediction"] for line in found
    ]
    for wrong, words in {
        "the file is there": ([*asked, "--out", str(out)], "exists; choose another --out"),
        "no folder for it": ([*asked, "--out", str(tmp_path / "no" / "p.csv")], "cannot write"),
        "no such round": (["predict", "runs/clinic", "new.csv", "--which", "best"], "unknown round of a model 'best'"),
        "no such client": (["predict", "runs/clinic", "new.csv", "--client", "9"], "has no client 9"),
        "no such file": (["predict", "runs/clinic", "old.csv"], "no file or folder 'old.csv'"),
    }.values():
        assert main(wrong) == 2
        assert words in capsys.readouterr().err


def test_labels_are_no_formulas():
    assert table_of(["=1+1", "a"], []).splitlines() == ["row,prediction", "0,'=1+1", "1,a"]
    assert table_of([["u", "v"], []], []).splitlines()[1:] == ["0,u+v", "1,"]
    assert table_of([0.5], [{"-x": 1.0}]).splitlines() == ["row,prediction,probability -x", "0,0.5,1.0"]


JIT = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch would have all take torch.export


@JIT
@pytest.mark.parametrize("to", ["torchscript", "torch-export", "onnx"])
@pytest.mark.parametrize("model", ["mlp:8", "resnet8"])
def test_what_is_exported_gives_the_networks_outputs(to, model, tmp_path):
    run = fedloom.run("fedavg", "digits", clients=3, rounds=2, model=model)
    if to == "onnx":
        pytest.importorskip("onnxscript")
        session = pytest.importorskip("onnxruntime")
    path = run.export(to, tmp_path / "exported")
    loaded = {
        "torchscript": lambda: torch.jit.load(str(path)),
        "torch-export": lambda: torch.export.load(path).module(),
        "onnx": lambda: lambda x: torch.from_numpy(session.InferenceSession(path).run(None, {"inputs": x.numpy()})[0]),
    }[to]()
    x = torch.rand(7, 1, 8, 8)
    torch.testing.assert_close(loaded(x), run.module()(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(loaded(x[:1]), run.module()(x[:1]), rtol=1e-3, atol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exported"]
    with pytest.raises(UsageError, match=r"exists; choose another --out"):
        run.export(to, tmp_path / "exported")


def test_without_onnx_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r'onnx needs onnx and onnxscript and onnxruntime: pip install "fedloom\[onnx\]"'
    ):
        fedloom.run("fedavg", "digits", clients=3, rounds=1).export("onnx")


class Counts(nn.Module):
    """A network that no tracing sees through: what it does hangs on how many rows there are."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Identity(), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x) * float(len(x))


def test_what_gives_other_outputs_is_not_left_behind(tmp_path):
    run = fedloom.run("fedavg", toy_of(Counts), rounds=1)
    with pytest.raises(UsageError, match="what it reads is not known; give an example"):
        run.export("torchscript", tmp_path / "a.pt")
    with pytest.raises(UsageError, match="the example has 1 rows; give at least two"):
        run.export("torchscript", tmp_path / "a.pt", example=torch.zeros(1, 6))
    with pytest.raises(UsageError, match=r"cannot be exported to torchscript .*AssertionError"):
        run.export("torchscript", tmp_path / "a.pt", example=torch.rand(3, 6))
    assert not list(tmp_path.iterdir())
    mine = fedloom.run("fedavg", toy_of(Tied), rounds=1)
    assert mine.export("torch-export", tmp_path / "b.pt2", example=torch.rand(3, 6)).is_file()
    for to, words in {"pickle": "unknown form of a model 'pickle'", "peft": "this network has none"}.items():
        with pytest.raises(UsageError, match=words):
            mine.export(to, tmp_path / "c", example=torch.rand(3, 6))


@JIT
def test_texts_and_clients_are_exported_too(clinic, tmp_path, capsys):
    run = clinic[0]
    assert (
        main(["export", str(run.path), "--to", "torchscript", "--client", "1", "--out", str(tmp_path / "own.pt")]) == 0
    )
    assert capsys.readouterr().out == f"{tmp_path / 'own.pt'}\n"
    x = torch.rand(4, 30)
    own = torch.jit.load(str(tmp_path / "own.pt"))
    assert torch.equal(own(x), run.client_module(1)(x)) and not torch.equal(own(x), run.module()(x))
    assert run.export("torchscript") == run.path / "model" / "chosen.pt"
    rows = [{"text": f"{('bad', 'good fine')[n % 2]} words {n}", "label": n % 2} for n in range(60)]
    written(tmp_path / "t.csv", rows)
    texts = fedloom.run("fedavg", tmp_path / "t.csv", clients=2, rounds=1, model="transformer:8,1")
    tokens = torch.randint(1, 9, (5, 4))
    loaded = torch.export.load(texts.export("torch-export", tmp_path / "t.pt2")).module()
    torch.testing.assert_close(loaded(tokens), texts.module()(tokens))


@dataclass(frozen=True)
class Multiples(Method):
    """Sends client k the start times k + 1."""

    def round(self, server, cohort):
        pass

    def predict_message(self, server, clients):
        return {"model": Each({k: server.model * (k + 1.0) for k in clients}), "factor": Once(2.0)}

    @fedloom.client
    def predict(self, client, model, factor):
        return model * factor


def test_each_client_is_sent_its_own_part():
    run = fedloom.run(Multiples(), Toy(), rounds=1)
    start = run.module()
    for k in range(4):
        for name, weight in run.client_module(k).state_dict().items():
            assert torch.equal(weight, 2 * (k + 1) * start.state_dict()[name])
