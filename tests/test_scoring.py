"""The measures that a run asks for: against scikit-learn on whole arrays, and against what a hand works out."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn import metrics

import fedloom
from fedloom import scoring, tasks
from fedloom.cli import main
from fedloom.cli.tables import print_results, summary
from fedloom.comparison.grid import Comparison
from fedloom.comparison.measures import about, measured
from fedloom.comparison.table import table
from fedloom.errors import UsageError
from fedloom.quality import asked, chooser_of, main_of, named
from fedloom.random import numpy_stream
from fedloom.runs.choice import chosen
from fedloom.task import Data
from fedloom.tasks.multilabel import Multilabel
from fedloom.tasks.regression import RegressionToy
from fedloom.tasks.toy import Toy

EVERY = ("auc", "auc:weighted", "auc:micro", "f1", "f1:weighted", "f1:micro", "precision", "recall:weighted",
         "balanced_accuracy", "top_k:2", "log_loss", "ece", "ece:10", "accuracy")  # fmt: skip


class Fixed(Toy):
    """A task whose rows are their own outputs."""

    def __init__(self, outputs, y, classes=None):
        self.classes = classes or outputs.shape[1]
        self.rows = Data(torch.as_tensor(outputs), torch.as_tensor(y))
        self.qualities = ()

    def global_test(self):
        return self.rows


def scored(outputs, y, *texts, task=None):
    task = task or Fixed(np.asarray(outputs, dtype=np.float64), np.asarray(y))
    return scoring.measured(scoring.beside(texts, task), task, lambda x: x, task.rows)


def softmax(outputs):
    e = np.exp(outputs - outputs.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 4])
def test_measures_of_classes_are_scikit_learns_on_the_whole_array(classes):
    draw = numpy_stream(0, "tests", "scoring", classes)
    n = 2500  # several pieces, of which the last is smaller
    y = draw.integers(classes, size=n)
    y[: n // 3] = 0
    outputs = draw.normal(size=(n, classes)) + 1.2 * np.eye(classes)[y]
    p, said = softmax(outputs), outputs.argmax(1)
    texts = [text for text in EVERY if classes > 2 or text != "top_k:2"]
    found = scored(outputs, y, *texts)
    hot = np.eye(classes)[y]
    area = (lambda a: metrics.roc_auc_score(y, p, multi_class="ovr", average=a)) if classes > 2 else (
        lambda a: metrics.roc_auc_score(y, p[:, 1])
    )  # fmt: skip
    expected = {
        "auc": area("macro"),
        "auc_weighted": area("weighted"),
        "auc_micro": metrics.roc_auc_score(hot.ravel(), p.ravel()),
        "f1": metrics.f1_score(y, said, average="macro"),
        "f1_weighted": metrics.f1_score(y, said, average="weighted"),
        "f1_micro": metrics.f1_score(y, said, average="micro"),
        "precision": metrics.precision_score(y, said, average="macro"),
        "recall_weighted": metrics.recall_score(y, said, average="weighted"),
        "balanced_accuracy": metrics.balanced_accuracy_score(y, said),
        "log_loss": metrics.log_loss(y, p),
        "accuracy": metrics.accuracy_score(y, said),
    } | ({"top_k_2": metrics.top_k_accuracy_score(y, p, k=2)} if classes > 2 else {})
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert set(found) == {*expected, "ece", "ece_10"}
    for bins in (15, 10):
        sure, right, gap = p.max(1), said == y, 0.0
        for b in range(bins):
            inside = (sure > b / bins) & (sure <= (b + 1) / bins)
            if inside.any():
                gap += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
        assert found["ece" if bins == 15 else "ece_10"] == pytest.approx(gap, abs=1e-12)


def test_tiny_cases_by_hand():
    # Logs of 3:1 and so on: sure are 0.75, 0.75, 0.5, 0.9; right are yes, no, (tie: the first is said) yes, yes.
    outputs = np.log([[3.0, 1.0], [3.0, 1.0], [1.0, 1.0], [1.0, 9.0]])
    found = scored(outputs, [0, 1, 0, 1], "auc", "f1", "balanced_accuracy", "top_k:1", "log_loss", "ece:2", "ece:4")
    assert found["auc"] == pytest.approx(0.625)  # of class 1: .25 <> .5, .25 = .25; .9 > both: (0.5 + 0 + 1 + 1) / 4
    assert found["f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert found["balanced_accuracy"] == found["top_k_1"] == 0.75
    assert found["log_loss"] == pytest.approx(-np.log([0.75, 0.25, 0.5, 0.9]).mean())
    # Two bins: 0.5 alone lies in the first (which holds its upper edge), the others in the second.
    assert found["ece_2"] == pytest.approx((0.5 + abs(0.25 + 0.1 - 0.75)) / 4)
    assert scored([[0.0, 0.0, 0.0]] * 3, [0, 1, 2], "top_k:1", "top_k:2") == {"top_k_1": 1 / 3, "top_k_2": 2 / 3}
    assert found["ece_4"] == pytest.approx((0.5 + abs(0.25 - 0.75) + 0.1) / 4)


def test_what_the_samples_do_not_tell_is_no_number_and_who_diverged_is_not_left_out():
    assert scored([[0.0, 1.0], [1.0, 0.0]], [1, 1], "auc", "recall") == {"recall": pytest.approx(0.25)}
    three = scored([[2.0, 0.0, 1.0], [0.0, 2.0, 1.0], [0.0, 2.0, 3.0]], [0, 1, 1], "auc")
    assert three == {"auc": 1.0}, "a class that no sample is of is left out of the mean, the others are not"
    lost = scored([[0.0, math.nan], [1.0, 0.0]], [0, 1], "auc", "f1")
    assert list(lost) == ["auc", "f1"] and all(map(math.isnan, lost.values()))
    empty = Fixed(np.zeros((0, 2)), np.zeros(0, dtype=int))
    assert scored(None, None, "f1", task=empty) == {}


def test_amounts_and_labels_have_their_own():
    task = RegressionToy()
    task.qualities = ()
    data = task.global_test()
    found = scoring.measured(scoring.beside(("rmse", "mae", "r2"), task), task, lambda x: x[:, :1], data)
    y, said = data.y.double().numpy(), data.x[:, 0].double().numpy()
    expected = {"rmse": math.sqrt(((y - said) ** 2).mean()), "mae": abs(y - said).mean(),
                "r2": 1 - ((y - said) ** 2).sum() / ((y - y.mean()) ** 2).sum()}  # fmt: skip
    assert found == pytest.approx(expected)

    outputs = torch.tensor([[1.0, -1.0], [2.0, 0.1], [-1.0, 2.0]])
    truth = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    several = Multilabel.__new__(Multilabel)
    object.__setattr__(several, "federation", None)
    rows = Data(outputs, truth)
    measures = [scoring.measure(text, several) for text in ("f1", "precision:micro", "auc")]
    found = scoring.measured(measures, several, lambda x: x, rows)
    # The first label: said of two, right in one; its area 1/2. The second: said of two, right in one; its area 1.
    assert found == pytest.approx({"f1": 2 / 3, "precision_micro": 0.5, "auc": 0.75})


def test_amounts_are_in_the_unit_of_the_target():
    task = tasks.build(fedloom.Spec(problem="regression", data="diabetes", clients=3))
    seen = {}

    def off(y_true, said):
        seen["y"] = y_true
        return float(abs(y_true - said).mean())

    measures = scoring.beside((f"{fedloom.Spec(measures=(off,)).measures[0]}:low",), task)
    found = scoring.measured(measures, task, lambda x: torch.zeros(len(x), 1), task.global_test())
    assert found["off"] == pytest.approx(task.describe()["baseline"]["mae"], rel=1e-5)
    assert 24 < seen["y"].min() < seen["y"].max() <= 346


def test_a_stream_is_asked_among_the_classes_that_it_is_judged_among():
    task = tasks.build(fedloom.Spec(problem="stream:5,rounds=2", data="digits", clients=3)).at(1)
    out = torch.zeros(2, 10)
    own = task.classes_of[0].nonzero().flatten()
    p, y = task.answers(out, own[:2])
    assert torch.equal(y, own[:2]) and p.sum(1).tolist() == pytest.approx([1, 1])
    assert (p > 0).sum(1).tolist() == [len(own)] * 2


WRONG = [
    ({"measures": "auk"}, "unknown measure 'auk'; did you mean 'auc'"),
    ({"measures": "f1:mean"}, "f1 takes one of macro, weighted, micro"),
    ({"measures": "ece:0"}, "ece takes a whole number from 1, as in ece:15"),
    ({"measures": "log_loss:2"}, "log_loss takes no option"),
    ({"measures": "auc,auc"}, "measures has auc twice"),
    ({"measures": "top_k:3"}, "of 3 classes the first 3 are always right"),
    ({"measures": "rmse"}, "no measure of a problem whose target is one class"),
    ({"choose_by": "kappa"}, "this run is judged by accuracy, loss"),
    ({"measures": "nowhere.py:cost"}, "no measure file"),
    ({"measures": (lambda y, p: 0.0,)}, "has no name"),
    ({"measures": "python:cost"}, "was given in Python"),
]


@pytest.mark.parametrize(("settings", "told"), WRONG)
def test_what_cannot_be_measured_is_told_before_the_first_round(settings, told):
    rows = []
    with pytest.raises(UsageError, match=told):
        fedloom.run("fedavg", Toy(), rounds=1, on_round=rows.append, **settings)
    assert not rows


def test_a_problem_of_another_kind_and_a_choice_that_has_nothing_to_go_by_are_told():
    with pytest.raises(UsageError, match="a Saddle is judged by measures of its own"):
        fedloom.run("fedavg", problem="saddle", measures="auc", rounds=1)
    with pytest.raises(UsageError, match="validation=0 sets nothing aside"):
        fedloom.run("fedavg", choose_by="loss", validation=0, rounds=1)
    with pytest.raises(UsageError, match="makes no value of all together; take rmse, mae, loss"):
        fedloom.run("fedavg", problem="regression", data="diabetes", choose_by="r2", rounds=1)
    with pytest.raises(UsageError, match="is no measure of a problem whose target is an amount"):
        fedloom.run("fedavg", problem="regression", data="diabetes", measures="f1", rounds=1)
    huge = Fixed(np.zeros((100, 2)), np.zeros(100, dtype=int), classes=2_000_000)
    with pytest.raises(UsageError, match=r"need the probabilities of all 100 samples.*leave auc out"):
        scoring.beside(("auc", "f1"), huge)
    scoring.beside(("f1", "ece", "log_loss"), huge)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A file of measures, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "def cost(y_true, scores):\n    return 10 * float((scores.argmax(1) != y_true).mean())\n\n\n"
        "def silent(y_true, scores):\n    return None if 0 in y_true else 1.0\n\n\n"
        "def words(y_true, scores):\n    return 'much'\n"
    )
    return tmp_path


def test_engines_give_the_same_numbers_and_clients_count_by_their_rows(own):
    measures = "auc,f1,ece,log_loss,mine.py:cost:low,mine.py:silent"
    runs = {e: fedloom.run("fedavg", Toy(), rounds=2, measures=measures, engine=e) for e in ("serial", "pool")}
    columns = [name for name in runs["serial"].final if "test_" in name or name.startswith("validation_")]
    assert len(columns) > 20
    for name in columns:
        assert runs["pool"].final[name] == runs["serial"].final[name]
    batched = fedloom.run("fedavg", Toy(), rounds=2, measures=measures, engine="vectorized")
    row, clients = runs["serial"].final, runs["serial"].clients["clients"]
    for name in ("auc", "f1", "ece", "log_loss", "cost"):
        together = sum(c[name] * c["n"] for c in clients) / sum(c["n"] for c in clients)
        assert row[f"personal_test_{name}"] == pytest.approx(together)
        assert batched.final[f"global_test_{name}"] == pytest.approx(row[f"global_test_{name}"], abs=1e-4)
    assert row["global_test_cost"] == pytest.approx(10 * (1 - row["global_test_accuracy"]))
    assert row["global_test_log_loss"] == pytest.approx(row["global_test_loss"], rel=1e-5)
    # Client 0 alone lacks class 0: of four, three do not tell.
    assert row["personal_test_silent"] == 1.0 and row["personal_test_silent_left_out"] == 3
    assert row["global_test_silent"] is None and "personal_test_auc_left_out" not in row


def test_validation_chooses_by_what_is_asked(own):
    rows = [
        {"round": 1, "validation_accuracy": 0.5, "validation_loss": 1.0, "validation_cost": 3.0},
        {"round": 2, "validation_accuracy": 0.9, "validation_loss": 2.0, "validation_cost": 2.0},
        {"round": 3, "validation_accuracy": 0.6, "validation_loss": 0.5, "validation_cost": None},
        {"round": 4, "validation_accuracy": 0.7, "validation_loss": 0.5, "validation_cost": 1.0},
    ]
    by = [[row | {"chosen_by": name, "lower_is_better": "fee,cost"} for row in rows] for name in ("loss", "cost")]
    assert [chosen(one)["round"] for one in (rows, *by)] == [2, 3, 4]
    assert chosen([row | {"chosen_by": "cost"} for row in rows])["round"] == 1, "higher is better unless it is said"
    assert main_of(by[0]).name == "accuracy" and chooser_of(by[0]).name == "loss" and chooser_of(rows) == main_of(rows)

    run = fedloom.run("fedavg", Toy(), rounds=4, measures="mine.py:cost:low", choose_by="cost", lr=0.5)
    costs = [row["validation_cost"] for row in run.metrics]
    assert run.selected["round"] == 1 + costs.index(min(costs))
    assert run.chosen_clients["round"] == run.selected["round"]
    implied = fedloom.run("fedavg", Toy(), rounds=1, choose_by="f1:weighted")
    assert implied.spec.measures == ("f1:weighted",) and implied.final["chosen_by"] == "f1_weighted"
    assert fedloom.run("fedavg", Toy(), rounds=1, measures="accuracy").metrics[0].keys() == (
        fedloom.run("fedavg", Toy(), rounds=1).metrics[0].keys()
    )


def gain(y_true, scores):
    return float(scores[np.arange(len(y_true)), y_true].sum())


def test_functions_given_in_python(tmp_path):
    run = fedloom.run("fedavg", Toy(), rounds=1, measures=["f1", gain, (fee, "low")], out=tmp_path / "r", report=False)
    here = str(Path(__file__).resolve())
    assert run.spec.measures == ("f1", f"{here}:gain", f"{here}:fee:low")
    assert run.final["lower_is_better"] == "fee"
    with pytest.raises(UsageError, match="returned 'much'"):
        fedloom.run("fedavg", Toy(), rounds=1, measures=(lambda_like := closure(),))
    assert lambda_like.__name__ == "words"


def fee(y_true, scores):
    return -gain(y_true, scores)


def closure():
    def words(y_true, scores):
        return "'much'"

    return words


def test_a_function_that_changed_is_not_gone_on_with(own, capsys):
    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedloom.run("fedavg", rounds=2, clients=3, measures="mine.py:cost", out="r", on_round=stop, report=False)
    assert json.loads(Path("r/manifest.json").read_text())["inputs"][str(own / "mine.py")]["what"] == "measure"
    before = Path("mine.py").read_text()
    Path("mine.py").write_text(before.replace("10", "20"))
    assert main(["resume", "r"]) == 2
    assert "the measure" in capsys.readouterr().err
    Path("mine.py").write_text(before)
    assert main(["resume", "r"]) == 0
    out = capsys.readouterr().out
    assert "personal cost" in out and "validation cost" in out


@pytest.mark.parametrize(("width", "tall"), [(60, True), (160, True), (400, False)])
def test_results_are_told_whole_in_any_width(own, width, tall):
    run = fedloom.run("fedavg", Toy(), rounds=3, measures="auc,f1,ece,mine.py:cost:low", choose_by="loss")
    out = Console(file=io.StringIO(), width=width)
    print_results(out, summary(run))
    lines = out.file.getvalue().splitlines()
    text = " ".join(out.file.getvalue().split())
    assert all(len(line) <= width for line in lines) and "…" not in text
    for name in ("global_test_accuracy", "personal_test_cost", "validation_loss", "validation_auc"):
        assert f"{run.selected[name]:.4f}" in text
    assert (len(lines) > 15) == tall


def test_methods_are_compared_by_what_is_asked(own):
    settings = {"rounds": 2, "seeds": 2, "measures": "mine.py:cost:low,f1"}
    results = fedloom.compare(["fedavg", "local"], Toy(), metric="personal_test_cost", out="c", **settings)
    made = table(results)
    assert made.metric == "personal_test_cost" and [q.name for q in made.qualities] == ["accuracy", "cost", "f1"]
    means = {row.method: row.score.mean for row in made.rows}
    assert made.references == {row.setting: min(means, key=means.get) for row in made.rows}
    assert measured(results.cells[0].run)["personal_test_f1"] == results.cells[0].run.selected["personal_test_f1"]
    page = Path("c/report.html").read_text()
    assert "personal test cost" in page
    with pytest.raises(UsageError, match="unknown metric 'personal_test_auc'"):
        Comparison.of({"methods": ["fedavg"], "metric": "personal_test_auc", "measures": "f1"}).check()
    Comparison.of({"methods": ["fedavg"], "metric": "personal_test_auc", "choose_by": "auc"}).check()


def test_names_of_columns_say_what_they_are():
    assert asked("f1:weighted").name == "f1_weighted" and named("f1_weighted") == asked("f1:weighted")
    assert named("top_k_3").words == "top-3 accuracy" and named("auc").unit == "index"
    assert named("f1_of_mine") == named("mine", {}).__class__("f1_of_mine", "f1_of_mine", "index")
    assert named("cost", {"lower_is_better": "fee,cost"}).better == "low" and named("cost", {}).better == "high"
    assert named("loss").better == named("ece_10").better == named("log_loss").better == "low"
    assert about("personal_test_f1_weighted").words == "personal test weighted F1"
    assert about("global_test_auc@exit1").words == "global test AUC @exit1"
    with pytest.raises(UsageError, match="as a measure of the library is"):
        asked("mine.py:auc")
    with pytest.raises(UsageError, match="as a measure of the library is"):
        asked("mine.py:loss")


def test_each_measure_has_its_worst_client_and_comparisons_go_by_it(tmp_path):
    run = fedloom.run("fedavg", "digits", clients=5, rounds=2, measures="auc,ece,f1", out=tmp_path / "run")
    row, judged = run.selected, run.chosen_clients["clients"]
    for name, worst in (("auc", min), ("ece", max), ("f1", min), ("accuracy", min)):
        values = [one[name] for one in judged if name in one]
        assert row[f"worst_client_{name}"] == worst(values) and len(values) > 1 and len(set(values)) > 1
    page = (run.path / "report.html").read_text()
    assert "Worst client, test AUC" in page
    amounts = fedloom.run("fedavg", "diabetes", problem="regression", clients=3, rounds=1)
    each = amounts.chosen_clients["clients"]
    assert all({"rmse", "mae", "r2"} <= one.keys() for one in each)
    assert amounts.selected["worst_client_mae"] == max(one["mae"] for one in each)
    assert amounts.selected["worst_client_r2"] == min(one["r2"] for one in each)
    made = fedloom.compare(["fedavg", "local"], "digits", clients=5, rounds=1, seeds=2, measures="auc",
                           metric="worst_client_auc", jobs=1, out=tmp_path / "c")  # fmt: skip
    for one in table(made).rows:
        values = [cell.run.selected["worst_client_auc"] for cell in made.of(one.setting, one.method)]
        assert one.score.mean == pytest.approx(sum(values) / 2)
    assert "worst client, AUC" in (tmp_path / "c/report.html").read_text()
