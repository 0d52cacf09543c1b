"""Windows of series: what is in each, whose they are, that none spans two clients or splits, and networks for them."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

import fedloom
from fedloom.cli import main
from fedloom.data.files import Files, Windows
from fedloom.data.windows import from_the_end, starts, unfolded
from fedloom.errors import UsageError
from fedloom.nets import build, describe
from fedloom.random import numpy_stream

LENGTHS = {"a": 40, "b": 60, "c": 50}


def machines(test=False):
    """Rows whose column `t` counts them, machine by machine, mixed in the file; `level` says t and machine."""
    rows, at = [], dict.fromkeys(LENGTHS, 0)
    draw = numpy_stream(3, "test", int(test))
    left = [name for name, length in LENGTHS.items() for _ in range(length)]
    for name in draw.permutation(left):
        t = at[name]
        at[name] += 1
        place = 1000 * "abc".index(name) + t
        rows.append({"machine": name, "place": float(place) + 0.25, "noise": draw.normal(), "level": place + 0.5})
    return {key: [row[key] for row in rows] for key in rows[0]}


SETTINGS = {"problem": "regression", "label": "level", "partition": "column:machine", "keep": "place"}


def raw(task, data):
    """The places [M, T] and the targets' places [M] of windows, as they were before they were scaled."""
    how = task.preprocessing()
    names = [column.name for column in how.columns]
    at = names.index("place")
    x = data.x[:, :, at].double() * how.deviation[at] + how.mean[at]
    y = data.y.double() * task.deviation + task.mean
    return x.round().long(), (y - 0.4).round().long()


@pytest.mark.parametrize(
    ("text", "length", "stride", "horizon"), [("5", 5, 1, 0), ("4,stride=3", 4, 3, 0), ("3,2,horizon=2", 3, 2, 2)]
)
def test_each_window_is_rows_of_one_client_in_their_order(text, length, stride, horizon):
    task = fedloom.problem(machines(), windows=text, **SETTINGS)
    assert task.shape == (length, 2) and task.population == 3
    for client, (name, n) in enumerate(LENGTHS.items()):
        first = 1000 * "abc".index(name)
        test = round(0.2 * n)
        validation = int((n - test) * 0.1 + 1e-9)
        spans = {
            "train": (0, n - test - validation),
            "validation": (n - test - validation, n - test),
            "test": (n - test, n),
        }
        for split, (begin, end) in spans.items():
            x, y = raw(task, task.data(client, split))
            expected = [*range(begin, end - length - horizon + 1, stride)]
            assert x[:, 0].tolist() == [first + start for start in expected], (name, split)
            assert (x.diff(dim=1) == 1).all()
            assert y.tolist() == [first + start + length - 1 + horizon for start in expected]


def test_no_row_stands_in_two_splits():
    task = fedloom.problem(machines(), windows="5,horizon=1", validation=0.3, **SETTINGS)
    for client in range(3):
        found = [raw(task, task.data(client, split)) for split in ("train", "validation", "test")]
        seen = [set(torch.cat([x.flatten(), y]).tolist()) for x, y in found]
        assert all(seen) and not (seen[0] & seen[1]) and not (seen[1] & seen[2]) and not (seen[0] & seen[2])
        assert max(seen[0]) < min(seen[1]) and max(seen[1]) < min(seen[2])


def test_a_test_split_of_its_own_is_cut_likewise(tmp_path):
    for split in ("train", "test"):
        columns = machines(split == "test")
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
    task = fedloom.problem(str(tmp_path), windows=10, **SETTINGS)
    assert [len(task.data(k, "test")) for k in range(3)] == [n - 9 for n in LENGTHS.values()]
    assert [len(task.data(k, "train")) for k in range(3)] == [n - n // 10 - 9 for n in LENGTHS.values()]
    with pytest.raises(UsageError, match=r"partition=iid deals rows singly; set partition=column:NAME"):
        fedloom.problem(str(tmp_path), windows=10, **SETTINGS | {"partition": "iid"})


def test_rows_are_scaled_as_single_training_rows_are():
    cut, single = (fedloom.problem(machines(), windows=w, validation=0.0, **SETTINGS) for w in (6, None))
    how = cut.preprocessing()
    columns = machines()
    by_machine = {
        name: [p for m, p in zip(columns["machine"], columns["place"], strict=True) if m == name] for name in LENGTHS
    }
    seen = np.concatenate([by_machine[name][: n - round(0.2 * n)] for name, n in LENGTHS.items()])
    at = [column.name for column in how.columns].index("place")
    assert how.mean[at] == pytest.approx(seen.mean(), rel=1e-5)
    assert how.deviation[at] == pytest.approx(seen.std(), rel=1e-2)
    assert single.preprocessing().mean != how.mean


def test_columns_beside_are_those_of_the_targets_row():
    task = fedloom.problem(machines(), windows="4,horizon=1", metadata="noise", **SETTINGS | {"keep": "place,noise"})
    data = task.data(1, "train")
    how = task.preprocessing()
    names = [column.name for column in how.columns]
    noise = data.x[:, :, names.index("noise")] * how.deviation[names.index("noise")] + how.mean[names.index("noise")]
    assert torch.allclose(data["noise"][:-1], noise[1:, -1], atol=1e-5)
    assert not torch.allclose(data["noise"][:-1], noise[:-1, -1], atol=1e-5)


def test_gaps_are_filled_before_windows_are_cut():
    columns = machines()
    columns["noise"][7] = None
    run = fedloom.run("fedavg", columns, windows=4, missing="mean", rounds=1, **SETTINGS)
    assert all(row["train_loss"] == row["train_loss"] for row in run.metrics)
    with pytest.raises(UsageError, match="noise"):
        fedloom.problem(columns, windows=4, **SETTINGS)


def waves(amount=False):
    """Three machines whose value goes up and down; whether it goes up cannot be told from one row."""
    columns = {"machine": [], "value": [], "label": []}
    for k in range(3):
        t = np.arange(220)
        phase = t / (6 + k)
        columns["machine"] += [f"m{k}"] * 220
        columns["value"] += np.sin(phase).tolist()
        columns["label"] += (
            np.sin(phase + 0.5).tolist() if amount else ["up" if c > 0 else "down" for c in np.cos(phase)]
        )
    return columns


@pytest.mark.parametrize("model", [None, "gru:16,2", "lstm:16", "transformer:16,1"])
def test_networks_learn_what_a_single_row_does_not_tell(model):
    settings = {"partition": "column:machine", "rounds": 15}
    lr = 0.3 if model != "transformer:16,1" else 0.1
    run = fedloom.run("fedavg", waves(), windows=10, model=model, lr=lr, **settings)
    assert run.spec.model == (model or "gru") and run.final["global_test_accuracy"] > 0.85
    single = fedloom.run("fedavg", waves(), model="mlp:32", lr=0.3, **settings)
    assert single.final["global_test_accuracy"] < 0.7


@pytest.mark.parametrize("method", ["scaffold", "fedrep", "fedproto", "ditto"])
def test_methods_train_on_windows(method):
    run = fedloom.run(method, waves(), windows="10,stride=2", partition="column:machine", rounds=3)
    assert run.final["personal_test_accuracy"] > 0.5


def test_engines_agree():
    runs = [
        fedloom.run("fedavg", waves(), windows=8, partition="column:machine", rounds=2, engine=engine, workers=2)
        for engine in ("serial", "pool")
    ]
    assert torch.equal(runs[0].model.flat, runs[1].model.flat)


def test_a_network_of_ones_own_reads_windows():
    from torch import nn

    net = nn.Sequential(nn.Flatten(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 2))
    run = fedloom.run("fedrep", waves(), windows=10, model=net, partition="column:machine", rounds=2)
    assert run.client_module(0)(torch.zeros(3, 10, 1)).shape == (3, 2)


def test_predictions_are_of_each_row_that_enough_precede(tmp_path):
    columns = waves(amount=True)
    settings = {"problem": "regression", "partition": "column:machine", "rounds": 2, "out": tmp_path / "run"}
    run = fedloom.run("fedavg", columns, windows="6,stride=3", report=False, **settings)
    rows = {"value": columns["value"][:20]}
    found = run.predict(rows)
    assert len(found) == 15
    assert found == fedloom.load(tmp_path / "run").predict(rows)
    assert found[4:] == pytest.approx(run.predict({"value": columns["value"][4:20]}), abs=1e-5)
    net = run.module()
    about = fedloom.problem(columns, windows="6,stride=3", **{k: settings[k] for k in ("problem", "partition")})
    how = about.preprocessing()
    x = (torch.tensor(rows["value"][2:8]) - how.mean[0]) / how.deviation[0]
    assert found[2] == pytest.approx(float(net(x.view(1, 6, 1))) * about.deviation + about.mean, abs=1e-4)
    with pytest.raises(UsageError, match="has 5 rows, and the model reads windows of 6"):
        run.predict({"value": columns["value"][:5]})


def test_what_was_decided_is_told():
    task = fedloom.problem(machines(), windows="4,stride=2,horizon=3", **SETTINGS)
    said = " ".join(task.describe()["decisions"])
    assert "the last 20% of each client's rows are held out as test rows, 30 in all" in said
    assert "a window of 4 rows begins every 2, its target is that 3 rows behind its last" in said
    few = fedloom.problem(machines(), windows=8, **SETTINGS)
    assert "no client has enough validation rows for a window" in " ".join(few.describe()["decisions"])
    assert not any(len(few.data(k, "validation")) for k in range(3))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"windows": 1}, "length is 1; expected a whole number from 2"),
        ({"windows": "many"}, "length"),
        ({"windows": "4,stride=0"}, "stride is 0; expected a whole number from 1"),
        ({"windows": "4,horizon=-1"}, "horizon is -1"),
        ({"windows": "4,step=2"}, "step"),
        ({"windows": 4, "partition": "iid", "clients": 3}, "set partition=column:NAME"),
        ({"windows": 40}, r"client a has \d+ training rows, too few for a window, which with its target has 40"),
        ({"windows": "10,horizon=3"}, "no client has enough test rows for a window, which with its target has 13"),
        ({"windows": 4, "public": 0.1}, "do not go with public or shared_data"),
        ({"windows": 4, "shared_data": 0.1}, "do not go with public or shared_data"),
        (
            {"windows": 4, "model": "cnn"},
            r"'cnn' reads images, got windows of shape \(4, 2\); take lstm or gru or transf",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_words(settings, told):
    with pytest.raises(UsageError, match=told):
        fedloom.problem(machines(), **SETTINGS | settings)


@pytest.mark.parametrize("data", ["digits"])
def test_what_is_no_table_has_no_windows(data):
    with pytest.raises(UsageError, match="windows"):
        fedloom.problem(data, windows=4)
    with pytest.raises(UsageError, match="windows says how the rows of tables are read"):
        x = numpy_stream(0, "test").random((40, 8, 8)).astype("float32")
        fedloom.problem([(x[:20], [k % 2 for k in range(20)]), (x[20:], [k % 2 for k in range(20)])], windows=4)


def test_a_list_of_one_data_set_a_client_is_cut_client_by_client():
    draw = numpy_stream(0, "test")
    clients = [(draw.normal(size=(n, 3)), draw.integers(0, 2, n)) for n in (50, 40)]
    task = fedloom.problem(clients, windows="5,stride=5")
    assert [len(task.data(k, "train")) for k in range(2)] == [7, 5] and task.shape == (5, 3)


def test_small_parts():
    owner = torch.tensor([1, 0, 1, -1, 1, 0])
    assert from_the_end(owner, 2).tolist() == [2, 1, 1, -1, 0, 0]
    assert starts(10, Windows(4, 3, 1)).tolist() == [0, 3] and starts(3, Windows(4)).tolist() == []
    rows = torch.arange(10).view(5, 2)
    assert unfolded(rows, Windows(3), "").tolist() == [rows[k : k + 3].tolist() for k in range(3)]
    assert Files.told(None, None, None, None, "8,stride=2").windows == Windows(8, 2)


FIRST, SECOND = 5 * (3 + 5 + 2), 5 * (5 + 5 + 2)  # of a gate of a layer of 5: weights of inputs and states, two biases


@pytest.mark.parametrize(
    ("name", "count"), [("gru:5", 3 * FIRST), ("gru:5,2", 3 * (FIRST + SECOND)), ("lstm:5", 4 * (FIRST + SECOND))]
)
def test_recurrent_networks_have_the_parameters_of_their_gates(name, count):
    net = build(name, (7, 3), 4)
    assert sum(p.numel() for p in net.body.parameters()) == count
    x = torch.randn(2, 7, 3)
    assert net(x).shape == (2, 4) and not torch.allclose(net(x), net(x.flip(1)), atol=1e-5)
    later = x.clone()
    later[:, -1] += 1  # the last row counts
    assert not torch.allclose(net(x), net(later), atol=1e-4)


def test_attention_sees_every_row_and_their_order():
    net = build("transformer:8,2", (7, 3), 4)
    x = torch.randn(2, 7, 3)
    assert net(x).shape == (2, 4) and not torch.allclose(net(x), net(x.flip(1)), atol=1e-5)
    for row in range(7):
        other = x.clone()
        other[:, row] += 1
        assert not torch.allclose(net(x), net(other), atol=1e-5)
    layers = [p for name, p in net.named_parameters() if name.endswith("linear1.weight")]
    assert not torch.equal(*layers)


def test_the_table_of_networks_says_who_reads_windows():
    assert {how.partition(":")[0] for how, _, needs in describe() if "windows" in needs} == {
        "lstm",
        "gru",
        "transformer",
    }


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    columns = waves()
    with Path("waves.csv").open("w", newline="") as file:
        csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
    words = ["run", "fedavg", "--data", "waves.csv", "--partition", "column:machine", "--rounds", "1"]
    assert main([*words, "--windows", "8,stride=2", "--out", "run"]) == 0
    assert fedloom.load("run").spec.windows == "8,stride=2" and fedloom.load("run").spec.model == "gru"
    assert main([*words, "--windows", "8", "--out", "whole"]) == 0
    assert fedloom.load("whole").spec.windows == 8
    assert main(["data", "waves.csv", "--partition", "column:machine", "--windows", "8"]) == 0
    assert "a window of 8 rows begins every 1" in " ".join(capsys.readouterr().out.split())
    assert main(["run", "fedavg", "--resize", "4", "--rounds", "1", "--out", "small"]) == 0
    assert fedloom.load("small").spec.resize == 4


def ready(n=240):
    """Windows [n, 6, 2] whose class is whether the first column goes up; the second is a thousand times larger."""
    draw = numpy_stream(0, "test", "ready")
    slope = draw.normal(size=n)
    x = slope[:, None] * np.arange(6) + 0.1 * draw.normal(size=(n, 6)) + 3 * draw.normal(size=(n, 1))
    return np.stack([x, 5000 + 1000 * draw.normal(size=(n, 6))], 2).astype(np.float32), (slope > 0).astype(int)


class Items(torch.utils.data.Dataset):
    """Windows one by one, as PyTorch has them."""

    def __len__(self):
        return 240

    def __getitem__(self, place):
        x, y = ready()
        return torch.from_numpy(x[place]), int(y[place])


@pytest.mark.parametrize("model", ["lstm:8", "gru:8", "transformer:8,1"])
def test_a_network_that_reads_series_says_that_arrays_are_windows(model, tmp_path):
    x, y = ready()
    np.savez(tmp_path / "w.npz", x=x, y=y)
    settings = {"partition": "iid", "clients": 3, "rounds": 1, "model": model, "report": False}
    found = fedloom.run("fedavg", tmp_path / "w.npz", out=tmp_path / "run", **settings)
    said = fedloom.run("fedavg", tmp_path / "w.npz", windows="given", **settings)
    assert found.metrics[-1]["train_loss"] == said.metrics[-1]["train_loss"]
    told = f"arrays [T, C] a row are windows of series, since {model} reads these (windows=given)"
    assert told in found.partition["decisions"] and told not in said.partition["decisions"]
    assert fedloom.load(tmp_path / "run").predict(x[:9]) == said.predict(x[:9])
    with pytest.raises(UsageError, match=r"reads (text or )?windows, got images of shape"):
        fedloom.problem((np.zeros((9, 3, 8, 8), np.float32), y[:9]), model=model, partition="iid", clients=3)
    assert fedloom.problem((x, y), model="mlp:4", partition="iid", clients=3).shape == (1, 6, 2), "else pictures"


def test_windows_that_are_given_are_read_as_such(tmp_path):
    x, y = ready()
    task = fedloom.problem((x, y), windows="given", partition="iid", clients=3)
    assert task.shape == (6, 2) and task.model == "gru"
    how, data = task.preprocessing(), task.data(0, "train")
    there = data.x * torch.tensor(how.deviation) + torch.tensor(how.mean)
    rows = [int(np.abs(x - window.numpy()).sum((1, 2)).argmin()) for window in there]
    assert torch.allclose(there, torch.from_numpy(x[rows]), rtol=1e-3, atol=1e-3)
    assert data.y.tolist() == y[rows].tolist()
    every = torch.cat([task.data(k, s).x for k in range(3) for s in ("train", "validation")])
    assert torch.allclose(every.mean((0, 1)), torch.zeros(2), atol=0.1) and torch.allclose(
        every.std((0, 1)), torch.ones(2), atol=0.1
    )
    settings = {"windows": "given", "partition": "iid", "clients": 3, "rounds": 30, "lr": 0.5}
    run = fedloom.run("fedavg", (x, y), out=tmp_path / "run", report=False, **settings)
    assert run.final["global_test_accuracy"] > 0.9
    said = fedloom.load(tmp_path / "run").predict(x[:20])
    assert np.mean([int(one) == other for one, other in zip(said, y[:20], strict=True)]) > 0.8
    assert said[3:4] == run.predict(x[3]) and said == run.predict(torch.from_numpy(x[:20]))
    items = fedloom.problem(Items(), windows="given", partition="iid", clients=3)
    assert torch.equal(items.data(1, "train").x, task.data(1, "train").x)


@pytest.mark.parametrize(
    ("data", "settings", "told"),
    [
        ("breast_cancer", {}, r"windows=given says that arrays \[T, C\] a row are windows, and breast_cancer has none"),
        (np.zeros((40, 3, 8, 8), np.float32), {}, r"takes arrays \[T, C\] a row, got \[3, 8, 8\]"),
        (ready()[0], {"embed": "random"}, "this encoder reads images, and .* is windows; leave it out"),
        (ready()[0], {"resize": 4}, "resize says how images are read"),
        (ready()[0], {"partition": "iid+rotation:90"}, "rotation changes image data"),
        (ready()[0], {"model": "cnn"}, r"reads images, got windows of shape \(6, 2\)"),
    ],
)
def test_what_are_no_windows_is_refused_in_words(data, settings, told):
    given = data if isinstance(data, str) else (data, [k % 2 for k in range(len(data))])
    with pytest.raises(UsageError, match=told):
        fedloom.problem(given, **{"windows": "given", "partition": "iid", "clients": 3} | settings)
