"""The command line: what it reads, what it says, and how it ends."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fedloom
from fedloom.cli import main
from fedloom.cli.flags import entry, flags_of, positionals
from fedloom.cli.progress import Watch
from fedloom.registry import catalogue
from fedloom.runs.spec import KNOWN
from fedloom.testing import CHECKS, without_times

QUICK = ["--clients", "4", "--partition", "iid", "--rounds", "3"]

METHOD = '''
from dataclasses import dataclass
from typing import Literal
from fedloom import Method, client

@dataclass(frozen=True)
class Mine(Method):
    """Does [bold] stay as it is?"""

    lr: float = 0.05  # eta [per step]
    twice: bool = False  # whether to go twice
    norm: str | None = None  # text
    rule: Literal["first", "second"] = "first"
    rounds: int = 1  # shares its name with a setting

    def round(self, server, cohort):
        up = cohort.mean(self.local, weight="n", model=server.model)
        server.model = server.model + up.delta

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=self.lr, epochs=2 if self.twice else self.rounds, batch=10)
        return {"delta": w - model, "n": client.n}
'''


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that has ended."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["run", "fedavg", *QUICK, "--out", str(out)]) == 0
    return out


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def unreported(monkeypatch):
    """Runs without a report, which takes as long as all else."""
    monkeypatch.setattr("fedloom.report.write", lambda run: run.path)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Neither a colour nor a width that the tests' own surroundings ask for."""
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def error_of(capsys) -> str:
    """The one line on standard error, with nothing on standard output."""
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("fedloom: error: ")
    assert said.err.count("\n") == 1
    return said.err


def metrics_of(run: Path) -> list:
    return [without_times(row) for row in fedloom.Run(run).metrics]


# What is said quickly


def test_help_and_the_list_of_methods_wait_for_nothing_heavy():
    code = (
        "import sys; from fedloom.cli import main\n"
        "for words in (['--help'], ['methods'], ['methods', 'fedavg'], ['run', 'fedavg', '--help'], ['--version']):\n"
        "    assert main(words) == 0\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'pandas', 'pyarrow', 'sklearn', 'jinja2'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_module_runs_as_the_command_does():
    said = subprocess.run([sys.executable, "-m", "fedloom", "--version"], check=True, capture_output=True, text=True)
    assert said.stdout == f"fedloom {fedloom.__version__}\n"


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help_names_every_command(words, capsys):
    assert main(words) == 0
    said = capsys.readouterr().out
    for command in ("run", "resume", "show", "report", "methods", "data", "check"):
        assert re.search(rf"^│ {command} ", said, re.MULTILINE)


def test_help_of_a_run_has_every_setting_and_every_field(capsys):
    assert main(["run", "fedrep", "--help"]) == 0
    said = capsys.readouterr().out
    for name in (*KNOWN[1:], *(field for field, *_ in entry("fedrep").fields())):
        assert f"--{name.replace('_', '-')} " in said
    assert said.index("Settings") < said.index("--eval-every") < said.index("Fields of fedrep") < said.index("--batch")


@pytest.mark.parametrize("method", [one.name for one in catalogue()])
def test_flags_are_distinct(method):
    flags = flags_of(entry(method))
    assert len({flag.name for flag in flags}) == len({flag.key for flag in flags}) == len(flags)


def test_a_flag_takes_the_next_word():
    words = ["run", "--lr", "0.1", "scaffold", "--rounds=3", "method.lr=2", "--json", "rounds=1"]
    assert list(positionals(words)) == ["run", "scaffold", "method.lr=2", "rounds=1"]


# Running


def test_a_run_says_what_came_out(finished, here, capsys):
    out = here / "again"
    assert main(["run", str(finished / "spec.yaml"), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    assert [line.split() for line in lines[:2]] == [["label", "label:", "10", "classes"], ["images", "image"]]
    assert [line.split(",")[0] for line in lines[2:5]] == [f"round {k} of 3" for k in (1, 2, 3)]
    assert f"{fedloom.Run(out).final['global_test_accuracy']:.4f}" in said.out
    assert lines[-1].endswith(f"; {out / 'report.html'}")
    assert metrics_of(out) == metrics_of(finished)
    assert (out / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_json_is_all_that_a_program_gets(here, capsys):
    assert main(["run", "local", *QUICK, "--json", "--out", "r"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    found = json.loads(said.out)
    run = fedloom.Run("r")
    assert (found["path"], found["status"], found["rounds"]) == ("r", "finished", 3)
    assert (found["final"], found["selected"]) == (run.final, run.selected)
    assert found["down_bytes"] == sum(row["down_bytes"] for row in run.metrics)
    assert Path(found["report"]).is_file()
    assert main(["show", "r", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_flags_win_over_assignments_and_these_over_the_spec(finished, here, unreported, capsys):
    words = [str(finished / "spec.yaml"), "rounds=2", "seed=5", "method.lr=0.3", "method.batch=20", "--lr", "1e-1"]
    assert main(["run", *words, "--rounds=1", "--out", "r", "--json"]) == 0
    spec = fedloom.Run("r").spec
    assert (spec.rounds, spec.seed, spec.clients) == (1, 5, 4)
    assert spec.method == {"name": "fedavg", "lr": 0.1, "epochs": 1, "batch": 20}


def test_another_method_on_the_settings_of_a_spec(finished, here, unreported, capsys):
    words = [str(finished / "spec.yaml"), "method=scaffold", "--server-lr", "0.5", "rounds=1"]
    assert main(["run", *words, "--out", "r", "--json"]) == 0
    assert fedloom.Run("r").spec.method["server_lr"] == 0.5


def test_a_file_of_ones_own_has_flags_of_every_type(here, unreported, capsys):
    Path("mine.py").write_text(METHOD)
    assert main(["run", "mine.py", "--help"]) == 0
    said = capsys.readouterr().out
    assert "eta [per step]" in said
    assert "--no-twice" in said
    flags = ["--twice", "--norm", "no", "--rule", "second", "--method.rounds", "3", "--rounds", "1", "--label", "label"]
    assert main(["run", "mine.py", *QUICK, *flags, "--json"]) == 0
    spec = fedloom.Run("runs/mine-digits-001").spec
    fields = {"lr": 0.05, "twice": True, "norm": "no", "rule": "second", "rounds": 3}
    assert spec.method == {"name": str(here / "mine.py"), **fields}
    assert (spec.rounds, spec.label) == (1, "label")
    assert main(["run", "mine.py", *QUICK, "method.norm=null", "--no-twice", "--label", "null", "--json"]) == 0
    again = fedloom.Run("runs/mine-digits-002").spec
    assert (again.method["norm"], again.method["twice"], again.label) == (None, False, None)


@pytest.mark.parametrize(("data", "word"), [("sub/table.csv", "table"), ("./sub", "sub")])
def test_the_folder_has_the_name_of_method_and_data(here, unreported, capsys, data, word):
    Path("sub").mkdir()
    rows = [f"{k % 7},{k % 2}" for k in range(60)]
    Path("sub/table.csv").write_text("\n".join(["a,label", *rows]) + "\n")
    assert main(["run", "local", "--data", data, *QUICK, "--json"]) == 0
    assert [path.name for path in Path("runs").iterdir()] == [f"local-{word}-001"]


# Stopping and going on


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on_and_ends_as_if_it_had_not(
    finished, here, unreported, capsys, monkeypatch, number, code
):
    told = Watch.__call__

    def stopping(watch, row):
        told(watch, row)
        if row["round"] == 2:
            signal.raise_signal(number)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "__call__", stopping)
        assert main(["run", "fedavg", *QUICK, "--out", "a run"]) == code
    assert signal.getsignal(signal.SIGTERM) is handler
    assert capsys.readouterr().err == "fedloom: stopped after round 2 of 3; go on with: fedloom resume 'a run'\n"
    assert main(["show", "a run"]) == 0
    assert "2 of 3 rounds; stopped; go on with: fedloom resume 'a run'" in capsys.readouterr().out
    assert main(["resume", "a run"]) == 0
    assert "round 3 of 3" in capsys.readouterr().out
    assert metrics_of(Path("a run")) == metrics_of(finished)
    assert fedloom.Run("a run").manifest["status"] == "finished"


def test_ctrl_c_at_a_terminal(tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "fedloom", "run", "local", "--rounds", "100000", "--out", str(tmp_path / "r")]
    running = subprocess.Popen(
        command, stdout=theirs, stderr=subprocess.PIPE, text=True, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    seen = ""
    while not re.search(r"round \d+ of 100000, loss [\d.]+, accuracy [\d.]+, \d+ B", seen):
        seen += os.read(ours, 4096).decode(errors="replace")
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    os.close(ours)
    assert running.returncode == 130
    assert re.fullmatch(r"fedloom: stopped after round \d+ of 100000; go on with: fedloom resume \S+\n", err)


def test_a_failing_client_is_one_line_and_a_readable_run(here, capsys):
    Path("mine.py").write_text(
        METHOD.replace("        w, _ =", "        assert client.id != 2, 'no\\nway'\n        w, _ =")
    )
    assert main(["run", "mine.py", *QUICK, "--out", "r", "--json"]) == 1
    assert "client 2, round 1, mine.local: AssertionError: no way" in error_of(capsys)
    assert main(["show", "r"]) == 0
    said = capsys.readouterr().out
    assert "0 of 3 rounds; failed" in said
    assert "no round has been evaluated yet" in said


# Bad requests

RUN = ["run", "fedavg", *QUICK]
BAD = {
    "no such command": (["rnu"], ["'rnu'", "'run'"]),
    "no method": (["run"], ["METHOD", "fedloom run --help"]),
    "unknown method": (["run", "fedavgg", "--lr", "1"], ["method 'fedavgg'", "did you mean 'fedavg'"]),
    "unknown flag": ([*RUN, "--lrr", "1"], ["--lrr", "--lr)", "fedloom run --help"]),
    "a field of another method": ([*RUN, "--server-lr", "1"], ["--server-lr"]),
    "unknown field": ([*RUN, "method.epoch=1"], ["field of fedavg 'epoch'", "did you mean 'epochs'"]),
    "unknown setting": ([*RUN, "round=3"], ["setting 'round'", "did you mean 'rounds'"]),
    "no assignment": ([*RUN, "rounds"], ["'rounds'", "name=value"]),
    "unknown data": ([*RUN, "--data", "digts"], ["data set 'digts'", "did you mean 'digits'"]),
    "no such file": ([*RUN, "--data", "no/such.csv"], ["no file or folder 'no/such.csv'"]),
    "unknown partition": ([*RUN, "--partition", "dirchlet:1"], ["partition 'dirchlet'", "did you mean 'dirichlet'"]),
    "unknown model": ([*RUN, "--model", "mpl"], ["model 'mpl'", "did you mean 'mlp'"]),
    "unknown engine": ([*RUN, "--engine", "seral"], ["engine 'seral'", "did you mean 'serial'"]),
    "unknown device": ([*RUN, "--device", "cuba"], ["device 'cuba'", "cpu"]),
    "unknown policy": ([*RUN, "--buffers", "averge"], ["buffers 'averge'", "did you mean 'average'"]),
    "no such label": ([*RUN, "--label", "digit"], ["'digit'", "image, label"]),
    "too many clients": ([*RUN, "--clients", "5000"], ["5000 clients", "at most"]),
    "too large a cohort": ([*RUN, "--cohort", "5"], ["cohort is 5", "4 clients"]),
    "no rounds": ([*RUN, "--rounds", "0"], ["rounds is 0", "at least 1"]),
    "half a round": ([*RUN, "--rounds", "0.5"], ["rounds is 0.5", "type int"]),
    "negative rate": ([*RUN, "--lr", "-1"], ["fedavg.lr is -1.0", "greater than 0"]),
    "rate in words": ([*RUN, "--lr", "abc"], ["fedavg.lr is 'abc'", "type float"]),
    "infinite rate": ([*RUN, "--lr", "inf"], ["fedavg.lr is inf", "finite"]),
    "no value": ([*RUN, "--lr"], ["--lr", "requires an argument"]),
    "absent spec": (["run", "absent.yaml"], ["cannot read the spec absent.yaml"]),
    "absent method": (["run", "absent.py"], ["cannot read the method absent.py"]),
    "unreadable spec": (["run", "torn.yaml"], ["cannot read the spec torn.yaml"]),
    "spec of nothing": (["run", "list.yaml"], ["the spec list.yaml is not a mapping"]),
    "broken method": (["run", "broken.py"], ["cannot read the method broken.py", "line 1"]),
    "folder that exists": ([*RUN, "--out", "there"], ["there exists", "--out", "fedloom resume there"]),
    "no run to resume": (["resume", "there"], ["there is not a run's folder"]),
    "no run to show": (["show", "there"], ["there is not a run's folder"]),
    "no run to report": (["report", "absent"], ["absent is not a run's folder"]),
    "no such word": (["methods", "qwertz"], ["'qwertz'", "fedavg"]),
    "no such method to check": (["check", "fedprx"], ["'fedprx'", "did you mean 'fedprox'"]),
    "no such data to show": (["data", "digit"], ["'digit'", "did you mean 'digits'"]),
    "clients in words": (["data", "digits", "--clients", "many"], ["clients is 'many'", "type int"]),
    "a share of all": (["data", "digits", "--validation", "1"], ["validation is 1.0", "below 1"]),
    "a picture of no kind": (["data", "digits", "--out", "picture.doc"], ["picture.doc", ".png"]),
    "a picture nowhere": (["data", "digits", "--out", "no/picture.png"], ["no/picture.png", "--out"]),
}


@pytest.mark.parametrize(("words", "told"), BAD.values(), ids=BAD)
def test_a_bad_request_is_one_line_and_leaves_nothing(here, capsys, words, told):
    Path("torn.yaml").write_text("method: {name: fedavg")
    Path("list.yaml").write_text("- fedavg\n")
    Path("broken.py").write_text("class Mine(Method:\n")
    Path("there").mkdir()
    before = sorted(here.rglob("*"))
    assert main(words) == 2
    said = error_of(capsys)
    for words in told:
        assert words in said
    assert sorted(here.rglob("*")) == before


def test_a_checkpoint_of_another_spec(finished, here, capsys):
    shutil.copytree(finished, "r")
    spec = yaml.safe_load(Path("r/spec.yaml").read_text())
    spec["method"]["lr"] = 0.9
    Path("r/spec.yaml").write_text(yaml.safe_dump(spec))
    files = {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()}
    assert main(["resume", "r"]) == 2
    said = error_of(capsys)
    assert "checkpoint of another spec" in said
    assert "method.lr: 0.05 there, 0.9 here" in said
    assert {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()} == files


def test_what_nobody_expected_is_one_line_too(here, capsys):
    Path("mine.py").write_text(METHOD + "\n1 / 0\n")
    assert main(["run", "mine.py", *QUICK]) == 1
    assert "ZeroDivisionError: division by zero; run again with --debug" in error_of(capsys)
    assert main(["run", "mine.py", "--debug", *QUICK]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.rstrip().endswith("ZeroDivisionError: division by zero")


# Showing


def test_show_tells_the_results_bytes_and_privacy(finished, capsys):
    assert main(["show", str(finished)]) == 0
    said = capsys.readouterr().out
    run = fedloom.Run(finished)
    assert "fedavg on digits, iid" in said
    assert "3 of 3 rounds; finished" in said
    assert "local: the server learns only the (weighted) average of: delta, n" in said
    assert f"{run.final['worst_client_accuracy']:.4f}" in said


def test_show_and_report_of_a_run_that_was_killed_at_once(finished, here, capsys):
    Path("r").mkdir()
    for name in ("spec.yaml", "manifest.json", "partition.json"):
        shutil.copy(finished / name, "r")
    assert main(["show", "r"]) == 0
    assert "no round has been evaluated yet" in capsys.readouterr().out
    assert main(["show", "r", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rounds"], found["final"], found["selected"], found["report"]) == (0, None, None, None)
    assert main(["report", "r"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()


def test_the_round_that_validation_chooses_is_told_apart_from_the_last(finished, here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")  # room for one line
    shutil.copytree(finished, "r")
    rows = fedloom.Run("r").metrics
    for row, accuracy in zip(rows, (0.1, 0.9, 0.5), strict=True):
        row["validation_accuracy"] = accuracy
    Path("r/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["show", "r"])
    said = capsys.readouterr().out
    assert re.search(rf"^chosen by validation +2 +{rows[1]['global_test_accuracy']:.4f} ", said, re.MULTILINE)
    assert re.search(rf"^last +3 +{rows[2]['global_test_accuracy']:.4f} ", said, re.MULTILINE)


def test_methods_are_listed_found_and_explained(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # room for a line each
    assert main(["methods"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[1:]] == [one.name for one in catalogue()]
    assert all(one.question in said for one in catalogue())
    assert main(["methods", "BatchNorm", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "fedbn" in [one["name"] for one in found]
    assert len(found) < len(catalogue())
    assert main(["methods", "fedrep"]) == 0
    said = capsys.readouterr().out
    assert entry("fedrep").doc in said
    assert re.search(r"--head-epochs +int +10 +tau", said)


def test_a_method_without_fields_is_explained(here, capsys):
    Path("bare.py").write_text('class Bare(Method):\n    """Why [not]?"""\n')
    assert main(["methods", "bare.py"]) == 0
    assert "Why [not]?" in capsys.readouterr().out


def test_data_shows_what_every_client_got(here, capsys):
    words = ["data", "digits", "--clients", "60", "--partition", "classes:2", "--seed", "3"]
    assert main([*words, "--json"]) == 0
    dealt = json.loads(capsys.readouterr().out)
    assert main([*words, "--out", "picture.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if re.match(r"\d+ ", line)]) == 50
    first = dealt["clients"][0]
    assert [line.split()[0] for line in lines[:2]] == ["label", "images"]
    assert lines[3].split()[:4] == [str(first[name]) for name in ("id", "train", "validation", "test")]
    assert lines[-3] == "... and 10 clients more"
    assert lines[-2].startswith("digits, classes:2: 60 clients with ")
    assert lines[-1] == "picture: picture.png"
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")


def test_names_from_data_are_never_markup(here, capsys):
    names = ["[red]north[/red]", "so\x1b[31muth"]
    rows = [f"{k % 7},{names[k % 2]},{'[b]' if k % 3 else 'no'}" for k in range(60)]
    Path("t.csv").write_text("\n".join(["a,site,label", *rows]) + "\n")
    assert main(["data", "t.csv", "--partition", "column:site"]) == 0
    said = capsys.readouterr().out
    assert "[red]north[/red]" in said
    assert "\x1b" not in said
    assert "[b] … no" in said


def test_check_tells_every_check(here, capsys):
    Path("mine.py").write_text(METHOD)
    assert main(["check", "mine.py"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKS)
    assert all(" ok " in line for line in lines)


def test_check_of_a_broken_method_fails(here, capsys):
    Path("mine.py").write_text(METHOD.replace("server.model + up.delta", "server.model - up.delta"))
    assert main(["check", "mine.py"]) == 1
    said = capsys.readouterr()
    assert re.search(r"FAILED +learns\n +\w+_accuracy is ", said.out)
    assert re.fullmatch(r"fedloom: error: mine.py breaks the contract in \d+ of its checks\n", said.err)


# Several at once


def test_a_folder_that_another_run_took_meanwhile_is_left_to_it(finished, here, monkeypatch, capsys):
    shutil.copytree(finished, "runs/fedavg-digits-001")
    before = Path("runs/fedavg-digits-001/metrics.jsonl").read_bytes()
    free = iter([Path("runs/fedavg-digits-001"), Path("runs/fedavg-digits-002")])  # the first was free a moment ago
    monkeypatch.setattr("fedloom.cli.output.vacant", lambda words: next(free))
    assert main(["run", "fedavg", *QUICK]) == 0
    assert fedloom.Run("runs/fedavg-digits-002").manifest["status"] == "finished"
    assert Path("runs/fedavg-digits-001/metrics.jsonl").read_bytes() == before


def test_a_comparison_takes_its_folder_at_once_and_leaves_none_if_it_is_refused(here, monkeypatch, capsys):
    Path("runs/compare-first").mkdir(parents=True)
    free = iter([Path("runs/compare-first"), Path("runs/compare-second")])
    monkeypatch.setattr("fedloom.cli.output.vacant", lambda words: next(free))
    assert main(["compare", "fedavg", "local", "--seeds", "1", "--rounds", "1", "--clients", "3"]) == 0
    assert list(Path("runs/compare-first").iterdir()) == [] and Path("runs/compare-second/report.html").is_file()
    monkeypatch.setattr("fedloom.cli.output.vacant", lambda words: Path("runs/compare-third"))
    assert main(["compare", "fedavg", "local", "--seeds", "1", "--rounds", "1", "--clients", "0"]) == 2
    assert not Path("runs/compare-third").exists()
