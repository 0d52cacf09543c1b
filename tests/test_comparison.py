"""A comparison is ordinary runs, paired, each done once, whatever happens on the way."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fedloom
from fedloom.cli import main
from fedloom.comparison import tuning
from fedloom.comparison.grid import CAP, Comparison
from fedloom.comparison.layout import error_file
from fedloom.comparison.reading import assigned, value_at
from fedloom.comparison.results import Results
from fedloom.comparison.run import execute
from fedloom.errors import RunError, UsageError
from fedloom.methods.aggregate.feddisco import FedDisco
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.fedprox import FedProx
from fedloom.runs.experiment import Experiment
from fedloom.runs.record import Run
from fedloom.runs.spec import Spec
from fedloom.runs.writing import hold
from fedloom.tasks.toy import Toy

DIGITS = {"data": "digits", "clients": 4, "model": "mlp:8", "partition": "dirichlet:0.3"}

# A method that fails at one seed for as long as a file is there.
FRAGILE = '''
import os
from dataclasses import dataclass
from pathlib import Path
from fedloom import Method, client


@dataclass(frozen=True)
class Fragile(Method):
    """What happens to the others when one fails?"""

    lr: float = 0.05
    mark: str = ""
    seed: int = 1
    deadly: bool = False

    def round(self, server, cohort):
        if server.round == 2 and server.site.seed == self.seed and Path(self.mark).exists():
            if self.deadly:
                os._exit(7)
            raise RuntimeError("it broke")
        server.model = cohort.mean(self.local, model=server.model).model

    @client
    def local(self, client, model):
        return {"model": client.descend(model, lr=self.lr, epochs=1, batch=10)[0]}
'''


def numbers(run: Run) -> list[dict[str, object]]:
    """The rounds without what a clock says."""
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in run.metrics]


def compared(methods, out, task=None, **settings) -> Results:
    return fedloom.compare(methods, task or Toy(), out=out, report=False, **settings)


def test_a_cell_is_the_ordinary_run_of_its_settings(tmp_path):
    methods = ["fedavg", {"name": "fedprox", "mu": 0.5, "label": "strong"}]
    settings = {"all": {}, "half": {"cohort": 2}}
    results = compared(methods, tmp_path / "c", seeds=[3, 5], settings=settings, rounds=2)
    assert [cell.name for cell in results.cells] == [
        f"{setting}/{method}/seed-{seed}" for setting in settings for method in ("fedavg", "strong") for seed in (3, 5)
    ]
    for cell in results.cells:
        fields = {"mu": 0.5} if cell.method == "strong" else {}
        name = "fedprox" if cell.method == "strong" else "fedavg"
        alone = fedloom.run(name, Toy(), fields=fields, seed=cell.seed, rounds=2, **settings[cell.setting])
        assert cell.run is not None and numbers(cell.run) == numbers(alone)
        assert cell.path == tmp_path / "c" / "cells" / cell.setting / cell.method / f"seed-{cell.seed}"


def test_at_one_seed_all_methods_meet_the_same_partition_model_and_cohorts(tmp_path):
    methods = ["fedavg", "scaffold", "ditto", "moon", "fedproto"]
    spec = Comparison.of({"methods": methods, "seeds": 2, "cohort": 2, "rounds": 3, "dropout": 0.2, **DIGITS})
    starts, heard, dealt = {}, {}, {}
    for setting, method, seed in spec.grid():
        made = Experiment(spec.spec(setting, method, seed)).begin(None)
        starts[method, seed] = made.server.model.flat.clone()
        made.go()
        dealt[method, seed] = made.record.partition
        heard[method, seed] = [made.world.choose(round) for round in range(1, 4)]
        asked = {
            (line["round"], client)
            for line in made.record.ledger
            if line["kind"] == "train" and line["direction"] == "down"
            for client in line["clients"]
        }
        if asked:  # fedproto has nothing to send in its first round
            assert asked <= {(round, c) for round, chosen in enumerate(heard[method, seed], 1) for c in chosen}
            if method != "fedproto":
                assert {client for _, client in asked} == {c for chosen in heard[method, seed] for c in chosen}
    for seed in (0, 1):
        for method in methods[1:]:
            assert torch.equal(starts[method, seed], starts["fedavg", seed])
            assert dealt[method, seed] == dealt["fedavg", seed]
            assert heard[method, seed] == heard["fedavg", seed]
    assert dealt["fedavg", 0] != dealt["fedavg", 1]
    assert not torch.equal(starts["fedavg", 0], starts["fedavg", 1])


def test_a_comparison_comes_back_from_its_text(tmp_path):
    given = Comparison.of(
        {
            "methods": ["fedavg", {"name": "fedprox", "mu": 0.1}, "fedprox:mu=1", "fedopt:optimizer=yogi"],
            "fields": {"lr": 0.02, "mu": 7.0},
            "seeds": "2,4",
            "settings": [{"partition": "iid"}, {"partition": "dirichlet:0.1", "cohort": 5}],
            "tune": 3,
            "ranges": {"lr": [0.01, 0.1, "log"]},
            "baseline": "fedavg",
            "rounds": 4,
        }
    )
    assert given.methods == {
        "fedavg": {"name": "fedavg", "lr": 0.02},
        "fedprox:mu=0.1": {"name": "fedprox", "lr": 0.02, "mu": 0.1},
        "fedprox:mu=1": {"name": "fedprox", "lr": 0.02, "mu": 1},
        "fedopt": {"name": "fedopt", "lr": 0.02, "optimizer": "yogi"},
    }
    assert given.seeds == (2, 4)
    assert list(given.settings) == ["partition=iid", "partition=dirichlet:0.1,cohort=5"]
    path = tmp_path / "c.yaml"
    path.write_text(given.text())
    assert Comparison.read(path) == given
    path.write_text(Comparison.of({"methods": "fedavg"}).text())
    assert Comparison.read(path) == Comparison.of(
        {"methods": ["fedavg"], "seeds": [0, 1, 2], "settings": {"digits": {}}}
    )


WRONG = [
    ({"methods": []}, "nothing to compare"),
    ({"methods": ["fedavg", "scafold"]}, "unknown method 'scafold'; did you mean 'scaffold'"),
    ({"methods": ["fedavg", "fedprox:muu=1"]}, "cell digits/fedprox: unknown field of fedprox 'muu'"),
    ({"methods": ["fedavg", "fedprox:mu=-1"]}, "cell digits/fedprox: fedprox.mu is -1.0; it must be at least 0"),
    ({"methods": ["fedprox:0.1"]}, "0.1 is not of the form field=value"),
    ({"methods": ["fedavg", "fedavg"]}, "two methods are called"),
    ({"methods": [{"name": "fedavg", "label": "a b"}, {"name": "local", "label": "a-b"}]}, "would share a folder"),
    ({"methods": [3]}, "3 is no method"),
    ({"methods": ["fedavg"], "fields": {"mu": 1}}, "unknown field of these methods 'mu'"),
    ({"methods": ["fedavg"], "cohorts": 3}, "unknown setting 'cohorts'; did you mean 'cohort'"),
    ({"methods": ["fedavg"], "lr": 0.1}, "; a field of all methods is fields={NAME: ...}, of one of them METHOD:"),
    ({"methods": ["fedavg"], "seed": 3}, "a comparison has `seeds`"),
    ({"methods": ["fedavg"], "settings": {"x": {"cohorts": 3}}}, "setting x: unknown setting 'cohorts'"),
    ({"methods": ["fedavg"], "settings": {"x": {"rounds": 0}}}, "cell x/fedavg: rounds is 0"),
    ({"methods": ["fedavg"], "settings": {"x": {"cohort": 9}}}, "cell x/fedavg: cohort is 9; there are 4 clients"),
    ({"methods": ["fedavg"], "settings": {"x": {"data": "digts"}}}, "cell x/fedavg: unknown data set 'digts'"),
    ({"methods": ["fedavg"], "seeds": 0}, "seeds are []"),
    ({"methods": ["fedavg"], "seeds": [1, 1]}, "seeds are [1, 1]"),
    ({"methods": ["fedavg"], "seeds": ["a"]}, "a seed is 'a'"),
    ({"methods": ["fedavg"], "tune": -1}, "tune is -1"),
    ({"methods": ["fedavg"], "test": "u"}, "unknown test 'u'"),
    ({"methods": ["fedavg"], "metric": "accuracy"}, "unknown metric 'accuracy'"),
    ({"methods": ["fedavg"], "baseline": "fedavgg"}, "unknown baseline 'fedavgg'; did you mean 'fedavg'"),
    ({"methods": ["fedavg"], "ranges": {"mu": [0, 1]}}, "no method of this comparison has a field 'mu'"),
    ({"methods": ["fedavg"], "jobs": -1}, "jobs is -1"),
]


@pytest.mark.parametrize(("settings", "complaint"), WRONG, ids=lambda value: str(value)[:40])
def test_what_cannot_be_carried_out_stops_before_anything_starts(settings, complaint, tmp_path):
    with pytest.raises(UsageError) as refused:
        fedloom.compare(out=tmp_path / "c", report=False, **DIGITS, **settings)
    assert complaint in str(refused.value) and "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_assignments_reach_all_methods_or_one():
    given = {"methods": ["fedavg", "fedprox:mu=0.1", "local"], "fields": {"batch": 5}}
    made = Comparison.of(assigned(given, ["method.lr=0.2", "fedprox.mu=2", "local.lr=1", "rounds=7", "seeds=2"]))
    assert made.methods["fedavg"] == {"name": "fedavg", "batch": 5, "lr": 0.2}
    assert made.methods["fedprox"] == {"name": "fedprox", "batch": 5, "lr": 0.2, "mu": 2}
    assert made.methods["local"] == {"name": "local", "batch": 5, "lr": 1}
    assert made.seeds == (0, 1) and made.base == {"rounds": 7}
    with pytest.raises(UsageError, match="unknown method of this comparison 'fedprix'; did you mean 'fedprox'"):
        assigned(given, ["fedprix.mu=2"])


def test_shared_fields_reach_methods_that_others_wrap():
    own = {"name": "feddisco", "inner": {"name": "fedprox", "lr": 0.5}, "label": "own"}
    methods = ["feddisco", {"name": "feddisco", "inner": "fedprox", "label": "named"}, own, FedDisco(FedAvg(epochs=2))]
    given = Comparison.of({"methods": methods, "fields": {"lr": 0.02, "mu": 7.0, "a": 0.1}, "seeds": 1})
    made = [given.made(label, given.spec(next(iter(given.settings)), label, 0)) for label in given.methods]
    assert [one.inner for one in made] == [
        FedAvg(lr=0.02),
        FedProx(lr=0.02, mu=7.0),
        FedProx(lr=0.5, mu=7.0),
        FedAvg(lr=0.02, epochs=2),
    ]
    assert [one.a for one in made] == [0.1] * 4
    assert Comparison.of({"methods": ["feddisco"], "fields": {"a": 0.1}}).methods == {
        "feddisco": {"name": "feddisco", "a": 0.1}
    }, "what nothing reaches is not written down"
    with pytest.raises(UsageError, match="unknown field of these methods 'mu'"):
        Comparison.of({"methods": ["feddisco"], "fields": {"mu": 1}})


def test_fields_of_methods_that_others_wrap_are_tuned_too():
    given = {
        "methods": [
            {"name": "feddisco", "label": "plain"},
            {"name": "feddisco", "inner": "fedprox:mu=0.3", "label": "given"},
        ],
        "tune": 3,
    }
    made = Comparison.of(given | {"ranges": {"lr": [0.01, 0.1, "log"]}, "seeds": 1})
    own = {name: r for name, r in FedDisco.search_space().items() if name != "inner"}
    assert tuning.space(made, "plain") == own | {
        f"inner.{name}": r for name, r in FedAvg.search_space().items() if name != "lr"
    } | {"inner.lr": (0.01, 0.1, "log")}
    assert {"inner.mu"} == {f"inner.{name}" for name in FedProx.search_space()} - {*tuning.space(made, "given")}
    setting = next(iter(made.settings))
    spec = made.spec(setting, "given", 0, {"inner.lr": 0.07, "a": 0.2})
    assert made.made("given", spec) == FedDisco(FedProx(lr=0.07, mu=0.3), a=0.2)
    assert [value_at(spec.method, name) for name in ("inner.lr", "a", "b")] == [0.07, 0.2, None]
    with pytest.raises(UsageError, match="ranges: no method of this comparison has a field 'mu'"):
        Comparison.of({"methods": ["feddisco"], "ranges": {"mu": [0.1, 1.0, "log"]}}).check()


def test_trials_begin_with_the_defaults_of_wrapped_methods_and_go_on(tmp_path):
    results = compared(["feddisco"], tmp_path / "c", tune=3, rounds=1, seeds=1)
    tried = [trial["fields"] for trial in results.trials(next(iter(results.spec.settings)), "feddisco")]
    assert tried[0]["inner.lr"] == FedAvg().lr and len({one["inner.lr"] for one in tried}) == 3
    (cell,) = results.cells
    chosen = results.tuned(cell.setting, "feddisco")
    assert chosen in tried and cell.run.spec.method["inner"]["lr"] == chosen["inner.lr"]


def test_every_method_gets_the_same_budget(tmp_path):
    methods = ["fedavg", "fedavg:epochs=3", "local"]
    results = compared(methods, tmp_path / "c", seeds=1, max_steps=60)
    for cell in results.cells:
        steps = [row["gradient_steps"] for row in cell.run.metrics]
        assert sum(steps[:-1]) < 60 <= sum(steps)
        assert cell.run.spec.rounds == CAP and "max_steps" in cell.run.manifest["stopped_because"]
    assert len(results.cells[0].run.metrics) > len(results.cells[1].run.metrics)
    assert not results.capped and results.spec.budgets == {"max_steps": 60}


def test_who_never_spends_a_budget_is_named(tmp_path):
    results = compared(["fedavg", "local"], tmp_path / "c", seeds=1, max_bytes=3000, rounds=30)
    assert [cell.method for cell in results.capped] == ["local"]


def test_the_table_of_cells_has_the_chosen_rounds_of_those_that_are_finished(tmp_path):
    results = compared(["fedavg", "local"], tmp_path / "c", seeds=2, rounds=3, settings={"a": {}, "b": {"cohort": 2}})
    shutil.rmtree(results.cells[0].path)
    results = Results.read(tmp_path / "c")
    table = results.frame()
    cells = [(cell.setting, cell.method, cell.seed) for cell in results.cells[1:]]
    assert list(table[["setting", "method", "seed"]].itertuples(index=False, name=None)) == cells
    assert table["round"].tolist() == [cell.run.selected["round"] for cell in results.cells[1:]]
    assert repr(results) == f"Results('{tmp_path / 'c'}': 7 of 8 runs finished)"


def test_finished_cells_are_never_run_again(tmp_path):
    out = tmp_path / "c"
    compared(["fedavg", "local"], out, seeds=2, rounds=2)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("seed-*/*") if path.is_file()}
    results = compared(["fedavg", "local", "scaffold"], out, seeds=3, rounds=2)
    assert not results.unfinished and len(results.cells) == 9
    assert before and all(path.stat().st_mtime_ns == then for path, then in before.items())
    with pytest.raises(UsageError, match=r"cell .*/fedavg/seed-0: rounds: 2 there, 3 here.*choose another --out"):
        compared(["fedavg"], out, rounds=3)
    assert Results.read(out).methods == ("fedavg", "local", "scaffold")


def test_a_folder_that_is_something_else_stays_as_it_is(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one").touch()
    with pytest.raises(UsageError, match="is not a comparison's folder"):
        compared(["fedavg"], tmp_path / "letters", rounds=1)
    with pytest.raises(UsageError, match="is not a comparison's folder"):
        Results.read(tmp_path / "letters")
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["one"]


def test_two_processes_never_work_on_one_comparison(tmp_path):
    out = tmp_path / "c"
    compared(["fedavg"], out, seeds=1, rounds=1)
    with hold(out), pytest.raises(UsageError, match="still running in another process"):
        compared(["fedavg"], out, seeds=1, rounds=1)


def test_without_a_folder_the_results_live_as_long_as_their_object():
    results = compared(["fedavg"], None, seeds=1, rounds=1)
    path = results.path
    assert results.cells[0].run.final["round"] == 1 and path.exists()
    del results
    assert not path.exists()


@pytest.mark.parametrize("deadly", [False, True], ids=["raises", "dies"])
def test_a_failing_cell_is_told_and_the_others_go_on(tmp_path, deadly):
    file, mark, out = tmp_path / "fragile.py", tmp_path / "mark", tmp_path / "c"
    file.write_text(FRAGILE)
    mark.touch()
    methods = ["fedavg", {"name": str(file), "mark": str(mark), "deadly": deadly}]
    settings = {"seeds": 2, "rounds": 3, "out": out, "jobs": 1, "report": False, **DIGITS}
    results = fedloom.compare(methods, **settings)
    (failed,) = results.failed
    assert failed.name == "digits/fragile/seed-1" and failed.run is None
    assert ("exit code 7" if deadly else "it broke") in failed.error
    told = json.loads(error_file(failed.path).read_text())
    assert deadly or "RuntimeError: it broke" in told["traceback"]
    assert all(cell.run is not None for cell in results.cells if cell != failed)
    mark.unlink()
    again = fedloom.compare(methods, **settings)
    assert not again.failed and not again.unfinished
    alone = fedloom.run(str(file), fields={"mark": str(mark), "deadly": deadly}, seed=1, rounds=3, **DIGITS)
    assert numbers(again.cells[-1].run) == numbers(alone)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("name", [".comparison.yaml.partial", ".report.csv.partial"])
def test_a_full_disk_is_told_with_how_to_go_on(tmp_path, name, full_disk):
    with full_disk(name), pytest.raises(RunError, match=rf"is full; .*: fedloom compare {tmp_path / 'c'}$"):
        fedloom.compare("fedavg", Toy(), out=tmp_path / "c", rounds=1, seeds=1)
    results = fedloom.compare("fedavg", Toy(), out=tmp_path / "c", rounds=1, seeds=1)
    assert not results.failed and (results.path / "report.csv").is_file()


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\xff", "[" * 100_000])
def test_a_damaged_error_file_is_told(tmp_path, text):
    results = compared("fedavg", tmp_path / "c", rounds=1, seeds=1)
    path = results.cells[0].path
    path.with_name(f"{path.name}.error.json").write_text(text, encoding="latin-1")
    with pytest.raises(RunError, match=r"error\.json is damaged"):
        Results.read(tmp_path / "c")


def test_a_method_that_only_python_has(tmp_path):
    from fedloom.method import build

    given = build("fedprox", {"mu": 0.3})

    class Mine(type(given)):
        """Of this test."""

    results = compared([given, Mine(mu=0.3)], tmp_path / "c", seeds=1, rounds=2)
    assert results.methods == ("fedprox", "test_comparison")
    assert numbers(results.cells[0].run) == numbers(results.cells[1].run)


def started(out: Path) -> subprocess.Popen:
    """A comparison on the command line that takes some seconds."""
    words = ["compare", "fedavg", "scaffold", "--rounds", "12", "--seeds", "2", "--jobs", "2", "--out", str(out)]
    words += [f"{name}={value}" for name, value in DIGITS.items()]
    return subprocess.Popen([sys.executable, "-m", "fedloom", *words], stderr=subprocess.PIPE, text=True)


def halfway(out: Path, process: subprocess.Popen) -> None:
    """Waits until a cell is done and another one is under way."""
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if out.exists():
            cells = Results.read(out).cells if (out / "comparison.yaml").exists() else ()
            begun = [cell for cell in cells if cell.run is None and (cell.path / "metrics.jsonl").exists()]
            if begun and any(cell.run for cell in cells):
                return
        time.sleep(0.01)
    raise AssertionError("it never came half way")


def test_a_killed_comparison_goes_on_as_if_it_had_never_stopped(tmp_path):
    out = tmp_path / "c"
    process = started(out)
    halfway(out, process)
    process.kill()
    process.communicate()
    left = Results.read(out)
    done = [cell for cell in left.cells if cell.run is not None]
    assert done and left.unfinished
    before = {path: path.stat().st_mtime_ns for cell in done for path in cell.path.rglob("*") if path.is_file()}
    results = execute(left.spec, out)
    assert not results.unfinished and not results.failed
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    for cell in results.cells:
        alone = fedloom.run(cell.method, seed=cell.seed, rounds=12, **DIGITS)
        assert numbers(cell.run) == numbers(alone)
        assert torch.equal(cell.run.model.flat, alone.model.flat)


def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "c"
    process = started(out)
    halfway(out, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"go on with: fedloom compare {out}" in said and "of 4 cells done" in said and "Traceback" not in said
    left = Results.read(out)
    assert left.unfinished and not left.failed
    states = {cell.path: Run(cell.path).manifest["status"] for cell in left.unfinished if cell.path.exists()}
    assert set(states.values()) == {"stopped"}
    with hold(out):
        for path in states:
            with hold(path):  # nobody works on it any more
                pass


def test_the_round_is_chosen_by_validation_even_where_the_test_disagrees(tmp_path):
    class Contrary(Toy):
        """Test labels are shifted by one: the better a model, the worse its test."""

        def data(self, client, split):
            data = super().data(client, split)
            if split == "test":
                return type(data)(data.inputs, (data.labels + 1) % 3, data.rows)
            return data

    results = compared(["fedavg", "local"], tmp_path / "c", Contrary(), seeds=2, rounds=6)
    for cell in results.cells:
        rows = cell.run.metrics
        best = max(rows, key=lambda row: row["validation_accuracy"])
        assert cell.run.selected == best
        assert best["personal_test_accuracy"] < max(row["personal_test_accuracy"] for row in rows)
    score = [cell.run.selected["validation_accuracy"] for cell in results.of("a-Contrary-given-in-Python", "local")]
    assert results.validated("a-Contrary-given-in-Python")["local"] == sum(score) / 2


def test_blind_runs_train_alike_and_judge_no_test_row():
    class Guarded(Toy):
        def judge(self, scores, data):
            tests = torch.cat([self.data(k, "test").rows for k in range(self.population)])
            assert not torch.isin(data.rows, tests).any()
            return super().judge(scores, data)

    with pytest.raises(AssertionError):
        fedloom.run("fedavg", Guarded(), rounds=1)
    blind = fedloom.run("fedavg", Guarded(), rounds=2, blind=True)
    seeing = fedloom.run("fedavg", Toy(), rounds=2)
    assert torch.equal(blind.model.flat, seeing.model.flat)
    for mine, theirs in zip(blind.metrics, seeing.metrics, strict=True):
        assert mine["validation_accuracy"] == theirs["validation_accuracy"]
        assert mine["global_test_accuracy"] is mine["personal_test_accuracy"] is mine["worst_client_accuracy"] is None
    assert blind.spec == Spec.read(blind.path / "spec.yaml") and blind.spec.blind


def test_folders_are_named_after_labels(tmp_path):
    results = compared({"strong pull/1": "fedprox:mu=1"}, tmp_path / "c", seeds=1, rounds=1)
    assert results.cells[0].path.relative_to(tmp_path).as_posix().endswith("/strong-pull-1/seed-0")
    assert list(tmp_path.iterdir()) == [tmp_path / "c"]


@pytest.fixture(scope="module")
def on_the_command_line(tmp_path_factory):
    """A finished comparison, and the words that made it."""
    out = tmp_path_factory.mktemp("cli") / "c"
    words = ["compare", "fedavg", "fedprox:mu=0.5", "local", "--seeds", "2", "--rounds", "2", "--lr", "0.1"]
    words += ["--setting", "iid:partition=iid", "--setting", "skewed:partition=dirichlet:0.1", "--jobs", "1"]
    words += ["--data", "digits", "--clients", "4", "model=mlp:8", "fedavg.batch=20", "--out", str(out)]
    assert main(words) == 0
    return words, out


def test_the_command_line_says_it_all(on_the_command_line):
    _, out = on_the_command_line
    results = Results.read(out)
    assert results.settings == ("iid", "skewed") and results.methods == ("fedavg", "fedprox", "local")
    assert results.spec.methods["fedavg"] == {"name": "fedavg", "lr": 0.1, "batch": 20}
    assert results.spec.methods["fedprox"] == {"name": "fedprox", "lr": 0.1, "mu": 0.5}
    assert not results.unfinished and not results.failed and (out / "report.html").is_file()
    assert results.of("skewed", "local")[1].run.spec.partition == "dirichlet:0.1"


def test_the_same_command_and_the_folder_only_tell_again(on_the_command_line, capsys):
    words, out = on_the_command_line
    before = {path: path.stat().st_mtime_ns for path in out.rglob("seed-*/*") if path.is_file()}
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (
        told["path"] == str(out) and told["failed"] == {} and told["chosen_by_validation"].keys() == {"iid", "skewed"}
    )
    assert main(["compare", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "12 cells, 12 of them are done" in shown and "fedprox" in shown and str(out / "report.html") in shown
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


REFUSED = [
    (["compare"], "nothing to compare"),
    (["compare", "fedavg", "scafold"], "unknown method 'scafold'; did you mean 'scaffold'"),
    (["compare", "fedavg", "rounds=2", "fedprix.mu=1"], "unknown method of this comparison 'fedprix'"),
    (["compare", "fedavg", "--setting", "iid"], "is not of the form NAME:KEY=VALUE"),
    (["compare", "fedavg", "--seed", "3"], "No such option"),
    (["compare", "fedavg", "--jobs", "-2"], "jobs is -2"),
    (["compare", "."], ". is not a comparison's folder"),
    (["compare", "no.yaml"], "cannot read the spec no.yaml"),
    (["sweep", "fedavg"], "nothing to sweep over"),
    (["sweep", "fedavg", "local", "--over", "lr=1"], "a sweep is of one method"),
    (["sweep", "fedavg", "--over", "lr"], "is not of the form NAME=VALUE"),
]


@pytest.mark.parametrize(("words", "told"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_bad_command_is_one_line_and_leaves_nothing(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_fields_of_a_comparison_in_a_folder_stay(on_the_command_line, capsys):
    _, out = on_the_command_line
    assert main(["compare", str(out), "method.lr=1"]) == 2
    assert "have their fields" in capsys.readouterr().err


def test_failed_cells_end_in_exit_code_1(tmp_path, capsys):
    file, mark = tmp_path / "fragile.py", tmp_path / "mark"
    file.write_text(FRAGILE)
    mark.touch()
    words = ["compare", "local", str(file), f"fragile.mark={mark}", "fragile.seed=0", "--seeds", "1", "--rounds", "2"]
    assert main([*words, "--out", str(tmp_path / "c"), "clients=4", "model=mlp:8"]) == 1
    said = capsys.readouterr()
    assert "1 of 2 cells failed, as digits/fragile/seed-0: RuntimeError: it broke" in said.err
    assert "local" in said.out and "it broke" in said.out
