"""Terminals that are narrow, know few letters, or hang up: everything is told, nothing is cut, nothing dies."""

import io
import os
import re
import subprocess
import sys
import warnings

import pytest
from rich.console import Console

import fedloom
from fedloom.cli import main
from fedloom.comparison.table import table
from fedloom.report import exports
from fedloom.report.printed import print_table
from fedloom.tasks.toy import Toy

SCRIPT = """
import sys
from fedloom.cli import main
for words in (
    ["run", "fedavg", "--rounds", "2", "--clients", "3", "--measures", "auc,ece", "--out", "run"],
    ["compare", "fedavg", "ditto", "--rounds", "1", "--clients", "3", "--seeds", "2", "--jobs", "1", "--out", "both"],
    ["show", "run"], ["list", "."], ["report", "run"], ["data", "digits", "--clients", "3"], ["methods", "fedavg"],
):
    code = main(words)
    assert code == 0, (words, code)
"""


def told(folder, **env):
    there = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    return subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, cwd=folder, env=there | env, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_few_letters_and_sixty_columns_are_enough(encoding, tmp_path):
    done = told(tmp_path, PYTHONIOENCODING=encoding, COLUMNS="60", NO_COLOR="1")
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stderr == b"" and b"\x1b" not in done.stdout
    said = done.stdout.decode(encoding)
    assert ("+/- over clients" if encoding == "ascii" else "± over clients") in said
    tables = [
        line.rstrip() for line in said.splitlines() if re.match(r"(  )?[a-z±+/ ,%]+?  +\S+( \S+){0,2}$", line.lower())
    ]
    assert len(tables) > 20 and max(map(len, tables)) <= 60


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal") / "compared"
    return fedloom.compare(["fedavg", "fedprox", "local"], Toy(), seeds=3, rounds=2, out=folder, report=False)


def shown(results, width):
    out = Console(file=io.StringIO(), width=width, color_system=None)
    print_table(out, results)
    return out.file.getvalue()


def test_a_narrow_table_says_what_a_wide_one_says(compared):
    wide, tall = shown(compared, 200), shown(compared, 60)
    head = next(line for line in wide.splitlines() if line.startswith("method"))
    rows = tall.partition("Compared by")[0].splitlines()
    assert max(map(len, rows)) <= 60
    said: dict[str, dict[str, str]] = {}
    for line in filter(str.strip, rows[1:]):
        if not line.startswith("  "):
            said[line.strip()] = {}
        else:
            name, value = re.split(r"\s{2,}", line.strip())
            said[[*said][-1]][name] = value
    for row in table(compared).rows:
        line = next(line for line in wide.splitlines() if line.startswith(row.method))
        own = said[row.method]
        assert own["seeds"] == "3/3" and own["personal test accuracy, %"] == exports.score(row.score)
        assert all(name in head and value in line for name, value in own.items())
    assert [*said] == ["fedavg", "fedprox", "local"] and said["local"]["global test accuracy"] == "–"


def test_who_hangs_up_ends_no_run(tmp_path):
    command = [sys.executable, "-m", "fedloom", "run", "fedavg", "--rounds", "3", "--clients", "3", "--out", "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert fedloom.load(tmp_path / "run").manifest["status"] == "finished" and b"Traceback" not in said


def test_a_warning_is_one_line_and_the_hook_is_put_back(monkeypatch, capsys, tmp_path):
    from fedloom.cli import commands

    def warned():
        warnings.warn("the features kept\nare damaged", stacklevel=2)
        warnings.warn("from a library", RuntimeWarning, stacklevel=2)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        heard = []
        monkeypatch.setattr(warnings, "showwarning", lambda message, *rest, **how: heard.append(str(message)))
        hook = warnings.showwarning
        monkeypatch.setattr(commands.comparing, "commands", lambda words: [compare_that_warns(warned)])
        assert main(["compare"]) == 0
        assert warnings.showwarning is hook
    assert capsys.readouterr().err == "fedloom: warning: the features kept are damaged\n" and heard == [
        "from a library"
    ]


def compare_that_warns(warned):
    def compare() -> None:
        """Warns."""
        warned()

    return compare
