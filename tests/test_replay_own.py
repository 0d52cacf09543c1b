"""A run between machines on rows of clients' own, carried out again on the one machine that has them all."""

import json
from dataclasses import replace

import pytest
from federation import Federation, spec_of
from test_deploy import left
from test_own_kinds import KINDS
from test_own_kinds import named as kind_and_form
from test_own_kinds import site as site
from test_own_rows import hospitals as hospitals
from test_own_rows import spec_at
from test_remote import difference
from test_rowless import columns_of, without_rows

from fedloom.cli import main
from fedloom.deploy.replay import confirm, places, replayed
from fedloom.errors import RunError, UsageError
from fedloom.runs.record import Run

pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


def federation_of(hospitals, certificates, **rounds):
    federation = Federation(hospitals / "fed", certificates, **rounds)
    federation.data_of = lambda name: f'file = "../{name}.csv"'
    return federation


def files(hospitals, names="abc"):
    return places([f"{name}={hospitals / name}.csv" for name in names])


@pytest.mark.parametrize("method", ["scaffold", "ditto"])
def test_a_replay_has_the_bits_where_the_server_had_a_table(method, certificates, hospitals):
    run = federation_of(hospitals, certificates).run(replace(spec_at(hospitals, method=method), clients=None)).record
    again = replayed(run.path, data=files(hospitals, "cab"))
    again.go()
    mine, theirs = left(again.record), left(run)
    assert difference(mine, theirs) is None


def test_a_replay_by_the_clients_settings_has_the_bits_where_the_server_had_no_row(certificates, hospitals, capsys):
    columns_of(hospitals)
    federation = federation_of(hospitals, certificates)
    run = federation.run(replace(without_rows(hospitals), clients=None)).record
    given = [word for name in "abc" for word in ("--data", f"{name}={federation.folder / name}.toml")]
    assert main(["replay", str(run.path), *given, "--out", str(hospitals / "again")]) == 0
    assert difference(left(Run(hospitals / "again")), left(run)) is None
    assert f"The same bits as {run.path}." in " ".join(capsys.readouterr().out.split())


def test_rows_that_are_as_many_and_others_are_told_by_the_bits(certificates, hospitals, capsys):
    run = federation_of(hospitals, certificates).run(replace(spec_at(hospitals), clients=None)).record
    head, *rows = (hospitals / "a.csv").read_text().splitlines()
    (hospitals / "a.csv").write_text("\n".join([head, *reversed(rows)]) + "\n")
    given = [word for name in "abc" for word in ("--data", f"{name}={hospitals / name}.csv")]
    assert main(["replay", str(run.path), *given, "--out", str(hospitals / "again")]) == 1
    said = capsys.readouterr()
    assert "again has other bits than" in said.err and "from round 1 on (train_loss is " in said.err
    assert "The same bits" not in said.out


def test_bits_are_those_of_what_was_learned(certificates, tmp_path):
    run = Federation(tmp_path, certificates, clients=2).run(spec_of()).record
    again = replayed(run.path, tmp_path / "again").go()
    confirm(run.path, again)
    rows = (again.path / "metrics.jsonl").read_text()

    def changed(round, **values):
        lines = [json.loads(line) for line in rows.splitlines()]
        lines[round - 1] |= values
        (again.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return Run(again.path)

    confirm(run.path, changed(2, seconds=7.0, up_bytes=1))
    for name in ("train_loss", "global_test_loss", "validation_accuracy", "personal_test_accuracy"):
        with pytest.raises(RunError, match=rf"other bits than \S+ from round 2 on \({name} is 0.5, and was 0"):
            confirm(run.path, changed(2, **{name: 0.5}))
    same = changed(2)
    data = bytearray((again.path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (again.path / "model.safetensors").write_bytes(data)
    with pytest.raises(RunError, match=r"other bits than \S+ in its model: its clients had other data"):
        confirm(run.path, same)


@pytest.mark.parametrize(
    "site", [(kind, True) for kind in KINDS if kind in ("windows", "stream", "segmentation")], indirect=True,
    ids=kind_and_form,
)  # fmt: skip
def test_a_replay_of_another_kind_has_the_bits(site, certificates):
    folder, ending, spec = site
    federation = Federation(folder / "fed", certificates, clients=2)
    federation.data_of = lambda name: f'file = "../{name}{ending}"'
    run = federation.run(replace(spec, clients=None)).record
    again = replayed(run.path, data=places([f"{name}={folder / name}{ending}" for name in "ab"]))
    again.go()
    assert difference(left(again.record), left(run)) is None


def test_a_replay_hears_whom_the_server_heard(certificates, hospitals):
    federation = federation_of(hospitals, certificates, start=2)
    spec = replace(spec_at(hospitals, method="fedavg", rounds=60), clients=None)
    run = federation.run_with_late(spec, "c", 2).record
    replies = [row["replies"] for row in run.metrics]
    assert replies[:2] == [2, 2] and replies[-1] == 3
    again = replayed(run.path, data=files(hospitals))
    again.go()
    assert left(again.record)["model"] == left(run)["model"]
    assert [row["replies"] for row in again.record.metrics] == replies


def test_a_replay_without_the_rows_says_what_to_give(certificates, hospitals):
    columns_of(hospitals)
    run = federation_of(hospitals, certificates).run(replace(without_rows(hospitals), clients=None)).record
    with pytest.raises(UsageError, match=r"client a of .* --data a=FILE, or --data a=CLIENT.toml"):
        replayed(run.path)


def test_data_that_are_others_than_they_were_are_told(certificates, hospitals):
    run = federation_of(hospitals, certificates).run(replace(spec_at(hospitals), clients=None)).record
    with pytest.raises(UsageError, match=r"client c of .* had data of its own .* --data c=FILE"):
        replayed(run.path, data=files(hospitals, "ab"))
    swapped = places([f"a={hospitals / 'b.csv'}", f"b={hospitals / 'a.csv'}", f"c={hospitals / 'c.csv'}"])
    with pytest.raises(UsageError, match=r"client a of .* and here are others"):
        replayed(run.path, data=swapped)
    with pytest.raises(UsageError, match="had no client 'd'; it had a, b, c"):
        replayed(run.path, data=places([f"d={hospitals / 'a.csv'}"]))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["north"], "is not of the form NAME=FILE"),
        (["=a.csv"], "is not of the form NAME=FILE"),
        (["a=x.csv", "a=y.csv"], "names the client a twice"),
        (["a=nowhere.toml"], "cannot read nowhere.toml"),
    ],
)
def test_places_that_are_none_are_told(texts, expected):
    with pytest.raises(UsageError, match=expected):
        places(texts)


def test_a_function_may_be_a_place():
    assert places(["a=site.py:load"])["a"].data.loader == "site.py:load"
