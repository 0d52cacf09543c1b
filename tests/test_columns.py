"""What each column of a table is used as, and what is said of columns and cells that cannot be told apart."""

import datetime
import json
import re
import shlex
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

import fedloom
from fedloom.cli import main
from fedloom.data import federate, load
from fedloom.errors import UsageError
from fedloom.random import numpy_stream

ROWS = 200


def written(path: Path, rows: int = ROWS, separator: str = ",", label=None, **columns) -> str:
    """A table of two numbers, further columns (functions of the row) and a label that none of them tells."""
    draw = numpy_stream(0, "test")
    names = ["age", "bp", *columns, "label"]
    lines = [separator.join(names)]
    for row in range(rows):
        numbers = [str(draw.integers(20, 81)), f"{draw.normal(120, 10):.1f}"]
        cells = [str(column(row)) for column in columns.values()]
        lines.append(separator.join([*numbers, *cells, str(label(row)) if label else str(draw.integers(2))]))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def used(source) -> dict[str, str]:
    return {column.name: column.role for column in source.roles}


def note(source, name: str) -> str:
    return next(column.note for column in source.roles if column.name == name)


def error(*args, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        load(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def table(tmp_path):
    return lambda **given: written(tmp_path / "t.csv", **given)


class TestGaps:
    MARKED: ClassVar = {
        "site": lambda i: "" if i % 20 == 0 else "abc"[i % 3],
        "chol": lambda i: "?" if i % 25 == 1 else i * i % 97,
        "smoker": lambda i: "NA" if i % 50 == 2 else "yn"[i // 3 % 2],
    }

    def test_all_of_all_columns_are_told_at_once_with_counts_marks_and_choices(self, table):
        line = error(table(**self.MARKED, label=lambda i: "" if i == 3 else "uv"[i % 2]), client="site")
        assert f"has missing values among its {ROWS} rows: the client 'site' in 10, 'chol' in 8 (such as '?'), " in line
        assert "'smoker' in 4 (such as 'NA'), the label 'label' in 1; " in line
        for choice in ("missing=drop", "missing=mean", "missing=most_frequent", "exclude=NAME", "keep=NAME"):
            assert choice in line

    @pytest.mark.parametrize("cell", ["", "   ", "?", "NA", "n/a", "NaN", "null", "-", "<NA>"])
    def test_what_stands_for_nothing_is_never_a_client_a_class_or_a_category(self, table, cell):
        hole = {"site": lambda i: cell if i == 7 else "abc"[i % 3]}
        assert "the client 'site' in 1" in error(table(**hole), client="site")
        assert "'site' in 1" in error(table(**hole))
        assert "the label 'label' in 1" in error(table(label=lambda i: cell if i == 7 else "abc"[i % 3]))

    def test_a_gap_may_be_a_value_if_it_is_said_so(self, table):
        path = table(region=lambda i: ["EU", "NA", "AP"][i % 3])
        assert "'region' in 67 (such as 'NA')" in error(path)
        assert load(path, keep=("region",)).widths == (1, 1, 3)
        clients = load(path, client="region", keep=("region",))
        assert set(clients.train.columns["region"]) == {"EU", "NA", "AP"} and clients.widths == (1, 1)

    def test_dropping_leaves_out_the_rows_and_says_how_many(self, table):
        source = load(table(**self.MARKED), client="site", missing="drop")
        whole = [i for i in range(ROWS) if i % 20 and i % 25 != 1 and i % 50 != 2]
        assert len(source.train.y) + len(source.test.y) == len(whole)
        assert note(source, "chol") == "8 rows without it are dropped"
        assert torch.isfinite(source.train.x).all() and set(source.train.columns["site"]) == set("abc")

    def test_labels_clients_and_texts_are_never_filled_in(self, table):
        path = table(label=lambda i: "" if i == 3 else "uv"[i % 2])
        line = error(path, missing="mean")
        assert "the label 'label' in 1; " in line and line.endswith(
            "missing=mean fills in numbers, dates and categories only"
        )
        assert "the client 'site' in 10; " in error(table(site=self.MARKED["site"]), client="site", missing="mean")

    def test_an_unknown_way_is_refused(self, table):
        assert "unknown way with missing values 'median'; did you mean 'mean'" in error(table(), missing="median")

    @pytest.mark.parametrize("missing", ["mean", "most_frequent"])
    def test_filling_in_is_learned_on_the_training_rows_alone(self, table, missing):
        columns = {
            "city": lambda i: "abc"[i * i % 7 % 3],
            "chol": lambda i: "" if i % 5 == 1 else i * i % 7,
            "smoker": lambda i: "" if i % 9 == 2 else "yyn"[i % 3],
        }
        source = load(table(**columns), missing=missing)
        dealt = federate(source, "iid", 4, validation=0.3, public=0.1)
        raw = torch.cat([source.train.x, source.test.x]).double()
        assert source.widths == (1, 1, 3, 1, 2)
        kept = raw[dealt.train.rows]
        chol = kept[:, 5][~kept[:, 5].isnan()]
        counts = torch.bincount(chol.long())
        value = chol.mean() if missing == "mean" else counts.argmax().double()
        filled = raw[:, 5].where(~raw[:, 5].isnan(), value)
        mean, deviation = filled[dealt.train.rows].mean(), filled[dealt.train.rows].std(correction=0)
        assert torch.allclose(dealt.x[:, 5].double(), (filled - mean) / deviation, atol=1e-4)
        word = "the mean" if missing == "mean" else "the most frequent value"
        notes = {column["name"]: column["note"] for column in dealt.table()["columns"]}
        assert notes["chol"] == f"40 gaps, filled in with {word} {float(value):.6g} of the training rows"
        assert notes["smoker"] == "2 values, 22 gaps, filled in with the most frequent value 'y' of the training rows"
        gap, yes = raw[:, 6].isnan(), raw[:, 7] == 1
        assert dealt.x[gap][:, 6:].unique(dim=0).equal(dealt.x[yes][:, 6:].unique(dim=0)), "a gap is as a y"

    def test_a_column_without_any_value_to_fill_in_with(self, tmp_path):
        for split, cell in (("train", lambda i: "5" if i == 0 else ""), ("test", lambda i: i)):
            written(tmp_path / f"{split}.csv", rows=30, chol=cell)
        source = load(str(tmp_path), missing="mean")
        source.train.x[0, 2] = torch.nan
        with pytest.raises(UsageError, match=r"'chol' of .* has no value in any training row .* exclude=chol"):
            federate(source, "iid", 2)


class TestNumbers:
    def test_cells_that_are_no_numbers_are_told_and_counted(self, table):
        path = table(dose=lambda i: "low" if i % 20 == 0 else i * i % 97)
        line = error(path)
        assert "column 'dose' holds 10 values that are no numbers, such as 'low': exclude=dose" in line
        assert load(path, keep=("dose",)).train.x.shape[1] > 20
        assert load(path, exclude=("dose",)).train.x.shape[1] == 2

    def test_the_same_in_a_typed_file(self, tmp_path):
        cells = ["?" if i % 30 == 7 else str(i * i % 97) for i in range(ROWS)]
        file = tmp_path / "t.parquet"
        pa.parquet.write_table(pa.table({"chol": cells, "label": [i // 2 % 2 for i in range(ROWS)]}), file)
        assert "'chol' in 7 (such as '?')" in error(str(file))
        assert load(str(file), missing="mean").widths == (1,)

    @pytest.mark.parametrize(
        "cell",
        [
            lambda i: f'"{i % 9},5"',
            lambda i: f'"{i + 1},{100 + i}"',
            lambda i: f"{i % 97}%",
            lambda i: f"{40 + i % 50} kg",
            lambda i: f'"{i},5"',
        ],
    )
    def test_numbers_written_as_text_are_refused(self, table, cell):
        assert "column 'pay' holds numbers written as text" in error(table(pay=cell))

    def test_few_values_that_look_like_numbers_may_be_categories(self, table):
        source = load(table(group=lambda i: ["40-49", "50-59", "3rd"][i % 3]))
        assert used(source)["group"] == "category" and note(source, "group") == "3 values"

    def test_python_writes_none_for_a_missing_number_but_none_may_be_an_answer(self, table):
        assert "'x' in 10 (such as 'None')" in error(table(x=lambda i: "None" if i % 20 == 0 else i * i % 97))
        assert load(table(x=lambda i: ["None", "Some", "Much"][i % 3])).widths == (1, 1, 3)

    def test_a_column_of_lists_is_as_many_numbers(self, tmp_path):
        x = numpy_stream(0, "test").normal(size=(40, 5)).astype(np.float32)
        labels = [i // 2 % 2 for i in range(40)]
        plain = {"e": pa.array(x.tolist()), "label": labels}
        sized = plain | {"e": pa.array(x.tolist(), type=pa.list_(pa.float64(), 5))}
        for number, columns in enumerate((plain, sized)):
            file = tmp_path / f"{number}.parquet"
            pa.parquet.write_table(pa.table(columns), file)
            source = load(str(file), missing="mean")
            assert source.widths == (5,) and note(source, "e") == "5 numbers a row"
            assert {tuple(row) for row in source.train.x.tolist()} <= {tuple(row) for row in x.tolist()}
        pa.parquet.write_table(pa.table(plain | {"e": [[1.0], [1.0, 2.0]] * 20}), tmp_path / "c.parquet")
        assert "column 'e' is list" in error(str(tmp_path / "c.parquet"))
        pa.parquet.write_table(pa.table(plain | {"e": [None, *x.tolist()[1:]]}), tmp_path / "d.parquet")
        assert "'e' in 1" in error(str(tmp_path / "d.parquet"))


class TestFiles:
    @pytest.mark.parametrize("separator", [";", "\t", "|"])
    def test_other_separators_and_decimal_commas(self, tmp_path, separator):
        plain = load(written(tmp_path / "a.csv", x=lambda i: 1000 + i * i % 97 + 0.5, site=lambda i: "ab"[i % 2]))
        path = written(
            tmp_path / "b.csv", separator=separator, x=lambda i: 1000 + i * i % 97 + 0.5, site=lambda i: "ab"[i % 2]
        )
        text = Path(path).read_text().replace(".", ",").replace("1000,", "1.000,")
        Path(path).write_text(text)
        assert load(path).train.x.equal(plain.train.x)

    def test_a_thousands_point_is_no_decimal_point(self, tmp_path):
        path = written(tmp_path / "a.csv", separator=";", pay=lambda i: f"{1 + i % 9}#{100 + i}")
        Path(path).write_text(Path(path).read_text().replace(".", ",").replace("#", "."))
        assert "column 'pay' has points in numbers, such as '1.100'" in error(path)

    @pytest.mark.parametrize(("encoding", "said"), [("cp437", "is not UTF-8"), ("utf-16", "UTF-16")])
    def test_another_encoding_is_told(self, table, encoding, said):
        path = Path(table(site=lambda i: ["Zürich", "Orléans"][i % 2]))
        text = path.read_text()
        path.write_text(text, encoding=encoding)
        assert said in error(str(path))
        path.write_text("\ufeff" + text)
        assert used(load(str(path)))["age"] == "number"

    def test_a_first_line_of_numbers_names_nothing(self, table):
        path = Path(table())
        path.write_text("\n".join(path.read_text().splitlines()[1:]))
        assert "begins with numbers" in error(str(path), label="1")

    def test_blanks_around_cells_and_names_say_nothing(self, tmp_path):
        plain = load(written(tmp_path / "a.csv", site=lambda i: "ab"[i % 2], label=lambda i: "uv"[i // 2 % 2]))
        path = written(
            tmp_path / "b.csv", separator=" , ", site=lambda i: "ab"[i % 2], label=lambda i: "uv"[i // 2 % 2]
        )
        blank = load(path)
        assert blank.classes == plain.classes and blank.train.x.equal(plain.train.x) and used(blank) == used(plain)

    def test_a_line_break_inside_a_text(self, tmp_path):
        rows = [f'"{"much was said " * 40}\nto {i} friends",{i % 2}' for i in range(2400)]
        (tmp_path / "a.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
        assert (tmp_path / "a.csv").stat().st_size > 2**20, "more than is read at once"
        source = load(str(tmp_path / "a.csv"))
        assert len(source.train.y) + len(source.test.y) == 2400 and source.kind == "text"

    def test_columns_of_one_name(self, tmp_path):
        (tmp_path / "a.csv").write_text("a,a,label\n1,2,0\n2,3,1\n1,2,0\n2,3,1\n")
        assert "two columns of one name" in error(str(tmp_path / "a.csv"))

    def test_what_a_cell_is_does_not_hang_on_the_split(self, tmp_path):
        written(tmp_path / "train.csv", chol=lambda i: i * i % 97)
        written(tmp_path / "test.csv", chol=lambda i: "?" if i == 5 else i * i % 97)
        assert f"among its {2 * ROWS} rows: 'chol' in 1 (such as '?')" in error(str(tmp_path))


class TestNames:
    @pytest.mark.parametrize(
        ("name", "cell"),
        [
            ("ticket", lambda i: f"T{i:05d}"),
            ("barcode", lambda i: 10**19 + i * 7919),
            ("record", lambda i: f"{(i * 7919) % 65536:08x}-{i}"),
            ("patient_id", lambda i: i * 7 % 83),
            ("PatientID", lambda i: i * 7 % 83),
            ("MRN", lambda i: 10_000 + i * 7919 % 8191),
            ("row", lambda i: i),
            ("count", lambda i: 5 + (i * 7) % ROWS),
            ("user", lambda i: i % 4),
            ("empty", lambda i: ""),
            ("always", lambda i: "x"),
            ("seven", lambda i: 7),
        ],
    )
    def test_names_row_numbers_and_constants_are_ignored_and_told(self, table, name, cell):
        path = table(**{name: cell})
        source = load(path)
        assert used(source)[name] == "ignored" and source.widths == (1, 1)
        if name != "empty":
            assert note(source, name).endswith(f"keep={name} makes it a feature")
            assert used(load(path, keep=(name,)))[name] != "ignored"

    @pytest.mark.parametrize(
        ("name", "cell"),
        [("paid", lambda i: i * i % 97), ("year", lambda i: 1900 + i % 100), ("store_id", lambda i: i % 5),
         ("city", lambda i: f"city {i % 60}"), ("humid", lambda i: i * 31 % 199)],
    )  # fmt: skip
    def test_numbers_and_categories_are_features(self, table, name, cell):
        assert used(load(table(**{name: cell})))[name] in ("number", "category")

    def test_a_number_that_counts_the_rows_is_used_where_there_is_nothing_else(self, tmp_path):
        (tmp_path / "a.csv").write_text("a,label\n" + "".join(f"{i},{i // 2 % 2}\n" for i in range(40)))
        source = load(str(tmp_path / "a.csv"))
        assert used(source)["a"] == "number" and note(source, "a").startswith("counts the rows, from 0 to 39")
        (tmp_path / "a.csv").write_text("a,label\n" + "".join(f"x{i},{i // 2 % 2}\n" for i in range(40)))
        line = error(str(tmp_path / "a.csv"))
        assert "no feature columns beside 'label' ('a': an identifier, or nearly: 40 values in 40 rows" in line

    def test_excluded_kept_and_client_columns_are_told_as_such(self, table):
        path = table(site=lambda i: "abc"[i % 3], ward=lambda i: "xy"[i % 2])
        source = load(path, client="site", exclude=("ward",))
        assert used(source) == {"age": "number", "bp": "number", "site": "client", "ward": "ignored", "label": "label"}
        assert note(source, "site") == "3 clients" and note(source, "ward") == "excluded"
        assert "is kept and excluded" in error(path, exclude=("ward",), keep=("ward",))
        assert "is the label and excluded" in error(path, exclude=("label",))
        assert "no column 'wart'" in error(path, keep=("wart",))

    def test_names_that_differ_by_case_only_are_told(self, table):
        source = load(table(site=lambda i: ["A", "a", "B"][i % 3]), client="site")
        assert note(source, "site") == "3 clients, of which 'A', 'a' differ by case only"

    def test_dates_are_read_and_those_that_may_be_two_are_refused_with_the_choices(self, table):
        path = table(day=lambda i: datetime.date(2020, 1, 1) + datetime.timedelta(days=i % 50))
        assert used(load(path))["day"] == "date" and load(path).widths == (1, 1, 5)
        path = table(day=lambda i: f"{i % 12 + 1:02}/{i % 7 + 1:02}/2024")
        assert "column 'day' holds dates, such as '01/01/2024'" in error(path) and "exclude=day" in error(path)
        assert "day and month cannot be told apart" in error(path)
        assert used(load(path, keep=("day",)))["day"] == "category"


class TestText:
    def test_text_beside_numbers_is_read_as_words_that_some_rows_have(self, table):
        said = lambda i: f"patient {i} seen {'today' if i % 3 else 'twice'} with pain"  # noqa: E731
        path = table(notes=said)
        source = load(path)
        words = next(column.values for column in source.roles if column.name == "notes")
        assert words == ("today", "twice"), "all rows have the others, and no two have the same number"
        assert note(source, "notes") == "as which of 2 frequent words a row has"
        assert source.kind == "tabular" and source.train.x.shape[1] == 4
        assert (source.train.x[:, 2] + source.train.x[:, 3] == 1).all()
        assert load(path, exclude=("notes",)).kind == "tabular"
        assert load(path, exclude=("age", "bp")).kind == "text"

    @pytest.mark.parametrize(
        "words", ["这个 商品 很好 喜欢 满意", "とても よい 映画 でした 本当に", "หนัง เรื่อง นี้ ดี มาก"]
    )
    def test_scripts_without_blanks_are_text(self, tmp_path, words):
        draw = numpy_stream(1, "test")
        rows = ["".join(draw.choice(words.split(), 6)) for _ in range(100)]
        (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{row},{i % 2}\n" for i, row in enumerate(rows)))
        source = load(str(tmp_path / "a.csv"))
        assert source.kind == "text" and max(map(len, source.vocabulary[2:])) == 1
        assert set("".join(words.split())) >= set(source.vocabulary[2:])

    def test_short_names_in_such_a_script_are_names(self, table):
        draw = numpy_stream(2, "test")
        source = load(table(name=lambda i: "".join(draw.choice([*"王李张明红伟芳"], 3))))
        assert used(source)["name"] == "ignored"

    def test_words_of_several_scripts(self):
        from fedloom.data.text import words

        tokens, _, vocabulary = words(["iPhone 很好!"], ["x"])
        assert [vocabulary[t] for t in tokens[0]] == ["iphone", "很", "好", "!"]

    def test_the_vocabulary_has_the_most_frequent_words(self, monkeypatch):
        from fedloom.data import text

        monkeypatch.setattr(text, "MOST_WORDS", 2)
        tokens, _, vocabulary = text.words(["b c", "c a b", "c d"], ["d"])
        assert vocabulary == ("<pad>", "<unk>", "c", "b")
        assert tokens.tolist() == [[3, 2, 0], [2, 1, 3], [2, 1, 0]]

    def test_beside_images_nothing_is_read_and_that_is_told(self, tmp_path):
        images = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((40, 3, 3), dtype=np.float32))
        columns = {"image": images, "age": [i * i % 31 for i in range(40)], "label": [i // 2 % 2 for i in range(40)]}
        pa.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
        source = load(str(tmp_path / "a.parquet"))
        assert used(source)["age"] == "ignored" and note(source, "age") == "beside images nothing else is read"
        assert "leave 'age' out of keep" in error(str(tmp_path / "a.parquet"), keep=("age",))


class TestLabels:
    @pytest.mark.parametrize(
        ("label", "other"),
        [("label", "label_text"), ("label", "target"), ("label", "fine_label"), ("label_a", "label_b"), ("y1", "y2"),
         ("Class1", "Class2"), ("species", "species_code"), ("domain", "intent")],
    )  # fmt: skip
    def test_what_is_named_as_the_label_is_never_a_feature(self, tmp_path, label, other):
        path = Path(written(tmp_path / "a.csv", **{other: lambda i: i * 7 % 3}))
        path.write_text(path.read_text().replace(",label\n", f",{label}\n", 1))
        source = load(str(path), label=label)
        assert used(source)[other] == "ignored" and note(source, other).startswith("named as a label is")

    @pytest.mark.parametrize(
        ("label", "other"), [("label", "income"), ("class", "x2"), ("y", "x"), ("sick", "classics")]
    )
    def test_other_names_are_features(self, tmp_path, label, other):
        path = Path(written(tmp_path / "a.csv", **{other: lambda i: i * 7 % 13}))
        path.write_text(path.read_text().replace(",label\n", f",{label}\n", 1))
        assert used(load(str(path), label=label))[other] == "number"

    def test_several_usual_names_are_refused_unless_one_is_the_label(self, tmp_path):
        (tmp_path / "a.csv").write_text("x,y,class\n" + "".join(f"{i * i % 7},{i % 3},{i % 2}\n" for i in range(40)))
        assert "2 columns that may be the label, 'y', 'class'; say which" in error(str(tmp_path / "a.csv"))
        assert used(load(str(tmp_path / "a.csv"), label="class"))["y"] == "number"

    @pytest.mark.parametrize("cell", [lambda i: "ill" if i % 2 else "well", lambda i: 3 + i % 2])
    def test_a_copy_of_the_label_is_refused(self, table, cell):
        path = table(verdict=cell, label=lambda i: i % 2)
        assert "column 'verdict' tells the label: each of its 2 values has one class only" in error(path)
        assert used(load(path, keep=("verdict",)))["verdict"] in ("number", "category")
        nearly = table(verdict=lambda i: cell(i + (i == 150)), label=lambda i: i % 2)
        assert used(load(nearly))["verdict"] in ("number", "category")

    def test_finer_and_coarser_labels(self, table):
        fine = {"code": lambda i: f"J{i % 12}"}
        assert "column 'code' tells the label: each of its 12 values" in error(
            table(**fine, label=lambda i: i % 12 % 3)
        )
        source = load(table(area=lambda i: "ab"[i % 12 % 2], label=lambda i: i % 12))
        assert used(source)["area"] == "ignored" and note(source, "area").startswith("a coarser label")

    def test_a_number_that_parts_the_classes_is_told(self, table):
        source = load(table(stay=lambda i: i * 7 % 99 + (200 if i % 2 else 0), label=lambda i: i % 2))
        assert note(source, "stay").startswith("tells the label by itself")
        overlapping = load(table(stay=lambda i: i * 7 % 99 + (90 if i % 2 else 0), label=lambda i: i % 2))
        assert note(overlapping, "stay") == ""

    @pytest.mark.parametrize("label", ["toxic", "obscene", "threat"])
    def test_the_other_labels_of_a_row_are_no_features(self, tmp_path, label):
        names = ("toxic", "obscene", "threat")
        path = Path(written(tmp_path / "a.csv", **dict.fromkeys(names, lambda i: i * i % 2)))
        draw = numpy_stream(3, "test")
        head, *rows = path.read_text().splitlines()
        rows = [",".join([*row.split(",")[:2], *(str(draw.integers(2)) for _ in names)]) for row in rows]
        path.write_text("\n".join([head.removesuffix(",label"), *rows]) + "\n")
        others = [name for name in names if name != label]
        line = error(str(path), label=label)
        assert f"beside the label {label!r} are 0 or 1 as it is: exclude={','.join(others)}" in line
        assert load(str(path), label=label, keep=tuple(others)).widths == (1, 1, 1, 1)
        assert load(str(path), label=label, exclude=tuple(others)).widths == (1, 1)

    @pytest.mark.parametrize(
        "label",
        [lambda i: 100 + i * 37 % 317, lambda i: 100 + 7 * (i % 79), lambda i: i / 7, lambda i: f"{i * 37 % 317}"
         if i else "unknown"],
    )  # fmt: skip
    def test_an_amount_is_no_class(self, table, label):
        assert "regression" in error(table(rows=400, label=label))

    def test_whole_numbers_that_are_classes(self, table):
        assert len(load(table(rows=400, label=lambda i: i % 79)).classes) == 79
        assert len(load(table(rows=400, label=lambda i: 1900 + i % 21)).classes) == 21
        amounts = table(rows=400, label=lambda i: 100 + 7 * (i % 79))
        assert len(load(amounts, keep=("label",)).classes) == 79


class TestHoldOut:
    def users(self, path: Path, seed: int) -> str:
        draw = numpy_stream(seed, "test")
        rows = [
            f"u{user:02},{draw.normal(0, 1):.3f},{draw.integers(0, 2)}"
            for user in range(60)
            for _ in range(1 + min(6, int(draw.exponential(2.5))))
        ]
        draw.shuffle(rows)
        path.write_text("user,a,label\n" + "\n".join(rows) + "\n")
        return str(path)

    @pytest.mark.parametrize("seed", range(4))
    def test_no_client_loses_its_last_row_and_classes_keep_their_shares(self, tmp_path, seed):
        path = self.users(tmp_path / "a.csv", seed)
        source, plain = load(path, client="user", seed=seed), load(path, exclude=("user",), seed=seed)
        assert set(source.test.columns["user"]) <= set(source.train.columns["user"])
        assert len(set(source.train.columns["user"])) == 60
        assert torch.bincount(source.test.y).equal(torch.bincount(plain.test.y))
        assert len(set(plain.train.columns["user"])) < 60, "or this tests nothing"
        assert len(federate(source, "column:user").train) == 60

    def test_who_has_rows_enough_changes_nothing(self, table):
        path = table(site=lambda i: "abc"[i % 3])
        one, other = load(path, client="site"), load(path, exclude=("site",))
        assert one.test.x.equal(other.test.x) and one.train.y.equal(other.train.y)

    def test_where_it_cannot_be_done_it_is_told(self, tmp_path):
        rows = [f"u{i},{i * i % 7},{i % 2}" for i in range(40)]
        (tmp_path / "a.csv").write_text("site,a,label\n" + "\n".join(rows) + "\n")
        assert "too few rows to hold a test split out" in error(str(tmp_path / "a.csv"), client="site")


class TestRuns:
    def test_the_record_has_every_column_and_its_use(self, table):
        run = fedloom.run(
            "fedavg",
            Path(
                table(site=lambda i: "abc"[i % 3], ward=lambda i: f"W{i}", chol=lambda i: "" if i % 9 == 0 else i % 13)
            ),
            partition="column:site",
            exclude=["ward"],
            missing="mean",
            rounds=1,
            lr=0.1,
        )
        roles = {column["name"]: column["role"] for column in run.partition["columns"]}
        assert roles == {"age": "number", "bp": "number", "site": "client", "ward": "ignored", "chol": "number",
                         "label": "label"}  # fmt: skip
        assert run.spec.exclude == ("ward",) and run.spec.missing == "mean" and run.spec.method["lr"] == 0.1

    def test_what_is_ignored_unasked_is_a_warning(self, table):
        path = table(ward=lambda i: f"W{i}")
        with pytest.warns(UserWarning, match=r"ignored is ward \(an identifier, or nearly"):
            fedloom.run("fedavg", path, clients=2, partition="iid", rounds=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fedloom.run("fedavg", path, clients=2, partition="iid", rounds=1, exclude="ward")

    def test_the_commands_of_the_page_do_what_it_shows(self, tmp_path, monkeypatch, capsys):
        page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
        monkeypatch.chdir(tmp_path)
        draw = numpy_stream(1, "test", "page")
        rows = [
            f"{i},P{i:04},{'ABC'[i % 3]},{draw.integers(20, 80)},{'' if i % 30 == 0 else draw.integers(80, 120)},"
            f"{'xyz'[draw.integers(3)]},{'ill' if draw.integers(2) else 'well'}"
            for i in range(300)
        ]
        Path("hospitals.csv").write_text("\n".join(["id,patient_id,hospital,age,bp,city,diagnosis", *rows]) + "\n")
        series = [
            f"{'uvw'[i % 3]},{draw.normal()},{draw.integers(9) / 2},{'on' if i % 5 else 'off'}" for i in range(600)
        ]
        Path("machines.csv").write_text("\n".join(["machine,heat,load,state", *series]) + "\n")
        plants = [f"{'ns'[i % 2]},{row},{i // 6}" for i, row in enumerate(series * 2)]
        Path("plants.csv").write_text("\n".join(["plant,machine,heat,load,state,date", *plants]) + "\n")
        said_by_all = "to be, or not to be, that is the question. " * 3
        rows_of = {"x": [said_by_all[k : k + 80] for k in range(20)], "y": [said_by_all[k + 80] for k in range(20)]}
        Path("shakespeare/data").mkdir(parents=True)
        spoken = {"users": ["HAMLET", "OPHELIA"], "user_data": dict.fromkeys(["HAMLET", "OPHELIA"], rows_of)}
        Path("shakespeare/data/all_data.json").write_text(json.dumps(spoken))
        commands = re.findall(r"^fedloom (.*)$", page, re.MULTILINE)
        assert len(commands) >= 2
        said = []
        for command in map(shlex.split, commands):
            # What is said of columns does not depend on how long it trains.
            assert main(command + ["--rounds", "1"] * (command[0] == "run")) == 0
            said += capsys.readouterr().out.splitlines()
        shown = re.search(r"```text\n(.*?)```", page, re.DOTALL)[1].splitlines()
        mean = re.compile(r"the mean [\d.]+ of")
        assert [mean.sub("the mean of", line) for line in said if line in shown or mean.search(line)] == [
            mean.sub("the mean of", line) for line in shown
        ]
        assert Path("clients.png").exists()
        words = "run fedavg --data hospitals.csv --label diagnosis --partition column:hospital --missing mean"
        assert main([*words.split(), "--exclude", "id,patient_id", "--rounds", "1", "--out", "r"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == shown[:2] and lines[4:6] == ["ignored    id: excluded", "ignored    patient_id: excluded"]
