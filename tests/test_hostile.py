"""Texts and labels from strangers: bounded where they are read, harmless where they are shown."""

import contextlib
import csv
import io
import json
import os
import pickle  # noqa: TID251 - what an attacker would use
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path
from xml.dom import minidom

import numpy as np
import pytest

import fedloom
from fedloom.cli import main
from fedloom.comparison.reading import mapping
from fedloom.comparison.table import table
from fedloom.data.load import load
from fedloom.errors import UsageError
from fedloom.fields import MOST_DEPTH, loaded, parse
from fedloom.letters import printable
from fedloom.report import exports
from fedloom.runs.record import Run
from fedloom.runs.spec import Spec
from fedloom.tasks.toy import Toy

BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{here}: &{here} [{','.join([f'*{before}'] * 10)}]\n" for before, here in zip("abcdef", "bcdefg", strict=True)
)
YAMLS = {
    "a bomb of aliases": (BOMB, "more than 100000 values"),
    "a list that holds itself": ("a: &a [*a]\n", "more than 100000 values"),
    "depth": ("method: " + "[" * 5000 + "]" * 5000, "more than 32 lists or mappings inside one another"),
    "digits": ("rounds: " + "9" * 5000, "cannot read the spec"),
    "no YAML": ("a: [", "cannot read the spec"),
    "a Python object": ("a: !!python/object/apply:os.system [x]", "cannot read the spec"),
}


@pytest.mark.parametrize("name", YAMLS)
def test_a_hostile_spec_is_one_short_sentence(name, tmp_path, capsys):
    text, told = YAMLS[name]
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    for read in (Spec.read, mapping):
        with pytest.raises(UsageError, match=told) as refused:
            read(path)
        assert len(str(refused.value)) < 1000 and "\n" not in str(refused.value)
    assert main(["run", str(path)]) == 2
    assert len(capsys.readouterr().err) < 1000


def test_the_bounds_of_a_spec_are_met_exactly():
    assert loaded("[" * MOST_DEPTH + "]" * MOST_DEPTH, "it") is not None
    with pytest.raises(UsageError, match="inside one another"):
        loaded("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1), "it")
    assert len(loaded("[" + "1," * 99_999 + "]", "it")) == 99_999
    with pytest.raises(UsageError, match="more than 100000 values"):
        loaded("[" + "1," * 100_000 + "]", "it")
    assert loaded("x: &a {lr: 1}\ny: *a\nz: {<<: *a, mu: 2}", "it")["z"] == {"lr": 1, "mu": 2}, "aliases are fine"
    assert loaded("", "it") is None


@pytest.mark.parametrize("word", ["2024-13-45", "2024-01-01", "2024-01-01 10:00:00"])
def test_a_date_is_a_word(word):
    assert parse(word) == word
    with pytest.raises(UsageError, match=r"lr is .* of type str; it must be of type float"):
        fedloom.run("fedavg", fields={"lr": word})


STEERING = ["\x1b[31mred\x1b[2J", "\x1b]0;owned\x07", "\x9b31m", "\u202egnp.exe", "a\rb\x08", "\x00", "\x7f"]


@pytest.mark.parametrize("text", STEERING)
def test_nothing_from_data_steers_the_terminal(text, tmp_path, monkeypatch, capsys):
    assert printable(text).isprintable() and printable(printable(text)) == printable(text)
    monkeypatch.chdir(tmp_path)
    with Path("d.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", text.replace("\x00", "")])
        writer.writerows([[i % 7 / 2, i % 5 / 2, f"{text}{i % 2}".replace("\x00", "")] for i in range(60)])
    main(["run", "fedavg", "--data", "d.csv", "--label", "absent", "--rounds", "1"])
    main(["data", "d.csv", "--label", text.replace("\x00", "") or "x", "--clients", "2"])
    said = capsys.readouterr()
    for shown in (said.out, said.err):
        assert all(line.replace("\t", " ").isprintable() for line in shown.splitlines()), ascii(shown)


def test_no_control_character_reaches_a_page_or_a_picture(tmp_path):
    hostile = "".join(STEERING).replace("\x00", "").replace("\r", "")
    with (tmp_path / "d.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", f"b{hostile}", "site", "label"])
        writer.writerows([[i % 7 / 2, i % 5 / 2, f"{hostile}{i % 3}", f"{hostile}{i % 2}"] for i in range(120)])
    words = ["--data", str(tmp_path / "d.csv"), "--label", "label", "--partition", "column:site"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["data", *words[1:], "--out", str(tmp_path / "p.svg")]) == 0
    assert main(["run", "fedavg", *words, "--rounds", "1", "--out", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    inside = [f'<x xmlns:xlink="-">{svg}</x>' for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    picture = (tmp_path / "p.svg").read_text()
    assert inside and page == printable(page) and picture == printable(picture)
    for drawing in (picture, *inside):
        minidom.parseString(drawing)  # a control character is no XML


def _with(content, *names):
    def edit(folder):
        for name in names:
            (folder / name).write_bytes(content)

    return edit


def _stating(**facts):
    def edit(folder):
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))

    return edit


MEANINGLESS = {
    "a processor that is a word": _stating(cpu="x"),
    "a statement of privacy without its parts": _stating(privacy=[{"verb": "x"}]),
    "no command": lambda folder: (folder / "manifest.json").write_text('{"status": "finished"}'),
    "seconds that are a word": lambda folder: (folder / "metrics.jsonl").write_text(
        (folder / "metrics.jsonl").read_text().replace('"seconds": ', '"seconds": "a", "y": ')
    ),
    "a partition of nothing": _with(b"{}", "partition.json"),
    "clients without their rows": _with(
        b'{"round": 2, "clients": [{"id": "a", "accuracy": "b"}]}', "clients.json", "chosen.json"
    ),
    "a model that is none": _with(b"x" * 20, "model.safetensors"),
    "a model of a huge header": _with((2**60).to_bytes(8, "little") + b"{}", "model.safetensors"),
}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The folder of a run that has ended."""
    out = tmp_path_factory.mktemp("hostile") / "run"
    assert main(["run", "fedavg", "--clients", "4", "--rounds", "2", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("what", MEANINGLESS)
@pytest.mark.parametrize("command", ["show", "report", "resume"])
def test_a_record_that_means_nothing_is_told_with_its_folder(record, command, what, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(record, folder)
    MEANINGLESS[what](folder)
    capsys.readouterr()
    status = main([command, str(folder)])
    said = capsys.readouterr().err.splitlines()
    assert status == 0 or (status == 1 and str(folder) in said[-1] and "damaged" in said[-1]), said
    if command == "report":
        assert status == 1, "the report needs all of these"


def _npy(shape, kind="'<f4'", body=b""):
    """An array's file that claims a shape and a type, and has the numbers that it has."""
    header = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


class _Touch:
    """Makes a file where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch PWNED",)


LABELS_OF_FOUR = _npy("(4,)", "'<i8'", np.arange(4).tobytes())
ARCHIVES = {
    "a pickle": {"x.npy": pickle.dumps(_Touch())},
    "an array of objects": {"x.npy": _npy("(4,)", "'|O'", pickle.dumps([_Touch()] * 4))},
    "more numbers than there are": {"x.npy": _npy("(4, 1000000000000)")},
    "more numbers than there can be": {"x.npy": _npy("(4, 4611686018427387904)")},
    "a negative length": {"x.npy": _npy("(-4, 3)")},
    "records": {"x.npy": _npy("(4,)", "[('a', '<f4'), ('b', '<i4')]", bytes(32))},
    "code for a header": {"x.npy": b"\x93NUMPY\x01\x00\xff\xff__import__('os').system('touch PWNED')"},
    "complex numbers": {"x.npy": _npy("(4, 3)", "'<c16'", bytes(192))},
    "no rows": {"x.npy": _npy("(0, 3)"), "label.npy": _npy("(0,)", "'<i8'")},
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_a_hostile_archive_is_refused_in_a_sentence_and_runs_nothing(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("a.npz", "w") as archive:
        for name, content in ({"label.npy": LABELS_OF_FOUR} | ARCHIVES[what]).items():
            archive.writestr(name, content)
    with pytest.raises(UsageError, match=r"a\.npz") as refused:
        load("a.npz")
    assert "\n" not in str(refused.value) and [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_an_archive_writes_nothing_where_its_names_point(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("../slip.npy", _npy("(40, 3)", body=bytes(480)))
        archive.writestr("label.npy", _npy("(40,)", "'<i8'", (np.arange(40) % 2).tobytes()))
    with contextlib.suppress(UsageError):
        load(str(tmp_path / "a.npz"))
    assert not (tmp_path.parent / "slip.npy").exists() and [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def _png(width, height):
    """The file of a picture that claims this size and has a few bytes."""

    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 0, 0, 0, 0))
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


@pytest.mark.parametrize("content", [_png(60_000, 60_000), _png(2**31 - 1, 2**31 - 1), _png(8, 8)[:40], b"GIF89a"])
def test_a_hostile_picture_is_told_with_its_name(content, tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(3):
            (tmp_path / label / f"{number}.png").write_bytes(content)
    with pytest.raises(UsageError, match=r"\.png") as refused:
        load(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_what_may_be_shown_is_left_alone():
    for text in ("Grüße, 你好, 0.5 ± 0.1\n\tnext", "می‌خواهم", "👩‍🔬"):
        assert printable(text) == text


LABELS = ["=cmd|'/c calc'!A1", "+1+1", "-1+1", "@SUM(1+1)", "<script>alert(1)</script>", "<b onclick=alert(5)>&"]


def test_labels_are_no_formulas_in_csv_and_no_html_in_markdown():
    methods = {label: {"name": "fedavg", "lr": 0.01 * (n + 1)} for n, label in enumerate(LABELS)}
    results = fedloom.compare(methods, Toy(), rounds=1, seeds=2, settings={"=1+1": {}})
    made = table(results)
    rows = list(csv.reader(io.StringIO(exports.rows_csv(made))))
    for cell in (cell for row in rows for cell in row):
        if cell[:1] in ("=", "+", "-", "@"):
            float(cell)  # a number, and no formula
    assert {row[1].removeprefix("'") for row in rows[1:]} == set(LABELS)
    text = exports.markdown(made, ["about <script>"])
    assert "<script" not in text and "<b" not in text and "&lt;script&gt;" in text and "about &lt;script" in text


def test_a_terminal_that_knows_ascii_only_gets_look_alikes(tmp_path):
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    words = ["run", "fedavg", "--rounds", "1", "--clients", "3", "--out", str(tmp_path / "r")]
    done = subprocess.run([sys.executable, "-m", "fedloom", *words], env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"+/- over clients" in done.stdout and done.stdout.isascii()


def test_a_run_goes_on_when_nobody_reads_what_it_prints(tmp_path):
    words = ["run", "fedavg", "--rounds", "3", "--clients", "3", "--out", str(tmp_path / "r")]
    process = subprocess.Popen([sys.executable, "-m", "fedloom", *words], stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.wait() == 0
    assert Run(tmp_path / "r").manifest["status"] == "finished"
