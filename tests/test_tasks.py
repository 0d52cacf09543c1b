"""The kinds of problems, by the settings of a run."""

import copy
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import fedloom
from fedloom import tasks
from fedloom.errors import UsageError
from fedloom.quality import ACCURACY
from fedloom.runs.spec import Spec
from fedloom.tasks.classification import Classification
from fedloom.tasks.toy import Toy


def test_a_problem_is_built_by_its_name():
    task = tasks.build(Spec(data="digits", clients=4, public=0.1))
    assert isinstance(task, Classification) and task.population == 4
    assert task.offers == {"public"} and len(task.public()) > 0
    assert tasks.build(Spec(clients=4)).offers == frozenset()


@pytest.mark.parametrize(
    ("problem", "complaint"),
    [
        ("clasification", "unknown problem 'clasification'.* did you mean 'classification'"),
        (
            "classification:3",
            "problem 'classification:3': too many positional arguments; classification takes no options",
        ),
        ("classification:a=3", "got an unexpected keyword argument 'a'"),
    ],
)
def test_a_problem_that_does_not_exist_or_fit_is_refused(problem, complaint):
    with pytest.raises(UsageError, match=complaint):
        tasks.build(Spec(problem=problem))


class TestGivenInPython:
    """A Task of one's own, and what is said of slips in it."""

    @pytest.mark.parametrize(
        ("setting", "value"),
        [("model", "mlp:32"), ("clients", 20), ("partition", "iid"), ("label", "y"), ("validation", 0.3),
         ("public", 0.1), ("shared_data", 0.1), ("exclude", "id"), ("keep", "id"), ("missing", "drop"),
         ("problem", "partial:0.1")],
    )  # fmt: skip
    def test_a_setting_that_it_does_not_read_is_refused(self, setting, value):
        with pytest.raises(UsageError, match=rf"{setting}=.* has no effect on a task given in Python"):
            fedloom.run("fedavg", Toy(), rounds=1, **{setting: value})

    def test_what_is_so_anyway_may_be_said(self):
        assert fedloom.run("fedavg", Toy(), rounds=1, clients=4, validation=0.1).spec.partition == "given"

    def test_a_path_is_data_and_other_things_are_refused_by_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("t.csv").write_text("a,label\n" + "".join(f"{i * i % 31},{i // 2 % 2}\n" for i in range(60)))
        run = fedloom.run("fedavg", Path("t.csv"), clients=2, partition="iid", rounds=1)
        assert run.spec.data == str(tmp_path / "t.csv")
        for given, named in (([], "a list"), (torch.zeros(2), "a Tensor"), ({}, "a dict")):
            with pytest.raises(
                UsageError,
                match=rf"the data are given as {named}; expected a name .*, the path of a file .* fedloom.Task",
            ):
                fedloom.run("fedavg", given, rounds=1)

    def test_a_field_of_the_method_may_stand_among_the_settings(self):
        run = fedloom.run("fedprox", Toy(), rounds=1, mu=0.5, fields={"lr": 0.2})
        assert run.spec.method["mu"] == 0.5 and run.spec.method["lr"] == 0.2
        with pytest.raises(UsageError, match="the field lr of fedavg is given twice"):
            fedloom.run("fedavg", Toy(), rounds=1, lr=0.1, fields={"lr": 0.2})
        with pytest.raises(UsageError, match="unknown setting 'mu'"):
            fedloom.run("fedavg", Toy(), rounds=1, mu=0.1)

    @pytest.mark.parametrize(
        ("returned", "said"),
        [
            ({"accuracy": 0.5}, 'at least "n"'),
            (0.5, "returned 0.5"),
            ({"n": 3, "accuracy": "good"}, "not all are numbers"),
        ],
    )
    def test_what_judge_returns_is_looked_at(self, returned, said):
        task = Toy()
        task.judge = lambda scores, data: returned
        with pytest.raises(UsageError, match=rf"Toy\.judge .*{said}"):
            fedloom.run("fedavg", task, rounds=1)

    def test_numbers_in_tensors_are_numbers(self):
        task, plain = Toy(), fedloom.run("fedavg", Toy(), rounds=2)
        judge = task.judge
        task.judge = lambda scores, data: {
            name: torch.tensor(value, dtype=torch.float64) for name, value in judge(scores, data).items()
        }
        run = fedloom.run("fedavg", task, rounds=2)
        assert run.final["global_test_accuracy"] == plain.final["global_test_accuracy"]
        assert run.final["validation_accuracy"] == plain.final["validation_accuracy"]

    def test_labels_that_are_no_class_are_told_before_training(self):
        task = copy.copy(Toy())
        task.y = task.y + 1
        with pytest.raises(UsageError, match=r"Toy\.data: client 0 has the label 3 in train, .* 3 classes .* 0 to 2"):
            fedloom.run("fedavg", task, rounds=1)

    @pytest.mark.parametrize("split", ["validation", "test"])
    def test_labels_of_other_splits_are_looked_at_too(self, split):
        task = Toy()
        task.y[task.data(2, split).rows[1]] = 3
        with pytest.raises(UsageError, match=rf"client 2 has the label 3 in {split}"):
            fedloom.run("fedavg", task, rounds=1)

    def test_a_client_without_training_rows_sits_out(self):
        run = fedloom.run("fedavg", Toy((30, 0, 20)), rounds=2)
        assert [row["cohort"] for row in run.metrics] == [2, 2]

    def test_batchnorm_and_a_batch_of_one_row(self):
        with pytest.raises(fedloom.RunError, match=r"client 1, .*BatchNorm cannot train on one row.*batch size"):
            fedloom.run("fedavg", Toy((30, 31), norm=True), rounds=1, fields={"batch": 10})
        assert isinstance(Toy(norm=True).network().body[1], nn.BatchNorm1d)

    def test_a_population_that_is_none(self):
        task = Toy()
        task.population = 0
        with pytest.raises(UsageError, match=r"Toy\.population is 0; expected a whole number of clients from 1"):
            fedloom.run("fedavg", task, rounds=1)


class TestClassification:
    """What is judged, registered and validated, on rows that are counted by hand."""

    def dealt(self, tmp_path, **settings) -> Classification:
        rows = [f"{i * i % 31},{i * 7 % 11},{'abc'[i % 3]},{int(i * i % 31 > 12)}" for i in range(3000)]
        (tmp_path / "t.csv").write_text("a,b,site,label\n" + "\n".join(rows) + "\n")
        return tasks.build(Spec(data=str(tmp_path / "t.csv"), partition="column:site", **settings))

    def test_a_client_of_its_column_and_its_splits(self, tmp_path):
        task = self.dealt(tmp_path, validation=0.2)
        assert task.population == 3 and task.shape == (2,), "the clients' column is no feature"
        splits = [task.data(k, split) for k in range(3) for split in ("train", "validation", "test")]
        rows = torch.cat([data.rows for data in splits])
        assert len(rows.unique()) == len(rows) == 3000
        for k in range(3):
            assert task.info(k) == {"n": len(task.data(k, "train"))}
            validation = len(task.data(k, "validation"))
            assert validation == int(0.2 * (len(task.data(k, "train")) + validation))
        assert torch.equal(task.global_test().rows, torch.cat([d.rows for d in splits[2::3]]).sort().values)

    def test_measures_are_means_over_samples_whatever_the_batches(self, tmp_path, monkeypatch):
        task = self.dealt(tmp_path)
        data = task.global_test()
        weights = torch.tensor([[0.0, 0.6], [1.0, 0.0]])
        out = (data.x @ weights).double()
        chances = out.exp() / out.exp().sum(1, keepdim=True)
        right = [int(chances[i, 1] > chances[i, 0]) == int(data.y[i]) for i in range(len(data))]
        loss = -sum(float(chances[i, data.y[i]].log()) for i in range(len(data))) / len(data)
        monkeypatch.setattr("fedloom.tasks.classification.JUDGED_AT_ONCE", 7)
        assert len(data) > 7 and len(data) % 7, "several pieces, the last one shorter"
        found = task.judge(lambda x: x @ weights, data)
        assert 0.55 < sum(right) / len(right) < 0.95, "or the wrong class, or a part of the rows, would do as well"
        assert found["n"] == len(data) and found["accuracy"] == pytest.approx(sum(right) / len(right))
        assert found["loss"] == pytest.approx(loss, rel=1e-5)

    def test_the_network_that_suits(self, tmp_path):
        assert self.dealt(tmp_path).model == "mlp:64"
        assert tasks.build(Spec(clients=4)).model == "mlp:64", "images of 8 x 8"


@pytest.mark.parametrize("kind", sorted(tasks.KINDS.own))
def test_what_a_kind_is_measured_by_is_known_before_its_data_are_read(kind):
    module = importlib.import_module(f"fedloom.tasks.{kind}")
    made = [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__]
    own = [one.qualities for one in made if "qualities" in vars(one) and isinstance(one.qualities, tuple)]
    assert all(one == getattr(module, "QUALITIES", (ACCURACY,)) for one in own)
    assert not own or tasks.qualities(kind) == own[0]
