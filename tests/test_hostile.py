"""Texts and labels from strangers: bounded where they are read, harmless where they are shown."""

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import manyhands
from manyhands.cli import main
from manyhands.cli.letters import printable
from manyhands.comparison.reading import mapping
from manyhands.comparison.table import table
from manyhands.errors import UsageError
from manyhands.fields import MOST_DEPTH, loaded, parse
from manyhands.record import Run
from manyhands.report import exports
from manyhands.spec import Spec
from manyhands.tasks.toy import Toy

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
        manyhands.run("fedavg", fields={"lr": word})


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


def test_what_may_be_shown_is_left_alone():
    for text in ("Grüße, 你好, 0.5 ± 0.1\n\tnext", "می‌خواهم", "👩‍🔬"):
        assert printable(text) == text


LABELS = ["=cmd|'/c calc'!A1", "+1+1", "-1+1", "@SUM(1+1)", "<script>alert(1)</script>", "<b onclick=alert(5)>&"]


def test_labels_are_no_formulas_in_csv_and_no_html_in_markdown():
    methods = {label: {"name": "fedavg", "lr": 0.01 * (n + 1)} for n, label in enumerate(LABELS)}
    results = manyhands.compare(methods, Toy(), rounds=1, seeds=2, settings={"=1+1": {}})
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
    done = subprocess.run([sys.executable, "-m", "manyhands", *words], env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"+/- over clients" in done.stdout and done.stdout.isascii()


def test_a_run_goes_on_when_nobody_reads_what_it_prints(tmp_path):
    words = ["run", "fedavg", "--rounds", "3", "--clients", "3", "--out", str(tmp_path / "r")]
    process = subprocess.Popen([sys.executable, "-m", "manyhands", *words], stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.wait() == 0
    assert Run(tmp_path / "r").manifest["status"] == "finished"
