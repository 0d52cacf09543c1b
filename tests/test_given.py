"""Data that Python has: the same rows give the same model, bit by bit, however they come; others are refused."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import fedloom
from fedloom.data.given import Given
from fedloom.data.load import load
from fedloom.errors import UsageError
from fedloom.random import numpy_stream

pd = pytest.importorskip("pandas")
hub = pytest.importorskip("datasets")

DRAWN = numpy_stream(3, "test")
X = DRAWN.normal(size=(160, 3)).round(3)
Y = (X.sum(1) > 0).astype(int)
OWNER = np.repeat([0, 1, 2, 3], [20, 40, 70, 30])
ROWS = [client == OWNER for client in range(4)]
FRAME = pd.DataFrame(X, columns=[*"abc"]).assign(label=Y)
SHORT = {"partition": "iid", "clients": 4, "rounds": 2}


class Own(Dataset):
    """A data set with a random transform, as PyTorch's users write them."""

    def __init__(self, x, y):
        self.x, self.y, self.asked = x, y, 0

    def __len__(self):
        return len(self.y)

    def __getitem__(self, place):
        self.asked += 1
        return torch.tensor(self.x[place]), int(self.y[place])


class Named(Own):
    def __getitem__(self, place):
        x, y = super().__getitem__(place)
        return {"a": float(x[0]), "b": float(x[1]), "c": float(x[2]), "label": y}


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])


def model(data, **settings) -> bytes:
    run = fedloom.run("fedavg", data, **SHORT | settings)
    return Path(run.path, "model.safetensors").read_bytes()


def refusal(data, **settings) -> str:
    with pytest.raises(UsageError) as caught:
        fedloom.run("fedavg", data, **SHORT | settings)
    line = str(caught.value)
    assert "\n" not in line
    return line


def table(data) -> pa.Table:
    return Given.of(data).read.train


ONE = {
    "a DataFrame": lambda: FRAME,
    "arrays": lambda: (X, Y),
    "tensors": lambda: (torch.tensor(X), torch.tensor(Y)),
    "lists": lambda: (X.tolist(), Y.tolist()),
    "a column of labels": lambda: (X, Y[:, None]),
    "a table and a column": lambda: (FRAME[[*"abc"]], FRAME["label"]),
    "columns": lambda: {"x": X, "label": Y},
    "a TensorDataset": lambda: TensorDataset(torch.tensor(X), torch.tensor(Y)),
    "a Dataset": lambda: Own(X, Y),
    "a Dataset of dicts": lambda: Named(X, Y),
    "a part of a Dataset": lambda: Subset(Own(np.r_[X, X], np.r_[Y, Y]), range(160, 320)),
    "a datasets.Dataset": lambda: hub.Dataset.from_pandas(FRAME),
    "a shuffled datasets.Dataset": lambda: hub.Dataset.from_pandas(FRAME[::-1].reset_index(drop=True)).select(
        range(159, -1, -1)
    ),
    "a table of Arrow": lambda: pa.Table.from_pandas(FRAME),
    "a DatasetDict": lambda: hub.DatasetDict({"train": hub.Dataset.from_pandas(FRAME)}),
    "a mapping": lambda: {"train": (X, Y)},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The models of files: of one, of one with a column of clients, of two splits."""
    folder = tmp_path_factory.mktemp("files")
    FRAME.to_csv(folder / "one.csv", index=False)
    FRAME.assign(client=OWNER).to_csv(folder / "clients.csv", index=False)
    (folder / "split").mkdir()
    FRAME[:120].to_csv(folder / "split" / "train.csv", index=False)
    FRAME[120:].to_csv(folder / "split" / "test.csv", index=False)
    natural = {"partition": "column:client", "clients": None}
    return {
        "one": model(folder / "one.csv"),
        "clients": model(folder / "clients.csv", **natural),
        "split": model(folder / "split"),
    }


class TestTheSameModel:
    """The identities: a file is the reference."""

    @pytest.mark.parametrize("kind", ONE)
    def test_of_one_table(self, kind, files):
        assert model(ONE[kind]()) == files["one"]

    def test_the_data_may_be_called_data(self, files):
        run = fedloom.run("fedavg", data=FRAME, **SHORT)
        assert Path(run.path, "model.safetensors").read_bytes() == files["one"]

    @pytest.mark.parametrize(
        "pair",
        [
            (FRAME[:120], FRAME[120:]),
            ((X[:120], Y[:120]), (X[120:], Y[120:])),
            {"test": (X[120:], Y[120:]), "train": (X[:120], Y[:120])},
            hub.DatasetDict(train=hub.Dataset.from_pandas(FRAME[:120]), test=hub.Dataset.from_pandas(FRAME[120:])),
            (Own(X[:120], Y[:120]), Own(X[120:], Y[120:])),
        ],
        ids=["frames", "arrays", "mapping", "DatasetDict", "Datasets"],
    )  # fmt: skip
    def test_of_two_splits(self, pair, files):
        assert model(pair) == files["split"]

    @pytest.mark.parametrize(
        "whole",
        [
            [Own(X[ROWS[k]], Y[ROWS[k]]) for k in range(4)],
            [(X[ROWS[k]], Y[ROWS[k]]) for k in range(4)],
            {name: FRAME[ROWS[k]] for k, name in enumerate("ABCD")},
            {k: hub.Dataset.from_pandas(FRAME[ROWS[k]]) for k in range(4)},
            [{"x": X[ROWS[k]], "label": Y[ROWS[k]]} for k in range(4)],
        ],
        ids=["Datasets", "arrays", "frames by name", "datasets by number", "columns"],
    )
    def test_of_clients_that_give_their_own(self, whole, files):
        run = fedloom.run("fedavg", whole, rounds=2)
        assert Path(run.path, "model.safetensors").read_bytes() == files["clients"]
        assert run.spec.partition == "column:client" and run.spec.clients == 4
        named = ["A", "B", "C", "D"] if "A" in whole else ["0", "1", "2", "3"]
        assert [client["name"] for client in run.partition["clients"]] == named

    def test_a_partition_of_clients_rows_that_is_asked_for_is_taken(self):
        with pytest.warns(UserWarning, match="the data of 2 clients given in Python: ignored is client"):
            run = fedloom.run("fedavg", [(X[:80], Y[:80]), (X[80:], Y[80:])], **SHORT)
        assert run.spec.partition == "iid" and run.spec.clients == 4
        roles = {column["name"]: column["role"] for column in run.partition["columns"]}
        assert roles["client"] == "ignored"  # told, and no feature


class TestClients:
    def test_ten_and_more_stand_in_their_order_and_each_has_its_rows(self):
        sizes = [10 + 2 * k for k in range(12)]
        x, y = [np.full((n, 2), k) + np.arange(2 * n).reshape(n, 2) / 99 for k, n in enumerate(sizes)], sizes
        parts = [(rows, np.arange(n) % 2) for rows, n in zip(x, y, strict=True)]
        told = fedloom.problem(parts, validation=0.0).describe()["clients"]
        assert [client["train"] + client["test"] for client in told] == sizes

    def test_each_may_have_a_test_split_of_its_own(self):
        pairs = [
            ((X[:50], Y[:50]), (X[50:60], Y[50:60])),
            {"train": (X[60:150], Y[60:150]), "test": (X[150:], Y[150:])},
        ]
        told = fedloom.problem(pairs, validation=0.0).describe()["clients"]
        assert [(client["train"], client["test"]) for client in told] == [(50, 10), (90, 10)]

    def test_columns_may_stand_in_any_order(self):
        made = table([FRAME[:80], FRAME[80:][["label", "c", "b", "a"]]])
        assert made.column_names == ["a", "b", "c", "label", "client"]
        assert made.column("a").to_pylist() == X[:, 0].tolist()

    @pytest.mark.parametrize(
        ("clients", "complaint"),
        [
            ([], "the data are given as a list; expected a name .*empty"),
            ([(X, Y), X], "the data of client 1 are a ndarray; .* an array alone has no labels: give \\(x, y\\)"),
            ({"A": (X, Y), "B": 3}, "the data are given as a dict; expected a name"),
            ([FRAME, FRAME.drop(columns="c")], "client 1 have the columns 'a', 'b', 'label'.*, those of 0"),
            ([(X, Y), (X[:, :2], Y)], "the clients' data do not fit together"),
            ([FRAME, FRAME.assign(client=1)], "client 1 have a column 'client' already; rename it, or join"),
            ([(X, Y), ((X, Y), (X, Y))], "client '0' has no test rows and others have some"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, clients, complaint):
        with pytest.raises(UsageError, match=complaint):
            Given.of(clients)


class TestFrames:
    def test_a_named_index_is_a_column_and_any_other_is_none(self):
        assert table(FRAME.set_index("a")).column_names == ["a", "b", "c", "label"]
        assert table(FRAME[::-1]).column_names == ["a", "b", "c", "label"]
        assert table(FRAME.rename_axis("a")).column_names == ["a", "b", "c", "label"]  # there is such a column

    def test_gaps_categories_and_truth_values_are_what_they_are_in_a_file(self, tmp_path):
        draw = numpy_stream(0, "test")
        frame = FRAME.assign(
            city=pd.Categorical(draw.choice(["Zürich", "Orléans"], 160)),
            smoker=draw.random(160) > 0.5,
            a=np.where(np.arange(160) % 9 == 0, np.nan, X[:, 0]),
            b=pd.Series(np.arange(160) * 7 % 23, dtype="Int64").mask(np.arange(160) == 5),
            job=pd.Series(draw.choice(["cook", "clerk"], 160), dtype=object).mask(np.arange(160) == 8),
        )
        frame.to_csv(tmp_path / "t.csv", index=False)
        assert model(frame, missing="mean") == model(tmp_path / "t.csv", missing="mean")
        assert "'a' in 18, 'b' in 1, 'job' in 1" in refusal(frame)

    def test_numbers_may_name_columns(self):
        assert table(pd.DataFrame(X).assign(label=Y)).column_names == ["0", "1", "2", "label"]

    @pytest.mark.parametrize(
        ("frame", "complaint"),
        [
            (pd.concat([FRAME, FRAME[["a"]]], axis=1), "two columns named 'a'; rename one"),
            (pd.concat({"one": FRAME}, axis=1), "the DataFrame's columns have 2 levels; give it one"),
            (FRAME.assign(a=[1, "x"] * 80), "values have no common type .*astype"),
            ((FRAME, FRAME["label"]), "the table of inputs has a column 'label' already"),
            ((FRAME[["a"]], Y[:9]), "160 rows of inputs and 9 labels"),
        ],
    )
    def test_what_is_no_table_is_refused(self, frame, complaint):
        with pytest.raises(UsageError, match=complaint):
            Given.of(frame)


class TestArraysAndItems:
    def test_images_are_images_whoever_decodes_them(self):
        pixels = numpy_stream(1, "test").integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
        y = np.arange(40) % 2
        reference = load(Given.of((pixels, y)))
        assert reference.kind == "image" and reference.train.x.shape[1:] == (3, 8, 8)
        pictures = [Image.fromarray(one) for one in pixels]
        same = [
            [(one, label) for one, label in zip(pictures, y.tolist(), strict=True)],
            [{"image": one, "label": label} for one, label in zip(pictures, y.tolist(), strict=True)],
        ]
        for items in same:
            source = load(Given.of(Items(items)))
            assert source.kind == "image" and torch.equal(source.train.x, reference.train.x)
        features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["cat", "dog"])})
        stored = hub.Dataset.from_dict({"image": pictures, "label": y.tolist()}, features=features)
        source = load(Given.of(stored))
        assert source.classes == ("cat", "dog") and torch.equal(source.test.x, reference.test.x)

    def test_sequences_and_records_are_columns(self):
        number = hub.Value("float32")
        features = hub.Features(point=hub.Sequence(number, length=3), of={"n": number}, label=hub.Value("int64"))
        rows = {"point": X.tolist(), "of": [{"n": float(v)} for v in X[:, 0]], "label": Y.tolist()}
        source = load(Given.of(hub.Dataset.from_dict(rows, features=features)))
        assert [c.name for c in source.roles] == ["point", "of.n", "label"] and source.widths == (3, 1)
        assert torch.equal(source.train.x[:, 0], source.train.x[:, 3])

    def test_pictures_in_grey_stay_so(self):
        pixels = numpy_stream(2, "test").integers(0, 256, (40, 8, 8), dtype=np.uint8)
        pictures = Items([(Image.fromarray(one), place % 2) for place, one in enumerate(pixels)])
        sources = [load(Given.of(data)) for data in (pictures, (pixels, np.arange(40) % 2))]
        assert sources[0].train.x.shape[1:] == (1, 8, 8) and torch.equal(sources[0].train.x, sources[1].train.x)

    def test_a_kind_of_tensor_data_set_of_ones_own_is_asked_for_its_items(self):
        class Doubled(TensorDataset):
            def __getitem__(self, place):
                x, y = super().__getitem__(place)
                return 2 * x, y

        made = table(Doubled(torch.tensor(X), torch.tensor(Y)))
        assert np.array_equal(made.column("x").combine_chunks().to_numpy_ndarray(), 2 * X)

    def test_texts_are_text(self):
        texts = [f"the {word} is {n} miles from here" for n, word in itertools.product(range(30), ["sea", "hill"])]
        source = load(Given.of((texts, [n % 2 for n in range(60)])))
        assert source.kind == "text" and "sea" in source.vocabulary

    def test_an_item_is_asked_for_once(self):
        own = Own(X, Y)
        model(own)
        assert own.asked == 160

    def test_half_and_brain_floats_and_leaves_of_a_graph_are_numbers(self):
        for kind in (torch.float16, torch.bfloat16):
            x = torch.tensor(X).to(kind).requires_grad_()
            assert np.allclose(load(Given.of((x, Y))).train.x.mean(), X.mean(), atol=0.1)
            columns = {"a": x[:, 0], "b": x[:, 1], "label": Y}
            assert np.allclose(load(Given.of(columns)).train.x.mean(), X[:, :2].mean(), atol=0.1)

    @pytest.mark.parametrize(
        ("data", "complaint"),
        [
            (X, "given as a ndarray; .* an array alone has no labels: give \\(x, y\\)"),
            (torch.tensor(X), "given as a Tensor; .* a tensor alone has no labels: give \\(x, y\\)"),
            (FRAME["a"], "given as a Series; .* a column alone has no features"),
            (DataLoader(Own(X, Y)), "given as a DataLoader; .* clients draw their own batches: give its dataset"),
            (Endless(), "given as an IterableDataset; .* rows are dealt by their numbers"),
            (hub.Dataset.from_pandas(FRAME).to_iterable_dataset(), "given as an IterableDataset; .* rows are dealt"),
            ((row for row in X), "given as a generator; .* rows are dealt by their numbers"),
            ({1, 2}, "given as a set; expected a name \\(digits, hf:NAME\\), the path of a file or folder, a Dat"),
            ((X, Y, X), "given as a tuple; expected a name"),
            ((X, Y[:9]), "columns differ in length \\(x 160, y 9\\)"),
            ((X + 1j, Y), "column 'x' is of complex128; expected numbers"),
            (({"a": 1}, Y), "given as a tuple; expected"),
            ([X, Y], "the data of client 0 are a ndarray"),
            (Own(X[:0], Y[:0]), "an Own has no items"),
            ({"train": (X, Y), "valid": (X, Y)}, "the splits 'train', 'valid'; expected train and test .*'valid' out"),
            (((X, Y), ((X, Y), (X, Y))), "one of two splits has a test split itself"),
            (hub.Dataset.from_pandas(FRAME).with_transform(lambda rows: rows), "has a transform, .* apply it once"),
        ],
        ids=range(17),
    )  # fmt: skip
    def test_what_is_no_data_is_refused_by_name_with_what_to_do(self, data, complaint):
        with pytest.raises(UsageError, match=complaint):
            Given.of(data)

    @pytest.mark.parametrize(
        ("items", "complaint"),
        [
            ([3, 4], "an item of the Items is an int; expected \\(x, y\\)"),
            ([(1, 2, 3)], "is a tuple of 3 parts; expected \\(x, y\\), or a dict"),
            ([(np.zeros(3), 0), (np.zeros(4), 1)], "'x' has rows of 2 shapes, such as \\[3\\] and \\[4\\]; .*resize"),
            ([(object(), 0), (object(), 1)], "a row of the column 'x' is an object; expected a number"),
            ([(1.0, "a"), (2.0, 3)], "the column 'y' has values of no common type"),
        ],
    )
    def test_items_that_are_no_rows_are_refused(self, items, complaint):
        with pytest.raises(UsageError, match=complaint):
            Given.of(Items(items))

    def test_neither_pandas_nor_datasets_is_needed_for_others_objects(self):
        code = """
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name in ("pandas", "datasets"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Without())
import torch
from fedloom.data import given, load
load(given.Given.of((torch.rand(40, 2), torch.arange(40) % 2)))
print("made")
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "made"


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, place):
        return self.items[place]


class TestRecord:
    def test_it_says_what_the_data_were(self, tmp_path):
        run = fedloom.run("fedavg", (FRAME[:120], FRAME[120:]), **SHORT, out=tmp_path / "run")
        told = run.partition["data"]
        assert told["rows"] == {"train": 120, "test": 40}
        assert told["columns"] == {"a": "double", "b": "double", "c": "double", "label": "int64"}
        assert run.spec.data == "a DataFrame given in Python" and run.spec.partition == "iid"
        assert "with the same data: fedloom.run(METHOD, DATA" in run.manifest["command"]
        assert Given.of((X, Y)).told["columns"] == {"x": "double[3]", "y": "int64"}

    def test_the_digest_is_of_values_names_types_and_splits_and_of_nothing_else(self):
        def digest(data):
            return Given.of(data).told["digest"]

        whole = digest(FRAME)
        assert whole == digest(FRAME.copy()) == digest(FRAME[:160]) == digest(pd.concat([FRAME[:30], FRAME[30:]]))
        assert whole == digest(hub.Dataset.from_pandas(FRAME))
        strings = [pa.table({"a": pa.array(["x", "y"], kind)}) for kind in (pa.string(), pa.large_string())]
        assert digest(strings[0]) == digest(strings[1])
        assert digest([FRAME[rows] for rows in ROWS]) == digest(FRAME.assign(client=OWNER))
        moved = FRAME.copy()
        moved.loc[77, "b"] += 1e-9
        others = [moved, FRAME[::-1], FRAME[:159], FRAME.rename(columns={"a": "d"}), FRAME.astype({"label": "int32"}),
                  (FRAME[:100], FRAME[100:]), (FRAME[:100], FRAME[101:])]  # fmt: skip
        assert len({whole, *map(digest, others)}) == 8

    def test_resuming_asks_for_the_same_data_again(self, tmp_path):
        def stop(row):
            raise KeyboardInterrupt

        def begun(name):
            with pytest.raises(KeyboardInterrupt):
                fedloom.run("scaffold", FRAME, **SHORT, out=tmp_path / name, on_round=stop, report=False)
            return tmp_path / name

        path = begun("run")
        with pytest.raises(UsageError, match=r"data are a DataFrame given in Python; resume it.*resume\(path, data\)"):
            fedloom.resume(path)
        moved = FRAME.assign(a=FRAME["a"] + 1)
        with pytest.raises(
            UsageError, match=r"a DataFrame given in Python \(160 train rows of 4 columns, digest .*\), are"
        ):
            fedloom.resume(path, moved)
        with pytest.raises(UsageError, match="are not what is given now"):
            fedloom.resume(path, (X, Y))
        resumed = fedloom.resume(path, FRAME.copy())
        through = fedloom.run("scaffold", FRAME, **SHORT)
        models = [Path(run.path, "model.safetensors").read_bytes() for run in (resumed, through)]
        assert models[0] == models[1] and len(resumed.metrics) == 2
        again = fedloom.resume(begun("other"), fedloom.problem(FRAME, partition="iid", clients=4))
        assert Path(again.path, "model.safetensors").read_bytes() == models[1]
        with pytest.raises(UsageError, match="none such"):
            fedloom.resume(begun("toy"), fedloom.problem("digits", partition="iid", clients=4))

    def test_the_command_line_says_how_to_go_on(self, tmp_path, capsys):
        from fedloom.cli import main

        def stop(row):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fedloom.run("fedavg", FRAME, **SHORT, out=tmp_path / "run", on_round=stop)
        assert main(["resume", str(tmp_path / "run")]) == 2
        assert "resume it in Python: fedloom.resume(path, data)" in capsys.readouterr().err
        assert main(["report", str(tmp_path / "run")]) == 0
        assert f"fedloom.resume({str(tmp_path / 'run')!r}, data)" in (
            tmp_path / "run" / "report.html"
        ).read_text().replace("&#39;", "'")


class TestComparisons:
    def test_every_seed_deals_the_data_anew_and_cells_of_other_data_are_refused(self, tmp_path):
        given = {"rounds": 1, "partition": "iid", "clients": 4, "report": False, "out": tmp_path / "both"}
        results = fedloom.compare(["fedavg", "scaffold"], FRAME, seeds=2, **given)
        held = [json.loads((cell.path / "partition.json").read_text()) for cell in results.cells]
        assert len(held) == 4 and all(cell.run is not None for cell in results.cells)
        labels = [[client["labels"] for client in one["clients"]] for one in held]
        assert labels[0] == labels[2] != labels[1]  # by method, then seed
        alone = fedloom.run("fedavg", FRAME, seed=1, **{k: v for k, v in given.items() if k not in ("out", "report")})
        assert results.cells[1].run.final == alone.final | {
            name: results.cells[1].run.final[name] for name in ("seconds", "eval_seconds")
        }
        with pytest.raises(UsageError, match="are not what is given now"):
            fedloom.compare(["fedavg", "scaffold"], FRAME[::-1], seeds=3, **given)
        with pytest.raises(UsageError, match="a DataFrame given in Python; go on in Python"):
            fedloom.compare(["fedavg", "scaffold"], "a DataFrame given in Python", seeds=3, **given)
        assert len(fedloom.compare(["fedavg", "scaffold"], FRAME.copy(), seeds=3, **given).cells) == 6

    def test_a_sweep_takes_them_too(self):
        results = fedloom.sweep("fedavg", (X, Y), over={"lr": [0.01, 0.1]}, seeds=1, report=False, **SHORT)
        assert [cell.run is not None for cell in results.cells] == [True, True]

    def test_regression_is_judged_as_regression(self):
        results = fedloom.compare("fedavg", (X, X[:, 0]), seeds=1, report=False, problem="regression", **SHORT)
        assert "global_test_rmse" in results.cells[0].run.final


class TestProblem:
    def test_a_task_of_a_table_is_what_a_run_of_it_learns(self):
        task = fedloom.problem(FRAME, partition="iid", clients=4)
        ran = fedloom.run("fedavg", task, rounds=2)
        assert Path(ran.path, "model.safetensors").read_bytes() == model(FRAME)
        assert ran.partition["data"]["rows"] == {"train": 160}

    def test_the_seed_deals_and_the_kind_of_problem_is_taken(self):
        first, again, other = (fedloom.problem(FRAME, partition="iid", clients=4, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(first.data(0, "train").x, again.data(0, "train").x)
        assert not torch.equal(first.data(0, "train").x, other.data(0, "train").x)
        assert fedloom.problem("diabetes", "regression", clients=4).qualities[0].name == "rmse"

    def test_columns_are_told_and_settings_hold(self):
        frame = FRAME.assign(id=range(160), sex=["f", "m"] * 80)
        task = fedloom.problem(frame, label="label", exclude="a", metadata="sex", partition="iid", clients=4)
        assert {c["name"]: c["role"] for c in task.describe()["columns"]} == {
            "a": "ignored", "b": "number", "c": "number", "label": "label", "id": "ignored", "sex": "metadata"
        }  # fmt: skip
        with pytest.warns(UserWarning, match="a DataFrame given in Python: ignored is id"):
            fedloom.run("fedavg", frame, exclude="sex", **SHORT)

    def test_what_a_problem_was_told_to_exclude_is_no_news(self):
        task = fedloom.problem(FRAME.assign(id=range(160)), exclude="id", partition="iid", clients=4)
        fedloom.run("fedavg", task, rounds=1)  # warnings are errors here

    @pytest.mark.parametrize(
        ("call", "complaint"),
        [
            (lambda: fedloom.problem(FRAME, rounds=3), "rounds is a setting of a run and not of its problem"),
            (lambda: fedloom.problem(FRAME, lable="y"), "unknown setting 'lable'"),
            (lambda: fedloom.problem(fedloom.problem(FRAME, clients=2)), "a Classification is a problem already"),
            (lambda: fedloom.run("fedavg", FRAME, data="digits"), "given twice, as a DataFrame and as data="),
            (lambda: fedloom.run("fedavg", FRAME, problem="saddle"), "saddle does not read a DataFrame given"),
            (lambda: fedloom.run("fedavg", FRAME, problem="graph"), "a DataFrame given in Python"),
            (lambda: fedloom.run("fedavg", FRAME, label="z"), "no column 'z' in a DataFrame given in Python; its col"),
            (lambda: fedloom.run("fedavg", fedloom.problem(FRAME, clients=2), clients=3), "has no effect on a task"),
        ],
    )  # fmt: skip
    def test_what_does_not_go_together_is_refused(self, call, complaint):
        with pytest.raises(UsageError, match=complaint):
            call()

    def test_kinds_of_problems_lie_upon_it(self):
        frame = pd.DataFrame(X, columns=[*"abc"]).assign(label=np.arange(160) % 4)
        for problem in ("stream:2", "partial:0.5", "vertical:0.5"):
            task = fedloom.problem(frame, problem, clients=3)
            assert task.describe()["data"]["rows"] == {"train": 160}


def test_own_data_set_to_trained_model_in_at_most_eight_lines():
    code = """
import fedloom
import torch

sets = [torch.utils.data.TensorDataset(torch.randn(60, 4), torch.arange(60) % 2) for _ in range(3)]
run = fedloom.run("fedavg", sets, rounds=2)
print(run.final["global_test_accuracy"])
"""
    assert len([line for line in code.splitlines() if line]) <= 8
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 <= float(done.stdout) <= 1
