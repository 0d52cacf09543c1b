"""Trackers, with the real packages on local folders."""

import importlib.util

import pytest

import fedloom
from fedloom.errors import UsageError
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.tasks.toy import Toy
from fedloom.tracking import names, numbers

# MLflow asks SQLAlchemy for what 2.1 deprecates; that is between the two.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow", "ignore:The ``noload``:DeprecationWarning")
ROUNDS = 4
VOLATILE = ("seconds", "eval_seconds")


def run(out, track=None, **settings):
    return fedloom.run("fedavg", Toy(), out=out, track=track, rounds=ROUNDS, report=False, **settings)


class Dead(Exception):
    """Of a run that is killed: no tracker hears of it."""


def killed(out, track, after):
    """A run that dies after a round that its trackers were told of and its last checkpoint was not."""
    spec = Spec.of({"method": "fedavg", "track": track, "rounds": ROUNDS, "partition": "given", "data": "toy"})
    made = Experiment(spec, Toy()).begin(out)

    def die(row):
        if row["round"] == after:
            raise Dead

    with pytest.raises(Dead):
        made.go(die)
    return made


def steps_of(folder):
    """{tag: [step]} and {tag: {step: value}} as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return {tag: {event.step: event.value for event in read.Scalars(tag)} for tag in read.Tags()["scalars"]}, {
        tag: [event.step for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]
    }


def history(folder):
    """The MLflow run of a folder, and {metric: [step]}."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "fedloom"]
    (found,) = client.search_runs([experiment.experiment_id])
    told = {name: client.get_metric_history(found.info.run_id, name) for name in found.data.metrics}
    return client, found, told


def without_time(run):
    return [{name: value for name, value in row.items() if name not in VOLATILE} for row in run.metrics]


def test_tensorboard_gets_every_round(tmp_path):
    made = run(tmp_path / "run", "tensorboard")
    values, steps = steps_of(made.path / "track" / "tensorboard")
    assert all(found == [row["round"] for row in made.metrics if tag in numbers(row)] for tag, found in steps.items())
    for row in made.metrics:
        assert values["validation_accuracy"][row["round"]] == pytest.approx(row["validation_accuracy"])


@pytest.mark.parametrize("after", [1, 3])
def test_tensorboard_resumes_without_doubles(tmp_path, after):
    made = killed(tmp_path / "run", "tensorboard", after)
    fedloom.resume(made.record.path, Toy(), report=False)
    _, steps = steps_of(made.record.path / "track" / "tensorboard")
    assert steps["train_loss"] == [1, 2, 3, 4]


def test_mlflow_gets_every_round_and_resumes_without_doubles(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    made = killed(tmp_path / "run", "mlflow,tensorboard", 2)
    again = fedloom.resume(made.record.path, Toy(), report=False)
    client, found, told = history(again.path / "track" / "mlflow")
    assert found.info.status == "FINISHED" and found.data.params["method"] == "fedavg"
    assert found.data.params["method.lr"] == str(again.spec.method["lr"])
    assert [event.step for event in told["train_loss"]] == [1, 2, 3, 4]
    assert [event.value for event in told["train_loss"]] == [row["train_loss"] for row in again.metrics]
    kept = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert {"spec.yaml", "clients.json"} <= kept
    from mlflow.telemetry.utils import is_telemetry_disabled

    assert is_telemetry_disabled()
    assert {file.name for file in (again.path / "track").iterdir()} == {"tensorboard", "mlflow"}


def test_a_tracker_changes_no_number(tmp_path):
    assert without_time(run(tmp_path / "a", "tensorboard")) == without_time(run(tmp_path / "b"))


def test_an_unknown_tracker_is_told_before_anything_starts(tmp_path):
    with pytest.raises(UsageError, match=r"unknown tracker 'tensorbord'.*tensorboard"):
        run(tmp_path / "run", "tensorbord")
    assert not (tmp_path / "run").exists()


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'fedloom\[track\]'"):
        names("mlflow")


def test_names_are_split_and_told_once():
    assert names(None) == [] and names(" mlflow,tensorboard, mlflow") == ["mlflow", "tensorboard"]


def test_only_finite_numbers_are_told():
    assert numbers({"round": 3, "a": 1, "b": None, "c": float("nan"), "d": float("inf"), "note": "x"}) == {"a": 1.0}
