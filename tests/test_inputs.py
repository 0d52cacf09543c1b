"""What a run reads: whoever goes on with it goes on with the same, and with no code that only a folder names."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import fedloom
from fedloom import inputs
from fedloom.cli import main
from fedloom.errors import UsageError
from fedloom.runs.record import Run
from fedloom.runs.spec import Spec
from fedloom.user_files import USERS

METHOD = '''
from dataclasses import dataclass
from fedloom.methods.optimize.fedavg import FedAvg
from .helper import FACTOR

@dataclass(frozen=True)
class Mine(FedAvg):
    """Does a change show?"""
'''
TABLE = "a,b,label\n" + "".join(f"{i % 7},{i % 5}.5,k{i % 2}\n" for i in range(60))


@pytest.fixture
def here(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def begun(here, rounds=1):
    """A run of a method and data of one's own, that more rounds are asked of."""
    Path("mine.py").write_text(METHOD)
    Path("helper.py").write_text("FACTOR = 1\n")
    Path("d.csv").write_text(TABLE)
    fedloom.run("mine.py", "d.csv", out="r", clients=2, rounds=rounds, report=False, partition="iid", keep="a,b")
    spec = here / "r" / "spec.yaml"
    spec.write_text(spec.read_text().replace(f"rounds: {rounds}", f"rounds: {rounds + 1}"))
    return Run(here / "r")


def test_nothing_changed_nothing_is_said(here, recwarn):
    record = begun(here)
    assert {path.rpartition("/")[2]: one["what"] for path, one in record.manifest["inputs"].items()} == {
        "mine.py": "method",
        "helper.py": "method",
        "d.csv": "data",
    }
    recwarn.clear()
    assert fedloom.resume("r", report=False).final["round"] == 2
    assert not [one for one in recwarn if "went" in str(one.message) or "goes on" in str(one.message)]


def test_other_data_are_never_gone_on_with(here):
    begun(here)
    Path("d.csv").write_text(TABLE.replace("3,", "4,", 1))
    for trust in (False, True):
        with pytest.raises(UsageError, match=r"the data \S+d\.csv changed since r began; put it back .* begin anew: "):
            fedloom.resume("r", trust=trust)
    Path("d.csv").unlink()
    with pytest.raises(UsageError, match=r"d\.csv changed since"):
        fedloom.resume("r")
    Path("d.csv").write_text(TABLE)
    assert fedloom.resume("r", report=False).final["round"] == 2


@pytest.mark.parametrize("name", ["mine.py", "helper.py"])
def test_another_method_is_gone_on_with_when_that_is_said_and_then_the_record_says_it(here, name):
    begun(here)
    before = (here / "r" / "metrics.jsonl").read_bytes()
    Path(name).write_text(Path(name).read_text() + "\n# another line\n")
    with pytest.raises(UsageError, match=rf"the method's file \S+{name} changed since r began; .* add --trust"):
        fedloom.resume("r")
    assert (here / "r" / "metrics.jsonl").read_bytes() == before
    with pytest.warns(UserWarning, match=rf"r goes on with another \S+{name} than it began with"):
        fedloom.resume("r", report=False, trust=True)
    (note,) = Run("r").manifest["notes"]
    assert note.startswith("after round 1: r goes on with another") and name in note
    fedloom.resume("r", report=False)  # which is now what it went on with


def test_code_outside_the_current_folder_is_executed_when_that_is_said_only(here, monkeypatch, capsys):
    begun(here)
    Path("mine.py").write_text(METHOD + "\nfrom pathlib import Path\nPath(__file__).with_name('executed').touch()\n")
    manifest = json.loads(Path("r/manifest.json").read_text())
    digest = inputs.digests(Spec.read("r/spec.yaml"))  # whoever sends a folder sends the digest that fits
    Path("r/manifest.json").write_text(json.dumps(manifest | {"inputs": digest}))
    (here.parent / "elsewhere").mkdir()
    monkeypatch.chdir(here.parent / "elsewhere")
    assert main(["resume", str(here / "r")]) == 2
    told = capsys.readouterr().err
    assert "mine.py, which is not in the current folder and would be executed" in told and "--trust" in told
    assert not (here / "executed").exists()
    for name in [name for name in sys.modules if name.startswith(USERS)]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["resume", str(here / "r"), "--trust"]) == 0
    assert (here / "executed").exists()


def test_a_record_of_before_says_nothing_of_its_inputs_and_goes_on(here, capsys):
    begun(here)
    manifest = json.loads(Path("r/manifest.json").read_text())
    del manifest["inputs"]
    Path("r/manifest.json").write_text(json.dumps(manifest))
    assert main(["resume", "r"]) == 0
    assert "does not say what its data and files were" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["x", [], {"a": "b"}])
def test_inputs_that_are_none_are_told(here, damage):
    begun(here)
    manifest = json.loads(Path("r/manifest.json").read_text())
    Path("r/manifest.json").write_text(json.dumps(manifest | {"inputs": damage}))
    with pytest.raises(UsageError, match="damaged: its inputs"):
        fedloom.resume("r")


def test_the_cells_of_a_comparison_read_the_same(here, monkeypatch, capsys):
    begun(here)
    words = ["compare", "mine.py", "fedavg", "--data", "d.csv", "--keep", "a,b", "--partition", "iid", "--clients", "2"]
    words += ["--rounds", "1", "--out", "c", "--jobs", "1"]
    assert main([*words, "--seeds", "1"]) == 0
    Path("helper.py").write_text("FACTOR = 2\n")
    capsys.readouterr()
    assert main(["compare", "c", "--seeds", "2"]) == 2
    told = capsys.readouterr().err
    assert "helper.py changed since c began" in told and "--trust" in told
    Path("helper.py").write_text("FACTOR = 1\n")
    (here.parent / "elsewhere").mkdir()
    monkeypatch.chdir(here.parent / "elsewhere")
    assert main(["compare", str(here / "c"), "--seeds", "2"]) == 2
    assert "would be executed" in capsys.readouterr().err


def test_a_folder_has_another_digest_when_any_file_of_it_changes(tmp_path):
    folder = tmp_path / "d"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "0").write_bytes(b"xy")
    (folder / "b").write_bytes(b"z")
    first = inputs.digest(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert inputs.digest(tmp_path / "copy") == first, "wherever it lies"
    changes = [
        lambda d: (d / "b").write_bytes(b"y"),
        lambda d: (d / "b").rename(d / "c"),
        lambda d: (d / "a" / "1").write_bytes(b""),
        lambda d: ((d / "a" / "0").write_bytes(b"x"), (d / "b").write_bytes(b"yz")),
    ]
    found = {first}
    for number, change in enumerate(changes):
        other = tmp_path / f"o{number}"
        shutil.copytree(folder, other)
        change(other)
        found.add(inputs.digest(other))
    assert len(found) == 5


def written(folder, **files):
    """Files of Python by name, in a folder."""
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def code_of(*methods):
    return {path.name for method in methods for path in inputs.code(method)}


def test_code_is_the_methods_file_and_what_it_imports_from_beside_it_however_far(here):
    written(here, mine="from . import one, two\nfrom .three.inner import X\nimport json\nfrom ..above import Y\n")
    written(here, one="from .four import F", two="from .mine import back", three="", four="broken (", json="", above="")
    written(here, apart="", inner="")
    expected = {"mine.py", "one.py", "two.py", "three.py", "four.py"}
    assert code_of({"name": "mine.py"}) == expected, "a broken file is told when it is imported"
    around = {"name": "ccvr", "inner": {"name": str(here / "mine.py"), "lr": 0.1}, "other": "apart.py", "lr": "x.txt"}
    assert code_of(around) == expected | {"apart.py"}
    assert code_of({"name": "fedavg"}) == code_of({"name": "gone.py"}) == set()


@pytest.mark.parametrize("name", ["mine", "a"])
def test_a_digest_is_of_every_byte(tmp_path, name):
    size = 2 * inputs.PIECE + 5
    found = set()
    for place in (None, 0, inputs.PIECE, size - 1):
        octets = bytearray(size)
        if place is not None:
            octets[place] = 1
        (tmp_path / name).write_bytes(octets)
        found.add(inputs.digest(tmp_path / name))
    assert len(found) == 4


def test_data_and_the_trace_of_an_availability_are_read_by_whoever_runs(tmp_path, monkeypatch):
    for name in ("d.csv", "t.csv"):
        (tmp_path / name).write_text(name)
    data, trace = str(tmp_path / "d.csv"), str(tmp_path / "t.csv")
    spec = Spec.of({"method": "fedavg", "data": data, "availability": f"trace:{trace},period=2"})
    assert {path: one["what"] for path, one in inputs.digests(spec).items()} == {data: "data", trace: "availability"}
    assert inputs.digests(Spec.of({"method": "fedavg", "data": data, "availability": "bernoulli:0.5"})).keys() == {data}
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text("no data of this run")
    assert inputs.digests(Spec.of({"method": "fedavg", "data": "digits"})) == {}


def test_what_changed_is_told_before_anything_goes_on(here):
    written(here, mine="from . import new", other="")
    (here / "d.csv").write_text("1")
    method, begun = {"name": "mine.py"}, {}
    for what, path in (("method", here / "mine.py"), ("data", here / "d.csv")):
        begun[str(path)] = {"what": what, "digest": inputs.digest(path)}

    def told(trust=False):
        return inputs.checked([method], begun, here / "r", "run again", trust)

    assert told() == []
    written(here, new="")
    with pytest.raises(UsageError, match=r"the method's file \S+new\.py changed since"):
        told()
    assert [note.rpartition("/")[2] for note in told(trust=True)] == ["new.py than it began with"]
    (here / "new.py").unlink()
    (here / "mine.py").unlink()
    with pytest.raises(UsageError, match=r"the method's file \S+mine\.py changed since"):
        told()
    written(here, mine="from . import new")
    (here / "d.csv").unlink()
    for trust in (False, True):
        with pytest.raises(
            UsageError, match=r"the data \S+d\.csv changed since .*; put it back .*begin anew: run again"
        ):
            told(trust)


def test_an_empty_folder_that_is_gone_changed(here):
    (here / "d").mkdir()
    begun = {str(here / "d"): {"what": "data", "digest": inputs.digest(here / "d")}}
    assert inputs.checked([], begun, here / "r", "run again") == []
    (here / "d").rmdir()
    with pytest.raises(UsageError, match=r"the data \S+d changed since"):
        inputs.checked([], begun, here / "r", "run again")


def test_a_folder_whose_name_begins_like_the_current_one_is_another(here, tmp_path):
    elsewhere = written(tmp_path / "here2", mine="from . import helper", helper="")
    inside = written(here, mine="")
    inputs.foreign([{"name": str(inside / "mine.py")}], here / "r", trust=False)
    with pytest.raises(UsageError, match=r"here2/mine\.py, which is not in the current folder and would be executed"):
        inputs.foreign([{"name": "fedavg"}, {"name": str(elsewhere / "mine.py")}], here / "r", trust=False)
    inputs.foreign([{"name": str(elsewhere / "mine.py")}], here / "r", trust=True)


def test_where_a_file_of_a_folder_ends_is_in_its_digest(tmp_path):
    for folder, files in {"two": {"a": "1", "b": "2"}, "one": {"a": "1b2"}, "moved": {"a": "", "b": "12"}}.items():
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
    assert len({inputs.digest(tmp_path / folder) for folder in ("two", "one", "moved")}) == 3
