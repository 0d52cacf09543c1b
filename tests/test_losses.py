"""Losses that a run asks for: what they are, that they are what is trained by, and what is refused."""

import math

import pytest
import torch
from torch.nn import functional as F

import fedloom
from fedloom import user_files
from fedloom.cli import main
from fedloom.errors import UsageError
from fedloom.losses import NAMED, loss_of
from fedloom.random import stream
from fedloom.tasks._trained_by import balanced, trained_by
from fedloom.tasks.regression import toy as amounts
from fedloom.tasks.several import toy as several
from fedloom.tasks.toy import Toy

SETTINGS = {"partition": "iid", "clients": 3, "rounds": 2}
SCORES = 3 * torch.randn(6, 4, generator=stream(0, "test", "scores"))
CLASSES = torch.tensor([0, 3, 1, 1, 2, 0])
LABELS = (SCORES.flip(0) > 0.5).float()
AMOUNTS = torch.tensor([0.1, -2.0, 3.0, 0.0, 0.4, -0.2])


def same(one, other):
    mine, its = ([{k: v for k, v in r.items() if "seconds" not in k} for r in run.metrics] for run in (one, other))
    assert mine == its and torch.equal(one.model.flat, other.model.flat)


def plain_focal(row, y, gamma):
    total = sum(math.exp(value) for value in row)
    p = math.exp(row[y]) / total
    return -((1 - p) ** gamma) * math.log(p)


def plain_smoothing(row, y, share):
    total = math.log(sum(math.exp(value) for value in row))
    return sum(-(share / len(row) + (1 - share) * (k == y)) * (value - total) for k, value in enumerate(row))


def plain_labels(row, there, gamma):
    chances = [1 / (1 + math.exp(-value if true else value)) for value, true in zip(row, there, strict=True)]
    return sum(-((1 - p) ** gamma) * math.log(p) for p in chances) / len(row)


def plain_huber(out, y, delta):
    error = abs(out - y)
    return error**2 / 2 if error <= delta else delta * (error - delta / 2)


@pytest.mark.parametrize(
    ("text", "answer", "plain"),
    [
        ("cross_entropy", "class", lambda row, y: plain_focal(row, y, 0)),
        ("focal", "class", lambda row, y: plain_focal(row, y, 2)),
        ("focal:0.5", "class", lambda row, y: plain_focal(row, y, 0.5)),
        ("focal:0", "class", lambda row, y: plain_focal(row, y, 0)),
        ("label_smoothing", "class", lambda row, y: plain_smoothing(row, y, 0.1)),
        ("label_smoothing:0.4", "class", lambda row, y: plain_smoothing(row, y, 0.4)),
        ("binary", "labels", lambda row, y: plain_labels(row, y, 0)),
        ("focal:3", "labels", lambda row, y: plain_labels(row, y, 3)),
        ("squared", "amount", lambda row, y: (row[0] - y) ** 2),
        ("absolute", "amount", lambda row, y: abs(row[0] - y)),
        ("huber", "amount", lambda row, y: plain_huber(row[0], y, 1)),
        ("huber:0.5", "amount", lambda row, y: plain_huber(row[0], y, 0.5)),
    ],
)
def test_each_loss_in_plain_python(text, answer, plain):
    y = {"class": CLASSES, "labels": LABELS, "amount": AMOUNTS}[answer]
    outputs = SCORES if answer != "amount" else SCORES[:, :1]
    expected = [plain(row, target) for row, target in zip(outputs.tolist(), y.tolist(), strict=True)]
    assert loss_of(text, answer)(outputs, y).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_where_nothing_is_wrong_a_focal_loss_has_a_slope_all_the_same():
    sure = torch.tensor([[90.0, -90.0]], requires_grad=True)
    loss_of("focal:0.5", "class")(sure, torch.tensor([0])).sum().backward()
    assert sure.grad.isfinite().all()
    sure = torch.tensor([[90.0, -90.0]], requires_grad=True)
    loss_of("focal:0.5", "labels")(sure, torch.tensor([[1.0, 0.0]])).sum().backward()
    assert sure.grad.isfinite().all()


@pytest.mark.parametrize(
    ("problem", "text", "data"),
    [("classification", "cross_entropy", "digits"), ("regression", "squared", "diabetes")],
)
@pytest.mark.parametrize("method", ["fedavg", "scaffold", "moon"])
def test_the_problems_own_loss_by_its_name_changes_nearly_nothing(method, problem, text, data):
    run, named = (
        fedloom.run(method, data, problem=problem, loss=loss, partition="iid", clients=3, rounds=1)
        for loss in (None, text)
    )
    assert (run.model - named.model).norm() <= 1e-5 * run.model.norm()


def double(outputs, y):
    return 2 * F.cross_entropy(outputs, y, reduction="none")


def double_mean(outputs, y):
    return 2 * F.cross_entropy(outputs, y)


@pytest.mark.parametrize("loss", [double, double_mean])
def test_twice_the_loss_is_twice_the_rate(loss):
    run = fedloom.run("fedavg", "digits", loss=loss, lr=0.02, **SETTINGS)
    plain = fedloom.run("fedavg", "digits", lr=0.04, **SETTINGS)
    assert (run.model - plain.model).norm() <= 1e-5 * plain.model.norm()
    assert run.final["global_test_loss"] == pytest.approx(plain.final["global_test_loss"], rel=1e-4)  # not doubled


def test_weights_of_two_are_twice_the_rate_and_a_weight_of_zero_no_class():
    plain = fedloom.run("fedavg", "digits", lr=0.04, **SETTINGS)
    run = fedloom.run("fedavg", "digits", class_weights=[2] * 10, lr=0.02, **SETTINGS)
    assert (run.model - plain.model).norm() <= 1e-5 * plain.model.norm()
    blind = fedloom.run("fedavg", "digits", class_weights="0,1,1,1,1,1,1,1,1,1", **SETTINGS | {"rounds": 8})
    digits = fedloom.problem("digits", partition="iid", clients=3).global_test()
    said = blind.module("last")(digits.x).argmax(1)
    assert not (said == 0).any() and (said == digits.y).double().mean() > 0.6


def test_balanced_weights_let_each_class_count_the_same():
    labels = [torch.tensor([0, 0, 0, 2]), torch.tensor([0, 2, -1])]
    weights = balanced(labels, 4)
    counts = torch.tensor([4.0, 0, 2, 0])
    assert (weights * counts).tolist() == [3, 0, 3, 0] and weights[1] == weights[3] == 1
    assert (weights * counts).sum() == counts.sum()
    task = trained_by(Toy(), None, "balanced")
    y = torch.cat([Toy().data(k, "train").y for k in range(4)])
    expected = len(y) / (3 * y.bincount().double())
    assert task.describe()["class_weights"] == pytest.approx(expected.tolist(), rel=1e-5)


def test_balanced_weights_find_the_rare_class():
    draw = stream(0, "test", "rare")
    x = torch.randn(900, 2, generator=draw)
    y = (torch.rand(900, generator=draw) < torch.sigmoid(2 * x[:, 0] - 3.5)).long()
    plain, weighted = (
        fedloom.run(
            "fedavg", (x, y), class_weights=w, model="linear", measures="recall", lr=0.1, **SETTINGS | {"rounds": 10}
        )
        for w in (None, "balanced")
    )
    assert weighted.final["global_test_recall"] > plain.final["global_test_recall"] + 0.1
    assert len(weighted.partition["class_weights"]) == 2 and "class_weights" not in plain.partition


@pytest.mark.parametrize("engine", ["pool", "loopback", "vectorized"])
def test_every_engine_trains_by_it(engine):
    plain, other = (
        fedloom.run("scaffold", Toy(), loss="focal:1.5", class_weights="1,2,3", engine=e, rounds=2, workers=0)
        for e in ("serial", engine)
    )
    assert (plain.model - other.model).norm() <= 1e-5 * plain.model.norm()
    without = fedloom.run("scaffold", Toy(), rounds=2)
    assert (plain.model - without.model).norm() > 1e-3 * without.model.norm()


@pytest.mark.parametrize("problem", ["partial:0.5", "oracle:0.5"])
def test_few_labels_train_by_it_too(problem):
    runs = [fedloom.run("fedavg", "digits", problem=problem, loss=loss, **SETTINGS) for loss in (None, "focal:5")]
    assert (runs[0].model - runs[1].model).norm() > 1e-3 * runs[0].model.norm()


def test_a_function_of_a_file_is_found_again(tmp_path, monkeypatch):
    def stop(row):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(user_files, "GIVEN", {})
    (tmp_path / "mine.py").write_text(
        "from torch.nn import functional as F\n\ndef double(outputs, y):\n"
        "    return 2 * F.cross_entropy(outputs, y, reduction='none')\n"
    )
    whole = fedloom.run("fedavg", "digits", loss="mine.py:double", **SETTINGS)
    assert whole.spec.loss == f"{tmp_path / 'mine.py'}:double"
    same(whole, fedloom.run("fedavg", "digits", loss=double, **SETTINGS))
    with pytest.raises(KeyboardInterrupt):
        fedloom.run("fedavg", "digits", loss="mine.py:double", out="run", on_round=stop, report=False, **SETTINGS)
    same(whole, fedloom.resume("run", report=False))
    results = fedloom.compare(["fedavg"], "digits", loss="mine.py:double", seeds=[0], jobs=1, report=False, **SETTINGS)
    same(whole, results.cells[0].run)
    with pytest.raises(KeyboardInterrupt):
        fedloom.run("fedavg", "digits", loss="mine.py:double", out="again", on_round=stop, report=False, **SETTINGS)
    (tmp_path / "mine.py").write_text("def double(outputs, y):\n    return 3\n")
    with pytest.raises(UsageError, match=r"the loss .*mine\.py changed since again began"):
        fedloom.resume("again", report=False)


def wordy(outputs, y):
    return "much"


def short(outputs, y):
    return F.cross_entropy(outputs, y, reduction="none")[:1]


def flat(outputs, y):
    return torch.ones(len(y))


def failing(outputs, y):
    raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"loss": "focul"}, "unknown loss 'focul'; did you mean 'focal'.*one of your own is FILE.py:function"),
        ({"loss": "huber"}, "unknown loss 'huber'"),
        ({"loss": "focal:-1"}, r"loss=focal:-1: -1 is no number from 0 to 100"),
        ({"loss": "label_smoothing:2"}, "2 is no number from 0 to 1"),
        ({"loss": "focal:much"}, "'much' is no number"),
        ({"loss": "focal:1,2"}, "expected focal:NUMBER"),
        ({"loss": "focal:gamma=1"}, "expected focal:NUMBER"),
        ({"loss": "cross_entropy:2"}, "expected cross_entropy alone"),
        (
            {"loss": wordy},
            r"wordy of outputs \[2, 10\] and targets torch.int64 \[2\] gives a str; expected a loss for each",
        ),
        ({"loss": short}, r"gives a tensor \[1\]; expected a loss for each row, \[2\], or their mean"),
        ({"loss": flat}, r"that has a gradient"),
        ({"loss": failing}, r"fails \(KeyError: 'no such thing'\)"),
        (
            {"loss": double_mean, "class_weights": "balanced"},
            r"a tensor \[\]; expected a loss for each row, \[2\], that",
        ),
        ({"loss": lambda outputs, y: 0}, "give a function made by `def`"),
        ({"loss": "absent.py:f"}, "no .* file"),
        ({"class_weights": "1,2"}, "2 numbers, .* for 10 classes"),
        ({"class_weights": [1] * 9 + [-1]}, "none may be negative"),
        ({"class_weights": "heavy"}, "expected balanced, or a number for each class"),
        ({"class_weights": "balanced", "dp": "client:noise=1.0,clip=1.0"}, "goes by how many samples of each class"),
        ({"problem": "stream:2,rounds=1", "loss": "focal"}, "trains by a loss of its own"),
        ({"problem": "saddle:bilinear,width=4", "loss": "focal"}, "has a loss of its own"),
        (
            {"problem": "vertical:0.1", "partition": "dirichlet:0.3", "loss": "focal", "method": "split_learning"},
            "trains by a loss of its own",
        ),
    ],
)
def test_what_is_no_loss_for_a_problem_is_refused_in_words(settings, told):
    settings = SETTINGS | settings
    with pytest.raises(UsageError, match=told):
        fedloom.run(settings.pop("method", "fedavg"), "digits", **settings)


class Longing(Toy):
    """Its loss goes by the network, too."""

    def loss(self, net, batch):
        return super().loss(net, batch) + sum(p.square().sum() for p in net.parameters())


@pytest.mark.parametrize(
    ("task", "settings", "told"),
    [
        (Longing(), {"loss": "focal"}, "trains by a loss of its own"),
        (several(), {"loss": "focal"}, "trains by a loss of its own"),
        (amounts(), {"class_weights": "balanced"}, "this problem has no classes"),
        (amounts(), {"loss": "focal"}, "unknown loss 'focal'"),
    ],
)
def test_what_is_no_loss_for_a_task_is_refused_in_words(task, settings, told):
    with pytest.raises(UsageError, match=told):
        trained_by(task, settings.get("loss"), settings.get("class_weights"))


def test_one_that_is_not_asked_for_changes_no_task():
    task = Toy()
    assert trained_by(task, None, None) is task
    assert {name: next(iter(losses)) for name, losses in NAMED.items()} == {
        "class": "cross_entropy",
        "labels": "binary",
        "amount": "squared",
        "mask": "cross_entropy",
    }


def test_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["run", "fedavg", "--clients", "3", "--rounds", "1", "--out", "run"]
    assert main([*words, "--loss", "focal:1", "--class-weights", "balanced"]) == 0
    assert fedloom.load("run").spec.class_weights == "balanced"
