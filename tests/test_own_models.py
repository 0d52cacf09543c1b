"""A client between machines keeps its own model, the one that a run on one machine would have written for it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from federation import Federation, spec_of
from test_deploy import killing, left, serial
from test_remote import difference

from fedloom.cli import main
from fedloom.deploy.models import Models
from fedloom.errors import UsageError
from fedloom.random import numpy_stream
from fedloom.report.page import render
from fedloom.runs.experiment import Experiment
from fedloom.runs.keeping import Kept
from fedloom.runs.personal import ELSEWHERE
from fedloom.runs.record import Run
from fedloom.runs.states import States
from fedloom.runs.trained import Trained

pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


def own(federation, name):
    """The folder of a client's own model."""
    run = json.loads((federation.folder / "run/deploy.json").read_text())["run"]
    return federation.folder / f"state-{name}" / run


def weights(path):
    with torch.no_grad():
        return {name: value.tolist() for name, value in path.state_dict().items()}


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory):
    """The same runs on one machine, by method; each is carried out once."""
    made = {}

    def run(spec):
        name = spec.method["name"]
        if name not in made:
            made[name] = Experiment(replace(spec, clients=3)).begin(tmp_path_factory.mktemp("serial") / name)
            made[name].go()
        return made[name].record

    return run


@pytest.mark.parametrize("method", ["ditto", "fedrep", "apfl"])
def test_each_client_has_the_model_that_is_its_own_on_one_machine(method, certificates, tmp_path, one_machine):
    spec = spec_of(method, rounds=4)
    federation = Federation(tmp_path, certificates)
    made = federation.run(spec)
    there = one_machine(spec)
    assert difference(left(made.record), left(there)) is None
    for number, name in enumerate("abc"):
        for which in ("chosen", "last"):
            mine = Trained(own(federation, name)).module(which)
            assert weights(mine) == weights(there.client_module(number, which))
        told = json.loads((own(federation, name) / "model/model.json").read_text())["weights"]
        assert told["last"]["round"] == 4 and told["chosen"]["round"] == there.selected["round"]
        files = {path.name for path in (own(federation, name) / "model").iterdir()}
        rounds = {told[which]["round"] for which in told}
        assert files == {"model.json"} | {f"round-{k}.{end}" for k in rounds for end in ("json", "safetensors")}


def test_the_record_says_who_judged_and_who_has_the_models(certificates, tmp_path):
    federation = Federation(tmp_path, certificates)
    run = Run(federation.run(spec_of("ditto")).record.path)
    assert run.selected["personal_test_accuracy"] is not None and len(run.clients["clients"]) == 3
    with pytest.raises(UsageError, match="each judged its own, of which its replies' measures are here"):
        run.client_module(1)
    assert "each judged its own" in render(run)
    assert not [*(run.path / "model").glob("*client*")]


def test_predict_works_at_the_client(certificates, tmp_path, capsys):
    federation = Federation(tmp_path, certificates)
    federation.run(spec_of("ditto"))
    rows = tmp_path / "rows.npz"
    np.savez(rows, image=numpy_stream(0, "rows").random((5, 8, 8)).astype(np.float32))
    assert main(["predict", str(own(federation, "b")), str(rows)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "row,prediction" and len(lines) == 6


def test_a_method_without_models_of_clients_leaves_none(certificates, tmp_path):
    federation = Federation(tmp_path, certificates)
    federation.run(spec_of("fedavg"))
    assert not (own(federation, "a") / "model").exists()


def test_clients_that_are_killed_have_the_same_models(certificates, tmp_path):
    spec = spec_of("ditto", rounds=20)
    federation = Federation(tmp_path, certificates)
    federation.start()
    thread = killing(federation, "b", [0.05 + 0.11 * k % 0.4 for k in range(6)], lambda: federation.start("b"))
    try:
        made = federation.serve(spec)
        thread.join(30)
        federation.codes()
    finally:
        federation.stop()
    there = serial(spec, 3)
    assert difference(left(made.record), left(there)) is None
    for which in ("chosen", "last"):
        assert weights(Trained(own(federation, "b")).module(which)) == weights(there.client_module(1, which))


def test_a_server_that_is_killed_tells_at_the_end_which_models_count(certificates, tmp_path):
    spec = spec_of("ditto", rounds=30)
    federation = Federation(tmp_path, certificates)
    federation.run_through_kills(spec, (1.3, 1.0))
    there = serial(spec, 3)
    for number, name in enumerate("abc"):
        for which in ("chosen", "last"):
            assert weights(Trained(own(federation, name)).module(which)) == weights(there.client_module(number, which))


def test_a_server_that_takes_a_run_up_knows_which_rounds_count():
    told = []
    engine = SimpleNamespace(judged=lambda which, round: told.append(([*which], round)))
    one = {"why": "none", **States().state()}
    state = {"chosen": {"round": 2, "lacking": ELSEWHERE} | one, "last": {"round": 3, "lacking": ""} | one}
    Kept(SimpleNamespace(engine=engine)).restore({"kept": state}, iter(()))
    assert told == [(["chosen"], 2)]


def test_models_that_count_no_more_are_dropped_and_one_that_was_never_made_is_told(tmp_path):
    kept = Models(tmp_path, None, None)
    kept.folder.mkdir()
    for round in (1, 2, 3, 5):
        for end in ("json", "safetensors"):
            (kept.folder / f"round-{round}.{end}").write_text('{"file": null, "why": "so"}')
    kept.forget(5, {"chosen": 2})
    assert {path.stem for path in kept.folder.iterdir()} == {"round-2", "round-5"}
    assert kept._told(4)["why"] == "this client was not asked to judge the round whose model counts"
    assert kept.end({}) is None
