"""What pages show as maps and panels, and what a sweep's page says of its trials and its choice."""

import json
import math
import re

import pytest

import fedloom
from fedloom.comparison import statistics
from fedloom.comparison.layout import trials_file
from fedloom.comparison.results import Results
from fedloom.quality import ACCURACY, RMSE
from fedloom.report.comparison import write as write_comparison
from fedloom.report.curves import panels
from fedloom.report.maps import by_round, map_figure, two_fields
from fedloom.report.page import FEW, render
from fedloom.report.sweeps import chosen, field_map, one_method, searched, subject
from fedloom.tasks.toy import Toy


def drawn(figure):
    """The numbers that stand in a map, by (row, column), and its shades."""
    axes = figure.axes[0]
    numbers = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}
    return numbers, axes.images[0].get_array()


def test_a_map_has_a_number_a_cell_and_the_better_is_the_darker():
    cells = [[0.5, None, 0.9], [0.25, 1.0, math.nan]]
    numbers, shades = drawn(map_figure(cells, "share", "high", ("a", [1, 2]), ("b", ["x", "y", "z"])))
    assert numbers == {(0, 0): "50.0", (0, 2): "90.0", (1, 0): "25.0", (1, 1): "100.0"}
    assert shades[1, 1] > shades[0, 2] > shades[0, 0] > shades[1, 0] and shades.mask[0, 1] and shades.mask[1, 2]
    _, errors = drawn(map_figure([[1.0, 3.0]], "amount", "low", ("a", [1]), ("b", [1, 2])))
    assert errors[0, 0] > errors[0, 1]
    axes = map_figure(cells, "share", "high", ("a", [1, 2]), ("b", ["x", "y", "z"])).axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("a", "b")
    assert [one.get_text() for one in axes.get_xticklabels()] == ["x", "y", "z"]


def test_clients_over_rounds_keep_their_lines_when_some_are_not_judged():
    lines = [
        {"round": 1, "id": [0, 2], "accuracy": [0.1, 0.3], "n": [5, 5]},
        {"round": 2, "id": [], "n": []},
        {"round": 4, "id": [1, 2], "accuracy": [0.2, None], "n": [5, 5]},
    ]
    assert by_round(lines, ACCURACY) == ([0, 1, 2], [1, 4], [[0.1, None], [None, 0.2], [0.3, None]])
    assert by_round(lines, RMSE) == ([], [], [])
    many = [{"round": r, "id": list(range(250)), "accuracy": [0.5] * 250} for r in range(1000)]
    ids, rounds, cells = by_round(many, ACCURACY)
    assert len(ids) == len(cells) <= 100 and len(rounds) == len(cells[0]) <= 100 and ids[:3] == [0, 3, 6]


def test_two_fields_are_those_that_move():
    grid = {f"{a}{b}": {"lr": a, "mu": b, "batch": 4} for a in (1, 2) for b in (3, 4)}
    assert two_fields(grid) == ("lr", "mu")
    assert two_fields({"a": {"lr": 1, "mu": 1}, "b": {"lr": 2, "mu": 1}}) is None
    assert two_fields(grid | {"c": {"lr": 1, "mu": 3, "batch": 8}}) is None


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    settings = {"attack": "sign_flip:0.2", "aggregate": "krum:f=1", "clients": 6, "rounds": 4, "measures": "auc"}
    return fedloom.run(
        "fedavg", problem="stream:2,rounds=2", out=tmp_path_factory.mktemp("maps") / "run", report=False, **settings
    )


def test_the_page_of_a_run_shows_tasks_clients_attack_and_measures(stream):
    page = render(stream)
    for title in ("Task by task", "Test accuracy of clients, round by round", "Attack", "AUC"):
        assert f"<figcaption>{title}</figcaption>" in page
    assert page.count("<figcaption>AUC</figcaption>") == 1
    assert "Over the stream of tasks: on the tasks so far" in page and "<span>mlp:64</span>" in page
    titles = {panel.title: panel for panel in panels(stream)}
    assert [curve.label for curve in titles["Attack"].curves] == ["precision", "recall"]
    assert [row["attack/recall"] for row in stream.metrics] == titles["Attack"].curves[1].y


def hesitant(y_true, scores):
    """Least sure is best: the first round of all."""
    return -float(scores.max(1).mean())


def test_what_stands_client_by_client_is_of_the_round_of_the_headline(stream):
    lines = list(stream.lines("clients.jsonl"))
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    columns = {client["id"]: client for client in stream.clients["clients"]}
    assert lines[-1]["id"] == list(columns) and lines[-1]["accuracy"] == [c["accuracy"] for c in columns.values()]
    early = fedloom.run("fedavg", Toy(), rounds=3, measures=(hesitant,), choose_by="hesitant")
    first, last = (next(one for one in early.lines("clients.jsonl") if one["round"] == k) for k in (1, 3))
    mean, late = (f"{100 * sum(line['accuracy']) / 4:.1f}" for line in (first, last))
    assert early.selected["round"] == 1 and mean != late
    page = " ".join(render(early).split())
    assert "test accuracy after round 1, a dot for each client" in page
    assert f"Test accuracy of 4 clients: mean {mean} %" in page and "% of 12 rows" in page


def test_epsilon_has_a_curve():
    run = fedloom.run("fedavg", Toy(), rounds=3, cohort=2, participation="poisson", dp="client:noise=1.0,clip=1.0")
    panel = next(panel for panel in panels(run) if panel.title.startswith("Privacy"))
    assert panel.curves[0].y == [row["dp/epsilon"] for row in run.metrics] == sorted(panel.curves[0].y)


def test_a_worst_client_of_few_rows_is_marked():
    class Few(Toy):
        def data(self, client, split):
            data = super().data(client, split)
            return (
                type(data)(data.inputs, 2 - data.labels, data.rows[: FEW - 1])
                if split == "test" and client == 1
                else data
            )

    few = fedloom.run("fedavg", Few((30, 20, 25)), rounds=4, lr=0.3)
    worst = min(few.chosen_clients["clients"], key=lambda one: one["accuracy"])
    marked = f"The worst client (1) has {FEW - 1} test rows only"
    assert (worst["id"] == 1) and marked in render(few)
    assert "test rows only" not in render(fedloom.run("fedavg", Toy((30, 20, 25)), rounds=1))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    over = {"mu": [0.1, 1.0], "lr": [0.001, 0.2]}
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    return fedloom.sweep("fedprox", Toy(), over=over, seeds=2, rounds=2, out=folder)


def test_the_page_of_a_sweep_names_its_method_and_what_was_chosen(swept):
    page = (swept.path / "report.html").read_text()
    heading = re.sub(r"<[^>]+>", "", re.search(r"<h1>(.*?)</h1>", page)[1])
    assert heading.startswith("fedprox on") and "4 ways" in heading
    best, score, by = swept.chosen(swept.settings[0])
    assert "lr=0.2" in best and by == ACCURACY
    assert chosen(swept) == [f"{swept.settings[0]}: {best}, validation accuracy {100 * score:.1f} %"]
    assert chosen(swept)[0] in page and "by mu and lr</figcaption>" in page
    assert one_method(swept) == "fedprox" and "4 clients" in subject(swept, [swept.cells[0].run])


def test_a_map_of_two_fields_has_the_scores_of_the_table(swept):
    from fedloom.comparison.table import table

    made = table(swept)
    (picture,) = field_map(swept, made, swept.settings[0])
    for row in made.rows:
        fields = swept.spec.methods[row.method]
        assert f"mu={fields['mu']}, lr={fields['lr']}: {100 * row.score.mean:.1f} %" in picture.alt


def test_a_comparison_of_methods_is_no_sweep_and_names_its_data(tmp_path):
    made = fedloom.compare(["fedavg", "local"], "digits", clients=4, seeds=1, rounds=1, out=tmp_path / "c")
    page = (tmp_path / "c/report.html").read_text()
    assert one_method(made) is None and chosen(made) == [] and "compared on</span> digits</h1>" in page
    assert "<span>4 clients</span>" in page and "<span>mlp:64</span>" in page


def test_trials_stand_on_the_page_the_best_first(swept):
    folder, setting, method = swept.path, swept.settings[0], swept.methods[0]
    file = trials_file(folder, setting, method)
    file.parent.mkdir(parents=True, exist_ok=True)
    tried = [
        {"number": k, "fields": {"lr": lr}, "validation_rmse": value, "error": error}
        for k, (lr, value, error) in enumerate([(0.1, 3.0, None), (0.25, 2.0, None), (0.5, None, "it broke")])
    ]
    file.write_text("".join(json.dumps(one) + "\n" for one in tried))
    ((whose, heads, rows),) = searched(Results.read(folder))
    assert whose == f"{setting}, {method}" and heads == ["trial", "lr", "validation RMSE"]
    assert rows == [["1", "0.25", "2"], ["0", "0.1", "3"], ["2", "0.5", "it broke"]]
    page = write_comparison(Results.read(folder)).read_text()
    assert "What was tried" in page and "<td>it broke</td>" in page


def test_validation_chooses_the_least_of_what_is_better_when_low(tmp_path):
    over = {"lr": [0.001, 0.1]}
    made = fedloom.sweep("fedavg", "diabetes", over=over, problem="regression", clients=3, seeds=1, rounds=3,
                         out=tmp_path / "s", report=False)  # fmt: skip
    errors = made.validated(made.settings[0])
    method, score, by = made.chosen(made.settings[0])
    assert by == RMSE and score == min(errors.values()) == errors[method] and len(set(errors.values())) == 2


def test_two_seeds_have_no_effect_size():
    three = statistics.paired({0: 1.0, 1: 2.0, 2: 4.0}, {0: 0.5, 1: 1.0, 2: 1.5}, "x", "t")
    two = statistics.paired({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.0}, "x", "t")
    assert three.effect is not None and two.effect is None and two.difference.mean == 0.75
