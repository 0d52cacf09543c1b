"""Clients between machines that bring rows of their own: read as the server's rows are, and none of them leaves."""

import importlib.util
import socket
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from federation import Federation
from PIL import Image
from test_deploy import left
from test_remote import difference

from fedloom import encoding, tasks
from fedloom.deploy import line, listening
from fedloom.deploy.config import ClientConfig, DataConfig, ServerConfig
from fedloom.deploy.offer import offered
from fedloom.deploy.own import described, task_of
from fedloom.deploy.replay import replayed
from fedloom.deploy.serve import Serving
from fedloom.engines import wired
from fedloom.errors import RunError, UsageError
from fedloom.method import build
from fedloom.random import numpy_stream
from fedloom.report.page import render
from fedloom.runs.experiment import Experiment
from fedloom.runs.record import Run
from fedloom.runs.spec import Spec
from fedloom.tasks._described import at_server
from fedloom.tasks._over import Over

pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]
COLUMNS = "age,pressure,sex,diagnosis"


def table(path, rows, seed, shift=0.0, classes=("ill", "well")):
    rng = numpy_stream(seed, "hospital")
    lines = [COLUMNS]
    for _ in range(rows):
        age, pressure, sex = rng.normal(50 + shift, 10), rng.normal(120, 15), rng.choice(["f", "m"])
        ill = (age - 50) / 10 + (pressure - 120) / 15 + (0.5 if sex == "m" else -0.5) + rng.normal(0, 0.5) > 0
        lines.append(f"{age:.1f},{pressure:.0f},{sex},{classes[0] if ill else classes[1]}")
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def hospitals(tmp_path):
    """A server's table and those of three clients; gives the folder."""
    table(tmp_path / "server.csv", 200, 0)
    for seed, (name, shift) in enumerate({"a": 5, "b": -5, "c": 0}.items(), 1):
        table(tmp_path / f"{name}.csv", 60 + 10 * seed, seed, shift)
    return tmp_path


def spec_at(folder, **settings):
    given = {"method": "scaffold", "data": str(folder / "server.csv"), "label": "diagnosis", "rounds": 3, "clients": 3}
    return Spec.of(given | settings)


def offer_of(spec):
    rows = described(at_server(spec))
    return wired.decode(encoding.encode({"settings": {}, "rows": rows}))


def own(folder, name, number, spec, **data):
    config = ClientConfig(folder, "localhost:1", DataConfig(**(data or {"file": f"{name}.csv"})))
    return task_of(config, spec, offer_of(spec), number)


@dataclass(frozen=True, eq=False)
class Joined(Over):
    """The server's problem with the data of each client's own."""

    parts: tuple

    def data(self, client, split):
        return self.parts[client].data(client, split)

    def info(self, client):
        return self.parts[client].info(client)

    def present(self, client):
        return self.parts[client].present(client)


def test_rows_of_their_own_have_the_bits_of_a_run_on_one_machine(certificates, hospitals):
    spec = replace(spec_at(hospitals), clients=None)
    federation = Federation(hospitals / "run", certificates)
    for name in federation.names:
        (hospitals / "run" / f"{name}.csv").write_bytes((hospitals / f"{name}.csv").read_bytes())
    federation.data_of = lambda name: f'file = "{name}.csv"'
    made = federation.run(spec)
    whole = spec_at(hospitals)
    parts = tuple(own(hospitals, name, number, whole) for number, name in enumerate("abc"))
    here = Experiment(whole, Joined(tasks.build(whole), parts)).begin(None)
    here.go()
    assert difference(left(made.record), left(here.record)) is None
    page = render(Run(made.record.path))
    assert (
        "are those of the server" in page
        and "Between machines" in page
        and all(f">{name}</th><td>{k}</td><td>3 of 3</td>" in page for k, name in enumerate("abc"))
    )
    with pytest.raises(UsageError, match=r"client a of .* had data of its own .* --data a=FILE"):
        replayed(made.record.path)
    assert [client["train"] for client in made.record.partition["clients"]] == [
        len(part.data(k, "train")) for k, part in enumerate(parts)
    ]


def test_rows_are_read_as_the_servers_are(hospitals):
    spec = spec_at(hospitals)
    server = tasks.build(spec)
    (hospitals / "a.csv").write_bytes((hospitals / "server.csv").read_bytes())
    task = own(hospitals, "a", 0, spec)
    mine = torch.cat([task.data(0, split).x for split in ("train", "validation", "test")])
    theirs = server.federation.x
    assert torch.allclose(torch.tensor(sorted(mine.tolist())), torch.tensor(sorted(theirs.tolist())), atol=1e-6)
    assert task.shape == server.shape and task.classes == server.classes == 2
    assert task.model == server.model and task.outputs() == server.outputs()


def test_splits_are_disjoint_whole_and_as_large_as_asked(hospitals):
    task = own(hospitals, "b", 1, spec_at(hospitals, validation=0.25, test_share=0.4))
    sizes = {split: task.rows_of(1, split) for split in ("train", "validation", "test")}
    assert sizes == {"test": 32, "validation": 12, "train": 36}
    rows = torch.cat([task.data(1, split).x for split in sizes])
    assert len(rows) == 80 and len(rows.unique(dim=0)) == len(own_rows(hospitals / "b.csv"))
    assert [task.rows_of(0, split) for split in sizes] == [0, 0, 0]


def own_rows(path):
    return {line.rpartition(",")[0] for line in path.read_text().splitlines()[1:]}


LOADERS = {
    "a table": "def load():\n    return pd.read_csv(HERE / 'c.csv')",
    "inputs and labels": "def load():\n    t = pd.read_csv(HERE / 'c.csv')\n"
    "    return t[['age', 'pressure', 'sex']], t['diagnosis'].tolist()",
    "splits": "def load():\n    t = pd.read_csv(HERE / 'c.csv')\n    return {'train': t[:60], 'test': t[60:]}",
}


@pytest.mark.parametrize("text", LOADERS.values(), ids=LOADERS)
def test_a_function_may_give_them(text, hospitals):
    pytest.importorskip("pandas")
    head = "from pathlib import Path\n\nimport pandas as pd\n\nHERE = Path(__file__).parent\n\n\n"
    (hospitals / "site.py").write_text(head + text + "\n")
    spec = spec_at(hospitals)
    task, plain = own(hospitals, "c", 2, spec, loader="site.py:load"), own(hospitals, "c", 2, spec)
    rows = [torch.cat([one.data(2, split).x for split in ("train", "validation", "test")]) for one in (task, plain)]
    assert sorted(map(tuple, rows[0].tolist())) == sorted(map(tuple, rows[1].tolist()))
    if "splits" in text or "'test'" in text:
        assert task.rows_of(2, "test") == 30


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text.replace("well", "healthy"), "'healthy', which is no class of this run"),
        (lambda text: text.replace("pressure", "bp"), "lacks the column"),
        (lambda text: text.replace("diagnosis", "result"), "label|diagnosis"),
        (lambda text: COLUMNS + "\n", "has no rows|no row"),
    ],
)
def test_rows_that_do_not_fit_are_refused_in_a_sentence(change, expected, hospitals):
    (hospitals / "a.csv").write_text(change((hospitals / "a.csv").read_text()))
    with pytest.raises(UsageError, match=expected):
        own(hospitals, "a", 0, spec_at(hospitals))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"file": "nowhere.csv"}, "there is no file"),
        ({"loader": "site.py"}, "is no function"),
        ({"loader": "nowhere.py:load"}, "nowhere.py"),
        ({"share": True}, "no name that every side knows"),
    ],
)
def test_data_that_are_not_there_are_told(data, expected, hospitals):
    with pytest.raises(UsageError, match=expected):
        own(hospitals, "a", 0, spec_at(hospitals), **data)


def test_a_file_that_the_server_names_is_not_read(hospitals, monkeypatch):
    monkeypatch.chdir(hospitals)
    spec = spec_at(hospitals)
    offer = {"settings": {"data": "server.csv"}, "rows": {"why": ""}}
    config = ClientConfig(hospitals, "localhost:1", DataConfig(share=True))
    with pytest.raises(UsageError, match="no name that every side knows"):
        task_of(config, spec, offer, 0)
    method = build("fedavg", {})
    assert "data" not in offered(replace(spec, data="server.csv"), method)["settings"]
    assert offered(replace(spec, data="digits"), method)["settings"]["data"] == "digits"


def test_a_network_in_a_file_that_the_server_names_is_not_made(hospitals):
    (hospitals / "net.py").write_text(f"open({str(hospitals / 'ran')!r}, 'w')\n")
    spec = spec_at(hospitals)
    offer = offer_of(spec)
    offer["rows"]["model"] = f"{hospitals / 'net.py'}:Net"
    config = ClientConfig(hospitals, "localhost:1", DataConfig(file="a.csv"))
    with pytest.raises(UsageError, match="no file name from elsewhere is followed"):
        task_of(config, spec, offer, 0)
    assert not (hospitals / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"fields": {"federation": 1}},
        {"problem": "toy"},
        {"shape": ["a"]},
        {"names": 3},
        {"how": {}},
        {"how": None},
        {"beside": {"sex": 1}},
        {"more": 1},
    ],
    ids=str,
)
def test_an_offer_that_says_nothing_of_rows_is_refused_in_a_sentence(change, hospitals):
    spec = spec_at(hospitals)
    offer = offer_of(spec)
    offer["rows"] |= change
    config = ClientConfig(hospitals, "localhost:1", DataConfig(file="a.csv"))
    with pytest.raises(UsageError, match="what the server offers"):
        task_of(config, spec, offer, 0)


def test_a_folder_of_images_and_one_of_masks_are_read(tmp_path):
    rng = numpy_stream(0, "own", "pictures")
    for name in ("server", "a"):
        for k in range(20):
            for kind in ("images", "masks"):
                at = tmp_path / "pairs" / name / kind / f"{k}.png"
                at.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (8, 8)).astype(np.uint8)
                Image.fromarray(pixels if kind == "images" else (pixels > 128).astype(np.uint8)).save(at)
            at = tmp_path / "classes" / name / ("cat", "dog")[k % 2] / f"{k}.png"
            at.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8)).astype(np.uint8)).save(at)
    for folder, problem, shape in (("classes", "classification", ()), ("pairs", "segmentation", (8, 8))):
        more = {"model": "unet:4"} if shape else {}
        data = {"data": str(tmp_path / folder / "server"), "problem": problem, "clients": 2, "partition": "iid"}
        spec = Spec.of({"method": "fedavg"} | data | more)
        task = own(tmp_path / folder, "a", 1, spec, file="a")
        y = torch.cat([task.data(1, split).y for split in ("train", "validation", "test")])
        assert y.shape == (20, *shape) and {*y.unique().tolist()} == {0, 1} and task.shape == (1, 8, 8)


def test_what_a_function_must_not_give_is_told(hospitals):
    (hospitals / "site.py").write_text("def load():\n    return 3\n")
    with pytest.raises(UsageError, match="is a int; expected a table"):
        own(hospitals, "a", 0, spec_at(hospitals), loader="site.py:load")
    head = f"import pandas as pd\n\n\ndef load():\n    t = pd.read_csv({str(hospitals / 'c.csv')!r})\n"
    (hospitals / "other.py").write_text(head + "    return t.drop(columns='diagnosis'), ['ill', 'well']\n")
    with pytest.raises(UsageError, match="90 inputs and 2 labels"):
        own(hospitals, "a", 0, spec_at(hospitals), loader="other.py:load")


def test_a_client_without_training_rows_says_so(hospitals):
    head = f"import pandas as pd\n\n\ndef load():\n    t = pd.read_csv({str(hospitals / 'c.csv')!r})\n"
    (hospitals / "site.py").write_text(head + "    return {'train': t[:1], 'test': t}\n")
    with pytest.raises(UsageError, match="no training rows"):
        own(hospitals, "a", 0, spec_at(hospitals, validation=0.9), loader="site.py:load")


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        ("oracle:0.5", "dealt by the sizes of all clients' pools"),
        ("causal", "its rows are drawn"),
        ("saddle", "are drawn"),
        ("graph:sbm", "the nodes of a graph"),
        ("several:digits", "of several data sets"),
        ("vertical", "columns of the same rows"),
    ],
)
def test_problems_of_other_kinds_say_so(problem, expected, hospitals):
    method = {"causal": "fedci", "vertical": "vertical"}.get(problem.partition(":")[0], "fedavg")
    spec = Spec.of({"method": method, "data": "digits", "problem": problem, "clients": 3})
    config = ClientConfig(hospitals, "localhost:1", DataConfig(file="a.csv"))
    with pytest.raises(UsageError, match=expected):
        task_of(config, spec, offer_of(spec), 0)


def test_images_and_arrays_are_read_too(tmp_path):
    spec = Spec.of({"method": "fedavg", "data": "digits", "clients": 2})
    about = tasks.build(spec)
    whole = np.arange(4 * 64).reshape(4, 8, 8) % 17
    np.savez(tmp_path / "mine.npz", x=whole, y=[0, 1, 2, 9])
    load = f"f = np.load({str(tmp_path / 'mine.npz')!r})\n    return f['x'], f['y']"
    (tmp_path / "site.py").write_text(f"import numpy as np\n\n\ndef load():\n    {load}\n")
    task = own(tmp_path, "", 1, spec, loader="site.py:load")
    found = torch.cat([task.data(1, split).x for split in ("train", "validation", "test")])
    assert found.shape == (4, 1, 8, 8) and task.shape == about.shape


@pytest.mark.parametrize("module", [line, listening], ids=lambda module: module.__name__)
def test_the_extra_that_is_missing_is_named(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    spec = importlib.util.spec_from_file_location("again", module.__file__)
    with pytest.raises(UsageError, match=r"pip install \"fedloom\[net\]\""):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"secure": "bonawitz"}, "secure=bonawitz does not go"),
        ({"method": "dfedsam"}, "no network form"),
        ({"method": "kafal"}, "oracle"),
        ({"clients": 5}, "clients=5"),
    ],
    ids=str,
)
def test_what_cannot_run_is_told_before_anybody_is_waited_for(settings, expected, certificates, tmp_path):
    federation = Federation(tmp_path, certificates)
    given = {"method": "fedavg", "data": "digits", "rounds": 3} | settings
    with pytest.raises(UsageError, match=expected):
        Serving(Spec.of(given), ServerConfig.read(federation.folder / "server.toml"), tmp_path / "run")
    with socket.create_server(("127.0.0.1", federation.port)):
        assert not (tmp_path / "run").exists()


def test_a_client_that_declines_keeps_the_reason_in_its_data_to_itself(certificates, hospitals):
    federation = Federation(hospitals / "run", certificates, clients=1)
    text = (hospitals / "a.csv").read_text().replace("well", "pneumonia")
    (hospitals / "run" / "a.csv").write_text(text)
    federation.data_of = lambda name: f'file = "{name}.csv"'
    federation.start("a")
    try:
        with pytest.raises(RunError, match="not all clients take part: a: its data") as told:
            federation.serve(replace(spec_at(hospitals), clients=None))
    finally:
        federation.stop()
    assert "pneumonia" not in str(told.value) and "pneumonia" in federation.log("a")
