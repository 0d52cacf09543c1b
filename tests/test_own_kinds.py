"""Clients bring rows of their own to problems of every kind that has a table: bit by bit the run on one machine."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from federation import Federation
from test_deploy import left
from test_own_rows import Joined, offer_of
from test_remote import difference

from fedloom import tasks
from fedloom.cli import main
from fedloom.deploy.config import ClientConfig, DataConfig
from fedloom.deploy.own import task_of
from fedloom.errors import UsageError
from fedloom.random import numpy_stream
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.task import SPLITS, Task
from fedloom.tasks._described import at_server, learned
from fedloom.tasks._over import Over

pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


def table(path, seed, names, row, rows=90):
    rng = numpy_stream(seed, "own", "kinds")
    lines = [names, *(",".join(map(str, row(rng, place))) for place in range(rows))]
    path.with_suffix(".csv").write_text("\n".join(lines) + "\n")


def amounts(path, seed):
    def row(rng, _):
        age, size = rng.normal(50, 10), rng.normal(170, 8)
        return f"{age:.1f}", f"{size:.0f}", f"{3 * age - size + rng.normal(0, 5):.2f}"

    table(path, seed, "age,size,cost", row)


def sets(path, seed):
    def row(rng, _):
        age, size = rng.normal(50, 10), rng.normal(170, 8)
        return f"{age:.1f}", f"{size:.0f}", int(age > 50), int(size + rng.normal(0, 3) > 170)

    table(path, seed, "age,size,old,tall", row)


def votes(path, seed):
    def row(rng, _):
        age = rng.normal(50, 10)
        share = round(float(1 / (1 + np.exp(-(age - 50) / 5))), 3)
        return f"{age:.1f}", f"{rng.normal(170, 8):.0f}", share, round(1 - share, 3)

    table(path, seed, "age,size,yes,no", row)


def diagnoses(path, seed):
    def row(rng, _):
        age, sex = rng.normal(50, 10), rng.choice(["f", "m"])
        kind = ("well", "ill", "worse")[int(np.clip((age - 40) // 10, 0, 2))]
        return f"{age:.1f}", f"{rng.normal(170, 8):.0f}", sex, kind

    table(path, seed, "age,size,sex,diagnosis", row)


def sensors(path, seed):
    def row(rng, place):
        hour = (place * 37) % 90  # rows are shuffled in time
        return "abc"[seed % 3], f"s{hour % 2}", hour, f"{np.sin(hour / 4) + rng.normal(0, 0.1):.3f}", int(hour % 8 > 3)

    table(path, seed, "station,sensor,hour,level,high", row)


def masks(path, seed):
    rng = numpy_stream(seed, "own", "masks")
    spots = rng.random((40, 16, 16)) + np.linspace(0, 1, 16)
    np.savez(path.with_suffix(".npz"), image=spots.astype(np.float32), mask=(255 * (spots > 1)).astype(np.uint8))


def text(path, seed):
    words = np.array(["the", "cat", "sat", "on", "a", "mat", "and", "ate"])
    path.with_suffix(".txt").write_text(" ".join(numpy_stream(seed, "own", "text").choice(words, 500)))


def letters(path, seed):
    rng = numpy_stream(seed, "own", "letters")
    said = "".join(rng.choice([*"abcd"], 200)) + "abcd"
    x, y = [said[k : k + 6] for k in range(0, 180, 2)], [said[k + 6] for k in range(0, 180, 2)]
    told = {"users": ["u"], "num_samples": [len(x)], "user_data": {"u": {"x": x, "y": y}}}
    path.with_suffix(".json").write_text(json.dumps(told))


WINDOWS = "windows=5,stride=2,horizon=1,series=sensor,time=hour"
KINDS = {  # what makes a table, how its file ends, the settings of its columns, and those of the run
    "regression": (amounts, ".csv", {"label": "cost", "problem": "regression"}, {}),
    "multilabel": (sets, ".csv", {"label": "old,tall", "problem": "multilabel"}, {}),
    "distribution": (votes, ".csv", {"label": "yes,no", "problem": "distribution"}, {}),
    "segmentation": (masks, ".npz", {"label": "mask", "problem": "segmentation", "model": "unet:4"}, {}),
    "metadata": (diagnoses, ".csv", {"label": "diagnosis", "metadata": "sex", "keep": "sex"}, {}),
    "windows": (sensors, ".csv", {"label": "high", "windows": WINDOWS.partition("=")[2]}, {}),
    "text": (text, ".txt", {}, {"model": "transformer:8"}),
    "letters": (letters, ".json", {}, {"model": "transformer:8"}),
    "partial": (diagnoses, ".csv", {"label": "diagnosis"}, {"problem": "partial:0.3"}),
    "stream": (diagnoses, ".csv", {"label": "diagnosis"}, {"problem": "stream:3,rounds=1,known=false"}),
    "samples": (diagnoses, ".csv", {"label": "diagnosis"}, {"problem": "stream:2,rounds=1,by=samples"}),
}


@pytest.fixture
def site(request, tmp_path):
    """A folder with the tables of a server and of two clients; gives it with the spec of a run."""
    kind, rowless = request.param
    make, ending, columns, more = KINDS[kind]
    for seed, name in enumerate(("server", "a", "b")):
        make(tmp_path / name, seed)
    data = tmp_path / f"server{ending}"
    asked = columns | ({"partition": "column:station"} if kind == "windows" else {})
    if rowless:
        words = [f"{name}={value}" for name, value in asked.items()]
        assert main(["columns", str(data), *words, "--out", str(tmp_path / "site.columns.yaml")]) == 0
        data = tmp_path / "site.columns.yaml"
        asked = {name: asked[name] for name in ("problem", "model") if name in asked}
    given = {"method": "fedavg", "data": str(data), "rounds": 3, "clients": 2, "validation": 0.2}
    return tmp_path, ending, Spec.of(given | asked | more)


BOTH = [(kind, rowless) for kind in KINDS for rowless in (False, True) if rowless or kind != "windows"]


def named(case):
    return f"{case[0]}-{'columns' if case[1] else 'table'}"


def own(folder, ending, name, number, spec):
    config = ClientConfig(folder, "localhost:1", DataConfig(file=f"{name}{ending}"))
    return task_of(config, spec, offer_of(spec), number)


@dataclass(frozen=True, eq=False)
class Below(Joined):
    """The same beneath what lies upon a problem."""

    loss, head_loss = Task.loss, Task.head_loss


def ground(task):
    while isinstance(task, Over):
        task = task.inner
    return task


@pytest.mark.parametrize("site", BOTH, indirect=True, ids=named)
def test_a_run_on_rows_of_their_own_has_the_bits_of_one_machine(site, certificates):
    folder, ending, spec = site
    federation = Federation(folder / "run", certificates, clients=2)
    federation.data_of = lambda name: f'file = "../{name}{ending}"'
    made = federation.run(replace(spec, clients=None))
    parts = tuple(ground(own(folder, ending, name, number, spec)) for number, name in enumerate("ab"))
    here = tasks.build(spec, ground=lambda: Below(ground(at_server(spec)), parts))
    alone = Experiment(spec, here).begin(None)
    alone.go()
    assert difference(left(made.record), left(alone.record)) is None
    row, main_measure = made.record.selected, here.qualities[0].name
    assert row[f"personal_test_{main_measure}"] is not None
    assert (row[f"global_test_{main_measure}"] is None) == spec.data.endswith(".columns.yaml")


def rows_of(task, number):
    """All samples of a client, as lines that can be sorted."""
    found = []
    for data in (task.data(number, split) for split in SPLITS):
        found += [
            [*map(float, torch.cat([x.flatten().float(), y.flatten().float()]).tolist())]
            for x, y in zip(data.x, data.y, strict=True)
        ]
    return sorted(found)


SAME = [(kind, False) for kind in ("regression", "multilabel", "distribution", "segmentation", "metadata", "letters")]


@pytest.mark.parametrize("site", SAME, indirect=True, ids=named)
def test_rows_are_read_as_the_servers_are(site):
    folder, ending, spec = site
    server = at_server(spec)
    task = own(folder, ending, "server", 1, spec)
    theirs = sorted(line for k in range(2) for line in rows_of(server, k))
    mine = rows_of(task, 1)
    assert len(mine) == len(theirs) and np.allclose(mine, theirs, atol=1e-5)
    assert task.outputs() == server.outputs() and task.shape == server.shape and task.width == server.width
    beside = [sorted(x for k in range(2) for split in SPLITS for x in t.data(k, split)["sex"].tolist()) for t in
              (server, task)] if spec.metadata else [0, 0]  # fmt: skip
    assert beside[0] == beside[1]


@pytest.mark.parametrize("site", [("windows", True)], indirect=True, ids=named)
def test_windows_are_cut_of_each_series_in_its_order_and_in_no_two_splits(site):
    folder, ending, spec = site
    task = own(folder, ending, "a", 0, spec)
    lines = [line.split(",") for line in (folder / "a.csv").read_text().splitlines()[1:]]
    how = task.preprocessing()
    levels = [column.name for column in how.columns].index("level")
    at = sum(column.width for column in how.columns[:levels])
    found = {}
    for split in SPLITS:
        data = task.data(0, split)
        found[split] = [(x[:, at] * how.deviation[at] + how.mean[at]).tolist() for x in data.x], data.y.tolist()
    ends = {}
    for sensor in ("s0", "s1"):
        mine = sorted((int(hour), float(level), int(high)) for _, name, hour, level, high in lines if name == sensor)
        held, left_over = round(len(mine) * 0.2), 0
        rest = mine[: len(mine) - held]
        left_over = round(len(rest) * 0.2)
        parts = {"test": mine[len(mine) - held :], "validation": rest[len(rest) - left_over :]}
        parts["train"] = rest[: len(rest) - left_over]
        for split, rows in parts.items():
            ends.setdefault(split, ([], []))
            for first in range(0, len(rows) - 5, 2):
                ends[split][0].append([level for _, level, _ in rows[first : first + 5]])
                ends[split][1].append(rows[first + 5][2])
    for split in SPLITS:
        assert np.allclose(found[split][0], ends[split][0], atol=1e-4)
        assert found[split][1] == ends[split][1]


@pytest.mark.parametrize("site", [("text", True), ("letters", True)], indirect=True, ids=named)
def test_the_last_of_a_text_is_held_out(site):
    folder, ending, spec = site
    task = own(folder, ending, "a", 0, spec)
    names = task.federation.classes
    if ending == ".txt":
        whole = (folder / "a.txt").read_text()
        expected = [whole[k] for k in range(80, len(whole), 10)]
    else:
        expected = json.loads((folder / "a.json").read_text())["user_data"]["u"]["y"]
    found = [names[place] for split in ("train", "validation", "test") for place in task.data(0, split).y.tolist()]
    assert found == expected
    assert task.rows_of(0, "test") == round(len(expected) * 0.2)


WRONG = {
    "regression": (lambda text: text.replace("\n4", "\nx", 1), "no number|are no numbers|is no number"),
    "multilabel": (
        lambda text: text.replace(",1\n", ",2\n", 1),
        "labels is 0 or 1",
    ),
    "distribution": (lambda text: text.replace(",0.", ",7.", 1), "is no distribution"),
    "metadata": (lambda text: text.replace(",f,", ",x,"), "metadata=sex: .* has 'x' there"),
    "windows": (lambda text: "\n".join(text.splitlines()[:6]) + "\n", "of which a window of 5"),
}


@pytest.mark.parametrize("site", [(kind, True) for kind in WRONG], indirect=True, ids=named)
def test_rows_that_do_not_fit_are_told(site, request):
    folder, ending, spec = site
    change, expected = WRONG[request.node.callspec.params["site"][0]]
    path = folder / f"a{ending}"
    path.write_text(change(path.read_text()))
    with pytest.raises(UsageError, match=expected):
        own(folder, ending, "a", 0, spec)


@pytest.mark.parametrize("site", [("segmentation", True)], indirect=True, ids=named)
def test_masks_with_a_class_that_nobody_knows_are_told(site):
    folder, ending, spec = site
    held = dict(np.load(folder / "a.npz"))
    held["mask"][0, 0, 0] = 7
    np.savez(folder / "a.npz", **held)
    with pytest.raises(UsageError, match="have the class '7'"):
        own(folder, ending, "a", 0, spec)


@pytest.mark.parametrize("site", [("regression", True), ("segmentation", True)], indirect=True, ids=named)
def test_inputs_and_targets_may_come_of_a_function(site):
    folder, ending, spec = site
    if ending == ".csv":
        load = "t = pd.read_csv(HERE / 'a.csv')\n    return t[['age', 'size']], t['cost'].tolist()"
    else:
        load = "t = np.load(HERE / 'a.npz')\n    return t['image'], t['mask']"
    head = "from pathlib import Path\n\nimport numpy as np\nimport pandas as pd\n\nHERE = Path(__file__).parent\n\n\n"
    (folder / "site.py").write_text(f"{head}def load():\n    {load}\n")
    config = ClientConfig(folder, "localhost:1", DataConfig(loader="site.py:load"))
    made = [task_of(config, spec, offer_of(spec), 0), own(folder, ending, "a", 0, spec)]
    assert rows_of(made[0], 0) == rows_of(made[1], 0)


def test_a_site_that_is_one_client_needs_no_column_that_says_so(tmp_path):
    sensors(tmp_path / "a", 1)
    words = [f"windows={WINDOWS.partition('=')[2]}", "label=high"]
    with_column = learned(str(tmp_path / "a.csv"), [*words, "partition=column:station"])
    text = (tmp_path / "a.csv").read_text()
    (tmp_path / "a.csv").write_text("".join(line.partition(",")[2] for line in text.splitlines(keepends=True)))
    without = learned(str(tmp_path / "a.csv"), words)
    assert without == with_column and "rows of a.csv" in without.source
    out = tmp_path / "site.columns.yaml"
    out.write_text(without.text())
    spec = Spec.of({"method": "fedavg", "data": str(out), "clients": 1})
    assert own(tmp_path, ".csv", "a", 0, spec).rows_of(0, "train") > 10
