"""What `load` reads, how it turns columns into tensors, and what it says of data that it cannot use."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from fedloom.data import cells, load
from fedloom.data.text import STRIDE, WINDOW
from fedloom.errors import UsageError


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, kind)
    return held.getvalue()


def parquet(path: Path, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path)
    return path


def people(path: Path, **replaced) -> Path:
    """Twelve rows of tabular data in two classes."""
    columns = {
        "age": list(range(20, 32)),
        "job": ["cook", "clerk", "cook", "smith"] * 3,
        "client": [2, 10, 1, 2, 10, 1, 2, 10, 1, 2, 10, 1],
        "label": ["no", "yes"] * 6,
    }
    return parquet(path, **(columns | replaced))


def error(*args, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        load(*args, **kwargs)
    line = str(caught.value)
    assert "\n" not in line
    return line


class TestEmbedded:
    def test_digits_are_images_in_unit_range_and_every_class_is_held_out_by_its_share(self):
        source = load("digits")
        assert source.kind == "image" and source.classes == tuple("0123456789")
        assert source.train.x.shape[1:] == (1, 8, 8) and source.train.x.dtype == torch.float32
        assert source.train.x.min() == 0 and source.train.x.max() == 1
        assert len(source.train.y) + len(source.test.y) == 1797
        whole = torch.bincount(torch.cat([source.train.y, source.test.y]))
        assert torch.equal(torch.bincount(source.test.y), (whole * 0.2).round().long())

    @pytest.mark.parametrize("found", [True, False])
    def test_the_digits_are_scikit_learns_bit_by_bit_whether_their_file_is_found_or_not(self, found, monkeypatch):
        bunch = load_digits()
        if not found:
            monkeypatch.setattr("fedloom.data.embedded.find_spec", lambda name: None)
        table = sys.modules[load.__module__].EMBEDDED["digits"]()
        images, digits = (table.column(name).to_pylist() for name in ("image", "label"))
        assert np.array_equal(np.array(images, np.float32), (bunch.data / 16).astype(np.float32))
        assert digits == bunch.target.tolist()

    def test_the_held_out_rows_are_drawn_from_the_seed(self):
        first, again, other = load("digits", seed=3), load("digits", seed=3), load("digits", seed=4)
        assert torch.equal(first.test.x, again.test.x)
        assert not torch.equal(first.test.y, other.test.y)

    def test_breast_cancer_has_thirty_named_columns(self):
        source = load("breast_cancer")
        assert source.kind == "tabular" and source.classes == ("benign", "malignant")
        assert source.train.x.shape[1] == 30 and "mean_radius" in source.train.columns
        assert torch.equal(source.train.x[:, 0], torch.tensor(source.train.columns["mean_radius"]).float())


class TestTables:
    def test_strings_become_one_hot_over_the_training_categories_and_unseen_ones_zeros(self, tmp_path):
        people(tmp_path / "train.parquet")
        people(tmp_path / "test.parquet", job=["cook", "pilot"] * 6)
        source = load(str(tmp_path), exclude=("client",))
        assert source.train.x.shape == (12, 1 + 3)  # age; clerk, cook, smith
        assert source.train.x[0].tolist() == [20, 0, 1, 0]
        assert source.test.x[0, 1:].tolist() == [0, 1, 0] and source.test.x[1, 1:].tolist() == [0, 0, 0]
        assert source.classes == ("no", "yes") and source.train.y.tolist() == [0, 1] * 6

    def test_an_excluded_column_is_no_feature_but_all_columns_may_name_clients(self, tmp_path):
        path = str(people(tmp_path / "people.parquet"))
        with_client, without = load(path, keep=("client",)), load(path, exclude=("client",))
        assert with_client.train.x.shape[1] == without.train.x.shape[1] + 1
        assert load(path, client="client").train.x.equal(without.train.x)
        assert set(without.train.columns) == {"age", "job", "client", "label"}
        assert without.train.columns["client"].dtype == np.int64

    def test_csv_reads_as_parquet_does(self, tmp_path):
        path = people(tmp_path / "a.parquet")
        pyarrow.csv.write_csv(pyarrow.parquet.read_table(path), tmp_path / "a.csv")
        one, two = load(str(path)), load(str(tmp_path / "a.csv"))
        assert torch.equal(one.train.x, two.train.x) and torch.equal(one.test.y, two.test.y)

    def test_shards_are_read_in_order_and_validation_files_are_not(self, tmp_path):
        for shard in range(2):
            people(tmp_path / "data" / f"train-0000{shard}-of-00002.parquet", age=[shard] * 12)
        people(tmp_path / "data" / "test-00000-of-00001.parquet")
        people(tmp_path / "data" / "validation-00000-of-00001.parquet", age=[99] * 12)
        source = load(str(tmp_path), exclude=("client", "job"))
        assert source.train.x.flatten().tolist() == [0] * 12 + [1] * 12 and len(source.test.y) == 12

    def test_dictionary_encoded_columns_and_integer_labels_in_any_order(self, tmp_path):
        job = pa.array(["cook", "clerk"] * 6).dictionary_encode()
        source = load(str(people(tmp_path / "a.parquet", job=job, label=[30.0, 4.0] * 6)))
        assert source.classes == ("4", "30") and source.train.x.shape[1] == 1 + 2

    def test_names_of_classes_that_a_hub_file_carries(self, tmp_path):
        features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
        table = pa.table({"a": [float(i) for i in range(10)], "label": [1, 0] * 5})
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        assert load(str(tmp_path / "a.parquet")).classes == ("cat", "dog")

    def test_the_label_is_looked_for_by_name_and_may_be_named(self, tmp_path):
        path = str(people(tmp_path / "a.parquet", target=["x"] * 6 + ["y"] * 6))
        assert load(path).classes == ("no", "yes")
        assert load(path, label="target").classes == ("x", "y")

    def test_sentences_become_words_of_the_training_vocabulary(self, tmp_path):
        said = [f"please book table {number} now!" for number in range(12)]
        people(tmp_path / "train.parquet", text=said, age=["x"] * 12)
        people(tmp_path / "test.parquet", text=["Book zebra", *said[:11]], age=["x"] * 12)
        source = load(str(tmp_path), exclude=("age", "job"))
        assert source.kind == "text" and source.vocabulary[:2] == ("<pad>", "<unk>")
        assert source.train.x.shape == (12, 6) and source.train.x.dtype == torch.int64
        words = [source.vocabulary[token] for token in source.train.x[3]]
        assert words == ["please", "book", "table", "3", "now", "!"]
        assert source.test.x[0].tolist() == [source.vocabulary.index("book"), 1, 0, 0, 0, 0]
        assert set(source.train.columns) == {"job", "client", "age"}


class TestArrays:
    def test_npz_of_both_splits_with_channels_last(self, tmp_path):
        x = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (20, 5, 6, 3), dtype=np.uint8)
        y = np.arange(20).reshape(20, 1) % 2
        np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])
        source = load(str(tmp_path / "a.npz"))
        assert source.kind == "image" and source.train.x.shape == (20, 3, 5, 6) and len(source.test.y) == 4
        assert torch.allclose(source.train.x[7, 2], torch.from_numpy(x[7, :, :, 2] / 255).float())

    def test_npz_of_rows_of_numbers_with_a_client_column(self, tmp_path):
        x = np.arange(60.0).reshape(20, 3)
        np.savez(tmp_path / "a.npz", x=x, y=np.arange(20) % 2, client=np.arange(20) % 4)
        source = load(str(tmp_path / "a.npz"), exclude=("client",))
        assert source.kind == "tabular" and source.train.x.shape == (16, 3)
        assert (source.train.columns["client"] % 2 == source.train.y.numpy()).all()

    def test_arrays_of_different_lengths(self, tmp_path):
        np.savez(tmp_path / "a.npz", x=np.zeros((5, 2)), y=np.zeros(4))
        assert "differ in length (x 5, y 4)" in error(str(tmp_path / "a.npz"))


class TestImages:
    PIXELS = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (12, 6, 4), dtype=np.uint8)

    def hub_column(self, images: list[bytes]) -> pa.Array:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        return pa.array([{"bytes": held, "path": None} for held in images], type=kind)

    def test_png_bytes_and_hub_structs_are_decoded_exactly(self, tmp_path):
        held = [png(pixels) for pixels in self.PIXELS]
        people(tmp_path / "a" / "train.parquet", image=held)
        people(tmp_path / "a" / "test.parquet", image=held)
        people(tmp_path / "b" / "train.parquet", image=self.hub_column(held))
        people(tmp_path / "b" / "test.parquet", image=self.hub_column(held))
        for folder in ("a", "b"):
            source = load(str(tmp_path / folder))
            assert source.train.x.shape == (12, 1, 6, 4)
            assert torch.equal(source.train.x[:, 0], torch.from_numpy(self.PIXELS).float() / 255)
            assert set(source.train.columns) == {"age", "job", "client"}

    def test_one_colour_image_makes_all_of_them_colour(self, tmp_path):
        held = [png(pixels) for pixels in self.PIXELS]
        held[3] = png(np.stack([self.PIXELS[3], self.PIXELS[4], self.PIXELS[5]], axis=-1))
        people(tmp_path / "train.parquet", image=held)
        people(tmp_path / "test.parquet", image=held)
        x = load(str(tmp_path)).train.x
        assert x.shape == (12, 3, 6, 4)
        assert torch.equal(x[0, 0], x[0, 2]) and not torch.equal(x[3, 0], x[3, 2])

    @pytest.mark.parametrize("above", [("train", "test"), ("",)])
    def test_a_folder_of_images_has_a_class_a_folder(self, tmp_path, above):
        for split in above:
            for row, pixels in enumerate(self.PIXELS):
                folder = tmp_path / split / ("train" if row % 2 else "car")
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{row:02}.png").write_bytes(png(pixels))
        source = load(str(tmp_path))
        assert source.classes == ("car", "train") and source.train.x.shape[1:] == (1, 6, 4)
        assert len(source.train.y) == (12 if len(above) == 2 else 10)
        cars = torch.from_numpy(self.PIXELS[0::2]).float() / 255
        if len(above) == 2:
            assert torch.equal(source.train.x[source.train.y == 0, 0], cars)

    def test_images_of_two_sizes(self, tmp_path):
        held = [png(pixels) for pixels in self.PIXELS[:11]] + [png(self.PIXELS[11].T)]
        assert "images of 2 sizes (6x4 to 4x6 pixels)" in error(str(people(tmp_path / "a.parquet", image=held)))

    def test_bytes_that_are_no_image(self, tmp_path):
        held = [png(pixels) for pixels in self.PIXELS[:11]] + [b"RIFF sound"]
        people(tmp_path / "test.parquet", image=held)
        people(tmp_path / "train.parquet", image=held[:11] + held[:1])
        assert "row 11: 10 bytes cannot be read as an image" in error(str(tmp_path))

    def test_an_image_cut_short(self, tmp_path):
        held = [png(pixels) for pixels in np.repeat(self.PIXELS, 9, axis=1)]
        people(tmp_path / "train.parquet", image=held)
        people(tmp_path / "test.parquet", image=[held[0][:-60], *held[1:]])
        assert "cannot be read as an image" in error(str(tmp_path))

    def test_an_image_of_sixteen_bits(self, tmp_path):
        held = [png(pixels.astype(np.uint16) * 200) for pixels in self.PIXELS]
        source = load(str(people(tmp_path / "a.parquet", image=held)))
        deep = {tuple((pixels.astype(np.float64) * 200 / 65535).astype(np.float32).ravel()) for pixels in self.PIXELS}
        assert {tuple(x.ravel().tolist()) for x in source.train.x} <= deep and source.train.x.max() > 0.5
        mixed = load(str(people(tmp_path / "b.parquet", image=[*held[:4], *(png(one) for one in self.PIXELS[4:])])))
        assert 0.9 < mixed.train.x.max() <= 1 and mixed.train.x.shape == source.train.x.shape
        float_image = io.BytesIO()
        Image.fromarray(self.PIXELS[0].astype(np.float32)).save(float_image, "TIFF")
        held = [float_image.getvalue()] * 12
        assert "expected 8-bit grey or colour, or 16-bit" in error(str(people(tmp_path / "c.parquet", image=held)))

    def test_pixels_that_are_not_numbers(self, tmp_path):
        x = np.ones((20, 4, 4), dtype=np.float32)
        x[3, 1, 1] = np.nan
        np.savez(tmp_path / "a.npz", x=x, y=np.arange(20) % 2)
        assert "'x' of" in error(str(tmp_path / "a.npz")) and "1 images with NaN" in error(str(tmp_path / "a.npz"))


class TestPlainText:
    PLAY = "\n\n".join(
        f"{role}:\n{line * 20}" for line in ("To be, or not. ", "Whether 'tis") for role in ("HAMLET", "ALL")
    )

    def test_windows_labels_and_roles(self, tmp_path):
        (tmp_path / "input.txt").write_text(self.PLAY + "\n\nGHOST:\nMark me.")
        source = load(str(tmp_path))
        assert source.kind == "text" and set(source.train.columns["role"]) == {"ALL", "HAMLET"}
        said = "To be, or not. " * 20 + "\n" + "Whether 'tis" * 20
        cut = round(0.8 * len(said))
        mine = source.train.columns["role"] == "ALL"
        for row, (tokens, label) in enumerate(zip(source.train.x[mine], source.train.y[mine], strict=True)):
            assert "".join(source.vocabulary[t] for t in tokens) == said[row * STRIDE : row * STRIDE + WINDOW]
            assert source.classes[label] == said[row * STRIDE + WINDOW]
        tested = source.test.columns["role"] == "ALL"
        assert mine.sum() + tested.sum() == len(range(WINDOW, len(said), STRIDE))
        assert mine.sum() == len(range(WINDOW, cut, STRIDE))
        assert source.vocabulary == ("<pad>", "<unk>", *source.classes)

    def test_text_without_roles_is_spoken_by_its_file(self, tmp_path):
        for name in ("alice", "bob"):
            (tmp_path / f"{name}.txt").write_text("It was a dark and stormy night.\n\n" * 10)
        assert set(load(str(tmp_path)).train.columns["role"]) == {"alice", "bob"}

    def test_a_test_file_of_its_own(self, tmp_path):
        (tmp_path / "train.txt").write_text("A:\n" + "abc " * 50)
        (tmp_path / "test.txt").write_text("A:\n" + "cba?" * 30)
        source = load(str(tmp_path))
        assert source.classes == (" ", "a", "b", "c") and 1 in source.test.x[0]
        assert len(source.train.y) == len(range(WINDOW, 200, STRIDE))

    def test_too_short_and_not_text(self, tmp_path):
        (tmp_path / "a.txt").write_text("short")
        assert "says more than 80 characters" in error(str(tmp_path / "a.txt"))
        assert "leave the label 'x' out" in error(str(tmp_path / "a.txt"), label="x")
        (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa" * 100)
        assert "expected UTF-8" in error(str(tmp_path / "a.txt"))


class TestHub:
    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets", reason="the extra [hub] is not installed")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def test_a_local_folder_reads_as_parquet_does(self, tmp_path):
        people(tmp_path / "d" / "train.parquet")
        people(tmp_path / "d" / "test.parquet", age=list(range(12)))
        hub, plain = load(f"hf:{tmp_path / 'd'}"), load(str(tmp_path / "d"))
        assert torch.equal(hub.train.x, plain.train.x) and torch.equal(hub.test.x, plain.test.x)
        assert hub.classes == plain.classes and hub.train.columns.keys() == plain.train.columns.keys()

    def test_a_saved_data_set_with_names_of_classes(self, tmp_path):
        from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

        features = Features({"a": Value("float32"), "label": ClassLabel(names=["cat", "dog"])})
        rows = Dataset.from_dict({"a": list(range(10)), "label": [0, 1] * 5}, features=features)
        DatasetDict({"train": rows.select([9, 8, 7, 6, 5, 4])}).save_to_disk(tmp_path / "d")
        source = load(f"hf:{tmp_path / 'd'}", test=0.34)
        assert source.classes == ("cat", "dog")
        assert sorted(torch.cat([source.train.x, source.test.x]).flatten().tolist()) == [4, 5, 6, 7, 8, 9]

    def test_a_name_that_is_not_there(self, tmp_path):
        assert "cannot load" in error(f"hf:{tmp_path / 'nothing'}")

    def test_the_extra_is_named_where_it_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        assert 'pip install "fedloom[hub]"' in error("hf:mnist")


class TestErrors:
    def test_unknown_names_and_paths(self, tmp_path):
        assert "did you mean 'digits'" in error("digts")
        assert "no file or folder" in error(str(tmp_path / "nothing.parquet"))
        (tmp_path / "a.xlsx").write_text("x")
        assert "unknown kind of file '.xlsx'" in error(str(tmp_path / "a.xlsx"))
        assert "has no .parquet, .csv" in error(str(tmp_path))

    def test_a_missing_column_is_told_with_those_there_are(self, tmp_path):
        path = str(people(tmp_path / "a.parquet"))
        assert "no column 'lable'" in error(path, label="lable") and "age, job, client, label" in error(
            path, label="lable"
        )
        assert "no column 'role'" in error(path, exclude=("role",))
        parquet(tmp_path / "b.parquet", a=[1, 2], b=[1, 2])
        assert "say which one is the label (label=NAME) among: a, b" in error(str(tmp_path / "b.parquet"))

    @pytest.mark.parametrize("value", [None, float("nan"), float("inf"), 1e300])
    def test_features_that_are_not_finite(self, tmp_path, value):
        people(tmp_path / "train.parquet", age=[1.0, value, value] + [2.0] * 9)
        people(tmp_path / "test.parquet", age=[1.0] * 12)
        line = error(str(tmp_path))
        if value is None or np.isnan(value):
            assert "missing values among its 24 rows: 'age' in 2; " in line
        else:
            assert "column 'age' has 2 rows with infinite values" in line

    def test_a_missing_string(self, tmp_path):
        path = str(people(tmp_path / "a.parquet", job=["cook", None] + ["clerk"] * 10))
        assert "missing values among its 12 rows: 'job' in 1; " in error(path)

    def test_a_column_of_another_kind(self, tmp_path):
        path = str(people(tmp_path / "a.parquet", when=pa.array([0] * 12, type=pa.duration("s"))))
        assert "column 'when' is duration" in error(path) and "expected numbers, strings, dates or images" in error(
            path
        )
        assert load(path, exclude=("when",)).train.x.shape[1] == 4

    def test_classes_that_one_split_lacks(self, tmp_path):
        people(tmp_path / "a" / "train.parquet")
        people(tmp_path / "a" / "test.parquet", label=["no"] * 12)
        assert "class 'yes' of" in error(str(tmp_path / "a")) and "no row in the test split" in error(
            str(tmp_path / "a")
        )
        people(tmp_path / "b" / "train.parquet")
        people(tmp_path / "b" / "test.parquet", label=["no", "yes", "maybe"] * 4)
        assert "class 'maybe' of" in error(str(tmp_path / "b")) and "training split" in error(str(tmp_path / "b"))

    def test_labels_that_are_no_classes(self, tmp_path):
        assert "one class only" in error(str(people(tmp_path / "a.parquet", label=["no"] * 12)))
        assert "'rare' of" in error(str(people(tmp_path / "b.parquet", label=["no"] * 11 + ["rare"])))
        assert "fractions" in error(str(people(tmp_path / "c.parquet", label=[0.5, 1.0] * 6)))
        assert "the label 'label' in 1; " in error(str(people(tmp_path / "d.parquet", label=[None, 0] + [1] * 10)))

    def test_a_table_wider_than_what_is_read_at_once(self, tmp_path):
        names = [f"{'long' * 60}{column}" for column in range(5_000)]
        rows = [[(row * (column % 6 + 1) + column) % 7 for column in range(5_000)] + [row % 2] for row in range(20)]
        lines = [",".join(map(str, line)) for line in ([*names, "label"], *rows)]
        assert len(lines[0]) > cells.BLOCK
        (tmp_path / "a.csv").write_text("\n".join(lines))
        assert load(str(tmp_path / "a.csv")).train.x.shape == (16, 5_000)

    def test_no_rows_no_features_and_damaged_files(self, tmp_path):
        empty = {name: pa.array([], type=pa.int64()) for name in ("age", "label")}
        assert "without rows" in error(str(parquet(tmp_path / "a.parquet", **empty)))
        assert "no feature columns" in error(str(parquet(tmp_path / "b.parquet", label=[0, 1] * 5)))
        for name in ("c.parquet", "c.npz", "c.csv"):
            (tmp_path / name).write_bytes(b"")
            assert f"cannot read {tmp_path / name}" in error(str(tmp_path / name))

    def test_splits_of_different_columns(self, tmp_path):
        people(tmp_path / "train.parquet")
        parquet(tmp_path / "test.parquet", age=[1, 2], label=["no", "yes"])
        assert "lacks the column 'job', 'client'" in error(str(tmp_path))
        people(tmp_path / "test.parquet", age=["old"] * 12)
        assert "is int64 in the training split but string in the test split" in error(str(tmp_path))

    @pytest.mark.parametrize("share", [0, 1, -0.1])
    def test_a_share_that_is_none(self, share):
        assert "expected a number between 0 and 1" in error("digits", test=share)


class TestRealData:
    def test_adult(self, shared_data):
        source = load(str(shared_data("adult")), exclude=("workclass",))
        assert source.train.x.shape == (22621, 97) and source.test.x.shape == (7541, 97)
        assert source.classes == ("0", "1") and source.train.columns["workclass"][0] == "Federal-gov"

    def test_clinc(self, shared_data):
        source = load(str(shared_data("clinc150")), label="intent")
        assert source.kind == "text" and len(source.classes) == 150 and len(source.train.y) == 15000
        assert len(set(source.train.columns["domain"])) == 10

    def test_shakespeare(self, shared_data):
        source = load(str(shared_data("shakespeare")))
        assert source.train.x.shape[1] == 80 and len(set(source.train.columns["role"])) > 200

    def test_sound_is_told_apart(self, shared_data):
        assert "cannot be read as an image" in error(str(shared_data("fsdd")))
