"""Several series within a client, and a time to sort their rows by: windows as plain Python cuts them."""

import csv
import datetime
import json
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest
import torch
from test_windows import raw

import fedloom
from fedloom.cli import main
from fedloom.errors import UsageError
from fedloom.random import numpy_stream

SIZES = {("north", "m2"): 40, ("north", "m1"): 25, ("north", "m3"): 9, ("south", "m1"): 31, ("south", "m10"): 52}
FIRST = datetime.date(2023, 11, 20)
TIMES = {
    "number": lambda tick: 7.5 * tick - 40,
    "iso": lambda tick: str(FIRST + datetime.timedelta(3 * tick)),
    "german": lambda tick: f"{FIRST + datetime.timedelta(3 * tick):%d.%m.%Y}",
    "date": lambda tick: FIRST + datetime.timedelta(3 * tick),
    "hours": lambda tick: f"2024-01-{1 + tick // 20:02} {tick % 20:02}:30:00",
}


def rows(kind="number", sizes=SIZES, seed=1):
    """A row for each tick of each series, mixed; `place` numbers them from series to series."""
    made, draw = [], numpy_stream(seed, "test", "series")
    for number, ((site, machine), size) in enumerate(sizes.items()):
        for tick in range(size):
            place = 100 * number + tick
            made.append({"site": site, "machine": machine, "time": TIMES[kind](tick), "place": place + 0.25})
            made[-1] |= {"noise": place * 0.6180339887 % 1, "level": place + 0.5}
    return [made[place] for place in draw.permutation(len(made))]


def columns(made):
    return {name: [row[name] for row in made] for name in made[0]}


def oracle(made, key, length, stride=1, horizon=0, share=0.2, validation=0.1, by="machine"):
    """By client and split, the places of each window and of its target, as plain Python makes them of a list of rows.

    `key` says by what the rows of a series are sorted.
    """
    series = defaultdict(list)
    for at, row in enumerate(made):
        series[row["site"], row[by] if by else ""].append((key(at, row), int(row["place"])))
    found = defaultdict(list)
    for (site, _), own in sorted(series.items()):
        places = [place for _, place in sorted(own)]
        test = round(share * len(places))
        rest = len(places) - test
        held = int(rest * validation + 1e-9)
        parts = {
            "train": places[: rest - held],
            "validation": places[rest - held : rest],
            "test": places[rest:],
        }
        for split, part in parts.items():
            for begin in range(0, len(part), stride):
                if begin + length + horizon <= len(part):
                    window = part[begin : begin + length]
                    found[site, split].append((window, part[begin + length - 1 + horizon]))
    return found


def of_task(task, sites=("north", "south")):
    found = {}
    for client, site in enumerate(sites):
        for split in ("train", "validation", "test"):
            data = task.data(client, split)
            if len(data):
                x, y = raw(task, data)
                found[site, split] = list(zip(x.tolist(), y.tolist(), strict=True))
    return found


SETTINGS = {"problem": "regression", "label": "level", "partition": "column:site", "keep": "place"}


def tick(_, row):
    return int(row["place"]) % 100


@pytest.mark.parametrize("kind", TIMES)
@pytest.mark.parametrize(
    ("text", "cut"), [("4", (4,)), ("3,stride=2,horizon=1", (3, 2, 1)), ("5,3,2", (5, 3, 2)), ("2", (2,))]
)
def test_windows_are_those_of_the_oracle(kind, text, cut):
    made = rows(kind)
    data = pa.table(columns(made)) if kind == "date" else columns(made)
    task = fedloom.problem(data, windows=f"{text},series=machine,time=time", validation=0.3, **SETTINGS)
    assert of_task(task) == oracle(made, tick, *cut, validation=0.3)
    assert task.shape == (cut[0], 2)


@pytest.mark.parametrize(("share", "validation"), [(0.5, 0.0), (0.35, 0.15)])
def test_shares_are_of_each_series(share, validation):
    made = rows("iso")
    task = fedloom.problem(
        columns(made), windows="3,series=machine,time=time", test_share=share, validation=validation, **SETTINGS
    )
    assert of_task(task) == oracle(made, tick, 3, share=share, validation=validation)


def test_without_a_time_rows_stay_in_the_order_of_the_file():
    made = rows()
    task = fedloom.problem(columns(made), windows="4,series=machine", validation=0.3, **SETTINGS | {"exclude": "time"})
    expected = oracle(made, lambda at, _: at, 4, validation=0.3)
    assert of_task(task) == expected and expected != oracle(made, tick, 4, validation=0.3)


def test_without_series_a_clients_rows_are_sorted_as_one():
    made = [row for row in rows("german") if (row["site"], row["machine"]) in {("north", "m2"), ("south", "m10")}]
    task = fedloom.problem(columns(made), windows="4,time=time", validation=0.3, exclude="machine", **SETTINGS)
    assert of_task(task) == oracle(made, tick, 4, validation=0.3, by=None)
    with pytest.raises(UsageError, match=r"has 65 rows of the same time as another of their series, such as .*apart"):
        fedloom.problem(columns(rows("german")), windows="4,time=time", exclude="machine", **SETTINGS)


def test_no_training_window_reaches_behind_or_into_a_later_split():
    task = fedloom.problem(columns(rows()), windows="3,horizon=1,series=machine,time=time", validation=0.3, **SETTINGS)
    for client in range(2):
        spans = []
        for split in ("train", "validation", "test"):
            x, y = raw(task, task.data(client, split))
            seen = defaultdict(set)
            for place in torch.cat([x.flatten(), y]).tolist():
                seen[place // 100].add(place)
            assert (x // 100 == y[:, None] // 100).all(), "no window crosses into another series"
            spans.append(seen)
        for earlier, later in ((0, 1), (1, 2), (0, 2)):
            assert spans[later]
            for series, places in spans[later].items():
                assert max(spans[earlier][series]) < min(places)


@pytest.mark.parametrize("kind", ["number", "iso"])
def test_the_order_of_the_file_changes_no_bit(kind):
    text = "4,series=machine,time=time"
    one, other = (fedloom.problem(columns(rows(kind, seed=seed)), windows=text, **SETTINGS) for seed in (1, 2))
    for client in range(2):
        for split in ("train", "validation", "test"):
            a, b = one.data(client, split), other.data(client, split)
            assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)


def test_a_series_of_one_client_is_none_of_another():
    sizes = {("north", "m1"): 30, ("south", "m1"): 24}
    made = rows(sizes=sizes)
    task = fedloom.problem(columns(made), windows="4,series=machine,time=time", **SETTINGS)
    assert of_task(task) == oracle(made, tick, 4)
    assert all("m1" not in line or "machine" in line for line in task.describe()["decisions"])


def test_names_of_series_may_be_numbers_and_words(tmp_path):
    made, names = rows(), {"m1": "7", "m2": "08", "m3": "x", "m10": "1e1"}
    with (tmp_path / "machines.csv").open("w", newline="") as file:
        table = columns(made) | {"machine": [names[row["machine"]] for row in made]}
        csv.writer(file).writerows([list(table), *zip(*table.values(), strict=True)])
    renamed = [row | {"machine": names[row["machine"]]} for row in made]
    task = fedloom.problem(str(tmp_path / "machines.csv"), windows="4,series=machine,time=time", **SETTINGS)
    assert of_task(task) == oracle(renamed, tick, 4)


def test_newcomers_keep_their_series():
    made = rows()
    settings = SETTINGS | {"validation": 0.3, "newcomers": "north"}
    task = fedloom.problem(columns(made), windows="4,series=machine,time=time", **settings)
    assert of_task(task, ("south", "north")) == oracle(made, tick, 4, validation=0.3)


def test_a_test_split_of_its_own_is_sorted_and_cut_likewise(tmp_path):
    for split, seed in (("train", 1), ("test", 2)):
        table = columns(rows("hours", seed=seed))
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([list(table), *zip(*table.values(), strict=True)])
    task = fedloom.problem(str(tmp_path), windows="4,series=machine,time=time", **SETTINGS)
    whole, found = oracle(rows(), tick, 4, share=0.0), of_task(task)
    for site in ("north", "south"):
        assert found[site, "train"] == whole[site, "train"]
        every = oracle(rows(), tick, 4, share=0.0, validation=0.0)[site, "train"]
        assert found[site, "test"] == every
    early = "in 5 of 5 series the test split begins before the last training row"
    assert early in " ".join(task.describe()["decisions"])


def test_a_test_split_of_later_rows_is_no_cause_for_a_sentence():
    made = rows("iso")

    def split(*late):
        parts = [[], []]
        for row in made:
            own = row["site"], row["machine"]
            last = tick(0, row) >= SIZES[own] - 6
            parts[last].append(row)
            if own in late and tick(0, row) == 5:
                parts[1].append(row)
        task = fedloom.problem(
            tuple(pa.table(columns(part)) for part in parts),
            windows="3,series=machine,time=time",
            **SETTINGS | {"validation": 0.0},
        )
        return [line for line in task.describe()["decisions"] if "begins before the last training row" in line]

    assert split() == []
    assert split(("south", "m1"))[0].startswith("in 1 of 5 series the test split begins before")


def test_both_columns_are_told_and_no_features_unless_they_are_kept():
    text = "4,series=machine,time=time"
    task = fedloom.problem(columns(rows("iso")), windows=text, **SETTINGS)
    by_name = {one["name"]: one for one in task.describe()["columns"]}
    assert (by_name["machine"]["role"], by_name["time"]["role"]) == ("series", "time")
    assert by_name["machine"]["note"] == "4 series; keep=machine makes it a feature too"
    assert by_name["time"]["note"].startswith("2023-11-20 00:00:00 to 2024-") and "keep=time" in by_name["time"]["note"]
    assert [one.name for one in task.preprocessing().columns] == ["place", "noise"]
    kept = fedloom.problem(columns(rows("iso")), windows=text, **SETTINGS | {"keep": "place,machine,time"})
    assert [(one.name, one.role) for one in kept.preprocessing().columns] == [
        ("machine", "category"),
        ("time", "date"),
        ("place", "number"),
        ("noise", "number"),
    ]
    assert torch.equal(kept.data(0, "train").y, task.data(0, "train").y)
    assert torch.equal(kept.data(0, "train").x[..., -2:], task.data(0, "train").x)
    assert kept.shape == (4, 4 + 5 + 2)


def test_what_was_decided_is_told():
    task = fedloom.problem(columns(rows()), windows="4,series=machine,time=time", validation=0.3, **SETTINGS)
    said = task.describe()["decisions"]
    assert "the last 20% of each series' rows are held out as test rows, 31 in all" in said
    assert any(
        "in the order of 'time', client by client and in each by 'machine': a window of 4 rows begins every 1" in line
        and "the last 30% of a series' training rows are its validation rows, and no window spans two series" in line
        for line in said
    )
    short = [line for line in said if "too few" in line]
    assert short == [
        "1 of 5 series have too few validation rows for a window, which with its target has 4, and leave none: "
        "'m3 of north'",
        "1 of 5 series have too few test rows for a window, which with its target has 4, and leave none: 'm3 of north'",
    ]


def test_a_series_that_is_too_short_leaves_no_windows_and_is_named():
    task = fedloom.problem(columns(rows()), windows="8,series=machine,time=time", **SETTINGS)
    said = " ".join(task.describe()["decisions"])
    assert "1 of 5 series have too few training rows for a window" in said and "'m3 of north'" in said
    assert not any(window[0] // 100 == 2 for window, _ in of_task(task)["north", "train"])
    with pytest.raises(UsageError, match=r"client north has \d+ training rows in 3 series, too few for a window"):
        fedloom.problem(columns(rows()), windows="33,series=machine,time=time", **SETTINGS)


def test_columns_beside_may_be_the_series():
    task = fedloom.problem(columns(rows()), windows="4,series=machine,time=time", metadata="machine", **SETTINGS)
    data = task.data(0, "train")
    _, y = raw(task, data)
    of = {0: "m2", 1: "m1", 2: "m3"}
    levels = sorted({"m1", "m2", "m3", "m10"})
    assert [levels[number] for number in data["machine"].tolist()] == [of[place // 100] for place in y.tolist()]


def with_one(name, value, kind="number"):
    made = rows(kind)
    made[5][name] = value
    return columns(made)


@pytest.mark.parametrize(
    ("data", "settings", "told"),
    [
        (rows(), {"windows": "4,series=machin"}, "no column 'machin' in .*; its columns are: site, machine, time"),
        (rows(), {"windows": "4,time=when"}, "no column 'when' in"),
        (rows(), {"windows": "4,series=machine,time=machine"}, "series and time are both 'machine'"),
        (rows(), {"windows": "4,serie=machine"}, "serie"),
        (rows(), {"windows": "4,series=site"}, "series=site: that column of .* names the clients"),
        (rows(), {"windows": "4,time=level"}, "time=level: that column of .* is what is predicted"),
        (rows(), {"windows": "4,time=time", "exclude": "time"}, "time=time: that column of .* is excluded"),
        (rows(), {"windows": "4,time=machine"}, "time=machine: that column of .* holds 'm.*; rows are sorted by num"),
        (with_one("time", "soon", "iso"), {"windows": "4,series=machine,time=time"}, "time=time: .* holds '20"),
        (with_one("time", float("inf")), {"windows": "4,series=machine,time=time"}, "has infinite values"),
        (
            with_one("time", None),
            {"windows": "4,series=machine,time=time"},
            "has missing values .* the time 'time' in 1",
        ),
        (with_one("time", "", "iso"), {"windows": "4,series=machine,time=time"}, "the time 'time' in 1"),
        (with_one("machine", None), {"windows": "4,series=machine"}, "the series 'machine' in 1"),
        (
            with_one("time", None),
            {"windows": "4,series=machine,time=time", "keep": "place,time", "missing": "mean"},
            "time=time: .* has 1 rows without a value there",
        ),
        (
            columns(rows()) | {"time": [True] * sum(SIZES.values())},
            {"windows": "4,series=machine,time=time"},
            "time=time: that column of .* is bool; rows are sorted by numbers, or by dates such as 2024-01-31",
        ),
        (rows(), {"windows": "4,series=machine,time=time", "partition": "iid", "clients": 2}, "set partition=column"),
    ],
)
def test_what_cannot_be_is_refused_in_words(data, settings, told):
    with pytest.raises(UsageError, match=told):
        fedloom.problem(data if isinstance(data, dict) else columns(data), **SETTINGS | settings)


def test_rows_without_a_time_may_be_dropped():
    table = with_one("time", None)
    lost = int(table["place"][5])
    task = fedloom.problem(table, windows="4,series=machine,time=time", missing="drop", **SETTINGS)
    made = [row for row in rows() if int(row["place"]) != lost]
    assert of_task(task) == oracle(made, tick, 4)


def test_two_rows_of_one_time_are_refused():
    made = rows("iso")
    two = [at for at, row in enumerate(made) if (row["site"], row["machine"]) == ("south", "m1")][:2]
    made[two[0]]["time"] = made[two[1]]["time"]
    told = rf"has 1 rows of the same time as another of their series, such as {made[two[0]]['time']}.*; keep one row"
    with pytest.raises(UsageError, match=told):
        fedloom.problem(columns(made), windows="4,series=machine,time=time", **SETTINGS)


def test_dates_of_which_day_and_month_cannot_be_told_apart_are_refused():
    made = rows("iso", {("north", "m1"): 30, ("south", "m1"): 30})
    for row in made:
        row["time"] = f"{1 + tick(0, row) % 12:02}/{1 + tick(0, row) // 12:02}/2024"
    with pytest.raises(UsageError, match=r"day and month cannot be told apart; write them as 2024-01-31$"):
        fedloom.problem(columns(made), windows="4,series=machine,time=time", **SETTINGS)


@pytest.mark.parametrize("text", ["given,series=machine", "given,time=time"])
def test_windows_that_are_given_take_no_options(text):
    x = np.zeros((40, 6, 2), np.float32)
    with pytest.raises(UsageError, match="are cut and in order already, and take no options; write windows=given"):
        fedloom.problem((x, [k % 2 for k in range(40)]), windows=text, partition="iid", clients=2)


def test_what_is_no_table_has_no_series(tmp_path):
    (tmp_path / "text.txt").write_text("so it goes " * 200)
    with pytest.raises(UsageError, match="windows says how the rows of tables are read"):
        fedloom.problem(str(tmp_path / "text.txt"), windows="4,series=machine,time=time")
    images = numpy_stream(0, "test").random((40, 8, 8)).astype("float32")
    table = {"x": images, "label": [k % 2 for k in range(40)], "site": ["a", "b"] * 20, "time": [*range(40)]}
    with pytest.raises(UsageError, match="windows says how the rows of tables are read"):
        fedloom.problem(table, windows="4,time=time", partition="column:site")


def trained(tmp_path, kind="number", text="5,series=machine,time=time"):
    settings = {k: v for k, v in SETTINGS.items() if k != "keep"} | {"exclude": "place"}
    run = fedloom.run("fedavg", columns(rows(kind)), windows=text, rounds=1, out=tmp_path / "run", **settings)
    task = fedloom.problem(columns(rows(kind)), windows=text, **settings)
    return run, task


@pytest.mark.parametrize("kind", ["number", "german"])
def test_predictions_are_of_each_row_that_enough_of_its_series_precede(kind, tmp_path, capsys):
    run, task = trained(tmp_path, kind)
    made = [
        row for row in rows(kind, seed=9) if row["site"] == "north" and (row["machine"] != "m3" or tick(0, row) < 4)
    ]
    how, net = task.preprocessing(), run.module()
    noise = {int(row["place"]): row["noise"] for row in made}
    with pytest.warns(UserWarning, match="1 of 3 series have fewer rows than the 5 of a window"):
        found = run.predict(columns(made))
    assert len(found) == len(made)
    for row, said in zip(made, found, strict=True):
        place = int(row["place"])
        if place % 100 < 4:
            assert said is None
            continue
        window = torch.tensor([(noise[place - back] - how.mean[0]) / how.deviation[0] for back in range(4, -1, -1)])
        assert said == pytest.approx(float(net(window.view(1, 5, 1))) * task.deviation + task.mean, rel=1e-4)
    table = {name: column for name, column in columns(made).items() if name not in ("site", "level")}
    with (tmp_path / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows([list(table), *zip(*table.values(), strict=True)])
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "new.csv")]) == 0
    lines = [line.split(",") for line in capsys.readouterr().out.splitlines()][1:]
    assert {int(row): float(said) for row, said in lines} == pytest.approx(
        {row: said for row, said in enumerate(found) if said is not None}
    )
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "new.csv"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["predictions"]
    assert [said is None for said in printed] == [said is None for said in found]


def test_predictions_of_classes_have_probabilities_of_the_same_rows(tmp_path, capsys):
    made = rows()
    for row in made:
        row["level"] = "high" if row["noise"] > 0.5 else "low"
    settings = {"label": "level", "partition": "column:site", "exclude": "place", "keep": "noise"}
    run = fedloom.run(
        "fedavg", columns(made), windows="5,series=machine,time=time", rounds=1, out=tmp_path / "run", **settings
    )
    some = {name: column for name, column in columns(made).items() if name in ("machine", "time", "noise")}
    some = {
        name: [v for v, row in zip(column, made, strict=True) if row["site"] == "south"]
        for name, column in some.items()
    }
    said, chances = run.predict(some), run.predict(some, probabilities=True)
    assert [one is None for one in said] == [one is None for one in chances] and said.count(None) == 8
    assert all(max(by, key=by.get) == one for one, by in zip(said, chances, strict=True) if by)
    with (tmp_path / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows([list(some), *zip(*some.values(), strict=True)])
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "new.csv"), "--probabilities"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "row,prediction,probability high,probability low" and len(lines) == 1 + len(said) - 8


def test_new_dates_are_read_as_they_were_written_in_training(tmp_path):
    run, _ = trained(tmp_path, "german", "3,time=time,series=machine")
    table = {"machine": ["m1"] * 4, "noise": [0.1, 0.2, 0.3, 0.4]}
    days = run.predict(table | {"time": ["01.03.2024", "02.03.2024", "03.03.2024", "01.04.2024"]})
    written = ["2024-03-01", "2024-03-02", "2024-03-03", "2024-04-01"]
    assert days == run.predict(table | {"time": written})
    assert days == run.predict(pa.table(table | {"time": [*map(datetime.date.fromisoformat, written)]}))
    assert days[:2] == [None, None] and None not in days[2:]
    with pytest.raises(UsageError, match=r"reads dates there, written as %d\.%m\.%Y"):
        run.predict(table | {"time": [day.replace("-", "/") for day in written]})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"time": None}, "lacks the column 'time', which the model reads"),
        ({"machine": None}, "lacks the column 'machine'"),
        ({"time": [1, 2, 2, 3, 4, 5]}, "has 1 rows of the same time as another of their series, such as 2"),
        ({"time": [1, 2, None, 3, 4, 5]}, "has 1 rows without a value there"),
        ({"machine": ["m1", None, "m1", "m1", "m1", "m1"]}, "series=machine: .* has 1 rows without a value"),
        ({"time": ["a", "b", "c", "d", "e", "f"]}, "no numbers"),
        ({"machine": ["m1", "m2"] * 3}, "has 6 rows in 2 series, none of which has as many as the windows of 5"),
    ],
)
def test_rows_that_have_no_place_in_a_series_are_refused(change, told, tmp_path):
    run, _ = trained(tmp_path)
    table = {"machine": ["m1"] * 6, "time": [1, 2, 3, 4, 5, 6], "noise": [0.5] * 6} | change
    with pytest.raises(UsageError, match=told):
        run.predict({name: column for name, column in table.items() if column is not None})


def test_series_and_times_may_be_categories_of_pandas():
    import pandas as pd

    frame = pd.DataFrame(columns(rows("iso"))).astype({"machine": "category", "time": "category"})
    settings = {name: value for name, value in SETTINGS.items() if name != "keep"} | {"exclude": "place"}
    run = fedloom.run("fedavg", frame, windows="5,series=machine,time=time", rounds=1, **settings)
    south = frame[frame["site"] == "south"]
    said = run.predict(south)
    assert said == run.predict(
        {name: [*map(str, south[name])] if name != "noise" else [*south[name]] for name in south}
    )
    ticks = south["place"].astype(int) % 100
    assert [one is None for one in said] == [tick < 4 for tick in ticks]


def test_an_array_has_no_series(tmp_path):
    run, _ = trained(tmp_path)
    with pytest.raises(UsageError, match="lacks the column 'machine', 'time'"):
        run.predict(np.zeros((8, 1)))


def test_methods_and_engines_train_on_several_series():
    settings = {"windows": "4,series=machine,time=time", "rounds": 1, **SETTINGS}
    runs = [
        fedloom.run(method, columns(rows()), engine=engine, workers=2, **settings)
        for method, engine in (("scaffold", "serial"), ("scaffold", "pool"))
    ]
    assert torch.equal(runs[0].model.flat, runs[1].model.flat)


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table = columns(rows("iso"))
    with (tmp_path / "machines.csv").open("w", newline="") as file:
        csv.writer(file).writerows([list(table), *zip(*table.values(), strict=True)])
    words = ["--label", "level", "--problem", "regression", "--keep", "place", "--partition", "column:site"]
    assert main(["data", "machines.csv", *words, "--windows", "4,series=machine,time=time"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "series machine: 4 series; keep=machine makes it a feature too" in said
    assert "time time: 2023-11-20" in said
