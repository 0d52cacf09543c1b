"""Dates and texts beside other columns, as numbers: by hand, in all splits, and once more when a model predicts."""

import datetime
import json
import math

import numpy as np
import pyarrow as pa
import pytest

import fedloom
from fedloom.data import dates, load
from fedloom.data.preprocessing import Preprocessing
from fedloom.data.rows import inputs
from fedloom.data.text import BESIDE, frequent_words, having
from fedloom.errors import UsageError

MOMENTS = [
    datetime.datetime(2024, 2, 29, 18, 30),
    datetime.datetime(1969, 12, 31, 23, 59, 30),
    datetime.datetime(2000, 1, 1),
    datetime.datetime(2023, 12, 31, 6),
]


def by_hand(at: datetime.datetime, hours: bool) -> list[float]:
    since = (at - datetime.datetime(2000, 1, 1)).total_seconds() / 86_400
    day = at.replace(hour=0, minute=0, second=0)
    turns = [(at.timetuple().tm_yday - 1) / 365.25, at.weekday() / 7] + [(at - day).total_seconds() / 86_400] * hours
    return [since, *(f(2 * math.pi * turn) for turn in turns for f in (math.sin, math.cos))]


def strings(*values) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, pa.string())])


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("hours", [True, False])
def test_places_by_hand(unit, hours):
    column = pa.chunked_array([pa.array([*MOMENTS, None], pa.timestamp(unit))])
    found = dates.places(column, hours)
    assert found.shape == (5, 7 if hours else 5) and found.dtype == np.float32
    expected = np.array([by_hand(at, hours) for at in MOMENTS])
    assert np.allclose(found[:4], expected, rtol=1e-6, atol=2e-6) and np.isnan(found[4]).all()


def test_days_are_read_from_dates_too():
    days = pa.chunked_array([pa.array([at.date() for at in MOMENTS])])
    assert np.allclose(dates.places(days, False)[2], by_hand(MOMENTS[2], False), atol=1e-6)
    assert not dates.with_hours(days) and dates.is_date(days.type)
    assert dates.with_hours(pa.chunked_array([pa.array(MOMENTS)]))
    assert not dates.with_hours(pa.chunked_array([pa.array([MOMENTS[2], None])]))


@pytest.mark.parametrize(
    ("written", "way"),
    [
        (("2024-01-31", "2023-02-01"), ""),
        (("2024-01-31T08:15:00", "2023-02-01T00:00:00"), ""),
        (("2024-01-31T08:15:00Z", "2023-02-01T01:00:00+01:00"), ""),
        (("31.01.2024", "1.2.2023"), "%d.%m.%Y"),
        (("31.01.2024 08:15", "01.02.2023 00:00"), "%d.%m.%Y"),
        (("31/01/2024", "01/02/2023"), "%d/%m/%Y"),
        (("01/31/2024", "02/01/2023"), "%m/%d/%Y"),
        (("31-01-2024 08:15:00", "01-02-2023 00:00:00"), "%d-%m-%Y"),
        (("2024/01/31", "2023/02/01"), "%Y/%m/%d"),
    ],
)
def test_ways_of_writing(written, way):
    ((found, column),) = dates.parsed(strings(*written, None)).items()
    assert found == way
    days = [None if at is None else at.date() for at in column.to_pylist()]
    assert days == [datetime.date(2024, 1, 31), datetime.date(2023, 2, 1), None]
    clock = {at.hour * 60 + at.minute for at in column.to_pylist() if at}
    assert clock == ({0, 8 * 60 + 15} if "08:15" in written[0] else {0})


def test_what_is_no_date_or_may_be_two():
    assert [*dates.parsed(strings("03/04/2024", "01/02/2023"))] == ["%d/%m/%Y", "%m/%d/%Y"]
    assert [*dates.parsed(strings("03/04/2024"), ("%m/%d/%Y",))] == ["%m/%d/%Y"]
    for none in (("31.02.2024",), ("31.13.2024",), ("2024-01-31", "soon"), ("31.01.2024", "2024-01-31"), ("12.5.24",)):
        assert dates.parsed(strings(*none)) == {}
    assert dates.parsed(strings(None)) == {} and dates.parsed(strings("1.2.3", "10.0.0.1")) == {}


def test_words_that_several_texts_have_and_some_have_not():
    texts = ["Pain in the knee", "pain, and the knee!", "no pain: the hand, a hand", None, "the pain"]
    assert frequent_words(texts) == ("knee", "pain", "the"), "of five, one is missing and has none of them"
    assert frequent_words(texts[:3]) == ("knee",)
    assert np.array_equal(having(texts[:2], ("in", "knee")), [[1, 1], [0, 1]])
    assert np.isnan(having([None], ("in",))).all() and np.array_equal(having(["KNEE knee"], ("knee",)), [[1]])
    many = [" ".join(f"w{k:03}" for k in range(row, 300)) for row in range(300)]
    assert frequent_words(many) == tuple(f"w{k:03}" for k in range(300 - 1 - BESIDE, 299)), "the most frequent"


def reading_of(run) -> Preprocessing:
    return Preprocessing.restored(json.loads((run.path / "model" / "model.json").read_text())["preprocessing"])


@pytest.fixture
def hospitals(tmp_path):
    lines = ["Klinik;Alter;Aufnahme;Befund;Rückfall"]
    for row in range(60):
        day = datetime.date(2023, 1, 1) + datetime.timedelta(days=row * 9)
        said = "" if row % 20 == 7 else f"Patient klagt über {'Schmerzen' if row % 2 else 'Übelkeit'} Fall {row}"
        when = "?" if row % 20 == 3 else f"{day:%d.%m.%Y}"
        lines.append(f"{['Köln', 'Süd'][row % 2]};{40 + row * 7 % 31};{when};{said};{'ja' if row % 4 else 'nein'}")
    path = tmp_path / "fälle.csv"
    path.write_text("\n".join(lines) + "\n", encoding="cp1252")
    return path


def test_a_table_of_hospitals_is_read_and_predicted_from(hospitals, tmp_path):
    settings = {"label": "Rückfall", "missing": "mean", "partition": "column:Klinik"}
    run = fedloom.run("fedavg", hospitals, rounds=1, model="mlp:4", out=tmp_path / "run", **settings)
    source = load(str(hospitals), label="Rückfall", client="Klinik", missing="mean")
    assert {one.name: one.role for one in source.roles} == {
        "Klinik": "client", "Alter": "number", "Aufnahme": "date", "Befund": "text", "Rückfall": "label",
    }  # fmt: skip
    how = reading_of(run)
    rows = {"Alter": [50, 51], "Aufnahme": ["02.01.2024", None], "Befund": [None, "Schmerzen über Nacht"]}
    x, told = inputs(rows, how)
    date, words = how.columns[1], how.columns[2]
    assert date.written == "%d.%m.%Y" and words.values == ("fall", "klagt", "patient", "schmerzen", "übelkeit", "über")
    assert 8_401 < date.fill[0] < 8_401 + 60 * 9, "a day of 2023 or 2024"
    mean, deviation = np.array(how.mean), np.array(how.deviation)
    plain = x.numpy() * deviation + mean
    assert np.allclose(plain[0, 1:6], by_hand(datetime.datetime(2024, 1, 2), False), atol=1e-3)
    assert np.allclose(plain[1, 1:6], date.fill, rtol=1e-4, atol=1e-3), "the mean of the training rows"
    assert np.allclose(plain[0, 6:], 0, atol=1e-5) and np.allclose(plain[1, 6:], [0, 0, 0, 1, 0, 1], atol=1e-5)
    assert not told and len(run.predict(rows)) == 2
    for wrong, complaint in [
        (
            {"Aufnahme": ["2.1.24", "bald"]},
            "'Aufnahme' holds '2.1.24', 'bald', and the model reads dates there, written as",
        ),
        ({"Aufnahme": [1, 2]}, "'Aufnahme' is int64, and the model reads dates there"),
    ]:
        with pytest.raises(UsageError, match=complaint):
            inputs(rows | wrong, how)
    with pytest.raises(UsageError, match="reads dates and texts, which an array has no place for"):
        inputs(np.zeros((2, 11), dtype=np.float32), how)


def test_gaps_of_dates_and_texts_follow_the_setting(hospitals):
    with pytest.raises(UsageError, match=r"'Aufnahme' in 3 \(such as '\?'\), 'Befund' in 3"):
        load(str(hospitals), label="Rückfall")
    dropped = load(str(hospitals), label="Rückfall", missing="drop")
    assert len(dropped.train.y) + len(dropped.test.y) == 54 and not dropped.train.x.isnan().any()
    with pytest.raises(UsageError, match=r"'Befund' in 3; .*fills in numbers, dates and categories only"):
        load(str(hospitals), label="Rückfall", exclude=("Klinik", "Alter", "Aufnahme"), missing="mean")


def test_times_of_day_are_read_where_there_are_some_and_a_date_that_never_changes_is_none(tmp_path):
    path = tmp_path / "t.csv"
    lines = [f"{row % 7},2024-01-31,2024-01-{row % 28 + 1:02} {row % 24:02}:30:00,{'ab'[row % 2]}" for row in range(60)]
    path.write_text("x,closed,when,label\n" + "\n".join(lines) + "\n")
    with pytest.warns(UserWarning, match="ignored is closed .the same in every row"):
        run = fedloom.run("fedavg", path, rounds=1, clients=2, model="mlp:4", out=tmp_path / "run")
    how = reading_of(run)
    assert [(one.name, one.width) for one in how.columns] == [("x", 1), ("when", 7)]
    x, _ = inputs({"x": [1], "when": ["2024-01-05 06:00:00"]}, how)
    plain = x.numpy() * np.array(how.deviation) + np.array(how.mean)
    assert np.allclose(plain[0, 1:], by_hand(datetime.datetime(2024, 1, 5, 6), True), atol=1e-3)


@pytest.mark.parametrize(("way", "day"), [("%d/%m/%Y", (3, 4)), ("%m/%d/%Y", (4, 3))])
def test_a_day_and_month_of_the_training_rows_are_those_of_new_ones(way, day, tmp_path):
    path = tmp_path / "t.csv"
    days = [datetime.date(2024, row % 5 + 1, row % 28 + 1) for row in range(60)]
    lines = [f"{row % 7},{at.strftime(way)},{'ab'[row % 2]}" for row, at in enumerate(days)]
    path.write_text("x,day,label\n" + "\n".join(lines) + "\n")
    run = fedloom.run("fedavg", path, rounds=1, clients=2, model="mlp:4", out=tmp_path / "run")
    how = reading_of(run)
    x, _ = inputs({"x": [1], "day": ["03/04/2024"]}, how)
    plain = x.numpy() * np.array(how.deviation) + np.array(how.mean)
    expected = datetime.datetime(2024, day[1], day[0])
    assert np.allclose(plain[0, 1:6], by_hand(expected, False), atol=1e-3), "the third of April, or the fourth of March"
