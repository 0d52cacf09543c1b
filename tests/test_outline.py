"""Runs in a few words: in a notebook, as a table, in a list of folders."""

import builtins
import json

import pytest

import fedloom
from fedloom.cli import main
from fedloom.errors import UsageError
from fedloom.runs.outline import html, outline
from fedloom.tasks.toy import Toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    fedloom.run("fedprox:mu=0.1", "digits", clients=3, rounds=2, out=folder / "b", report=False)
    fedloom.run("local", "digits", clients=3, rounds=1, seed=4, out=folder / "deep" / "a", report=False)
    fedloom.compare(["fedavg"], Toy(), seeds=2, rounds=1, out=folder / "c", report=False)
    for _ in fedloom.rounds("fedavg", "digits", clients=3, rounds=5, eval_every=5, out=folder / "d", report=False):
        break
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "spec.yaml").write_text("")
    (folder / ".hidden" / "manifest.json").write_text("{}")
    (folder / "link").symlink_to(folder / "b")
    return folder


def test_runs_are_found_wherever_they_lie_and_once(folder):
    found = [run.path.relative_to(folder).as_posix() for run in fedloom.find_runs(folder)]
    assert found[0] == "b" and found[-2:] == ["d", "deep/a"]
    assert len(found) == 5 and all(path.startswith("c/cells/") for path in found[1:3])
    assert [run.path for run in fedloom.find_runs(folder / "b")] == [folder / "b"]
    with pytest.raises(UsageError, match=r"no folder .*nowhere to look for runs in"):
        fedloom.find_runs(folder / "nowhere")


def test_a_folder_is_loaded_as_what_it_is(folder):
    assert isinstance(fedloom.load(folder / "b"), fedloom.Run)
    assert isinstance(fedloom.load(str(folder / "c")), fedloom.Results)
    with pytest.raises(UsageError, match="is not a run's folder"):
        fedloom.load(folder)


def test_an_outline_says_what_was_asked_and_what_came_out(folder):
    run = fedloom.Run(folder / "b")
    told = outline(run)
    assert (told["method"], told["data"], told["clients"], told["rounds"]) == ("fedprox", "digits", 3, "2 of 2")
    assert told["status"] == "finished" and told["measure"] == "global_test_accuracy"
    assert told["value"] == run.selected["global_test_accuracy"]
    alone = fedloom.Run(folder / "deep" / "a")  # without a global model
    assert outline(alone)["measure"] == "personal_test_accuracy"
    assert outline(alone)["value"] == alone.selected["personal_test_accuracy"]
    left = outline(fedloom.Run(folder / "d"))
    assert (left["rounds"], left["status"], left["measure"], left["value"]) == ("1 of 5", "stopped", None, None)


def test_a_notebook_shows_a_small_table(folder):
    run = fedloom.Run(folder / "b")
    shown = run._repr_html_()
    assert shown.startswith("<table>") and shown.count("<tr>") == shown.count("</tr>") == 9
    assert f'global test accuracy</th><td style="text-align:left">{run.selected["global_test_accuracy"]:.4f}' in shown
    assert "None" not in fedloom.Run(folder / "d")._repr_html_()


def test_what_a_table_says_is_text():
    shown = html({"data": "<script>alert(1)</script>", "measure": None, "value": None})
    assert "&lt;script&gt;" in shown and "<script>" not in shown


def test_a_frame_has_a_row_a_round(folder, monkeypatch):
    run = fedloom.Run(folder / "b")
    pd = pytest.importorskip("pandas")
    frame = run.frame()
    assert isinstance(frame, pd.DataFrame) and list(frame["round"]) == [1, 2]
    assert list(frame["up_bytes"]) == [row["up_bytes"] for row in run.metrics]
    honest = builtins.__import__

    def without_pandas(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError(name)
        return honest(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    with pytest.raises(UsageError, match="which is not installed: pip install pandas"):
        run.frame()


def test_the_command_line_lists_runs(folder, capsys, tmp_path):
    assert main(["list", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    value = fedloom.Run(folder / "b").selected["global_test_accuracy"]
    about = "fedprox on digits, 3 clients, seed 0; 2 of 2 rounds, finished, global test accuracy"
    assert lines[0] == f"{folder / 'b'}: {about} {value:.4f}"
    assert lines[3].endswith("1 of 5 rounds, stopped")
    assert main(["list", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["seed"] for one in told] == [0, 0, 1, 0, 4]
    assert main(["list", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"


def test_one_damaged_run_hides_no_other(folder, capsys, tmp_path):
    for name in ("good", "bad"):
        fedloom.run("fedavg", Toy(), rounds=1, out=tmp_path / name, report=False)
    (tmp_path / "bad" / "manifest.json").write_text("{")
    assert main(["list", str(tmp_path)]) == 0
    bad, good = capsys.readouterr().out.splitlines()
    assert "is damaged" in bad and good.startswith(f"{tmp_path / 'good'}: fedavg on ")


def test_the_command_line_says_why_a_run_ended_early(tmp_path, capsys):
    words = ["--clients", "3", "--rounds", "60", "--patience", "1", "--min-delta", "0.5", "--out", str(tmp_path / "r")]
    assert main(["run", "fedavg", *words]) == 0
    assert "ended early: patience=1: validation has not become better by more than" in capsys.readouterr().out
