"""Files as people have them: Europe's CSV, a file or folder for each client, LEAF's, PFLlib's, images of all sizes."""

import json
import os
import pickle  # noqa: TID251 - to write what hostile files have in them
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import fedloom
from fedloom.cli import main
from fedloom.data.files import Files, guessed_encoding
from fedloom.data.load import load
from fedloom.errors import UsageError
from fedloom.random import numpy_stream

N = 90
X = numpy_stream(5, "test").normal(size=(N, 3)).round(3)
Y = (X.sum(1) > 0).astype(int)
SITES = ["Zürich", "Orléans", "Málaga"]


def error(*args, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        load(*map(str, args), **kwargs)
    line = str(caught.value)
    assert "\n" not in line
    return line


def csv(path: Path, rows=range(N), separator=",", decimal=".", encoding="utf-8", **columns) -> Path:
    """Rows of X with a city and the label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [separator.join(["a", "b", "c", "city", *columns, "label"])]
    for i in rows:
        numbers = [f"{value:.3f}".replace(".", decimal) for value in X[i]]
        lines.append(separator.join([*numbers, SITES[i % 3], *(str(make(i)) for make in columns.values()), str(Y[i])]))
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def notes(source) -> dict[str, str]:
    return {column.name: column.note for column in source.roles}


class TestCells:
    @pytest.fixture
    def plain(self, tmp_path):
        return load(str(csv(tmp_path / "plain.csv")))

    @pytest.mark.parametrize("separator", [";", "\t", "|"])
    @pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "cp1252", "utf-8-sig"])
    def test_what_is_guessed_is_right_and_told(self, tmp_path, plain, separator, encoding):
        source = load(str(csv(tmp_path / "a.csv", separator=separator, decimal=",", encoding=encoding)))
        assert source.train.x.equal(plain.train.x) and source.test.y.equal(plain.test.y)
        assert [c.values for c in source.roles] == [c.values for c in plain.roles]  # umlauts and all
        assert [notes(source)[name] for name in "abc"] == ["decimal commas"] * 3
        told = " ".join(source.decisions)
        assert f"separated by {separator!r} (sep= says another)" in told
        assert ("Windows-1252 (encoding= says another)" in told) == (encoding in ("latin-1", "cp1252"))
        assert not any("sep=" in line or "encoding=" in line for line in plain.decisions)

    @pytest.mark.parametrize(
        ("written", "said"),
        [
            ({"separator": ";", "decimal": ","}, {"sep": "semicolon", "decimal": ","}),
            ({"separator": "\t"}, {"sep": "tab"}),
            ({"separator": "\t"}, {"sep": "\t", "encoding": "utf-8"}),
            ({"encoding": "utf-16"}, {"encoding": "utf-16"}),
            ({"encoding": "cp437"}, {"encoding": "cp437"}),
            ({"encoding": "mac-roman", "separator": ";"}, {"encoding": "mac-roman", "decimal": "."}),
        ],
    )
    def test_what_is_said_is_taken_and_nothing_guessed_of_it(self, tmp_path, plain, written, said):
        how = Files.told(**{"sep": None, "encoding": None, "decimal": None, "resize": None} | said)
        source = load(str(csv(tmp_path / "a.csv", **written)), files=how)
        assert source.train.x.equal(plain.train.x)
        assert [c.values for c in source.roles] == [c.values for c in plain.roles]
        for name in said:
            assert not any(f"{name}=" in line for line in source.decisions)
        assert "decimal commas" not in notes(source)["a"]

    def test_a_separator_that_is_said_is_taken_where_another_is_as_likely(self, tmp_path):
        (tmp_path / "a.csv").write_text("a, b;label\n" + "".join(f"{i % 7},{i % 3};{i // 2 % 2}\n" for i in range(60)))
        assert "b;label" in error(tmp_path / "a.csv")
        source = load(str(tmp_path / "a.csv"), files=Files(sep=";"))
        assert [(c.name, c.role) for c in source.roles] == [("a, b", "number"), ("label", "label")]

    def test_a_decimal_comma_that_is_said_makes_points_thousands(self, tmp_path):
        path = csv(tmp_path / "a.csv", separator=";", decimal=",", pay=lambda i: f"{1 + i * i % 8}.{100 + i}")
        assert "decimal=, takes" in error(path)
        source = load(str(path), files=Files(decimal=","))
        pay = torch.tensor([1000.0 * (1 + i * i % 8) + 100 + i for i in range(N)])
        assert set(source.train.x[:, -1].tolist()) <= set(pay.tolist())

    def test_a_decimal_comma_between_quotes(self, tmp_path, plain):
        path = csv(tmp_path / "a.csv")
        lines = path.read_text().splitlines()
        quoted = [",".join([*(f'"{cell.replace(".", ",")}"' for cell in line.split(",")[:3]), *line.split(",")[3:]])
                  for line in lines[1:]]  # fmt: skip
        path.write_text("\n".join([lines[0], *quoted]) + "\n")
        assert load(str(path), files=Files(decimal=",")).train.x.equal(plain.train.x)

    @pytest.mark.parametrize(
        ("text", "encoding", "found"),
        [
            ("Zürich und Genève, 5 €, 3 µg, 20 °C", "cp1252", "cp1252"),
            ("Zürich und Genève, 3 µg, 20 °C", "latin-1", "cp1252"),
            ("Zürich", "utf-8", "utf-8"),
            ("plain", "ascii", "utf-8"),
            ("Ж" * 70000, "utf-8", "utf-8"),  # a letter lies across the pieces that are read
        ],
    )
    def test_the_encoding_is_found(self, tmp_path, text, encoding, found, monkeypatch):
        monkeypatch.setattr("fedloom.data.files.PIECE", 1001)
        (tmp_path / "a.csv").write_text(text, encoding=encoding)
        assert guessed_encoding(tmp_path / "a.csv") == found

    @pytest.mark.parametrize(
        ("text", "encoding"),
        [("Цюрих и Женева", "cp1251"), ("苏黎世和日内瓦", "gbk"), ("チューリッヒ", "shift_jis"),
         ("Zürich Genève", "cp437"), ("Zürich", "mac-roman")],
    )  # fmt: skip
    def test_what_looks_like_no_western_text_is_refused_with_what_to_say(self, tmp_path, text, encoding):
        (tmp_path / "a.csv").write_text(text, encoding=encoding)
        with pytest.raises(
            UsageError, match=r"is not UTF-8, and does not look like Latin-1 or Windows-1252; .*encoding="
        ):
            guessed_encoding(tmp_path / "a.csv")

    @pytest.mark.parametrize(
        ("settings", "complaint"),
        [
            ({"sep": ";;"}, "sep is ';;'; expected one character, or one of comma, semicolon"),
            ({"decimal": ";"}, "decimal is ';'; expected a comma or a point"),
            ({"sep": ",", "decimal": ","}, "sep and decimal are both ','"),
            ({"encoding": "klingon"}, "unknown encoding 'klingon'; expected utf-8, latin-1"),
            ({"resize": "big"}, "resize is 'big'; expected a number of pixels up to 4096, or WIDTHxHEIGHT"),
            ({"resize": "3x4x5"}, "resize is '3x4x5'"),
            ({"resize": 0}, "resize is '?0"),
            ({"resize": 16}, "resize says how images are read, and .*a.csv has none; leave it out"),
            ({"encoding": "cp437"}, "is not in the encoding|label"),
        ],
    )
    def test_settings_that_make_no_sense_are_refused(self, tmp_path, settings, complaint):
        path = csv(tmp_path / "a.csv", label2=lambda i: 0)
        with pytest.raises(UsageError, match=complaint):
            fedloom.problem(
                path, partition="iid", clients=3, **settings | ({"label": "z"} if "cp437" in str(settings) else {})
            )

    @pytest.mark.parametrize("settings", [{"sep": ";"}, {"encoding": "latin-1"}, {"decimal": ","}])
    def test_they_have_an_effect_or_are_refused(self, settings, tmp_path):
        name = next(iter(settings))
        for data in ("digits", (X, Y)):
            with pytest.raises(UsageError, match=f"{name} says how .* are read, and .* has none; leave it out"):
                fedloom.problem(data, clients=3, **settings)
        with pytest.raises(UsageError, match=f"{name}=.* has no effect on a task given in Python"):
            fedloom.run("fedavg", fedloom.problem((X, Y), clients=3), rounds=1, **settings)

    def test_an_encoding_that_is_not_the_file_s(self, tmp_path):
        path = csv(tmp_path / "a.csv", encoding="latin-1")
        assert "is not in the encoding utf-8; set another" in error(path, files=Files(encoding="utf-8"))

    def test_texts_have_an_encoding_too(self, tmp_path):
        text = "Größe und Übermut tun selten gut. " * 40
        (tmp_path / "a.txt").write_text(text, encoding="latin-1")
        (tmp_path / "b.txt").write_text(text)
        assert "encoding=latin-1" in error(tmp_path / "a.txt")
        one, two = load(str(tmp_path / "a.txt"), files=Files(encoding="latin-1")), load(str(tmp_path / "b.txt"))
        assert one.classes == two.classes and one.train.x.equal(two.train.x)


class TestClients:
    def test_a_file_for_each_is_what_a_column_is(self, tmp_path):
        for k in range(12):
            csv(tmp_path / "sites" / f"{k}.csv", range(k * 7, k * 7 + 7))
        csv(tmp_path / "one.csv", range(84), site=lambda i: i // 7)
        apart = fedloom.problem(tmp_path / "sites", partition="column:file", validation=0.0)
        whole = fedloom.problem(tmp_path / "one.csv", partition="column:site", validation=0.0)
        assert apart.population == 12 and list(apart.federation.names) == [str(k) for k in range(12)]
        order = (
            torch.cat([apart.data(k, "train").x for k in range(12)]),
            torch.cat([whole.data(k, "train").x for k in range(12)]),
        )
        # the files stand in the order of their names (0, 1, 10, 11, 2): other rows are held out
        assert order[0].shape == order[1].shape
        assert [len(apart.data(k, "train")) + len(apart.data(k, "test")) for k in range(12)] == [7] * 12

    def test_names_that_are_no_numbers_and_splits(self, tmp_path):
        for split, rows in (("train", range(60)), ("test", range(60, 90))):
            for k, site in enumerate(["north", "south", "west"]):
                csv(tmp_path / split / f"{site}.csv", [i for i in rows if i % 3 == k])
        task = fedloom.problem(tmp_path, partition="column:file", exclude="city", validation=0.0)
        told = task.describe()["clients"]
        assert [(c["name"], c["train"], c["test"]) for c in told] == [
            ("north", 20, 10),
            ("south", 20, 10),
            ("west", 20, 10),
        ]
        names = {column["name"]: column["role"] for column in task.describe()["columns"]}
        assert names["file"] == "client"

    def test_a_folder_for_each_with_its_own_splits(self, tmp_path):
        for k, site in enumerate(["north", "south"]):
            csv(tmp_path / site / "train.csv", range(k * 40, k * 40 + 30))
            csv(tmp_path / site / "test.csv", range(k * 40 + 30, k * 40 + 40))
        told = fedloom.problem(tmp_path, partition="column:folder", exclude="city", validation=0.0).describe()[
            "clients"
        ]
        assert [(c["name"], c["train"], c["test"]) for c in told] == [("north", 30, 10), ("south", 30, 10)]

    @pytest.mark.parametrize("layout", ["{client}/{label}/{i}.png", "{split}/{client}/{label}/{i}.png",
                                        "{client}/{split}/{label}/{i}.png"])  # fmt: skip
    def test_images_of_each_client_lie_above_their_classes(self, tmp_path, layout):
        rng = numpy_stream(1, "test")
        for client in ("clinic 1", "clinic 2"):
            for i, label in enumerate(["cat", "dog"] * 6):
                there = {"client": client, "label": label, "i": i, "split": "test" if i > 7 else "train"}
                file = tmp_path / layout.format(**there)
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (8, 8)).astype(np.uint8)).save(file)
        task = fedloom.problem(tmp_path, partition="column:folder", validation=0.0)
        assert list(task.federation.names) == ["clinic 1", "clinic 2"] and task.federation.classes == ("cat", "dog")
        assert len(task.global_test()) == (8 if "split" in layout else 4)
        if layout.startswith("{client}/{label}"):
            with pytest.raises(UsageError, match=r"lies in no client's folder, .* expected CLIENT/CLASS/image.png"):
                fedloom.problem(tmp_path / "clinic 1", partition="column:folder")
        with pytest.raises(UsageError, match=r"a client of each image .*; take column:folder"):
            fedloom.problem(tmp_path, partition="column:file")

    def test_rows_of_several_files_that_are_put_together_are_told(self, tmp_path):
        for k in range(3):
            csv(tmp_path / "sites" / f"{k}.csv", range(k * 30, k * 30 + 30))
        told = load(str(tmp_path / "sites")).decisions
        assert told[0] == "the rows of 3 files stand one below the other (partition=column:file makes a client of each)"

    def test_a_column_of_that_name_comes_first(self, tmp_path):
        for k in range(3):
            csv(tmp_path / "sites" / f"{k}.csv", range(k * 30, k * 30 + 30), file=lambda i: "uv"[i % 2])
        assert fedloom.problem(tmp_path / "sites", partition="column:file").federation.names == ("u", "v")

    def test_where_there_is_one_file_or_no_folder_it_is_told(self, tmp_path):
        path = csv(tmp_path / "sites" / "a.csv")
        assert "is one file, and partition=column:file makes a client of each of several" in error(path, client="file")
        assert "lies in no client's folder" in error(tmp_path / "sites", client="folder")


class TestLeaf:
    def write(self, path: Path, users: dict[str, list[int]], **replaced) -> None:
        data = {name: {"x": X[rows].tolist(), "y": Y[rows].tolist()} for name, rows in users.items()}
        whole = {"users": [*users], "num_samples": [len(rows) for rows in users.values()], "user_data": data}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(whole | replaced))

    def test_users_are_clients_and_splits_are_folders(self, tmp_path):
        self.write(tmp_path / "train" / "all_data_0.json", {"f01": [*range(20)], "f02": [*range(20, 50)]})
        self.write(tmp_path / "train" / "all_data_1.json", {"f03": [*range(50, 60)]})
        self.write(
            tmp_path / "test" / "all_data_0.json", {"f03": [60, 61], "f01": [*range(62, 80)], "f02": [80, 81, 82]}
        )
        task = fedloom.problem(tmp_path, partition="column:user", validation=0.0)
        told = [(c["name"], c["train"], c["test"]) for c in task.describe()["clients"]]
        assert told == [("f01", 20, 18), ("f02", 30, 3), ("f03", 10, 2)]
        raw = load(str(tmp_path), client="user")
        assert torch.equal(raw.train.x, torch.from_numpy(X[:60]).float())
        assert torch.equal(raw.test.x[:2], torch.from_numpy(X[60:62]).float()) and raw.test.y.tolist()[:2] == [
            *Y[60:62]
        ]

    def test_it_is_what_arrays_are(self, tmp_path):
        users = {f"u{k}": [*range(k * 30, k * 30 + 30)] for k in range(3)}
        self.write(tmp_path / "a.json", users)
        given = {name: (X[rows], Y[rows]) for name, rows in users.items()}
        runs = [
            fedloom.run("fedavg", tmp_path, partition="column:user", rounds=2),
            fedloom.run("fedavg", given, rounds=2),
        ]
        models = [Path(run.path, "model.safetensors").read_bytes() for run in runs]
        assert models[0] == models[1]

    def test_pixels_are_images_where_a_size_is_said(self, tmp_path):
        x = numpy_stream(2, "test").random((40, 48)).round(2)
        data = {"u": {"x": x.tolist(), "y": [k % 2 for k in range(40)]}}
        (tmp_path / "a.json").write_text(json.dumps({"users": ["u"], "num_samples": [40], "user_data": data}))
        assert load(str(tmp_path / "a.json")).kind == "tabular"
        source = load(str(tmp_path / "a.json"), files=Files(resize=(8, 6)))
        assert source.kind == "image" and source.train.x.shape[1:] == (1, 6, 8)
        rows = {tuple(row) for row in torch.from_numpy(x).float().tolist()}
        assert {tuple(row) for row in source.train.x.flatten(1).tolist()} <= rows

    def test_rows_of_several_texts_are_columns(self, tmp_path):
        rows = [[str(i), "cat" if i % 2 else "dog", f"a text of {i} words that is long"] for i in range(60)]
        data = {"u": {"x": rows, "y": [i // 2 % 2 for i in range(60)]}}
        (tmp_path / "a.json").write_text(json.dumps({"users": ["u"], "user_data": data}))
        source = load(str(tmp_path / "a.json"), exclude=("x0", "x1"))
        assert source.kind == "text" and len(source.train.y) + len(source.test.y) == 60

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("[1, 2", "cannot read .*expected JSON in LEAF's layout"),
            ("[" * 100_000, "cannot read"),
            ('{"rows": [1]}', "is not in LEAF's layout, a JSON object with users and user_data"),
            ('{"users": ["a"], "user_data": {}}', "names the user 'a' and has no data of it"),
            ('{"users": ["a"], "user_data": {"a": {"x": [1], "y": []}}}', "user 'a' has no x and y of one length"),
            ('{"users": ["a"], "user_data": {"a": {"x": [1, "b"], "y": [0, 1]}}}', "rows of no common type"),
            ('{"users": [], "user_data": {}}', "has users and no rows"),
        ],
    )
    def test_what_is_none_is_refused(self, tmp_path, text, complaint):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UsageError, match=complaint):
            load(str(tmp_path / "a.json"))


class TestLeafsLetters:
    """LEAF's Shakespeare: an x is a text of one length, and y the letter that follows."""

    TEXTS: ClassVar = {"HAMLET": "to be, or not to be. " * 9, "OPHELIA": "good my lord! " * 9}

    def write(self, path, texts, length=20):
        rows = {
            user: {
                "x": [text[k : k + length] for k in range(len(text) - length)],
                "y": [*text[length:]],
            }
            for user, text in texts.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"users": [*rows], "user_data": rows}))

    def spelled(self, source, rows):
        return ["".join(source.vocabulary[token] for token in row) for row in rows.x.tolist()]

    def test_rows_are_letters_and_classes_the_next_one(self, tmp_path):
        self.write(tmp_path / "a.json", self.TEXTS)
        source = load(str(tmp_path / "a.json"), client="user", test=0.25)
        assert source.kind == "text" and source.classes == tuple(sorted({*"".join(self.TEXTS.values())}))
        assert source.vocabulary[2:] == source.classes and len(source.vocabulary) == 2 + len(source.classes)
        for user, text in self.TEXTS.items():
            count = len(text) - 20
            first = count - round(0.25 * count)
            for rows, places in ((source.train, range(first)), (source.test, range(first, count))):
                own = [row for row, name in enumerate(rows.columns["user"]) if name == user]
                assert [self.spelled(source, rows)[row] for row in own] == [text[k : k + 20] for k in places]
                assert [source.classes[rows.y[row]] for row in own] == [text[k + 20] for k in places]
        told = " ".join(source.decisions)
        assert "each x is a text of 20 letters and y the next one: they are read letter by letter" in told
        assert f"the last 25% of each user's rows are held out as test rows, {len(source.test.y)} in all" in told

    def test_given_test_rows_are_taken_and_strange_letters_are_unknown(self, tmp_path):
        said = "to be, or not to b%. to be?"
        self.write(tmp_path / "train" / "a.json", self.TEXTS)
        self.write(tmp_path / "test" / "a.json", {"HAMLET": said})
        source = load(str(tmp_path), client="user")
        assert self.spelled(source, source.test) == [said[k : k + 20].replace("%", "<unk>") for k in range(6)]
        assert [source.classes[y] for y in source.test.y] == [*" to be"]
        assert "1 test rows are left out, whose next letter stands in no training row" in source.decisions

    def test_a_recurrent_network_learns_to_go_on(self, tmp_path):
        self.write(tmp_path / "a.json", self.TEXTS)
        settings = {"partition": "column:user", "model": "lstm:32", "optimizer": "adam"}
        run = fedloom.run("fedavg", tmp_path, rounds=12, lr=0.01, epochs=2, **settings)
        assert run.partition["population"] == 2 and run.final["global_test_accuracy"] > 0.9
        assert run.predict(["be. to be, or not to b", "! good my lord! good m"]) == ["e", "y"]

    def test_as_in_leaf_80_letters_are_the_network_of_leaf(self, tmp_path):
        self.write(tmp_path / "a.json", self.TEXTS, 80)
        task = fedloom.problem(tmp_path, partition="column:user", model="lstm")
        assert task.shape == (80,) and task.network().body.lstm.hidden_size == 256

    def test_clients_of_a_row_or_two_have_no_test_rows(self, tmp_path):
        self.write(
            tmp_path / "a.json", self.TEXTS | {"GHOST": "mark me, mark me, mark", "BOY": "o my lord, good my lo"}
        )
        task = fedloom.problem(tmp_path, partition="column:user", validation=0.0)
        assert task.describe()["decisions"][-1].startswith("2 of 4 clients have no test rows")

    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"label": "user"}, "text of one length a row, whose label is the next letter; leave the label 'user' out"),
            ({"exclude": "user"}, "has no columns; leave exclude=user out"),
            ({"problem": "regression"}, "whose next letter is a class; take problem=classification"),
            ({"windows": 4, "partition": "column:user"}, "windows says how the rows of tables are read"),
            ({"test_share": 0.001}, "too few rows of each user to hold some out"),
        ],
    )
    def test_what_says_nothing_of_letters_is_refused(self, tmp_path, settings, told):
        self.write(tmp_path / "a.json", self.TEXTS)
        with pytest.raises(UsageError, match=told):
            fedloom.problem(tmp_path, **settings)
        assert fedloom.problem(tmp_path, label="y", clients=2).classes

    def test_texts_of_other_lengths_are_no_windows_of_letters(self, tmp_path):
        uneven = {"x": [f"a text of {k * 7} words" for k in range(40)], "y": [*"ab" * 20]}
        (tmp_path / "a.json").write_text(json.dumps({"users": ["OPHELIA"], "user_data": {"OPHELIA": uneven}}))
        source = load(str(tmp_path / "a.json"), client="user")
        assert source.classes == ("a", "b") and not any("letter by letter" in one for one in source.decisions)
        self.write(tmp_path / "b" / "train" / "a.json", self.TEXTS)
        self.write(tmp_path / "b" / "test" / "a.json", self.TEXTS, 30)
        assert "has texts of 20 letters in its training split alone" in error(str(tmp_path / "b"))


class Touch:
    """What a hostile file may have in it: to read it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestPFLlib:
    def write(self, path: Path, data, **arrays) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.savez_compressed(file, data=data, **arrays)

    def test_its_folders_are_read_file_by_file(self, tmp_path):
        for k in range(11):
            rows = slice(k * 8, k * 8 + 6), slice(k * 8 + 6, k * 8 + 8)
            for split, part in zip(("train", "test"), rows, strict=True):
                self.write(tmp_path / split / f"{k}.npz", {"x": X[part].astype(np.float32), "y": Y[part]})
        (tmp_path / "config.json").write_text('{"num_clients": 11}')
        task = fedloom.problem(tmp_path, partition="column:file", validation=0.0)
        told = [(c["name"], c["train"], c["test"]) for c in task.describe()["clients"]]
        assert told == [(str(k), 6, 2) for k in range(11)]
        raw = load(str(tmp_path), client="file")
        for k in range(11):
            own = raw.train.x[torch.from_numpy(raw.train.columns["file"] == k)]
            assert torch.equal(own, torch.from_numpy(X[k * 8 : k * 8 + 6]).float())

    @pytest.mark.parametrize("kind", ["<f8", ">f4", "<i2", "u1", "?"])
    @pytest.mark.parametrize("order", ["C", "F"])
    def test_arrays_of_all_types_come_as_numpy_wrote_them(self, tmp_path, kind, order):
        x = np.asarray(numpy_stream(3, "test").integers(0, 2, (40, 2, 3)) * 1, kind, order=order)
        self.write(tmp_path / "a.npz", {"x": x, "y": [k % 2 for k in range(40)]})
        source = load(str(tmp_path / "a.npz"), test=0.5)
        seen = sorted(map(tuple, torch.cat([source.train.x, source.test.x]).flatten(1).tolist()))
        scale = 255 if kind in ("u1", "?") else 1
        assert seen == sorted(map(tuple, (torch.from_numpy(x.astype(np.float32)).flatten(1) / scale).tolist()))

    def test_nothing_in_it_is_executed(self, tmp_path):
        made = tmp_path / "made"
        hostile = [Touch(made), {"x": Touch(made), "y": Y}, {"x": X, "y": Y, "more": [Touch(made)]}]
        for number, data in enumerate(hostile):
            self.write(tmp_path / f"{number}.npz", data)
            with pytest.raises(
                UsageError, match=r"is pickled, which may run code when it is read: only a dict of arrays"
            ):
                load(str(tmp_path / f"{number}.npz"))
            assert not made.exists()
        assert pickle.loads(pickle.dumps(Touch(made))) is None and made.exists(), "or this tests nothing"  # noqa: S301

    @pytest.mark.parametrize(
        "data",
        [{"x": np.array([object()]), "y": Y}, {"x": "text", "y": Y}, {"x": {1, 2}, "y": Y}, {3: X},
         np.datetime64("now"), {"x": np.array(["a", "b"] * 45), "y": Y}],
        ids=range(6),
    )  # fmt: skip
    def test_what_is_pickled_and_no_dict_of_arrays_is_refused(self, tmp_path, data):
        self.write(tmp_path / "a.npz", data)
        with pytest.raises(UsageError, match=r"is pickled|differ in length \(none\)"):
            load(str(tmp_path / "a.npz"))

    def test_a_pickle_cut_short_or_changed_is_told_in_a_line(self, tmp_path):
        from fedloom.data.npz import _dict_of_arrays

        whole = pickle.dumps(np.array({"x": X, "y": Y}, dtype=object), protocol=4)
        for place in range(0, len(whole), 97):
            for pickled in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :]):
                try:
                    _dict_of_arrays(tmp_path, "data", pickled)
                except Exception as error:  # noqa: BLE001 - what may be raised is what the test is on
                    from fedloom.data.npz import NOT_ARRAYS

                    assert isinstance(error, NOT_ARRAYS)


class TestImages:
    PIXELS = numpy_stream(7, "test").integers(0, 256, (12, 20, 30, 3), dtype=np.uint8)

    def folder(self, path: Path, sizes, mode: str = "RGB") -> str:
        for i, pixels in enumerate(self.PIXELS):
            file = path / "ab"[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).convert(mode).resize(sizes[i % len(sizes)]).save(file)
        return str(path)

    def test_images_of_unequal_size_are_resized_where_it_is_said(self, tmp_path):
        path = self.folder(tmp_path, [(30, 20), (10, 40)])
        assert "as by resize=64" in error(path)
        source = load(path, files=Files(resize=(16, 8)))
        assert source.train.x.shape[1:] == (3, 8, 16) and "images are resized to 16 x 8 pixels" in source.decisions

    def test_one_that_has_the_size_stays_as_it_is(self, tmp_path):
        path = self.folder(tmp_path, [(30, 20)])
        assert load(path, files=Files(resize=(30, 20))).train.x.equal(load(path).train.x)

    def test_files_arrays_and_deep_images_are_resized_alike(self, tmp_path):
        grey = self.PIXELS[..., 0]
        smooth = np.stack([np.linspace(k, 200 + k, 600).reshape(20, 30) for k in range(12)]).astype(np.uint8)
        for i, pixels in enumerate(smooth):
            for kind, made in (("u8", pixels), ("u16", pixels.astype(np.uint16) * 257)):
                file = tmp_path / kind / "ab"[i % 2] / f"{i:02}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(made).save(file)
        order = [*range(0, 12, 2), *range(1, 12, 2)]
        np.savez(tmp_path / "a.npz", x=smooth[order], y=np.repeat([0, 1], 6))
        how = Files(resize=(10, 10))
        shapes = [load(str(tmp_path / name), files=how).train.x for name in ("u8", "u16", "a.npz")]
        assert {tuple(x.shape[1:]) for x in shapes} == {(1, 10, 10)} and grey.shape == (12, 20, 30)
        assert (shapes[0] - shapes[2]).abs().max() < 0.01 and (shapes[1] - shapes[2]).abs().max() < 0.01

    def test_deep_images_of_unequal_size_are_resized_too(self, tmp_path):
        for i in range(12):
            file = tmp_path / "ab"[i % 2] / f"{i}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((8 + i, 20 - i), 5000 * (i + 1), np.uint16)).save(file)
        x = load(str(tmp_path), files=Files(resize=(6, 5))).train.x
        assert x.shape[1:] == (1, 5, 6) and (x - x.mean((2, 3), keepdim=True)).abs().max() < 1e-5
        assert 0.07 < x.min() < x.max() < 0.93

    def test_a_run_takes_the_setting(self, tmp_path):
        path = self.folder(tmp_path, [(30, 20), (10, 40)])
        run = fedloom.run("fedavg", path, resize="12x10", partition="iid", clients=2, rounds=1)
        assert fedloom.problem(path, resize="12x10", clients=2).shape == (3, 10, 12)
        assert run.spec.resize == "12x10" and fedloom.problem(path, resize=9, clients=2).shape == (3, 9, 9)


class TestRawRows:
    """What a setting says of the files that were learned from holds for those that are predicted on."""

    def test_cells(self, tmp_path):
        path = csv(tmp_path / "a.csv", separator=";", decimal=",", pay=lambda i: f"{1 + i * i % 8}.{100 + i}")
        run = fedloom.run(
            "fedavg", path, decimal=",", exclude="city", partition="iid", clients=2, rounds=1, out=tmp_path / "r"
        )
        pay = [1000.0 * (1 + i * i % 8) + 100 + i for i in range(N)]
        rows = [{"a": float(x[0]), "b": float(x[1]), "c": float(x[2]), "pay": p} for x, p in zip(X, pay, strict=True)]
        for model in (run, fedloom.Run(tmp_path / "r")):
            assert model.predict(path, probabilities=True) == model.predict(rows, probabilities=True)

    def test_images_of_any_size(self, tmp_path):
        for i in range(24):
            file = tmp_path / "im" / "ab"[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8 + i, 20 - i // 2), 60 + 100 * (i % 2), np.uint8)).save(file)
        run = fedloom.run("fedavg", tmp_path / "im", resize="6x5", partition="iid", clients=2, rounds=20)
        found = run.predict([tmp_path / "im" / "a" / "0.png", tmp_path / "im" / "b" / "23.png"])
        assert found == ["a", "b"]


class TestHoldOut:
    def test_clients_with_two_rows_get_a_test_row_where_others_have_some_to_spare(self, tmp_path):
        draw = numpy_stream(4, "test")
        sizes = [2, 3, 2, 60, 3, 60, 2, 50, 1, 1]
        owner = np.repeat(np.arange(10), sizes)
        lines = [f"u{k},{draw.normal():.3f},{draw.normal():.3f},{i % 2}" for i, k in enumerate(owner)]
        (tmp_path / "a.csv").write_text("\n".join(["user,a,b,label", *lines]) + "\n")
        for seed in range(6):
            source, plain = (
                load(str(tmp_path / "a.csv"), seed=seed, **how) for how in ({"client": "user"}, {"exclude": ("user",)})
            )
            held, left = (
                [int((part.columns["user"] == f"u{k}").sum()) for k in range(10)]
                for part in (source.test, source.train)
            )
            assert min(held[:8]) == 1 and held[8:] == [0, 0]
            assert [n + m for n, m in zip(left, held, strict=True)] == sizes and min(left) >= 1
            assert torch.bincount(source.test.y).equal(torch.bincount(plain.test.y))


SEATS = ["Zürich", "Köln", "Graz", "Malmö"]


def hospitals(path: Path) -> Path:
    """A CSV as a hospital's office saves it."""
    draw = numpy_stream(11, "test")
    words = ["Patient", "klagt", "über", "Schmerzen", "im", "Rücken", "seit", "Tagen", "ohne", "Fieber"]
    lines = ["Nr;Patient-ID;Aufnahme;Alter;Blutdruck;CRP;Station;Klinik;Befund;Ausgang"]
    for i in range(900):
        age, pressure, crp = draw.integers(20, 90), draw.normal(120, 15), abs(draw.normal(20, 15))
        sick = (age - 55) / 15 + (crp - 18) / 8 + draw.normal(0, 0.4) > 0
        note = " ".join(draw.choice(words, 8)) + f" {i}"
        cells = [
            str(i), f"P{100_000 + i * 7}", f"2023-{1 + i % 12:02}-{1 + i % 28:02}", str(age),
            "" if i % 11 == 0 else f"{pressure:.1f}".replace(".", ","), f"{crp:.2f}".replace(".", ","),
            ["Chirurgie", "Innere", "Notaufnahme"][i % 3], SEATS[i // 3 % 4],
            f'"{note}"', "krank" if sick else "gesund",
        ]  # fmt: skip
        lines.append(";".join(cells))
    path.write_text("\n".join(lines) + "\n", encoding="cp1252")
    return path


class TestHospitals:
    """One command, a right model, and a sentence for every decision."""

    FLAGS = ("--label", "Ausgang", "--partition", "column:Klinik")

    def test_what_cannot_be_told_apart_is_asked_for_at_once(self, tmp_path, capsys):
        path = hospitals(tmp_path / "hospitals.csv")
        assert main(["run", "fedavg", "--data", str(path), *self.FLAGS, "--rounds", "1"]) == 2
        told = capsys.readouterr().err
        assert "'Blutdruck' in 82" in told and "missing=mean or missing=most_frequent" in told
        assert "exclude=NAME to do without the column" in told and "Aufnahme" not in told and "Befund" not in told

    def test_one_command_gives_a_right_model_and_says_what_was_decided(self, tmp_path, capsys):
        path = hospitals(tmp_path / "hospitals.csv")
        command = [
            "run",
            "fedavg",
            "--data",
            str(path),
            *self.FLAGS,
            "--exclude",
            "Aufnahme,Befund",
            "--missing",
            "mean",
        ]
        assert main([*command, "--rounds", "30", "--out", str(tmp_path / "run")]) == 0
        told = " ".join(capsys.readouterr().out.split())
        for sentence in (
            "label Ausgang: 2 classes",
            "client Klinik: 4 clients",
            "Alter;",
            "CRP: decimal commas",
            "Blutdruck: decimal commas, 82 gaps, filled in with the mean 1",
            "categories Station: 3 values",
            "ignored Nr: counts the rows, from 0 to 899",
            "ignored Patient-ID: names whose a row is (partition=column:Patient-ID makes clients of it)",
            "ignored Aufnahme: excluded",
            "ignored Befund: excluded",
            "rows gesund ",
            "decided cells are separated by ';' (sep= says another)",
            "decided text is in Windows-1252 (encoding= says another)",
            "rows, 20% of each class, are held out as test rows, drawn by the seed 0",
            "decided columns are normalized by the mean and deviation of the clients'",
        ):
            assert sentence in told, sentence
        run = fedloom.Run(tmp_path / "run")
        assert run.final["global_test_accuracy"] > 0.88
        assert sorted(c["name"] for c in run.partition["clients"]) == ["Graz", "Köln", "Malmö", "Zürich"]
        assert len(run.partition["decisions"]) == 4 and sum(run.partition["counts"]) == 900

    def test_dates_and_texts_need_no_setting_and_what_they_say_is_learned(self, tmp_path, capsys):
        path = hospitals(tmp_path / "hospitals.csv")
        lines = path.read_text("cp1252").splitlines()
        ill = [" mit Fieber seit gestern" if line.endswith("krank") else " ohne Befund" for line in lines[1:]]
        told = [line.replace('";', f'{more}";') for line, more in zip(lines[1:], ill, strict=True)]
        for name, rows in {"plain": lines[1:], "telling": told}.items():
            path.write_text("\n".join([lines[0], *rows]) + "\n", encoding="cp1252")
            command = ["run", "fedavg", "--data", str(path), *self.FLAGS, "--missing", "mean", "--rounds", "30"]
            assert main([*command, "--exclude", "Alter,CRP", "--out", str(tmp_path / name)]) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert "dates Aufnahme: as places in time, in the year and in the week" in told
        assert "text Befund: as which of 10 frequent words a row has" in told, "the ten there are; numbers stand once"
        plain, telling = (fedloom.Run(tmp_path / name).final["global_test_accuracy"] for name in ("plain", "telling"))
        assert plain < 0.65 and telling > 0.95

    def test_data_shows_the_same_and_what_each_client_gets(self, tmp_path, capsys):
        path = hospitals(tmp_path / "hospitals.csv")
        command = ["data", str(path), *self.FLAGS, "--exclude", "Aufnahme,Befund", "--missing", "mean"]
        assert main(command) == 0
        shown = capsys.readouterr().out
        assert "ignored    Befund: excluded" in shown and "decided    cells are separated by ';'" in shown
        assert main([*command, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        y = np.array([line.split(";")[-1] for line in path.read_text("cp1252").splitlines()[1:]])
        assert dict(zip(told["classes"], told["counts"], strict=True)) == {
            n: int((y == n).sum()) for n in ("gesund", "krank")
        }
        assert f"rows       gesund {(y == 'gesund').sum()}, krank {(y == 'krank').sum()}" in shown

    def test_what_is_said_of_the_file_in_place_of_guessed(self, tmp_path):
        path = hospitals(tmp_path / "hospitals.csv")
        how = {
            "label": "Ausgang",
            "partition": "column:Klinik",
            "exclude": "Aufnahme,Befund,Nr,Patient-ID",
            "missing": "mean",
            "rounds": 2,
        }
        guessed = fedloom.run("fedavg", path, **how, out=tmp_path / "a", report=False)
        said = fedloom.run(
            "fedavg", path, **how, sep=";", encoding="latin-1", decimal=",", out=tmp_path / "b", report=False
        )
        assert (
            guessed.path.joinpath("model.safetensors").read_bytes()
            == said.path.joinpath("model.safetensors").read_bytes()
        )
        assert not [line for line in said.partition["decisions"] if "=" in line]
