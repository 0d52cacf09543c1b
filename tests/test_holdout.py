"""The test rows that the library holds out itself: how many, of whom, and where none may be asked for."""

import json
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch

import fedloom
from fedloom.cli import main
from fedloom.data import load
from fedloom.errors import UsageError
from fedloom.random import numpy_stream
from fedloom.tasks.toy import Toy

ROWS = 120
CLASSES = [k % 3 if k % 4 else 0 for k in range(ROWS)]  # 60, 30 and 30 of them


def x() -> np.ndarray:
    return numpy_stream(0, "test", "holdout").normal(size=(ROWS, 4)).astype("float32")


def frame(**more: object) -> pa.Table:
    return pa.table({**{f"c{k}": column for k, column in enumerate(x().T)}, "label": CLASSES, **more})


class Items(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, place: int) -> tuple[np.ndarray, int]:
        return x()[place], CLASSES[place]


def parted() -> dict[str, tuple[np.ndarray, list[int]]]:
    return {name: (x()[k::3], CLASSES[k::3]) for k, name in enumerate("abc")}


def counted(task: fedloom.Task) -> Counter:
    return Counter(task.global_test().y.tolist())


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("data", [frame, lambda: (x(), CLASSES), Items, parted], ids=["table", "xy", "items", "each"])
def test_of_each_class_the_share_is_held_out_of_whatever_is_given(data, share):
    settings = {} if data is parted else {"partition": "iid", "clients": 4}
    task = fedloom.problem(data(), test_share=share, **settings)
    assert counted(task) == {label: round(share * count) for label, count in Counter(CLASSES).items()}
    assert (
        len(task.global_test())
        + sum(len(task.data(k, split)) for k in range(task.population) for split in ("train", "validation"))
        == ROWS
    )
    said = " ".join(task.describe()["decisions"])
    assert f"rows, {share * 100:g}% of each class, are held out as test rows" in said


def test_a_file_and_an_embedded_set_are_cut_likewise(tmp_path):
    (tmp_path / "t.csv").write_text("a,label\n" + "".join(f"{k * k % 31},{CLASSES[k]}\n" for k in range(ROWS)))
    assert len(fedloom.problem(tmp_path / "t.csv", test_share=0.4).global_test()) == 24 + 12 + 12
    digits = fedloom.problem("digits", test_share=0.5)
    every = torch.bincount(digits.federation.y)
    assert torch.bincount(digits.global_test().y).tolist() == [round(0.5 * n) for n in every.tolist()]


def test_a_fifth_is_what_is_taken_where_nothing_is_asked_for():
    one, other = (fedloom.problem(frame(), **share) for share in ({}, {"test_share": 0.2}))
    assert one.global_test().x.equal(other.global_test().x) and len(one.global_test()) == 24


def test_a_share_in_words_is_no_rounder_than_it_is():
    said = fedloom.problem(frame(), test_share=0.125).describe()["decisions"]
    assert any("12.5% of each class" in one for one in said)


def test_a_class_of_two_rows_has_one_on_either_side():
    task = fedloom.problem((x()[:12], [0] * 10 + [1] * 2), partition="iid", clients=1, validation=0, test_share=0.9)
    assert counted(task) == {0: 9, 1: 1} and Counter(task.data(0, "train").y.tolist()) == {0: 1, 1: 1}


def test_amounts_are_cut_by_their_strata():
    amount = frame(cost=[float(k * 7 % 127) for k in range(ROWS)])
    for share in (0.3, 0.6):
        task = fedloom.problem(amount, "regression", label="cost", partition="iid", clients=3, test_share=share)
        assert abs(len(task.global_test()) - share * ROWS) <= 5, "half a row of each of ten strata"
        assert any(f"{share:.0%} of each stratum" in one for one in task.describe()["decisions"])


class TestClients:
    OWNERS = ("one", *["two"] * 2, *["few"] * 5, *["many"] * 112)

    def task(self, share: float, **settings: object) -> fedloom.Task:
        data = frame(site=list(self.OWNERS), region=["N" if k < 8 else "S" for k in range(ROWS)])
        return fedloom.problem(data, label="label", partition="column:site", test_share=share, **settings)

    @pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
    def test_nobody_is_left_without_training_rows_and_who_has_no_test_rows_is_told(self, share):
        task = self.task(share)
        names = list(task.federation.names)
        sizes = {name: len(task.data(k, "train")) + len(task.data(k, "validation")) for k, name in enumerate(names)}
        tests = {name: len(task.data(k, "test")) for k, name in enumerate(names)}
        assert min(sizes.values()) >= 1 and tests["one"] == 0 and tests["two"] == 1
        assert {name: sizes[name] + tests[name] for name in names} == Counter(self.OWNERS)
        without = [name for name in names if not tests[name]]
        listed = ", ".join(map(repr, without))
        told = f"{len(without)} of 4 clients have no test rows, and no say in personal measures: {listed}"
        assert task.describe()["decisions"][-1] == told

    def test_a_run_counts_those_alone_who_have_test_rows(self):
        run = fedloom.run("fedavg", self.task(0.2), rounds=1)
        judged = json.loads((run.path / "clients.json").read_text())["clients"]
        assert sorted(one["n"] > 0 for one in judged) == [True] * 3
        assert sum(one["n"] for one in judged) == 24

    def test_nothing_is_told_where_all_have_some(self):
        task = fedloom.problem(parted(), test_share=0.3)
        assert not any("no test rows" in one for one in task.describe()["decisions"])

    def test_where_all_have_one_row_it_is_refused_in_a_sentence(self):
        data = frame(site=[f"s{k}" for k in range(ROWS)])
        for share in (0.1, 0.9):
            with pytest.raises(UsageError, match="too few rows to hold a test split out and leave every client one"):
                fedloom.problem(data, label="label", partition="column:site", keep="site", test_share=share)

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    def test_known_groups_of_clients_stay_what_they_are(self, share):
        task = self.task(share, group="region")
        groups = {name: task.info(k)["group"] for k, name in enumerate(task.federation.names)}
        assert groups == {"one": "N", "two": "N", "few": "N", "many": "S"}
        assert "region" not in {one["name"] for one in task.describe()["columns"] if one["role"] == "category"}

    def test_newcomers_have_their_share_too(self):
        task = self.task(0.5, newcomers="many")
        assert task.newcomers == 1 and len(task.data(3, "test")) > 40


class TestSeries:
    def data(self) -> pa.Table:
        return pa.table(
            {
                "machine": [name for name in "ab" for _ in range(40)],
                "v": [*range(40)] * 2,
                "label": [k % 2 for k in range(80)],
            }
        )

    def test_the_last_rows_of_each_client_are_held_out_before_windows_are_cut(self):
        task = fedloom.problem(
            self.data(), windows=4, partition="column:machine", label="label", validation=0, test_share=0.5, keep="v"
        )
        assert [len(task.data(k, "train")) for k in (0, 1)] == [17, 17]
        assert [len(task.data(k, "test")) for k in (0, 1)] == [17, 17]
        lines = task.data(0, "train").x[..., 0], task.data(0, "test").x[..., 0]
        assert lines[0].max() < lines[1].min(), "time goes on from training to test"
        assert any("the last 50% of each client's rows" in one for one in task.describe()["decisions"])

    def test_the_end_of_what_each_role_says(self, tmp_path):
        (tmp_path / "a.txt").write_text("A:\n" + "abc " * 100 + "\n\nB:\n" + "xyz " * 100)
        sizes = {
            share: (len((found := load(str(tmp_path / "a.txt"), test=share)).train.y), len(found.test.y))
            for share in (None, 0.2, 0.5)
        }
        assert sizes[None] == sizes[0.2] == (2 * 24, 2 * 8) and sizes[0.5] == (2 * 12, 2 * 20)


class TestProblems:
    def test_columns_of_parties_are_cut_so_too(self):
        task = fedloom.problem("digits", "vertical:0.2", test_share=0.5)
        assert len(task.test) == len(fedloom.problem("digits", test_share=0.5).global_test())

    def test_problems_that_lie_upon_others_and_several_hand_it_on(self):
        half = len(fedloom.problem("digits", test_share=0.5).global_test())
        for problem in ("partial:0.5", "several:digits"):
            task = fedloom.problem("digits", problem, test_share=0.5)
            assert len(task.global_test()) == half, problem

    def test_texts_for_fine_tuning(self):
        texts = {
            "text": [f"the letter number {k} is about {k % 3} things" for k in range(60)],
            "label": [k % 3 for k in range(60)],
        }
        task = fedloom.problem(texts, "finetune:head", model="gpt2:32,1", clients=2, partition="iid", test_share=0.4)
        assert len(task.global_test()) == 24

    @pytest.mark.parametrize("problem", ["causal", "saddle"])
    def test_those_that_make_their_samples_refuse_it(self, problem):
        with pytest.raises(
            UsageError, match=rf"test_share=0.3: a problem of the kind {problem} has test samples of its"
        ):
            fedloom.run("fedavg", problem=problem, test_share=0.3, rounds=1)

    def test_a_graph_names_its_own_setting(self):
        with pytest.raises(UsageError, match=r"graph:sbm' does not read test_share=0.3; .*test=0.4"):
            fedloom.run("fedavg", problem="graph:sbm", test_share=0.3, rounds=1)


@pytest.mark.parametrize("share", [0, 1, -0.2, 1.5])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(UsageError, match=rf"test_share is {share:g}; it is a share, above 0 and below 1"):
        fedloom.run("fedavg", "digits", test_share=share, rounds=1)
    with pytest.raises(UsageError, match="expected a number between 0 and 1"):
        load("digits", test=share)


class TestGivenTestRows:
    REFUSED = r"test_share=0.3: .* has a test split of its own, of {} rows, and none is held out"

    def test_a_pair_and_a_mapping(self):
        for data in ((frame(), frame().slice(0, 50)), {"train": frame(), "test": frame().slice(0, 50)}):
            with pytest.raises(UsageError, match=self.REFUSED.format(50)):
                fedloom.run("fedavg", data, test_share=0.3, rounds=1)

    def test_files_and_folders(self, tmp_path):
        for split, rows in (("train", 60), ("test", 30)):
            lines = "".join(f"{k * k % 31},{k // 2 % 2}\n" for k in range(rows))
            (tmp_path / f"{split}.csv").write_text("a,label\n" + lines)
        with pytest.raises(UsageError, match=self.REFUSED.format(30)):
            fedloom.problem(tmp_path, test_share=0.3)
        assert len(fedloom.problem(tmp_path).global_test()) == 30

    def test_leaf(self, tmp_path):
        for split in ("train", "test"):
            (tmp_path / split).mkdir()
            users = {name: {"x": [[k % 5, k % 3] for k in range(9)], "y": [k % 2 for k in range(9)]} for name in "ab"}
            (tmp_path / split / "all_data.json").write_text(json.dumps({"users": ["a", "b"], "user_data": users}))
        with pytest.raises(UsageError, match=self.REFUSED.format(18)):
            fedloom.problem(tmp_path, partition="column:user", test_share=0.3)

    def test_plain_text(self, tmp_path):
        for split in ("train", "test"):
            (tmp_path / f"{split}.txt").write_text("A:\n" + "abcd " * 40)
        with pytest.raises(UsageError, match=self.REFUSED.format(r"\d+")):
            fedloom.problem(tmp_path, test_share=0.3)

    def test_a_task_of_ones_own(self):
        with pytest.raises(UsageError, match=r"test_share=0\.3 has no effect on a task given in Python"):
            fedloom.run("fedavg", Toy(), test_share=0.3, rounds=1)
        task = fedloom.problem(frame(), test_share=0.3)
        assert fedloom.run("fedavg", task, test_share=0.3, rounds=1).spec.test_share == 0.3


def test_the_command_line_says_it(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("a,label\n" + "".join(f"{k * k % 31},{CLASSES[k]}\n" for k in range(ROWS)))
    assert main(["data", str(tmp_path / "t.csv"), "--test-share", "0.4"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert re.search(r"48 of 120 rows, 40% of each class, are held out as test rows", told)


def test_a_run_is_not_resumed_with_another_share(tmp_path):
    run = fedloom.run("fedavg", "digits", rounds=1, clients=3, test_share=0.3, out=tmp_path / "run", report=False)
    assert "test_share: 0.3" in (run.path / "spec.yaml").read_text()
    assert run.spec.differences(fedloom.Spec.of({"data": "digits", "test_share": 0.4}))
    assert fedloom.resume(run.path, rounds=2, report=False).spec.test_share == 0.3
