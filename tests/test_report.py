"""The report says what the files say, whatever they hold, and loads nothing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import fedloom
from fedloom.report import write
from fedloom.report.clients import clients_figure
from fedloom.report.curves import panels
from fedloom.report.words import brief, duration, percent, privacy_statement, size
from fedloom.runs.record import Run
from fedloom.runs.spec import Spec
from fedloom.tasks.toy import Toy

HOSTILE = "<script>alert('x')</script>&\"<img src=http://evil.example/x onerror=y>$\\frac"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """A page as a reader has it: the text, the tags with their attributes, and the tables by id."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.open: list[tuple[str, str]] = []
        self.feed(self.source)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id", "")))
        if tag == "tr":
            self.tables.setdefault(self.inside(), []).append([])
        if tag in ("td", "th"):
            self.tables[self.inside()][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any(tag == "style" for tag, _ in self.open):
            return
        self.words.append(data)
        if any(tag in ("td", "th") for tag, _ in self.open):
            cell = self.tables[self.inside()][-1]
            cell[-1] = " ".join(f"{cell[-1]} {data}".split())

    def inside(self) -> str:
        return next((id for _, id in reversed(self.open) if id in ("results", "bytes", "metrics")), "")


def make(
    folder: Path,
    rounds: int = 6,
    clients: int = 4,
    every: int = 1,
    planned: int | None = None,
    status: str = "finished",
    model: bool = True,
    name: str = "fedavg",
    data: str = "digits",
    label: str = "",
    validation: bool = True,
) -> Run:
    """A run's folder as the library writes it; its validation accuracy is highest two evaluations before the last."""
    folder.mkdir()
    spec = Spec.of(
        {"method": {"name": name, "lr": 0.05}, "data": data, "clients": clients, "rounds": planned or rounds, "seed": 7}
    )
    (folder / "spec.yaml").write_text(spec.text("0.1.0"))
    everybody = list(range(clients))
    evaluated = [r for r in range(1, rounds + 1) if r % every == 0 or r == rounds]
    best = evaluated[-3] if len(evaluated) > 2 else evaluated[-1] if evaluated else 0
    metrics, ledger = [], []
    for r in range(1, rounds + 1):
        row = {"round": r, "seconds": 0.25, "cohort": clients, "replies": clients, "gradient_steps": 10}
        row |= {"train_loss": 2.0 / r, "up_bytes": 2000 * clients, "down_bytes": 1000 * clients, "peer_bytes": 0}
        row |= {"eval_up_bytes": 0, "eval_down_bytes": 0}
        kinds = [("train", "down", "local", "model", 1000), ("train", "up", "local", "delta", 2000)]
        if r in evaluated:
            accuracy = 0.5 + 0.4 * r / rounds
            row |= {
                "global_test_accuracy": accuracy if model else None,
                "global_test_loss": 1.0 / r if model else None,
                "validation_accuracy": (0.9 if r == best else 0.3) if validation else None,
                "personal_test_accuracy": accuracy - 0.01,
                "personal_test_accuracy_std": 0.1,
                "worst_client_accuracy": accuracy - 0.2,
                "eval_seconds": 0.5,
                "eval_down_bytes": 1000 * clients,
            }
            kinds.append(("evaluate", "down", "evaluate", "model", 1000))
        metrics.append(row)
        for kind, direction, function, field, count in kinds:
            verb = "call" if kind == "evaluate" else "mean"
            line = {"round": r, "kind": kind, "verb": verb, "direction": direction, "function": function}
            ledger.append(line | {"field": field, "bytes": count, "clients": everybody})
    table = [
        {
            "id": k,
            "name": f"{k}{label}",
            "train": 10 + k,
            "validation": 2,
            "test": 1 + k % 5,
            "labels": [3, 7 + k],
            "note": label,
        }
        for k in everybody
    ]
    partition = {"partition": "dirichlet:0.3", "classes": [f"a{label}", "b"], "population": clients, "clients": table}
    judged = [{"id": k, "accuracy": (k * 37 % 101) / 101, "n": 1 + k % 5} for k in everybody]
    manifest = {
        "fedloom": "0.1.0",
        "python": "3.11.7",
        "torch": "2.13.0",
        "numpy": "2.4.6",
        "platform": "Linux",
        "cpu": {"name": "A processor", "cores": 2},
        "device": "cpu",
        "seed": 7,
        "started": "2026-11-21T02:50:05+00:00",
        "status": status,
        "command": "fedloom run spec.yaml --out NEW_FOLDER",
        "privacy": [] if status == "running" else [{"verb": "mean", "function": "local", "fields": ["delta"]}],
    }
    for file, content in (("partition.json", partition), ("manifest.json", manifest)):
        (folder / file).write_text(json.dumps(content))
    if evaluated:
        (folder / "clients.json").write_text(json.dumps({"round": evaluated[-1], "clients": judged}))
    run = Run(folder)
    if rounds:
        run.append("metrics.jsonl", metrics)
        run.append("ledger.jsonl", ledger)
    if model and status == "finished":
        save_file({"weight": torch.zeros(20, 10), "bias": torch.zeros(10)}, folder / "model.safetensors")
    return run


def page(run: Run) -> Page:
    path = write(run)
    assert path == run.path / "report.html"
    assert (run.path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.path.glob(".*")), "a file written aside was left"
    return Page(path)


def results(page: Page) -> dict[str, list[str]]:
    return {head: cells for head, *cells in page.tables["results"]}


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> tuple[Run, Page]:
    run = make(tmp_path_factory.mktemp("report") / "usual")
    return run, page(run)


def test_the_result_is_the_round_of_the_best_validation_and_stands_beside_the_last(usual):
    run, seen = usual
    chosen, last = run.metrics[3], run.metrics[5]
    assert (run.selected["round"], run.final["round"]) == (4, 6)
    table = results(seen)
    assert table["After round"] == ["4 chosen by validation", "6 the last"]
    assert table["Global model, test accuracy"] == ["76.7 %", "90.0 %"]
    assert table["Global model, test accuracy"] == [percent(row["global_test_accuracy"]) for row in (chosen, last)]
    assert table["Global model, test loss"] == ["0.2500", "0.1667"]
    assert table["Personal test accuracy"] == ["75.7 % ± 10.0 %", "89.0 % ± 10.0 %"]
    assert table["Worst client, test accuracy"] == ["56.7 %", "70.0 %"]
    assert table["Validation accuracy"] == ["90.0 %", "30.0 %"]
    assert "76.7 % test accuracy of the global model after round 4 chosen by validation" in seen.text
    assert "75.7 % mean personal test accuracy after round 4 chosen by validation" in seen.text


def test_settings_versions_hardware_and_the_command_stand_on_the_page(usual):
    run, seen = usual
    for name, value in run.spec.method.items():
        assert name == "name" or f"{name} {value}" in seen.text
    for fact in (
        "seed 7",
        "6 of 6 rounds",
        "4 clients",
        "dirichlet:0.3",
        "python 3.11.7",
        "torch 2.13.0",
        "processor A processor, 2 cores",
        "started 2026-11-21 02:50:05 UTC",
        "numbers in the model 210",
        "training rows 46 (median 12, from 10 to 13 a client)",
        "fedloom run spec.yaml --out NEW_FOLDER",
        "1.50 s training, 0.25 s a round",
        "3.00 s evaluation",
        "60 gradient steps",
    ):
        assert fact in seen.text, fact


def test_bytes_are_those_of_the_ledger_with_evaluation_apart(usual):
    run, seen = usual
    lines = list(run.ledger)

    def total(kind, direction):
        return sum(
            line["bytes"] * len(line["clients"])
            for line in lines
            if (line["kind"], line["direction"]) == (kind, direction)
        )

    assert total("train", "up") == sum(row["up_bytes"] for row in run.metrics) == 48_000
    table = seen.tables["bytes"]
    assert ["Training: 72.0 kB"] in table
    assert ["client → server", "local", "delta", "2.0 kB", "8.0 kB", size(total("train", "up")), ""] in table
    assert ["server → client", "local", "model", "1.0 kB", "4.0 kB", size(total("train", "down")), ""] in table
    evaluation = table.index(["Evaluation, not counted above: 24.0 kB"])
    assert table[evaluation + 1] == ["server → client", "evaluate", "model", "1.0 kB", "4.0 kB", "24.0 kB", ""]
    assert "24.0 kB to clients" in seen.text
    assert "48.0 kB from clients" in seen.text


def test_rounds_of_evaluation_and_messages_between_peers_are_counted_as_they_are(tmp_path):
    run = make(tmp_path / "run", rounds=5, every=2)
    edges = {"round": 2, "kind": "train", "verb": "exchange", "direction": "peer", "function": "mix", "field": "model"}
    unfinished = {"round": 6, "kind": "train", "verb": "mean", "direction": "up", "function": "local", "field": "delta"}
    run.append("ledger.jsonl", [edges | {"bytes": 100, "edges": [[0, 1], [1, 2], [2, 0]]}])
    run.append("ledger.jsonl", [unfinished | {"bytes": 10**9, "clients": [0]}])  # a round that a kill cut off
    table = page(run).tables["bytes"]
    assert ["client → client", "mix", "model", "100 B", "60 B", "300 B", ""] in table
    assert ["server → client", "evaluate", "model", "1.0 kB", "4.0 kB", "12.0 kB", ""] in table  # 3 evaluated rounds
    assert ["Training: 60.3 kB"] in table


def test_the_table_of_rounds_has_every_number(usual):
    run, seen = usual
    head, *rows = seen.tables["metrics"]
    assert head == list(run.metrics[0])
    for row, cells in zip(run.metrics, rows, strict=True):
        assert [float(cell) for cell in cells] == pytest.approx(list(row.values()), rel=1e-3)


def test_nothing_is_loaded_or_run_and_every_picture_says_what_it_shows(usual):
    _, seen = usual
    for tag, attributes in seen.tags:
        assert tag not in ("script", "link", "iframe", "object", "base"), tag
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert value.startswith(("#", "data:image/png;base64,")), value
    assert not re.search(r"@import|url\((?!#)", seen.source)
    drawings = [attributes for _, attributes in seen.tags if attributes.get("role") == "img"]
    assert len(drawings) == 5
    assert any("global model ends at 90.0 %" in drawing["aria-label"] for drawing in drawings)
    assert any("worst 0.0 % (client 0)" in drawing["aria-label"] for drawing in drawings)
    assert all(drawing["aria-label"] for drawing in drawings)
    assert seen.tags[0] == ("html", {"lang": "en"})


def test_themed_pictures_take_their_colours_and_their_font_from_the_page(usual):
    _, seen = usual
    drawing = seen.source[seen.source.index('aria-label="Accuracy against') :]
    drawing = drawing[: drawing.index("</svg>")]
    assert "var(--global)" in drawing
    assert "#0072b2" not in drawing
    assert "personal mean ± std" in drawing  # text, and not outlines of glyphs
    assert 'width="' not in drawing[: drawing.index("<defs>")]


def test_what_comes_from_data_is_escaped(tmp_path):
    run = make(tmp_path / "run", rounds=2, name=HOSTILE, data=HOSTILE, label=HOSTILE, status="stopped")
    run.append("metrics.jsonl", [run.metrics[-1] | {"round": 3, "note": HOSTILE, f"client/{HOSTILE}": 1.0}])
    manifest = run.manifest | {"command": HOSTILE, "status": HOSTILE, "privacy": [
        {"verb": "call", "function": HOSTILE, "fields": [HOSTILE]}]}  # fmt: skip
    run.write_json("manifest.json", manifest)
    run.append("ledger.jsonl", [{"round": 1, "kind": "train", "verb": "call", "direction": "up", "function": HOSTILE,
                                 "field": HOSTILE, "bytes": 1, "clients": [0]}])  # fmt: skip
    seen = page(run)
    assert not {"script", "img"} & {tag for tag, _ in seen.tags}
    assert "<script>alert" not in seen.source
    assert "<img src=http" not in seen.source
    assert f"0{HOSTILE}" in seen.text
    assert seen.text.count(HOSTILE) >= 10


@pytest.mark.parametrize("status", ["running", "stopped", "failed"])
def test_an_unfinished_run_says_so_and_how_to_go_on(tmp_path, status):
    run = make(tmp_path / "a run", rounds=3, planned=9, status=status, every=5)
    seen = page(run)
    assert "Not finished" in seen.text
    assert "3 of 9 rounds" in seen.text
    assert f"fedloom resume '{run.path}'" in seen.text
    assert "numbers in the model" not in seen.text
    assert ("Not known before the run has ended." in seen.text) == (status == "running")


def test_a_run_whose_time_ran_out_says_so(tmp_path):
    run = make(tmp_path / "run", rounds=3, planned=9)
    spec = yaml.safe_load((run.path / "spec.yaml").read_text()) | {"max_seconds": 5.0}
    (run.path / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert "Ended after 3 of 9 rounds: max_seconds=5.0 is spent." in page(run).text


def test_a_run_without_a_round_or_an_evaluation_has_a_page(tmp_path):
    begun = page(make(tmp_path / "begun", rounds=0, planned=9, status="failed", model=False))
    assert "No round has been evaluated yet." in begun.text
    assert "0 of 9 rounds" in begun.text
    assert not begun.tables.get("metrics")
    run = make(tmp_path / "trained", rounds=3, every=3, planned=9, status="stopped")
    run.write("metrics.jsonl", lambda file: file.writelines(json.dumps(r).encode() + b"\n" for r in run.metrics[:2]))
    (run.path / "clients.json").unlink()
    assert [panel.title for panel in panels(run)] == ["Loss"]
    assert "No round has been evaluated yet." in page(run).text


def test_a_method_without_a_global_model_is_judged_by_its_personal_ones(tmp_path):
    run = make(tmp_path / "run", model=False)
    seen = page(run)
    assert "75.7 % mean personal test accuracy after round 4" in seen.text
    assert results(seen)["Global model, test accuracy"] == ["–", "–"]
    drawn = {panel.title: [curve.label for curve in panel.curves] for panel in panels(run)}
    assert drawn["Accuracy"] == ["personal mean ± std", "worst client"]
    assert drawn["Loss"] == ["training"]
    assert "nan" not in re.sub(r"base64,[^\"]*", "", seen.source).lower().split()


def test_one_round_of_one_client(tmp_path):
    seen = page(make(tmp_path / "run", rounds=1, clients=1))
    assert results(seen)["After round"] == ["1"]
    assert "after round 1 chosen by validation, and the last" in seen.text


def test_without_validation_data_the_last_round_is_the_result_and_says_so(tmp_path):
    run = make(tmp_path / "run", validation=False)
    seen = page(run)
    assert results(seen)["After round"] == ["6"]
    assert "after round 6 the last: there are no validation data to choose by" in seen.text
    assert all(panel.chosen is None for panel in panels(run))


def test_curves_are_the_files_numbers_at_the_rounds_that_have_them(tmp_path):
    run = make(tmp_path / "run", rounds=7, every=3)
    accuracy, loss, spent = panels(run)
    assert accuracy.curves[0].x == [3, 6, 7]
    assert accuracy.curves[0].y == [row["global_test_accuracy"] for row in run.metrics if "validation_accuracy" in row]
    assert loss.curves[0].x == [1, 2, 3, 4, 5, 6, 7]
    assert loss.curves[0].y == [row["train_loss"] for row in run.metrics]
    assert spent.curves[0].x == pytest.approx([36, 72, 84])  # kB: 12 a round
    assert spent.across.startswith("kB")
    assert (accuracy.chosen, spent.chosen) == (3, pytest.approx(36))


def test_names_in_any_script_pass_without_a_warning(tmp_path):
    seen = page(make(tmp_path / "run", rounds=1, data="医院", label="病"))
    assert "fedavg on 医院" in seen.text
    assert "a病" in seen.text


def test_accuracy_for_bytes_needs_bytes_that_grow(tmp_path):
    run = make(tmp_path / "run", rounds=3)
    still = [row | {"up_bytes": 0, "down_bytes": 9 if row["round"] == 1 else 0} for row in run.metrics]
    run.write("metrics.jsonl", lambda file: file.writelines(json.dumps(row).encode() + b"\n" for row in still))
    assert [panel.title for panel in panels(run)] == ["Accuracy", "Loss"]


def test_a_loss_that_is_no_number_is_left_out_and_told(tmp_path):
    run = make(tmp_path / "run")
    run.append("metrics.jsonl", [run.metrics[-1] | {"round": 7, "train_loss": float("nan"), "replies": 3}])
    assert 7 not in next(panel for panel in panels(run) if panel.title == "Loss").curves[0].x
    seen = page(run)
    assert "The training loss is no finite number in 1 round, first in round 7." in seen.text
    assert "In 1 of 7 rounds fewer replies arrived than clients were asked." in seen.text


def test_a_long_run_of_many_clients_is_a_small_page(tmp_path):
    path = write(make(tmp_path / "run", rounds=500, clients=100))
    assert path.stat().st_size < 1_000_000


def test_more_rounds_than_a_page_bears_are_thinned(tmp_path):
    seen = page(make(tmp_path / "run", rounds=2100, clients=1))
    assert "2,100 rounds, as in metrics.jsonl (one in 3 shown)" in seen.text
    assert [cells[0] for cells in seen.tables["metrics"][1:4]] == ["1", "4", "7"]


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_every_client_has_its_stem_and_a_dot_of_its_size(count):
    judged = [{"id": k, "accuracy": (k * 37 % 101) / 101, "n": 1 + k % 5} for k in range(count)]
    axes = clients_figure(judged).axes[0]
    stems, others, worst = axes.collections
    assert len(stems.get_segments()) == count == len(others.get_offsets()) + 1
    assert worst.get_label().startswith("worst: client 0, 0.0 %")
    mean = sum(c["accuracy"] * c["n"] for c in judged) / sum(c["n"] for c in judged)
    assert axes.lines[0].get_label() == f"mean {percent(mean)}"
    if count == 3:
        sizes = {round(x): area for (x, _), area in zip(others.get_offsets(), others.get_sizes(), strict=True)}
        assert sizes[2] / sizes[1] == pytest.approx(3 / 2)  # clients 1 and 2, with 2 and 3 test rows


def test_a_task_given_in_python_has_no_classes_to_picture(tmp_path):
    run = make(tmp_path / "run")
    clients = [{"id": 0, "train": 5, "validation": 1, "test": 2}]
    run.write_json("partition.json", {"partition": "given", "classes": [], "population": 1, "clients": clients})
    seen = page(run)
    assert "training rows 5 (median 5, from 5 to 5 a client)" in seen.text
    assert "Rows of every client, and their classes" not in seen.text


def test_a_real_run_gets_its_report(tmp_path):
    run = fedloom.run("fedavg", out=tmp_path / "run", rounds=2, clients=3)
    seen = Page(run.path / "report.html")
    assert results(seen)["Global model, test accuracy"][0] == percent(run.selected["global_test_accuracy"])
    up = sum(line["bytes"] * len(line["clients"]) for line in run.ledger
             if line["direction"] == "up" and line["kind"] != "evaluate")  # fmt: skip
    assert f"{size(up)} from clients" in seen.text
    assert "local: the server learns only the (weighted) average of: delta, n." in seen.text


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("mean", "local: the server learns only the (weighted) average of: a, b."),
        ("call", "local: the server sees each client's: a, b."),
        ("stream", "local: the server sees each client's: a, b."),
        ("submit", "local: the server sees each client's: a, b."),
        ("exchange", "local: peers see each other's: a, b; the server sees nothing."),
    ],
)
def test_every_verb_says_what_it_gives_away(verb, said):
    manifest = {"status": "finished", "privacy": [{"verb": verb, "function": "local", "fields": ["a", "b"]}]}
    assert privacy_statement(manifest) == [said, "No differential privacy: no guarantee."]


def test_files_are_named_without_their_folders():
    assert [brief(name) for name in ("/home/me/x.csv", "hf:ylecun/mnist", "digits")] == [
        "x.csv",
        "hf:ylecun/mnist",
        "digits",
    ]


def test_no_verb_no_content_and_no_end_are_told_apart():
    def first(**manifest):
        return privacy_statement(manifest)[0]

    silent = {"verb": "call", "function": "f", "fields": []}
    assert first(status="finished", privacy=[silent]) == "f: replies without content; the server sees only who replied."
    assert first(status="finished", privacy=[]) == "No client sent anything."
    assert first(status="running", privacy=[]) == "Not known before the run has ended."


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (386_660, "386.7 kB"), (12e6, "12.0 MB"), (1.5e9, "1.5 GB"),
     (1e16, "10,000.0 TB")],
)  # fmt: skip
def test_size(count, said):
    assert size(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0.00 s"), (0.084, "0.08 s"), (9.996, "10.0 s"), (12.34, "12.3 s"), (59.96, "1 min 0 s"), (200, "3 min 20 s"),
     (3599.6, "1 h 0 min"), (7500, "2 h 5 min"), (4_000_000, "1,111 h 7 min")],
)  # fmt: skip
def test_duration(seconds, said):
    assert duration(seconds) == said


def test_nobody_is_missed_where_a_server_step_waits_for_some(tmp_path):
    run = fedloom.run("fedbuff", Toy(), fields={"buffer": 2}, rounds=3, out=tmp_path / "run")
    assert all(0 < row["replies"] < row["cohort"] for row in run.metrics)
    assert "fewer replies" not in page(run).text
