"""The page and the tables of a comparison, from real cells of the toy task."""

import csv
import gc
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

import fedloom
from fedloom.comparison.measures import MEASURES
from fedloom.comparison.results import Results
from fedloom.comparison.statistics import Interval, Paired
from fedloom.comparison.table import Row, Table, summary, table
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.report import exports
from fedloom.report.comparison import assumes, keeps, pictures, write
from fedloom.report.contrasts import COSTS, Looks, band
from fedloom.report.printed import print_table
from fedloom.report.style import SERIES
from fedloom.tasks.toy import Toy

METHODS = [{"name": "fedavg", "label": "plain"}, {"name": "scaffold"}, {"name": "ditto", "label": "a_b & <c>"}]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison") / "c"
    two = {"few": {"rounds": 2}, "more": {"rounds": 3}}
    return fedloom.compare(METHODS, Toy(), out=out, seeds=3, settings=two, report=False)


@pytest.fixture(scope="module")
def page(done):
    return write(done).read_text()


class Whole(HTMLParser):
    """Counts what is open, and what the page would load."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input", "path", "use", "circle", "rect", "line"})

    def __init__(self):
        super().__init__()
        self.open, self.loads = [], []

    def handle_starttag(self, tag, attrs):
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")]
        self.loads += [tag] if tag in ("script", "link") else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(page):
    parser = Whole()
    parser.feed(page)
    assert parser.open == [] and [one for one in parser.loads if not one.startswith("data:")] == []


def test_names_are_escaped(page):
    assert "a_b &amp; &lt;c&gt;" in page and "<c>" not in page


def test_the_page_has_every_picture_in_the_methods_colours(page, done):
    per_setting = ("few: personal test accuracy", "more: client by client, all seeds",
                   "few: personal test accuracy against rounds", "more: personal test accuracy against bytes",
                   "few: personal test accuracy against virtual time")  # fmt: skip
    for title in (*per_setting, "Mean ranks over the settings"):
        assert title in page
    looks = Looks.of(done.methods)
    for method in done.methods:
        assert page.count(f"var(--{looks.variable(method)})") > 5
        assert looks.colour(method) not in page.split("</style>", 1)[1]
    assert "fedloom compare" in page and "comparison.yaml" in page


def test_what_methods_send_and_keep_stands_there(page):
    assert "Each client keeps: control." in page and "the server learns only the (weighted) average of" in page


def test_a_bold_number_has_its_interval(page, done):
    bold = re.findall(r'<td class="lead">([^<]*)', page)
    assert len(bold) == sum(row.leads for row in table(done).rows) > 0
    assert all("±" in number for number in bold)
    assert all("±" in cell for cell in re.findall(r"\*\*(.*?)\*\*", (done.path / "report.md").read_text()))


def test_the_csv_has_every_digit_of_every_row(page, done):
    rows = list(csv.DictReader(io.StringIO((done.path / "report.csv").read_text())))
    assert [(row["setting"], row["method"]) for row in rows] == [(s, m) for s in done.settings for m in done.methods]
    for row in rows:
        scores = [cell.run.selected["personal_test_accuracy"] for cell in done.of(row["setting"], row["method"])]
        assert float(row["mean"]) == pytest.approx(sum(scores) / 3, abs=1e-15)
        assert float(row["up_bytes"]) > 0 and set(MEASURES) <= row.keys()


def test_latex_is_balanced_and_escaped(page, done):
    text = (done.path / "report.tex").read_text()
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(body) == 1 + len(done.methods) and r"a\_b \& <c>" in text
    assert all(len(re.findall(r"(?<!\\)&", line)) == len(done.settings) for line in body)
    assert text.count("{") == text.count("}")


def test_the_summary_is_json(done):
    found = json.loads(json.dumps(summary(done), allow_nan=False))
    assert len(found["rows"]) == 6 and found["metric"] == "personal_test_accuracy"
    assert {row["test"] is None for row in found["rows"]} == {True, False}


def printed(results):
    console = Console(file=io.StringIO(), width=200, markup=False)
    print_table(console, results)
    return console.file.getvalue()


def test_the_terminal_shows_the_table_and_how_it_came_to_be(done):
    shown = printed(done)
    assert all(method in shown for method in done.methods) and "paired t-test" in shown and "3/3" in shown


def test_a_failed_cell_stays_at_its_place_with_its_error(done):
    lost = {("few", "plain", seed) for seed in done.seeds} | {("more", "scaffold", 1)}
    cells = tuple(
        replace(c, run=None, error="it broke <here>") if (c.setting, c.method, c.seed) in lost else c
        for c in done.cells
    )
    broken = Results(done.path, done.spec, cells)
    shown, page = printed(broken), write(broken).read_text()
    assert "3 seeds failed (seed 0: it broke <here>)" in shown and "1 seed failed (seed 1" in shown and "2/3" in shown
    assert page.count("it broke &lt;here&gt;") >= 5 and "few/plain/seed-0 failed" in page
    assert [row.method for row in table(broken).of("few")] == list(done.methods)
    assert " & failed & " not in (done.path / "report.tex").read_text().split("scaffold")[1]


def test_what_is_not_done_yet_is_no_error(done):
    cells = tuple(replace(c, run=None) if c.seed or c.setting == "more" else c for c in done.cells)
    begun = Results(done.path, done.spec, cells)
    page = write(begun).read_text()
    assert "not finished" in page and "go on with: fedloom compare" in page and "2 seeds not done" in page
    assert "too few seeds: 1 pairs" in page and '<td class="lead">' not in page
    nothing = Results(done.path, done.spec, tuple(replace(c, run=None) for c in done.cells))
    assert "0 of 18 cells" in write(nothing).read_text()


def test_a_band_is_the_mean_and_interval_of_the_seeds(done):
    runs = [cell.run for cell in done.of("more", "plain")]
    found = band("plain", runs, "validation_accuracy", COSTS["round"])
    ends = [run.metrics[-1]["validation_accuracy"] for run in runs]
    assert found.x == [1, 2, 3] and found.mean[-1] == pytest.approx(sum(ends) / 3)
    assert found.low[-1] <= found.mean[-1] <= found.high[-1]
    one = band("plain", runs[:1], "validation_accuracy", COSTS["bytes"])
    assert one.low == one.mean == one.high
    assert band("plain", [], "validation_accuracy", COSTS["round"]) is None


def test_colours_stay_and_come_again_dashed():
    names = [str(i) for i in range(len(SERIES) + 1)]
    looks = Looks.of(names)
    assert looks.colour(names[-1]) == looks.colour("0") and looks.dashes(names[-1]) != looks.dashes("0")
    assert len({looks.colour(name) for name in names[:-1]}) == len(SERIES)


def test_what_a_method_keeps_and_assumes_is_read_from_its_file():
    from fedloom.methods.optimize.scaffold import Scaffold

    assert keeps(Scaffold) == {"client": ["control"], "server": ["control", "model"]}
    (plain_steps,) = assumes(Scaffold)
    assert plain_steps.startswith("does not go with optimizer: its control variates are mean gradients")
    assert assumes(FedAvg) == []


def interval(*values, half=0.014):
    mean = sum(values) / len(values) if values else None
    low, high = (None, None) if len(values) < 2 else (mean - half, mean + half)
    return Interval(tuple(values), mean, low, high)


NOTHING = {name: interval() for name in MEASURES}


def row(method="m", score=None, **more):
    score = score or interval(0.912, 0.952)
    given = {"setting": "s", "method": method, "score": score, "seeds": (0, 1), "leads": False, "test": None}
    given |= {"measures": NOTHING, "tuned": {}, "errors": {}, "unfinished": ()}
    return Row(**given | more)


def tabled(*rows, **more):
    given = {"rows": rows, "metric": "personal_test_accuracy", "test": "t", "references": {"s": "best"}}
    return Table(**given | {"targets": {}, "ranks": None} | more)


TEST = Paired("m", interval(-0.02, -0.04), -1.25, 0.0004, None, 0.012)


def cells(text):
    """The cells of the last line of a Markdown table."""
    return [cell.strip() for cell in [line for line in text.splitlines() if line.startswith("|")][-1].split("|")[1:-1]]


def test_a_row_of_markdown_says_what_was_measured():
    measures = NOTHING | {"jain_index": interval(0.91, 0.95), "up_bytes": interval(2_500_000.0)}
    made = exports.markdown(tabled(row(test=TEST, measures=measures)), [])
    assert cells(made) == ["m", "93.2 ± 1.4", "0.012", "-1.25", "0.930", "2.5 MB (1/2)"]
    assert "| method | personal test accuracy (%) | p against best (Holm) | effect g |" in made
    assert "global test accuracy" not in made, "nobody has a number there"
    measured = NOTHING | {"personal_test_accuracy": interval(0.9, 0.9), "global_test_accuracy": interval(0.5, 0.6)}
    made = exports.markdown(tabled(row(measures=measured, leads=True)), [])
    assert cells(made) == ["m", "**93.2 ± 1.4**", "–", "–", "55.0"], "the score stands there once"
    one = exports.markdown(tabled(row(score=interval(0.932), errors={3: "it broke"}, unfinished=(4, 5))), [])
    assert cells(one)[1] == "93.2 (one seed) (1 seed failed (seed 3: it broke); 2 seeds not done)"


@pytest.mark.parametrize(
    ("test", "said"),
    [
        (TEST, "0.012"),
        (replace(TEST, holm=0.0009), "<0.001"),
        (replace(TEST, p=None, holm=None, why="too few seeds"), "too few seeds"),
        (replace(TEST, holm=0.001), "0.001"),
        (None, "–"),
    ],
)
def test_the_p_that_is_told_is_the_corrected_one(test, said):
    assert exports.tested(test) == said


def test_the_csv_has_both_p_and_both_ends_of_every_interval():
    measures = NOTHING | {"jain_index": Interval((0.5, 0.7), 0.6, 0.4, 0.8)}
    made = exports.rows_csv(tabled(row("=m", test=TEST, measures=measures, seeds=(0, 1, 2)), row("\tm", leads=True)))
    first, second = csv.DictReader(io.StringIO(made, newline=""))
    assert (first["method"], second["method"]) == ("'=m", "'\tm")
    assert (float(first["p"]), float(first["p_holm"]), float(first["effect_g"])) == (0.0004, 0.012, -1.25)
    assert float(first["difference"]) == pytest.approx(-0.03), "a negative number is a number"
    low, mean, high = (float(first[name]) for name in ("low", "mean", "high"))
    assert (low, mean, high) == pytest.approx((0.918, 0.932, 0.946))
    names = ["jain_index", "jain_index_low", "jain_index_high", "jain_index_n", "seeds", "reference", "leads"]
    assert [first[name] for name in names] == ["0.6", "0.4", "0.8", "2", "3", "best", "False"]
    assert (second["p"], second["leads"], second["up_bytes"], second["up_bytes_n"]) == ("", "True", "", "0")


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_no_label_is_a_formula_in_the_csv(first):
    (only,) = csv.DictReader(io.StringIO(exports.rows_csv(tabled(row(f"{first}1+1"))), newline=""))
    assert only["method"] == f"'{first}1+1"


def test_a_cell_of_latex_is_bold_where_the_method_leads():
    rows = (row("a", leads=True), row("b"), row("c", score=interval(0.5)), row("d", score=interval()))
    lines = exports.latex(tabled(*rows, row("e", score=interval(), errors={0: "it broke"}))).splitlines()
    told = [line.removesuffix(r" \\").split(" & ")[1] for line in lines if line[:2] in ("a ", "b ", "c ", "d ", "e ")]
    assert told == [r"$\mathbf{93.2 \pm 1.4}$", r"$93.2 \pm 1.4$", "50.0 (one seed)", "--", "failed"]


def test_labels_break_no_table():
    label = "a|b\nc\\d_50%{~^}$#&"
    made = exports.markdown(tabled(row(label)), [f"about {label}"])
    line = next(line for line in made.splitlines() if line.startswith("| a"))
    assert line.startswith(r"| a\|b c\d_50%{~^}$#&amp; | 93.2") and "- about a|b c" in made
    tex = exports.latex(tabled(row("c\\d_50%{~^}$#&")))
    told = r"c\textbackslash{}d\_50\%\{\textasciitilde{}\textasciicircum{}\}\$\#\&"
    assert f"{told} & $93.2" in tex


class TestPictures:
    """`Results.plot`: the pictures of the page, in Python."""

    @pytest.fixture(scope="class")
    @staticmethod
    def one():
        return fedloom.compare(["fedavg", "fedprox"], Toy(), seeds=2, rounds=2, report=False)

    @pytest.fixture(scope="class")
    @staticmethod
    def two():
        settings = {"slow": {"participation": "uniform"}, "few": {"cohort": 2}}
        return fedloom.compare(["fedavg"], Toy(), seeds=1, rounds=1, settings=settings, report=False)

    def test_they_are_those_of_the_page(self, one, two):
        for results in (one, two):
            assert isinstance(results, fedloom.Results)
            assert {name: p.alt for name, p in results.pictures.items()} == {
                n: p.alt for n, p in pictures(results).items()
            }

    def test_a_setting_alone_need_not_be_named(self, one, two):
        (setting,) = one.settings
        assert one.plot().alt == one.plot("scores").alt == one.pictures[f"{setting}-scores"].alt
        assert one.plot("round").alt == one.pictures[f"{setting}-round"].alt != one.plot().alt
        assert two.plot().alt == two.plot("slow-scores").alt == two.pictures["slow-scores"].alt
        assert two.plot("few-scores").alt == two.pictures["few-scores"].alt
        with pytest.raises(fedloom.UsageError, match=r"'scores'.*known: .*few-scores.*slow-scores"):
            two.plot("scores")
        with pytest.raises(fedloom.UsageError, match=r"'score'; did you mean 'scores'"):
            one.plot("score")

    def test_a_picture_shows_itself_and_is_written(self, one, tmp_path):
        assert "<svg" in one.plot()._repr_svg_()
        assert one.plot("clients").save(tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")

    def test_what_is_read_again_draws_the_same(self, one):
        assert fedloom.load(one.path).plot("bytes").alt == one.plot("bytes").alt

    def test_a_temporary_folder_lives_as_long_as_the_results(self):
        results = fedloom.compare(["fedavg"], Toy(), seeds=1, rounds=1, report=False)
        gc.collect()
        assert results.path.is_dir() and results.plot().alt
        path = results.path
        del results
        gc.collect()
        assert not path.exists()

    def test_without_a_finished_run_there_is_nothing_to_draw(self, tmp_path):
        def stop(*_):
            raise KeyboardInterrupt

        class Stopped:
            def __getattr__(self, name):
                return stop if name == "row" else lambda *a, **k: None

        with pytest.raises(KeyboardInterrupt):
            fedloom.compare(["fedavg"], Toy(), seeds=2, rounds=1, out=tmp_path / "c", watcher=Stopped(), report=False)
        with pytest.raises(fedloom.UsageError, match="has no finished run to draw; 2 are still to be done"):
            fedloom.load(tmp_path / "c").plot()
