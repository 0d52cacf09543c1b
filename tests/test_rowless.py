"""A server without a row of its own: a site's file says what rows mean, and clients alone judge."""

import re
from dataclasses import replace

import pytest
from federation import Federation
from test_deploy import left
from test_own_rows import Joined, own
from test_own_rows import hospitals as hospitals
from test_remote import difference

from fedloom import tasks
from fedloom.cli import main
from fedloom.data.files import COLUMNS
from fedloom.deploy.config import ServerConfig
from fedloom.deploy.serve import Serving
from fedloom.errors import UsageError
from fedloom.report.page import render
from fedloom.runs.experiment import Experiment
from fedloom.runs.record import Run
from fedloom.runs.spec import Spec
from fedloom.tasks._described import Meaning, at_server

pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


def columns_of(folder, table="a", *settings):
    """The file that a site writes of its table; gives its path."""
    out = folder / f"site{COLUMNS}"
    out.unlink(missing_ok=True)
    asked = settings or ("label=diagnosis",)
    assert main(["columns", str(folder / f"{table}.csv"), *asked, "--out", str(out)]) == 0
    return out


def without_rows(folder, **settings):
    return Spec.of({"method": "scaffold", "data": str(folder / f"site{COLUMNS}"), "rounds": 3, "clients": 3} | settings)


def test_a_server_without_rows_has_the_bits_of_a_run_without_a_global_test(certificates, hospitals, capsys):
    columns_of(hospitals)
    whole = without_rows(hospitals)
    federation = Federation(hospitals / "run", certificates)
    federation.data_of = lambda name: f'file = "../{name}.csv"'
    made = federation.run(replace(whole, clients=None))
    parts = tuple(own(hospitals, name, number, whole) for number, name in enumerate("abc"))
    here = Experiment(whole, Joined(at_server(whole), parts)).begin(None)
    here.go()
    assert difference(left(made.record), left(here.record)) is None

    run = Run(made.record.path)
    row, tests = run.selected, sum(part.rows_of(k, "test") for k, part in enumerate(parts))
    assert row["global_test_accuracy"] is None and row["global_test_loss"] is None
    assert row["validation_accuracy"] > 0.5 and row["personal_test_accuracy"] > 0.5
    assert sum(client["n"] for client in run.clients["clients"]) == tests == 14 + 16 + 18
    told = " ".join(run.partition["apart"])
    assert "The server has no rows" in told and "56 of the 70 rows of a.csv" in told and "no global test" in told
    assert run.read_json("confusion.json").get("global") is None
    page = render(run)
    assert "The server has no rows" in page and "Personal test accuracy" in page
    capsys.readouterr()
    assert main(["show", str(run.path)]) == 0
    shown = capsys.readouterr().out
    assert "personal" in shown and "56 of the 70 rows of a.csv" in shown
    said = run.predict(str(hospitals / "b.csv"))
    assert len(said) == 80 and {*said} == {"ill", "well"}


def test_a_file_of_columns_has_no_row_and_reads_as_the_table_did(hospitals):
    out = columns_of(hospitals)
    text = out.read_text()
    assert all(line.partition(",")[0] not in text for line in (hospitals / "a.csv").read_text().splitlines()[1:])
    table = tasks.build(
        Spec.of(
            {"data": str(hospitals / "a.csv"), "label": "diagnosis", "clients": 1, "partition": "iid", "validation": 0}
        )
    )
    assert Meaning.read(out) == replace(Meaning.of(table), model=None)
    task = at_server(without_rows(hospitals))
    assert task.shape == table.shape and len(task.global_test()) == 0 and task.outputs() == table.outputs()
    assert task.preprocessing() == table.preprocessing() and not any(task.rows_of(k, "train") for k in range(3))
    sizes = [[one.shape for one in made.network().parameters()] for made in (task, table)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"label": "diagnosis"}, "label=diagnosis: .* give it to fedloom columns"),
        ({"partition": "iid"}, "partition=iid: .* no rows to deal"),
        ({"public": 0.1}, "public=0.1: .* no rows to deal"),
        ({"shared_data": 0.1}, "shared_data=0.1 does not go with clients that have rows of their own"),
        ({"newcomers": 1}, "newcomers=1.0 does not go"),
        ({"class_weights": "balanced"}, "counts the rows of all clients"),
        ({"problem": "regression"}, "rows of problem=classification mean, .* problem=regression"),
        ({"problem": "oracle:0.5"}, "dealt by the sizes of all clients' pools"),
        ({"data": "nowhere.columns.yaml"}, "cannot read nowhere.columns.yaml"),
    ],
    ids=str,
)
def test_what_a_server_without_rows_cannot_follow_is_told_at_once(settings, expected, certificates, hospitals):
    columns_of(hospitals)
    federation = Federation(hospitals / "run", certificates)
    spec = without_rows(hospitals, **{"method": "fedavg"} | settings)
    with pytest.raises(UsageError, match=expected):
        Serving(spec, ServerConfig.read(federation.folder / "server.toml"), hospitals / "run" / "run")


def test_a_file_of_columns_is_no_data_of_a_run_on_one_machine(hospitals):
    columns_of(hospitals)
    with pytest.raises(UsageError, match="says what rows mean, and has none; it is for fedloom server"):
        tasks.build(without_rows(hospitals))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text.replace("fedloom:", "other:"), "does not say what rows mean"),
        (lambda text: text.replace("kind: tabular", "sort: tabular"), "does not say what rows mean"),
        (lambda text: text.replace("tokens: ''", "tokens: tokenizer:/etc"), "need more than itself"),
        (lambda text: text.replace("problem: classification", "problem: finetune"), "does not say|another kind"),
        (lambda text: text + "more: 1\n", "does not say what rows mean"),
    ],
)
def test_a_file_of_columns_that_is_none_is_told(change, expected, hospitals):
    out = columns_of(hospitals)
    out.write_text(change(out.read_text()))
    with pytest.raises(UsageError, match=expected):
        Meaning.read(out)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rounds=3"], "rounds says nothing of what rows mean"),
        (["problem=causal"], "its rows are drawn"),
        (["label=diagnosis", "--out", "mine.yaml"], "has to end in .columns.yaml"),
    ],
)
def test_what_is_no_table_to_be_described_is_told(words, expected, hospitals, capsys):
    assert main(["columns", str(hospitals / "a.csv"), *words]) == 2
    assert re.search(expected, capsys.readouterr().err.replace("\n", " "))


@pytest.mark.parametrize("method", ["fedgen", "fcp", "fedproto", "ccvr", "fedbuff", "apfl", "ifca"])
def test_methods_of_all_sorts_learn_without_a_global_test(method, hospitals):
    columns_of(hospitals)
    spec = without_rows(hospitals, method=method)
    parts = tuple(own(hospitals, name, number, spec) for number, name in enumerate("abc"))
    made = Experiment(spec, Joined(at_server(spec), parts)).begin(None)
    made.go()
    row = made.record.selected
    assert row["global_test_accuracy"] is None and 0.4 < row["personal_test_accuracy"] <= 1


def test_measures_that_are_asked_for_are_those_of_clients(hospitals):
    columns_of(hospitals)
    spec = without_rows(hospitals, measures="auc,f1", choose_by="auc")
    parts = tuple(own(hospitals, name, number, spec) for number, name in enumerate("abc"))
    made = Experiment(spec, Joined(at_server(spec), parts)).begin(None)
    made.go()
    row = made.record.selected
    assert row["global_test_auc"] is None and row["personal_test_auc"] > 0.5 and row["chosen_by"] == "auc"
