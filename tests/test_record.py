"""A run's folder: whole or not at all, readable after a kill, a full disk and a torn line."""

import errno
import gc
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedloom
from fedloom.comparison.grid import Comparison
from fedloom.errors import RunError, TakenError, UsageError
from fedloom.fields import FORMERLY
from fedloom.runs.reading import understood
from fedloom.runs.record import Run
from fedloom.runs.spec import Spec

FIRST = {"spec.yaml": Spec().text("0"), "manifest.json": "{}\n"}
FULL = Path("/dev/full")  # a device on which every write finds the disk full
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", FIRST)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_made_with_its_first_files(tmp_path):
    run = Run.create(tmp_path / "new" / "deep" / "run", FIRST)
    assert names(run.path) == sorted(FIRST) and names(run.path.parent) == ["run"]
    assert run.spec == Spec() and run.manifest == {}
    assert run.metrics == [] and list(run.ledger) == [] and run.partition == {} and run.clients == {}
    assert repr(run) == f"Run({str(run.path)!r})"


def test_a_folder_that_exists_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("y")
    for name in ("mine", "file"):
        with pytest.raises(UsageError, match="exists; choose another --out, or go on with it: fedloom resume"):
            Run.create(tmp_path / name, FIRST)
    assert names(tmp_path) == ["file", "mine"] and (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_of_two_runs_that_begin_at_once_one_gets_the_folder(tmp_path, monkeypatch):
    Run.create(tmp_path / "run", FIRST)
    monkeypatch.setattr(Run, "require_absent", lambda out: None)  # it was, a moment ago
    with pytest.raises(TakenError, match="exists; choose another --out"):
        Run.create(tmp_path / "run", FIRST)
    assert names(tmp_path) == ["run"] and names(tmp_path / "run") == sorted(FIRST)


def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write to .*choose another --out"):
        Run.create(tmp_path / "file" / "run", FIRST)
    write = Path.write_text

    def full(path, text, **how):
        if path.name == "manifest.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, text, **how)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match="is full; free some space"):
        Run.create(tmp_path / "run", FIRST)
    assert names(tmp_path) == ["file"]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is not a run's folder"):
        Run(tmp_path)
    with pytest.raises(UsageError, match="is not a run's folder"):
        Run(tmp_path / "absent")


def test_a_temporary_run_goes_with_its_object():
    run = Run.create(None, FIRST)
    folder = run.path
    assert run.spec == Spec() and folder.is_dir()
    del run
    gc.collect()
    assert not folder.exists()


LINE = st.fixed_dictionaries(
    {"round": st.integers(0, 9)},
    optional={"x": st.floats(allow_nan=False), "text": st.text(), "ids": st.lists(st.integers())},
)


@settings(deadline=None, max_examples=40)
@given(st.lists(LINE, max_size=8), st.integers(0, 10), st.integers(1, 30))
def test_lines_survive_a_tear_and_are_cut_at_a_round(lines, after, torn):
    run = Run.create(None, FIRST)
    for line in lines:
        run.append("metrics.jsonl", [line])
    assert run.metrics == lines
    half = json.dumps({"round": 1, "note": "torn by a kill"})[:torn]
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(half)
    assert run.metrics == lines
    run.truncate_after("metrics.jsonl", after)
    kept = [line for line in lines if line["round"] <= after]
    assert run.metrics == kept
    run.append("metrics.jsonl", [{"round": 10}])
    assert run.metrics == [*kept, {"round": 10}]


def test_cutting_what_is_not_there_makes_nothing(run):
    run.truncate_after("metrics.jsonl", 3)
    assert names(run.path) == sorted(FIRST)


def test_a_file_is_the_old_one_or_the_new_one(run):
    run.write("deep/state.bin", lambda file: file.write(b"old"))

    def half(file):
        file.write(b"new, but")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.write("deep/state.bin", half)
    assert (run.path / "deep" / "state.bin").read_bytes() == b"old"
    assert names(run.path / "deep") == ["state.bin"]


@needs_full
@pytest.mark.parametrize("durable", [True, False])
def test_a_full_disk_leaves_the_old_file(run, durable, full_disk):
    run.write_json("clients.json", {"round": 1})
    with (
        full_disk(".clients.json.partial"),
        pytest.raises(RunError, match="is full; free some space, then: fedloom resume") as failed,
    ):
        run.write("clients.json", lambda file: file.write(b"x" * 100), durable)
    assert "\n" not in str(failed.value)
    assert run.clients == {"round": 1} and "clients.json" in names(run.path)
    assert ".clients.json.partial" not in names(run.path)


@needs_full
def test_a_full_disk_under_an_append(run, full_disk):
    with full_disk("metrics.jsonl"), pytest.raises(RunError, match="is full"):
        run.append("metrics.jsonl", [{"round": 1}])


def test_a_folder_where_a_file_belongs_is_told(run):
    (run.path / "metrics.jsonl").mkdir()
    with pytest.raises(UsageError, match=r"cannot write to .*: Is a directory"):
        run.append("metrics.jsonl", [{"round": 1}])
    (run.path / ".clients.json.partial").mkdir()
    with pytest.raises(UsageError, match="cannot write to"):
        run.write_json("clients.json", {})


def test_other_trouble_with_the_disk_is_not_hidden(run, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", broken)
    with pytest.raises(OSError, match="Input/output error"):
        run.append("metrics.jsonl", [{"round": 1}])


@pytest.mark.parametrize("name", [".report.html.partial", ".manifest.json.partial", "report.html"])
def test_no_link_is_followed_where_a_file_is_written(run, tmp_path, name):
    """A folder from somebody else (an unpacked archive) may have a link wherever a file is written."""
    (tmp_path / "precious").write_text("precious")
    (run.path / name).symlink_to(tmp_path / "precious")
    target = name.removeprefix(".").removesuffix(".partial")
    run.write(target, lambda file: file.write(b"new"), durable=False)
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (run.path / target).is_symlink() and (run.path / target).read_text() == "new"
    assert names(run.path) == sorted({*FIRST, target})


def test_no_link_is_followed_where_lines_are_added_or_a_folder_is_written_into(run, tmp_path):
    (tmp_path / "precious").write_text("precious")
    (run.path / "ledger.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(UsageError, match="cannot write to"):
        run.append("ledger.jsonl", [{"round": 1}])
    (tmp_path / "elsewhere").mkdir()
    (run.path / "checkpoint").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is a link; a run writes into its own folder only"):
        run.write("checkpoint/state.bin", lambda file: file.write(b"x"))
    assert (tmp_path / "precious").read_text() == "precious" and not list((tmp_path / "elsewhere").iterdir())


def mode(path):
    return path.stat().st_mode & 0o777


def test_what_clients_keep_to_themselves_is_for_this_user_only(run):
    run.write("checkpoint/state.bin", lambda file: file.write(b"x"), private=True)
    assert mode(run.path / "checkpoint") == 0o700 and mode(run.path / "checkpoint" / "state.bin") == 0o600


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
def test_a_folder_is_as_open_as_the_user_says(tmp_path, mask):
    before = os.umask(mask)
    try:
        run = Run.create(tmp_path / "run", FIRST)
        run.write_json("clients.json", {})
        run.append("metrics.jsonl", [{"round": 1}])
    finally:
        os.umask(before)
    assert mode(run.path) == 0o777 & ~mask
    assert {mode(path) for path in run.path.iterdir()} == {0o666 & ~mask}


def test_all_that_was_written_reaches_the_disk_when_it_is_waited_for(run, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), fsync(file)))
    run.append("metrics.jsonl", [{"round": 1}])
    run.append("ledger.jsonl", [{"round": 1}])
    run.write_json("chosen.json", {"round": 1})
    assert synced == []
    run.sync()
    assert {path.stat().st_ino for path in run.path.iterdir()} | {run.path.stat().st_ino} == set(synced)
    synced.clear()
    run.append("ledger.jsonl", [{"round": 2}])
    run.sync()
    assert set(synced) == {(run.path / "ledger.jsonl").stat().st_ino, run.path.stat().st_ino}, "and once only"


def test_a_file_that_lasts_is_on_the_disk_before_it_has_its_name(run, monkeypatch):
    order = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("sync"), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda path, target: (order.append("rename"), replace(path, target)))
    run.write("deep/state.bin", lambda file: file.write(b"x"))
    assert order == ["sync", "rename", "sync"], "the bytes, the name, and the folder that has it"


DAMAGED = {
    "garbage": b"garbage\n",
    "a list": b"[]\n",
    "binary": b"\xff\xfe\x00\n",
    "deep": b"[" * 100_000 + b"\n",
    "another round": b'{"round": "1"}\n',
    "no round": b"{}\n",
    "an infinite round": b'{"round": 2e400}\n',
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_line_is_told_with_its_file_and_number(run, how):
    (run.path / "metrics.jsonl").write_bytes(b'{"round": 1}\n' + DAMAGED[how])
    with pytest.raises(RunError, match=r"metrics\.jsonl is damaged \(line 2 ") as failed:
        run.metrics  # noqa: B018
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("how", ["garbage", "a list", "binary", "deep"])
def test_a_damaged_file_is_told_with_its_name(run, how):
    (run.path / "manifest.json").write_bytes(DAMAGED[how])
    with pytest.raises(RunError, match=r"manifest\.json is damaged"):
        run.manifest  # noqa: B018
    (run.path / "model.safetensors").write_bytes(DAMAGED[how])
    with pytest.raises(RunError, match=r"model\.safetensors is damaged"):
        run.model  # noqa: B018


def test_a_value_that_means_nothing_is_told_with_the_record_s_name(run):
    for error in (TypeError("unsupported operand"), KeyError("id"), AttributeError("no get"), ValueError("no number")):
        with pytest.raises(RunError, match="the record here is damaged, or another version wrote it"):  # noqa: SIM117
            with understood(Path("here")):
                raise error
    with pytest.raises(UsageError, match="choose another"), understood(Path("here")):
        raise UsageError("choose another")


def test_a_folder_that_is_removed_meanwhile_does_not_come_back(run):
    shutil.rmtree(run.path)
    for write in (
        lambda: run.append("metrics.jsonl", [{"round": 1}]),
        lambda: run.write_json("manifest.json", {}),
        lambda: run.write("checkpoint/state.bin", lambda file: file.write(b"x")),
    ):
        with pytest.raises(RunError, match="was removed or moved meanwhile"):
            write()
    assert not run.path.exists()


def test_a_name_that_is_too_long_is_told(tmp_path):
    for refused in (Run.require_absent, lambda out: Run.create(out, FIRST)):
        with pytest.raises(UsageError, match=r"cannot write to .*: File name too long"):
            refused(tmp_path / ("a" * 300))


def test_a_file_larger_than_the_system_allows_is_told(run):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
        with pytest.raises(RunError, match=r"larger than this system allows .* fedloom resume"):
            run.append("ledger.jsonl", [{"round": 1, "x": "y" * 2000}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_final_and_selected(run):
    with pytest.raises(UsageError, match="no evaluated round yet"):
        run.final  # noqa: B018
    rows = [
        {"round": 1, "global_test_accuracy": 0.9, "validation_accuracy": 0.5},
        {"round": 2},
        {"round": 3, "global_test_accuracy": 0.6, "validation_accuracy": 0.8},
        {"round": 4, "global_test_accuracy": 0.8, "validation_accuracy": 0.8},
        {"round": 5, "global_test_accuracy": None, "validation_accuracy": None},
        {"round": 6},
    ]
    run.append("metrics.jsonl", rows)
    assert run.final["round"] == 5
    assert run.selected["round"] == 3, "the best on validation data, the earliest of equals; the test set has no say"
    (run.path / "metrics.jsonl").write_text("")
    run.append("metrics.jsonl", rows[4:])
    assert run.selected["round"] == 5, "without validation data the last"


def test_the_model_comes_back_by_name(run):
    from safetensors.torch import save_file

    tensors = {"head.weight": torch.arange(6.0).view(2, 3), "scale": torch.tensor(3.0), "body": torch.ones(2)}
    tensors["conv"] = torch.arange(120.0).view(2, 3, 4, 5)
    save_file(tensors, run.path / "model.safetensors")
    assert set(run.model) == set(tensors) and all(torch.equal(run.model[name], t) for name, t in tensors.items())


# Records from before the project had its name


@pytest.fixture
def formerly(tmp_path):
    """A run's folder and a comparison's spec as the project wrote them under its first name."""
    whole = fedloom.run("scaffold", "digits", clients=3, rounds=3, out=tmp_path / "whole")
    old = tmp_path / "old"
    fedloom.run("scaffold", "digits", clients=3, rounds=2, out=old, report=False)
    for name in ("spec.yaml", "manifest.json"):
        text = (old / name).read_text()
        assert text.count("fedloom: ") + text.count('"fedloom": ') == 1
        text = text.replace("fedloom: ", f"{FORMERLY}: ").replace('"fedloom": ', f'"{FORMERLY}": ')
        (old / name).write_text(text.replace("rounds: 2", "rounds: 3"))
    return whole, old


def test_a_run_of_before_the_name_is_read_and_gone_on_with(formerly):
    whole, old = formerly
    assert Run(old).spec.rounds == 3 and Run(old).manifest["fedloom"] == fedloom.__version__
    assert FORMERLY not in Run(old).manifest
    again = fedloom.resume(old)
    assert torch.equal(again.model.flat, whole.model.flat)
    assert FORMERLY not in (old / "report.html").read_text()


def test_a_comparison_of_before_the_name_is_read():
    comparison = Comparison.of({FORMERLY: "0.1.0", "methods": ["fedavg"], "rounds": 2})
    assert "fedloom: " in comparison.text() and FORMERLY not in comparison.text()


@pytest.mark.parametrize("line", [f"from {FORMERLY} import Method", f"import {FORMERLY}.methods"])
def test_a_method_of_before_the_name_is_told_what_to_import(tmp_path, monkeypatch, line):
    monkeypatch.setitem(sys.modules, FORMERLY, None)  # not installed
    (tmp_path / "mine.py").write_text(line)
    with pytest.raises(UsageError, match=f"imports {FORMERLY}, which is called fedloom now"):
        fedloom.method.build(str(tmp_path / "mine.py"))


def test_nothing_says_the_old_name_but_the_changelog_and_what_reads_old_records():
    root = Path(__file__).parent.parent
    named = ("README.md", "pyproject.toml", "Makefile", "mkdocs.yml")
    folders = ("src", "tests", "docs", "benchmarks", "examples", ".ci")
    files = [root / name for name in named] + [path for name in folders for path in (root / name).rglob("*")]
    found = [
        path.relative_to(root).as_posix()
        for path in files
        if path.is_file() and path.suffix not in (".pyc", ".png") and FORMERLY.encode() in path.read_bytes().lower()
    ]
    assert found == ["src/fedloom/fields.py"]
