"""A sweep is a comparison of one method with other fields."""

import pytest

import fedloom
from fedloom.cli.comparing import _axis
from fedloom.comparison.reading import mapping
from fedloom.comparison.sweep import sweep_comparison
from fedloom.errors import UsageError
from fedloom.methods.optimize.fedprox import FedProx
from fedloom.tasks.toy import Toy


def test_a_grid_is_every_combination():
    made = sweep_comparison(
        {"method": "fedprox:epochs=2", "over": {"lr": [0.01, 0.1], "mu": [0, 1], "cohort": [2, 4]}, "rounds": 5}
    )
    assert made.methods == {
        f"lr={lr},mu={mu}": {"name": "fedprox", "epochs": 2, "lr": lr, "mu": mu} for lr in (0.01, 0.1) for mu in (0, 1)
    }
    assert made.settings == {"cohort=2": {"cohort": 2}, "cohort=4": {"cohort": 4}}
    assert made.base == {"rounds": 5} and made.tune == 0


def test_a_search_stands_beside_the_defaults(tmp_path):
    pytest.importorskip("optuna")
    results = fedloom.sweep("fedprox", Toy(), search=4, seeds=2, rounds=2, out=tmp_path / "s", report=False)
    (setting,) = results.settings
    assert results.methods == ("default", "search")
    assert len(results.trials(setting, "search")) == 4 and not results.trials(setting, "default")
    assert results.of(setting, "default")[0].run.spec.method["mu"] == 0.01
    found = results.of(setting, "search")[1].run.spec.method
    assert {name: found[name] for name in ("lr", "mu")} == results.tuned(setting, "search")


def test_the_specs_of_runs_are_swept(tmp_path):
    run = fedloom.run("fedavg", "breast_cancer", fields={"batch": 20}, rounds=1, clients=3, seed=4)
    made = sweep_comparison(mapping(run.path / "spec.yaml") | {"over": {"lr": [0.01, 0.1]}})
    assert made.seeds == (4,) and list(made.methods) == ["lr=0.01", "lr=0.1"]
    assert made.methods["lr=0.1"]["batch"] == 20 and made.base["clients"] == 3


def test_cells_of_a_grid_are_runs_with_these_fields(tmp_path):
    results = fedloom.sweep(
        "fedavg", Toy(), over={"lr": [0.001, 0.1]}, seeds=1, rounds=2, out=tmp_path / "s", report=False
    )
    for cell, lr in zip(results.cells, (0.001, 0.1), strict=True):
        alone = fedloom.run("fedavg", Toy(), fields={"lr": lr}, rounds=2)
        assert cell.run.spec.method["lr"] == lr
        assert cell.run.final["validation_accuracy"] == alone.final["validation_accuracy"]
    assert cell.path == tmp_path / "s" / "cells" / results.settings[0] / "lr=0.1" / "seed-0"


AXES = [
    ("lr=0.01,1e-3", ("lr", [0.01, 0.001])),
    ("lr=0.1", ("lr", [0.1])),
    ("optimizer=adam,yogi", ("optimizer", ["adam", "yogi"])),
    ("partition=iid,dirichlet:0.1", ("partition", ["iid", "dirichlet:0.1"])),
    ("attack=['flip:0.1,scale=2', null]", ("attack", ["flip:0.1,scale=2", None])),
]


@pytest.mark.parametrize(("text", "axis"), AXES)
def test_values_on_the_command_line(text, axis):
    assert _axis(text) == axis


WRONG = [
    ({"method": "fedprox"}, "nothing to sweep over"),
    ({"method": "fedprax", "over": {"lr": [1]}}, "unknown method 'fedprax'; did you mean 'fedprox'"),
    ({"method": "fedprox", "over": {"mv": [1]}}, "unknown field of fedprox, or setting, 'mv'; did you mean 'mu'"),
    ({"method": "fedprox", "over": {"mu": []}}, "over mu: [] is not a list of values"),
    ({"method": "fedprox", "over": {"mu": "1"}}, "over mu: '1' is not a list of values"),
    ({"methods": ["fedprox"], "over": {"mu": [1]}}, "a sweep is of one method"),
]


@pytest.mark.parametrize(("settings", "complaint"), WRONG)
def test_a_sweep_that_makes_no_sense_is_refused(settings, complaint):
    with pytest.raises(UsageError) as refused:
        sweep_comparison(settings)
    assert complaint in str(refused.value)


def test_fields_of_a_wrapped_method_are_swept_and_searched():
    made = sweep_comparison({"method": "feddisco:a=0.1", "over": {"inner.lr": [0.01, 0.1], "b": [0.2]}})
    assert [made.methods[label] for label in ("inner.lr=0.01,b=0.2", "inner.lr=0.1,b=0.2")] == [
        {"name": "feddisco", "a": 0.1, "b": 0.2, "inner": {"name": "fedavg", "lr": lr}} for lr in (0.01, 0.1)
    ]
    searched = sweep_comparison({"method": {"name": "feddisco", "inner": "fedprox:mu=0.3"}, "search": 2})
    inner = searched.methods["default"]["inner"]
    assert inner["mu"] == 0.3 and inner["lr"] == FedProx().lr, "given, the defaults stay where they are"
