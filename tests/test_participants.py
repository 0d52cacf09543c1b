"""Who took part, how stale replies were and who was turned away: the record's lines, told from its other files."""

import json
import re
from types import SimpleNamespace

import pytest

import fedloom
from fedloom.boundary.books import Books
from fedloom.report.curves import panels
from fedloom.report.page import render
from fedloom.report.participants import (
    Participant,
    flagged,
    flagged_figure,
    participants,
    participation,
    participation_figure,
    staleness,
    turned_away,
    verdict,
)
from fedloom.report.style import COLOURS, svg
from fedloom.tasks.toy import Toy

LINES = [
    {"round": 1, "replied": [0, 2, 3], "judged": [0, 2, 3, 4], "flagged": [2, 4], "attacking": [2, 3]},
    {"round": 2, "replied": [2, 3], "judged": [2, 3], "flagged": [2], "attacking": [3]},
    {"round": 4, "replied": [3]},
]


def shown(lines, population=6):
    return SimpleNamespace(
        lines=lambda name: iter(lines if name == "replies.jsonl" else []), partition={"population": population}
    )


def test_clients_are_counted_by_hand():
    found = participants(shown(LINES))
    assert [one.client for one in found] == [0, 1, 2, 3, 4, 5]
    each = [(one.replied, one.judged, one.flagged, one.attacked, one.caught, one.wronged) for one in found]
    assert each == [
        (1, 1, 0, 0, 0, 0),
        (0, 0, 0, 0, 0, 0),
        (2, 2, 2, 1, 1, 1),
        (3, 2, 0, 2, 0, 0),
        (0, 1, 1, 0, 0, 1),
        (0, 0, 0, 0, 0, 0),
    ]
    assert [one.client for one in turned_away(found)] == [2, 4, 3]
    assert (
        verdict(found)
        == "Of 6 replies that were judged 3 were turned away; 3 were attacks, and 1 of these were among them."
    )
    assert verdict([Participant(0, 2, 2, 1)]) == "Of 2 replies that were judged 1 were turned away; nobody attacked."
    assert participants(shown([])) == []
    assert [one.client for one in participants(shown([{"round": 1, "replied": [2]}], population=None))] == [0, 1, 2]


def test_what_is_alike_or_absent_is_not_drawn():
    alike = participants(shown([{"round": r, "replied": [0, 1]} for r in (1, 2)], 2))
    assert participation(alike, 2) == {} and flagged(alike) == {} and participation([], 0) == {}
    alt = participation(participants(shown(LINES)), 4)["participation"].alt
    assert alt == "Of 4 rounds a client took part in 0 to 3, median 0.5; 3 clients in none."
    assert staleness(shown(LINES)) == []


def test_bars_are_of_their_clients():
    found = participants(shown(LINES))
    axes = participation_figure(found).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [1, 0, 2, 3, 0, 0]
    assert axes.lines[0].get_ydata()[0] == 1.0
    many = [Participant(k, replied=k % 3) for k in range(300)]
    axes = participation_figure(many).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [100, 100, 100] and axes.get_ylabel() == "clients"
    axes = flagged_figure(turned_away(found)).axes[0]
    judged, caught, wronged = ([bar.get_height() for bar in bars] for bars in axes.containers)
    assert (judged, caught, wronged) == ([2, 1, 2], [1, 0, 0], [1, 1, 0])
    assert [bar.get_y() for bar in axes.containers[2]] == [1, 0, 0]
    assert [one.get_text() for one in axes.get_xticklabels()] == ["2", "4", "3"]
    assert list(axes.lines[0].get_xdata()) == [2]  # who attacked and was not flagged


def test_flagged_is_who_was_there_and_weighs_nothing_or_is_named():
    books = Books(None, None)
    books.begin("train", 1)
    books.judged = {1: 0.0, 2: 0.5, 3: 0.25}
    assert books.flagged([]) == {1} and books.flagged([2, 9]) == {1, 2}
    books.judged, books.came = {}, [(4, 0), (5, 1)]
    assert books.flagged([5, 9]) == {5}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    settings = {"attack": "sign_flip:0.2,scale=5,from=2", "aggregate": "multi_krum:f=0.25", "cohort": 6, "rounds": 5}
    return fedloom.run("fedavg", clients=12, out=tmp_path_factory.mktemp("who") / "run", report=False, **settings)


def test_the_lines_agree_with_metrics_and_ledger(attacked):
    lines = {line["round"]: line for line in attacked.lines("replies.jsonl")}
    ups = {}
    for line in attacked.ledger:
        if (line["kind"], line["direction"]) == ("train", "up"):
            ups.setdefault(line["round"], set()).update(line["clients"])
    for row in attacked.metrics:
        line = lines[row["round"]]
        assert line["replied"] == sorted(ups[row["round"]]) and len(line["replied"]) == row["replies"]
        assert (len(line["flagged"]), len(line["attacking"])) == (row["attack/flagged"], row["attack/malicious"])
        right = len(set(line["flagged"]) & set(line["attacking"]))
        assert row["attack/precision"] == (right / len(line["flagged"]) if line["flagged"] else None)
        assert "staleness" not in line and len(line["flagged"]) == 1  # multi-Krum leaves f = 0.25 * 6 out, rounded down
    assert not lines[1]["attacking"] and any(line["attacking"] for line in lines.values())
    always = {client for line in lines.values() for client in line["attacking"]}
    assert len(always) <= 2


def test_the_page_says_who_was_flagged_and_how_rightly(attacked):
    page = render(attacked)
    everybody = participants(attacked)
    section = page[page.index('id="flagged"') :].partition("</section>")[0]
    rows = re.findall(r'<th scope="row">(\d+)</th><td>(\d+)</td><td>(\d+)</td>\s*<td>(.*?)</td><td>(.*?)</td>', section)
    assert [int(row[0]) for row in rows] == [one.client for one in turned_away(everybody)] and rows
    for row, one in zip(rows, turned_away(everybody), strict=True):
        assert (int(row[1]), int(row[2])) == (one.judged, one.flagged)
        assert row[3:] == ((str(one.attacked), str(one.caught)) if one.attacked else ("–", "–"))
    assert verdict(everybody) in section
    for title in ("Who was flagged", "Who took part"):
        assert f"<figcaption>{title}</figcaption>" in page
    plain = fedloom.run("fedavg", Toy(), rounds=1)
    assert 'id="flagged"' not in render(plain) and "Who was flagged" not in render(plain)


def test_who_a_method_names_is_flagged_without_a_rule(tmp_path):
    run = fedloom.run("mud_hog", clients=6, rounds=3, attack="sign_flip:0.3,scale=20", out=tmp_path / "run")
    lines = list(run.lines("replies.jsonl"))
    assert [len(line["flagged"]) for line in lines] == [row["attack/flagged"] for row in run.metrics]
    honest = fedloom.run("mud_hog", clients=6, rounds=2, out=tmp_path / "honest", report=False)
    assert all(line["judged"] == line["replied"] and "attacking" not in line for line in honest.lines("replies.jsonl"))


def test_staleness_is_what_the_method_saw(tmp_path):
    settings = {"clients": 10, "rounds": 6, "speed": "lognormal:1"}
    run = fedloom.run("fedbuff", out=tmp_path / "run", report=False, **settings)
    lines = list(run.lines("replies.jsonl"))
    pairs = [[*zip(line["replied"], line["staleness"], strict=True)] for line in lines]
    assert all(line == sorted(line) for line in pairs) and any(len(line) > 1 for line in pairs)
    means = [sum(line["staleness"]) / len(line["staleness"]) for line in lines]
    assert means == pytest.approx([row["server/staleness"] for row in run.metrics]) and max(means) > 0
    assert all(
        len(line["staleness"]) == len(line["replied"]) == row["replies"]
        for line, row in zip(lines, run.metrics, strict=True)
    )
    (panel,) = staleness(run)
    assert panel.curves[0].y == means and panel.curves[1].y == [max(line["staleness"]) for line in lines]
    assert "<figcaption>Staleness of replies</figcaption>" in render(run)
    assert "Staleness of replies" not in [panel.title for panel in panels(run)]


def test_a_resumed_run_has_each_line_once(tmp_path):
    def stop(row):
        if row["round"] == 2:
            raise KeyboardInterrupt

    settings = {"clients": 6, "rounds": 4, "cohort": 3}
    with pytest.raises(KeyboardInterrupt):
        fedloom.run("fedavg", out=tmp_path / "run", on_round=stop, report=False, **settings)
    text = (tmp_path / "run/replies.jsonl").read_text()
    (tmp_path / "run/replies.jsonl").write_text(text + json.dumps({"round": 3, "replied": [5]}) + "\n")
    fedloom.resume(tmp_path / "run", report=False)
    whole = fedloom.run("fedavg", out=tmp_path / "whole", report=False, **settings)
    assert (tmp_path / "run/replies.jsonl").read_text() == (whole.path / "replies.jsonl").read_text()


def test_engines_write_the_same_lines(tmp_path):
    settings = {"clients": 6, "rounds": 2, "cohort": 5, "attack": "sign_flip:0.3", "aggregate": "krum:f=1"}
    for engine in ("serial", "pool", "vectorized"):
        fedloom.run("fedavg", engine=engine, workers=2, out=tmp_path / engine, report=False, **settings)
    assert len({(tmp_path / one / "replies.jsonl").read_text() for one in ("serial", "pool", "vectorized")}) == 1


def test_numbers_on_a_pale_cell_stay_dark_on_a_dark_page(attacked):
    figure = attacked.plot("confusion").figure
    drawn = svg(figure, "confusion")
    inks = {text.get_color() for text in figure.axes[0].texts}
    assert not inks & {*COLOURS.values()} and "white" in inks
    assert all(ink == "white" or ink in drawn for ink in inks)
