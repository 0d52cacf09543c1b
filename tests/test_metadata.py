"""Columns beside x and y: wherever rows go, their columns go too."""

import csv
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fedloom
from fedloom import Batch, Data, Method, client, tasks
from fedloom.data.load import load
from fedloom.errors import UsageError
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.random import numpy_stream
from fedloom.site import Site
from fedloom.tasks import classification
from fedloom.tasks.partial import Partial
from fedloom.tasks.toy import Toy


@pytest.fixture
def table(tmp_path):
    """300 rows whose columns beside x tell which row it is: `tag` is a feature's value, `who` its third."""
    draw = numpy_stream(0, "tests", "table")
    a, b = draw.normal(size=300).round(3), draw.normal(size=300)
    rows = [
        {
            "a": x,
            "b": f"{z:.4f}",
            "tag": 2 * x + 1,
            "weight": 0.5 + k % 4,
            "who": "low" if x < -0.4 else "mid, so-so" if x < 0.4 else "high",
            "site": f"s{k % 6}",
            "label": "yes" if x + z > 0 else "no",
        }
        for k, (x, z) in enumerate(zip(a, b, strict=True))
    ]
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(tmp_path / "table.csv")


BESIDE = ("tag", "weight", "who")


def task_of(table, **more):
    return tasks.build(fedloom.Spec(data=table, clients=5, metadata=BESIDE, **more))


def goes_along(batch, task):
    """The first feature and the column that tells it, once the two columns beside x agree."""
    a, tag, levels = batch.x[:, 0].double(), batch["tag"].double(), task.federation.levels["who"]
    value = ((tag - 1) / 2).round(decimals=3).tolist()
    said = [levels[k] for k in batch["who"].tolist()]
    assert said == ["low" if v < -0.4 else "mid, so-so" if v < 0.4 else "high" for v in value]
    return a, tag


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.5", "column:site", "quantity:0.5+noise:0.0+longtail:2"])
def test_every_split_of_every_client_keeps_rows_and_columns_together(table, partition):
    clients = None if partition.startswith("column") else 5
    task = tasks.build(fedloom.Spec(data=table, partition=partition, clients=clients, metadata=BESIDE, newcomers=1))
    parties = [task.data(k, s) for k in range(task.population + 1) for s in ("train", "validation", "test")]
    seen, lines = [], []
    for data in [*parties, task.global_test()]:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
        for batch in (data.all(), *data.pieces(7), *data.pieces(7, order)):
            a, line = goes_along(batch, task)
            seen.append(a)
            lines.append(line)
    a, line = torch.cat(seen), torch.cat(lines)
    fit = np.polyfit(a.numpy(), line.numpy(), 1)  # x was shifted and scaled, the column was not
    assert np.abs(np.polyval(fit, a.numpy()) - line.numpy()).max() < 1e-3 and fit[0] > 0.1
    assert task.shape == (2 + 6 * (clients is not None),), "metadata are no features"


def test_public_rows_and_rows_that_lost_their_label_keep_theirs(table):
    task = task_of(table, partition="iid", public=0.2)
    goes_along(task.public().all(), task)
    partial = tasks.build(fedloom.Spec(problem="partial:0.3", data=table, clients=5, partition="iid", metadata=BESIDE))
    assert isinstance(partial, Partial)
    for split in ("train", "unlabelled"):
        goes_along(partial.data(0, split).all(), partial)
    assert (partial.data(0, "unlabelled").y == -1).all()


def test_strings_are_numbered_and_numbers_stay(table):
    source = load(table, metadata=(*BESIDE, "site"))
    assert source.levels == {"who": ("high", "low", "mid, so-so"), "site": tuple(f"s{k}" for k in range(6))}
    columns = source.train.metadata
    assert columns["who"].dtype == torch.int64 and columns["tag"].dtype == torch.float32
    assert set(columns["weight"].tolist()) == {0.5, 1.5, 2.5, 3.5}
    roles = {c.name: (c.role, c.note) for c in source.roles}
    assert roles["who"] == ("metadata", "3 values; keep=who makes it a feature too")
    kept = load(table, metadata=("who",), keep=("who",), exclude=("tag", "weight", "site"))
    assert kept.train.x.shape[1] == 2 + 3 and kept.levels["who"] == source.levels["who"]


def test_a_value_that_only_the_test_has_is_a_value(tmp_path):
    (tmp_path / "train.csv").write_text("a,g,label\n" + "1.5,x,0\n2.5,z,1\n" * 20)
    (tmp_path / "test.csv").write_text("a,g,label\n" + "1.5,y,0\n2.5,x,1\n" * 5)
    source = load(str(tmp_path), metadata=("g",))
    assert source.levels["g"] == ("x", "y", "z")
    assert source.train.metadata["g"].tolist()[:2] == [0, 2] and source.test.metadata["g"].tolist()[:2] == [1, 0]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"metadata": ("nope",)}, "no column 'nope'"),
        ({"metadata": ("label",)}, "metadata=label: that column of .* is what is predicted, as batch.y"),
        ({"metadata": ("site",), "partition": "column:site", "clients": None}, "names the clients of the partition"),
        ({"metadata": ("who",), "exclude": ("who",)}, "'who' of .* is metadata and excluded"),
        ({"metadata": ("who", "who")}, "names the column 'who' twice"),
        ({"metadata": ("who",), "problem": "graph:sbm", "data": "digits"}, "does not read metadata"),
        ({"metadata": ("who",), "problem": "saddle:bilinear", "data": "digits"}, "the kind saddle carries no columns"),
    ],
)
def test_what_cannot_be_carried_is_refused(table, settings, told):
    with pytest.raises(UsageError, match=told):
        tasks.build(fedloom.Spec(**{"data": table, "clients": 3} | settings))


def test_gaps_in_metadata_are_told_and_texts_have_none(tmp_path):
    file = tmp_path / "gaps.csv"
    file.write_text("a,g,label\n" + "1.5,x,0\n2.5,,1\n3.5,y,1\n" * 20)
    with pytest.raises(UsageError, match="'g' in 20"):
        load(str(file), metadata=("g",))
    with pytest.raises(UsageError, match="fills in numbers, dates and categories only"):
        load(str(file), metadata=("g",), missing="mean")
    assert load(str(file), metadata=("g",), missing="drop").levels["g"] == ("x", "y")
    (tmp_path / "t.txt").write_text("some letters " * 100)
    with pytest.raises(UsageError, match="leave metadata=g out"):
        load(str(tmp_path / "t.txt"), metadata=("g",))


def test_a_column_that_is_not_there_is_named_with_those_that_are():
    batch = Batch(torch.zeros(2, 1), torch.zeros(2), {"sex": torch.tensor([0, 1])})
    with pytest.raises(UsageError, match=r"no column 'six' beside x and y \(there: sex\)"):
        batch["six"]
    with pytest.raises(UsageError, match=r"there: none\); the setting metadata=sex"):
        Data(torch.zeros(2, 1), torch.zeros(2))["sex"]


def test_the_test_is_judged_value_by_value(table):
    run = fedloom.run("fedavg", data=table, clients=3, rounds=2, metadata=("who", "tag"))
    task = classification.Classification.load(table, clients=3, metadata=("who", "tag"))
    test, row = task.global_test(), run.final
    counts = torch.bincount(test["who"], minlength=3).double()
    each = [row[f"global_test_accuracy@who {name}"] for name in ("high", "low", "mid_ so-so")]
    assert row["global_test_accuracy"] == pytest.approx(float((counts / counts.sum()) @ torch.tensor(each).double()))
    assert not any("@tag" in name for name in row), "it has too many values"
    assert run.spec.metadata == ("who", "tag")


class Tagged(Toy):
    """Toy with a weight a sample beside x and y: its place in the storage, in a cycle."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.beside = {"weight": (torch.arange(len(self.y)) % 3).float() + 0.5}


def weighed(net, batch):
    return (batch["weight"] * F.cross_entropy(net(batch.x), batch.y, reduction="none")).mean()


@dataclass(frozen=True)
class Weighed(Method):
    """How do samples count by their weights?"""

    lr: float = 0.1
    batch: int = 8
    epochs: int = 1
    open: bool = False

    compressible = private = ("delta",)

    def round(self, server, cohort):
        server.model = server.model + cohort.mean(self.local, model=server.model).delta

    @client
    def local(self, client, model):
        if not self.open:
            return {"delta": client.descend(model, lr=self.lr, batch=self.batch, loss=weighed)[0] - model}
        w = model.clone()
        for batch in client.batches(self.batch):
            w = w - self.lr * client.grad(w, batch, loss=weighed)
        return {"delta": w - model}


def model_of(method, task, **settings):
    return fedloom.run(method, task, rounds=2, **settings).model.flat


@pytest.mark.parametrize("open_loop", [False, True])
@pytest.mark.parametrize("engine", ["pool", "loopback", "vectorized"])
def test_every_engine_hands_the_columns_to_losses(engine, open_loop):
    method = Weighed(open=open_loop)
    plain, other = (model_of(method, Tagged((16, 20, 24)), engine=name) for name in ("serial", engine))
    assert torch.equal(plain, other) if engine != "vectorized" else torch.allclose(plain, other, atol=1e-6)
    assert not torch.allclose(plain, model_of(FedAvg(lr=0.1, batch=8, epochs=1), Tagged((16, 20, 24))), atol=1e-3)


def test_vectorized_takes_clients_with_storages_of_their_own():
    class Apart(Tagged):
        def data(self, client, split):
            data = super().data(client, split)
            return Data.of(data.all()) if split == "train" else data

    sizes = (16, 20, 24)
    together = model_of(Weighed(), Apart(sizes), engine="vectorized")
    assert torch.allclose(together, model_of(Weighed(), Tagged(sizes)), atol=1e-6)


def test_a_full_step_is_the_weighted_mean_of_the_gradients():
    task = Tagged((15,))
    run = fedloom.run(Weighed(batch=0), task, rounds=1)
    first = Site(task, 0).initial
    net = task.network()
    net.load_state_dict({name: first[name].clone() for name in first})
    data = task.data(0, "train")
    weights = (data.rows % 3).float() + 0.5
    loss = (weights * F.cross_entropy(net(data.x), data.y, reduction="none")).sum() / 15
    loss.backward()
    for name, parameter in net.named_parameters():
        assert torch.allclose(run.model[name], parameter.detach() - 0.1 * parameter.grad, atol=1e-6)


def test_private_batches_have_them_for_losses_alone():
    noisy = model_of(Weighed(), Tagged((16, 20)), dp="sample:noise=0.0,clip=1e6")
    plain = model_of(FedAvg(lr=0.1, batch=8, epochs=1), Tagged((16, 20)), dp="sample:noise=0.0,clip=1e6")
    assert not torch.allclose(noisy, plain, atol=1e-3)

    @dataclass(frozen=True)
    class Peeks(Weighed):
        """What does a method see of a sealed batch?"""

        @client
        def local(self, client, model):
            for batch in client.batches(self.batch):
                batch["weight"].sum()

    with pytest.raises(UsageError, match=r"batch\['weight'\]"):
        model_of(Peeks(), Tagged((16, 20)), dp="sample:noise=1.0,clip=1.0")


def test_attackers_and_the_membership_attack_know_the_columns():
    class Weighs(Tagged):
        def criterion(self, outputs, batch):
            return (batch["weight"] * F.cross_entropy(outputs, batch.y, reduction="none")).mean()

    flipped = model_of(Weighed(), Weighs((16, 20)), attack="label_flip:0.5")
    assert not torch.equal(flipped, model_of(Weighed(), Weighs((16, 20))))
    run = fedloom.run(Weighed(), Weighs((16, 20)), rounds=2, dp="client:noise=0.5,clip=1.0")
    assert run.manifest["dp"]


def test_a_group_of_clients_may_be_metadata_too(table):
    task = tasks.build(fedloom.Spec(data=table, clients=5, partition="iid", metadata=("who",), group="who"))
    assert task.info(0)["group"] in ("high", "low", "mid, so-so") and "who" in task.data(0, "train").metadata
