"""Tuning: the same number of trials for every method, on validation data, at a seed of its own, all of them kept."""

import json
import shutil

import pytest
import torch

import fedloom
from fedloom.comparison import tuning
from fedloom.comparison.grid import TRIAL_SEED, Comparison
from fedloom.comparison.layout import trial_folder, tuning_folder
from fedloom.errors import UsageError
from fedloom.method import Method
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.plugin import Plugin
from fedloom.registry import catalogue
from fedloom.runs.record import Run
from fedloom.tasks.toy import Toy

METHODS = ["fedavg", "fedprox", "local"]


def compared(methods, out, task=None, **settings):
    return fedloom.compare(methods, task or Toy(), out=out, report=False, **settings)


def plain(trials):
    return [{k: v for k, v in trial.items() if k != "seconds"} for trial in trials]


@pytest.mark.parametrize("entry", catalogue(), ids=lambda entry: entry.name)
def test_the_ranges_of_a_method_are_of_its_fields_and_can_be_searched(entry):
    pytest.importorskip("optuna")
    kind, made = entry.load(Method), Comparison.of({"methods": [entry.name]})
    assert kind.search_space().keys() <= {name for name, *_ in entry.fields()}
    where = tuning.space(made, entry.name)
    inner = {f"inner.{n}": r for n, r in FedAvg.search_space().items()} if issubclass(kind, Plugin) else {}
    assert where == kind.search_space() | inner
    for number in range(3):
        past = [{"fields": {}, "validation_accuracy": None}] * number
        fields = tuning._suggested(where, past, 17 * number, tuning._fields(made, entry.name))
        assert fields.keys() == where.keys()
        made.made(entry.name, made.spec(next(iter(made.settings)), entry.name, 0, fields))  # which checks them
        for name, r in where.items():
            if number and r[-1:] in (("log",), ("linear",)):
                assert r[0] <= fields[name] <= r[1] and type(fields[name]) is type(r[0])
            elif number:
                assert fields[name] in r


def test_every_method_gets_the_same_trials_and_its_best_by_validation(tmp_path):
    pytest.importorskip("optuna")
    results = compared(METHODS, tmp_path / "c", seeds=2, rounds=3, tune=5)
    (setting,) = results.settings
    for method in METHODS:
        trials = results.trials(setting, method)
        assert [trial["number"] for trial in trials] == list(range(5))
        assert {trial["seed"] for trial in trials} == {TRIAL_SEED} and TRIAL_SEED not in results.seeds
        kind = results.spec.kind(method)
        assert trials[0]["fields"] == {name: getattr(kind(), name) for name in kind.search_space()}
        assert len({json.dumps(trial["fields"]) for trial in trials}) == 5
        best = max(trials, key=lambda trial: trial["validation_accuracy"])
        assert results.tuned(setting, method) == best["fields"]
        for cell in results.of(setting, method):
            assert {name: cell.run.spec.method[name] for name in best["fields"]} == best["fields"]
            assert not cell.run.spec.blind
    # A trial is the run that its line says, to the bit.
    trial = results.trials(setting, "fedprox")[3]
    alone = fedloom.run("fedprox", Toy(), fields=trial["fields"], seed=TRIAL_SEED, rounds=3, blind=True)
    assert alone.selected["validation_accuracy"] == trial["validation_accuracy"]
    kept = Run(trial_folder(results.path, setting, "fedprox", 3))
    assert kept.spec.blind and len(kept.metrics) == 3
    assert not (kept.path / "checkpoint").exists() and not (kept.path / "model.safetensors").exists()


def test_trials_never_see_a_test_row(tmp_path):
    pytest.importorskip("optuna")

    class Watched(Toy):
        """Counts how often the test is judged."""

        judged = 0

        def judge(self, scores, data):
            tests = torch.cat([self.data(k, "test").rows for k in range(self.population)])
            type(self).judged += bool(torch.isin(data.rows, tests).any())
            return super().judge(scores, data)

    compared(["fedavg"], tmp_path / "tuned", Watched(), seeds=1, rounds=2, tune=4)
    tuned, Watched.judged = Watched.judged, 0
    compared(["fedavg"], tmp_path / "plain", Watched(), seeds=1, rounds=2)
    assert tuned == Watched.judged > 0


def test_tuning_follows_validation_even_where_the_test_disagrees(tmp_path):
    pytest.importorskip("optuna")

    class Contrary(Toy):
        """Test labels are shifted by one: the better a model, the worse its test."""

        def data(self, client, split):
            data = super().data(client, split)
            return type(data)(data.inputs, (data.labels + 1) % 3, data.rows) if split == "test" else data

    chosen = []
    for name, task in (("plain", Toy()), ("contrary", Contrary())):
        results = compared(["fedavg"], tmp_path / name, task, seeds=1, rounds=2, tune=4)
        chosen.append(results.tuned(*results.settings, "fedavg"))
    assert chosen[0] == chosen[1]


def test_a_search_that_was_killed_goes_on_to_the_same_end(tmp_path):
    pytest.importorskip("optuna")
    settings = {"seeds": 1, "rounds": 2, "tune": 6}
    whole = compared(METHODS, tmp_path / "whole", **settings)
    (setting,) = whole.settings
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    # As if it had been killed in the third trial of one method, and before the last line of another was written.
    folder = tuning_folder(tmp_path / "killed", setting, "fedprox")
    lines = (folder / "trials.jsonl").read_text().splitlines(keepends=True)
    (folder / "trials.jsonl").write_text("".join(lines[:3]))
    for number in (4, 5):
        shutil.rmtree(folder / f"trial-{number:03}")
    other = tuning_folder(tmp_path / "killed", setting, "fedavg")
    lines = (other / "trials.jsonl").read_text().splitlines(keepends=True)
    (other / "trials.jsonl").write_text("".join(lines[:-1]))
    shutil.rmtree(tmp_path / "killed" / "cells")
    results = compared(METHODS, tmp_path / "killed", **settings)
    for method in METHODS:
        assert plain(results.trials(setting, method)) == plain(whole.trials(setting, method))
        assert results.tuned(setting, method) == whole.tuned(setting, method)


def test_fields_that_were_given_are_not_searched(tmp_path):
    pytest.importorskip("optuna")
    methods = ["fedprox:lr=0.1", {"name": "fedprox", "lr": 0.1, "mu": 0.5, "label": "fixed"}]
    results = compared(methods, tmp_path / "c", seeds=1, rounds=1, tune=2, ranges={"mu": [0.0, 0.2, 5.0]})
    (setting,) = results.settings
    trials = results.trials(setting, "fedprox:lr=0.1")
    assert len(trials) == 2 and all(trial["fields"].keys() == {"mu"} for trial in trials)
    assert trials[1]["fields"]["mu"] in (0.0, 0.2, 5.0)
    assert results.trials(setting, "fixed") == [] and results.tuned(setting, "fixed") == {}


def test_trials_that_fail_are_kept_and_a_method_without_any_is_told(tmp_path):
    pytest.importorskip("optuna")

    class Unjudged(Toy):
        def data(self, client, split):
            data = super().data(client, split)
            return type(data)(data.inputs, data.labels, data.rows[:0]) if split == "validation" else data

    results = compared(["fedavg"], tmp_path / "c", Unjudged(), seeds=2, rounds=1, tune=2)
    (setting,) = results.settings
    assert [trial["error"] for trial in results.trials(setting, "fedavg")] == [
        "there are no validation data to judge it by"
    ] * 2
    assert [cell.error for cell in results.cells] == [
        "none of 2 trials of tuning succeeded; the first: there are no validation data to judge it by"
    ] * 2


WRONG = [
    ({"tune": 2, "validation": 0.0}, "cell digits/fedavg: tune needs validation data"),
    ({"tune": 2, "ranges": {"lr": [0.1, 0.01, "log"]}}, "the range of fedavg.lr is [0.1, 0.01, 'log']"),
    ({"tune": 2, "ranges": {"lr": [0, 1, "log"]}}, "begin above 0 on a log scale"),
    ({"tune": 2, "ranges": {"lr": []}}, "the range of fedavg.lr is empty"),
]


@pytest.mark.parametrize(("settings", "complaint"), WRONG)
def test_a_search_that_makes_no_sense_is_refused(settings, complaint, tmp_path):
    with pytest.raises(UsageError) as refused:
        fedloom.compare(["fedavg"], out=tmp_path / "c", report=False, **settings)
    assert complaint in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_without_the_sampler_one_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'fedloom\[tune\]'"):
        compared(["fedavg"], tmp_path / "c", tune=2)


def test_another_search_in_the_same_folder_is_refused(tmp_path):
    pytest.importorskip("optuna")
    compared(["fedavg"], tmp_path / "c", seeds=1, rounds=1, tune=2)
    with pytest.raises(UsageError, match="tuning: 2 trials there, 3 here"):
        compared(["fedavg"], tmp_path / "c", seeds=1, rounds=1, tune=3)
    more = compared(["fedavg"], tmp_path / "c", seeds=2, rounds=1, tune=2)
    assert len(more.cells) == 2 and not more.unfinished
