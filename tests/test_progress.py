"""What one hears of a run while it goes on: the log, the bar of a notebook, and how far a comparison is."""

import json
import logging
import re
import subprocess
import sys
from html import unescape
from types import SimpleNamespace

import pytest
from rich.console import Console

import fedloom
from fedloom import progress
from fedloom.cli.board import Board
from fedloom.comparison.tally import Tally
from fedloom.progress import Bar, in_notebook
from fedloom.runs.telling import Telling
from fedloom.tasks.toy import Toy


def test_the_logger_hears_of_every_round_and_has_no_handler(caplog, tmp_path):
    assert logging.getLogger("fedloom").handlers == []
    with caplog.at_level(logging.INFO, logger="fedloom"):
        run = fedloom.run("fedavg", Toy(), rounds=3, out=tmp_path / "run", report=False)
    said = [one.getMessage() for one in caplog.records if one.name == "fedloom.runs"]
    assert said[0] == f"fedavg on a Toy given in Python, 4 clients, seed 0, from round 1 of 3: {run.path}"
    telling = Telling(3)
    assert said[1:4] == [telling.line(row) for row in run.metrics]
    assert said[4:] == [f"finished after round 3 of 3: {run.path}"]
    assert {one.levelno for one in caplog.records} == {logging.INFO}
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="fedloom"):
        run = fedloom.run("fedavg", Toy(), rounds=2)
    rows = [one.getMessage().partition(": ") for one in caplog.records if one.levelno == logging.DEBUG]
    assert [json.loads(row) for _, _, row in rows] == run.metrics and [at for at, _, _ in rows] == [
        "round 1",
        "round 2",
    ]
    caplog.clear()
    fedloom.run("fedavg", Toy(), rounds=1)
    assert not caplog.records  # which are warnings and errors, where nobody asks for more


def test_a_script_prints_nothing_and_a_resumed_run_tells_all_its_bytes(tmp_path, caplog):
    code = "import fedloom; fedloom.run('fedavg', rounds=1, clients=3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")

    def stop(row):
        if row["round"] == 2:
            raise KeyboardInterrupt

    with caplog.at_level(logging.INFO, logger="fedloom"):
        with pytest.raises(KeyboardInterrupt):
            fedloom.run("fedavg", rounds=4, clients=3, out=tmp_path / "run", on_round=stop, report=False)
        broken = [one.getMessage() for one in caplog.records]
        caplog.clear()
        run = fedloom.resume(tmp_path / "run", report=False)
    assert broken[-1].startswith("stopped after round 2 of 4")
    said = [one.getMessage() for one in caplog.records]
    assert "from round 2 of 4" in said[0]  # the last checkpoint is of the round before the one that was stopped
    telling = Telling(4)
    assert said[1:4] == [telling.line(row) for row in run.metrics][1:]


def test_a_line_has_the_bytes_of_all_rounds_so_far():
    row = {"round": 2, "train_loss": 0.5, "up_bytes": 1500, "down_bytes": 400, "peer_bytes": 100}
    telling = Telling(3, [row | {"round": 1}])
    assert telling.line(row) == "round 2 of 3, loss 0.5000, 4.0 kB"
    judged = {"global_test_accuracy": None, "personal_test_accuracy": 0.25, "validation_accuracy": 0.5}
    assert telling.line(row | {"round": 3} | judged) == "round 3 of 3, loss 0.5000, accuracy 0.2500, 6.0 kB"


class Place:
    """What IPython gives to draw anew."""

    def __init__(self):
        self.drawn = []

    def update(self, html):
        self.drawn.append(html.data)


@pytest.fixture
def notebook(monkeypatch):
    """A stand-in for IPython in a notebook; what is displayed, a list of what each place shows one after another."""
    places = []

    def display(html, display_id):
        assert display_id is True
        places.append(Place())
        places[-1].update(html)
        return places[-1]

    class HTML:
        def __init__(self, data):
            self.data = data

    shell = SimpleNamespace(kernel=object())
    shows = SimpleNamespace(HTML=HTML, display=display)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell, display=shows))
    monkeypatch.setitem(sys.modules, "IPython.display", shows)
    monkeypatch.setattr(progress, "QUICK", 0.0)
    return SimpleNamespace(places=places, shell=shell)


def value(html):
    return float(re.search(r'<progress max="1" value="([\d.]+)"', html)[1])


def test_a_notebook_has_one_bar_a_run_that_moves(notebook, tmp_path):
    run = fedloom.run("fedavg", Toy(), rounds=4, out=tmp_path / "run", report=False)
    (place,) = notebook.places
    assert [value(html) for html in place.drawn] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    telling = Telling(4)
    for html, row in zip(place.drawn[1:5], run.metrics, strict=True):
        assert telling.line(row) in unescape(html)
    assert " left" in place.drawn[2] and " left" not in place.drawn[-1]
    fedloom.resume(tmp_path / "run", Toy(), rounds=5, report=False)
    assert [value(html) for html in notebook.places[1].drawn] == [0.8, 1.0, 1.0]
    fedloom.run("fedavg", Toy(), rounds=1, progress=False)
    assert len(notebook.places) == 2
    with pytest.raises(KeyboardInterrupt):
        fedloom.run("fedavg", Toy(), rounds=4, on_round=lambda row: (_ for _ in ()).throw(KeyboardInterrupt))
    assert "(stopped)" in notebook.places[2].drawn[-1] and value(notebook.places[2].drawn[-1]) < 1


def test_a_terminal_of_ipython_and_a_script_are_no_notebook(notebook, monkeypatch):
    assert in_notebook()
    del notebook.shell.kernel
    assert not in_notebook()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not in_notebook() and "IPython" not in sys.modules
    fedloom.run("fedavg", Toy(), rounds=1)
    assert notebook.places == []


def test_a_bar_is_not_drawn_too_often_and_escapes_what_it_says(notebook, monkeypatch):
    monkeypatch.setattr(progress, "QUICK", 1e9)
    bar = Bar()
    for k in range(5):
        bar.show(k / 4, "line")
    assert len(notebook.places[0].drawn) == 1
    bar.show(1.0, "<b>\x1b", whatever=True)
    assert "&lt;b&gt;" in notebook.places[0].drawn[1] and "\x1b" not in notebook.places[0].drawn[1]
    assert "about 30.0 s left" in Bar.html(0.25, "x", 10.0) and "left" not in Bar.html(0.0, "x", 10.0)


def test_a_comparison_in_a_notebook_is_one_bar_over_cells_and_trials(notebook):
    fedloom.compare(["fedavg", "local"], Toy(), seeds=2, rounds=2, tune=2, report=False)
    (place,) = notebook.places
    shares = [value(html) for html in place.drawn]
    assert shares == sorted(shares) and shares[0] == 0.0 and shares[-1] == 1.0
    assert "8 of 8 runs;" in place.drawn[-1]  # four cells, and two trials of each method
    assert 1 / 16 in shares  # half of the first trial


def job(name, rounds=4):
    return SimpleNamespace(name=name, spec=SimpleNamespace(rounds=rounds))


def cell(setting, method, seed, done=False):
    name = f"{setting}/{method}/seed-{seed}"
    return SimpleNamespace(setting=setting, method=method, seed=seed, name=name, run=object() if done else None)


def test_runs_are_counted_by_hand(monkeypatch):
    comparison = SimpleNamespace(tune=3, methods={"a": {}, "b": {}})
    monkeypatch.setattr(
        "fedloom.comparison.tuning.space", lambda comparison, method: {"lr": ()} if method == "a" else {}
    )
    tally = Tally()
    assert tally.share == 0.0
    tally.planned(comparison, [cell("s", "a", 0), cell("s", "a", 1), cell("s", "b", 0), cell("s", "b", 1, done=True)])
    assert (tally.total, tally.ended, str(tally)) == (7, 1, "1 of 7 runs")
    tally.begins(job("s/a/trial-2"))  # a kill left two of them over
    assert tally.ended == 3
    tally.row(job("s/a/trial-2"), {"round": 1})
    assert tally.share == (3 + 0.25) / 7
    tally.ends(job("s/a/trial-2"), None)
    tally.begins(job("s/b/seed-0"))
    tally.row(job("s/b/seed-0"), {"round": 4})
    assert (tally.ended, tally.share) == (4, 5 / 7)
    tally.ends(job("s/b/seed-0"), SimpleNamespace(error="it broke"))
    assert str(tally) == "5 of 7 runs, 1 failed"
    for seed in (0, 1):
        tally.begins(job(f"s/a/seed-{seed}"))
        tally.ends(job(f"s/a/seed-{seed}"), None)
    assert (tally.ended, tally.share) == (7, 1.0)


def test_no_trial_that_can_never_be_is_waited_for(monkeypatch):
    monkeypatch.setattr("fedloom.comparison.tuning.space", lambda comparison, method: {"lr": ()})
    tally = Tally()
    tally.planned(SimpleNamespace(tune=2, methods={"a": {}}), [cell("s", "a", 0)])
    tally.ends(job("s/a/seed-0"), SimpleNamespace(error="none of 2 trials of tuning succeeded"))
    assert (tally.ended, tally.share) == (3, 1.0)


def test_the_board_has_a_bar_over_all_runs():
    board = Board(quiet=True)
    board.console = Console(width=60, force_terminal=True, color_system=None)
    board.bar.disable = False
    comparison = SimpleNamespace(tune=0, methods={"a": {}})

    def seen():
        with board.console.capture() as captured:
            board.console.print(board.whole())
        return captured.get()

    assert "checking every cell" in seen()
    board.planned(comparison, [cell("s", "a", 0), cell("s", "a", 1)])
    board.begins(job("s/a/seed-0"))
    board.row(job("s/a/seed-0"), {"round": 2, "validation_accuracy": 0.5})
    shown = seen()
    assert "0 of 2 runs" in shown and "25%" in shown and max(map(len, shown.splitlines())) <= 60
    assert "round 2 of 4, 0.5000" in " ".join(shown.split())
