"""Known groups of clients: made by a partition, read from a column, and what clusters are scored by."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from fedloom.data import Source, Table, federate
from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.ops.agreement import adjusted_rand
from fedloom.runs.spec import Spec
from fedloom.tasks import build as build_task
from fedloom.tasks.classification import Classification
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab


def words(choices, length):
    return st.lists(choices, min_size=length, max_size=length)


LABELS = st.integers(1, 12).flatmap(lambda n: st.tuples(words(st.integers(0, 4), n), words(st.sampled_from("abc"), n)))


@settings(deadline=None)
@given(LABELS)
def test_the_adjusted_rand_index_is_that_of_scikit_learn(both):
    assert adjusted_rand(*both) == pytest.approx(adjusted_rand_score(*both), abs=1e-12)


def test_by_hand_and_what_is_no_pair_of_groupings():
    assert adjusted_rand([1, 1, 2, 2], "xxyy") == 1.0
    # Pairs together in both: 1; in the first 2, in the second 3, of 6: expected 1, most 2.5.
    assert adjusted_rand([1, 1, 2, 2], "xxxy") == pytest.approx((1 - 1) / (2.5 - 1))
    with pytest.raises(ValueError, match="3 labels and 2"):
        adjusted_rand([1, 2, 3], [1, 2])


def source(rows=600, tests=200, classes=10, **columns):
    def table(n, split):
        x = torch.rand(n, 5, generator=torch.Generator().manual_seed(n))
        y = torch.arange(n) % classes
        return Table(x, y, {name: both[split] for name, both in columns.items()})

    return Source("random", "tabular", tuple(map(str, range(classes))), table(rows, 0), table(tests, 1))


@pytest.mark.parametrize(("groups", "clients"), [(3, 7), (2, 2), (5, 15)])
def test_groups_share_no_class_and_their_members_all(groups, clients):
    made = federate(source(), f"groups:{groups}", clients, seed=1)
    assert list(made.groups) == [str(k % groups) for k in range(clients)]
    for split in ("train", "test"):
        held = [set(made.y[getattr(made, split)[k]].tolist()) for k in range(clients)]
        classes = [held[g] for g in range(groups)]
        assert held == [classes[k % groups] for k in range(clients)]
        assert sum(map(len, classes)) == len(set().union(*classes)) == 10
    sizes = [[len(made.train[k]) for k in range(g, clients, groups)] for g in range(groups)]
    assert all(max(of) - min(of) <= 10 for of in sizes), "a row a class at most"
    other = federate(source(), f"groups:{groups}", clients, seed=2)
    assert {*made.y[made.train[0]].tolist()} != {*other.y[other.train[0]].tolist()}, "the seed deals the classes"
    assert made.table()["clients"][1]["group"] == "1"


@pytest.mark.parametrize(
    ("partition", "told"),
    [("groups:4", "at most groups:3"), ("groups:1", "a whole number from 2"), ("groups:2.5", "from 2")],
)
def test_what_makes_no_groups_is_refused(partition, told):
    with pytest.raises(UsageError, match=told):
        federate(source(), partition, 3)


def test_a_column_names_the_commonest_group_of_a_client():
    who = np.arange(600) % 3
    towns = np.where(np.arange(600) % 9 < 5, "north", "south")
    tests = np.arange(200) % 3, np.full(200, "east")
    made = federate(source(who=(who, tests[0]), town=(towns, tests[1])), "column:who", group="town")
    expected = []
    for k in range(3):
        mine = towns[made.train[k].numpy()]
        expected.append("north" if (mine == "north").sum() >= (mine == "south").sum() else "south")
    assert list(made.groups) == expected
    skewed = np.where(who == 2, 7, 3)
    numbers = federate(source(who=(who, tests[0]), town=(skewed, tests[0])), "column:who", group="town")
    assert list(numbers.groups) == ["3", "3", "7"]
    with pytest.raises(UsageError, match="no column 'city' to group"):
        federate(source(who=(who, tests[0])), "column:who", group="city")


def test_the_setting_reaches_what_clients_register(tmp_path):
    rows = ["size,weight,town,user,label"]
    rows += [f"{k % 7},{k % 5},{'ab'[k % 4 > 1]},u{k % 4},{k % 2}" for k in range(80)]
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    spec = {"data": str(tmp_path / "rows.csv"), "label": "label", "partition": "column:user"}
    task = build_task(Spec.of({**spec, "group": "town"}))
    assert isinstance(task, Classification)
    assert [task.info(k)["group"] for k in range(4)] == ["a", "a", "b", "b"]
    with_town = build_task(Spec.of(spec))
    assert with_town.shape[0] > task.shape[0], "what names groups is no feature"
    assert "group" not in with_town.info(0)
    with pytest.raises(UsageError, match="knows no groups"):
        build_task(Spec.of({"problem": "saddle", "group": "town"}))


class Known(Toy):
    """Clients 0 and 2 are of one group, 1 and 3 of another."""

    def info(self, client):
        return {**super().info(client), "group": "ab"[client % 2]}


@dataclass(frozen=True)
class Listing(Method):
    """Lists clusters from the second round on."""

    by: int = 2

    def setup(self, server, clients):
        server.clusters = {}

    def round(self, server, cohort):
        cohort.mean(self.ask)
        if server.round > 1:
            server.clusters = {k: k % self.by for k in cohort}

    @client
    def ask(self, client):
        return {"x": 1.0}


def test_clusters_are_scored_in_the_record():
    rows = Lab(Listing()).experiment(Known((5, 6, 7, 8))).record.metrics
    assert "cluster_ari" not in rows[0] and rows[1]["cluster_ari"] == rows[2]["cluster_ari"] == 1.0
    rows = Lab(Listing(by=3)).experiment(Known((5, 6, 7, 8))).record.metrics
    assert rows[1]["cluster_ari"] == pytest.approx(adjusted_rand([0, 1, 2, 0], "abab"))
    assert not any("cluster_ari" in row for row in Lab(Listing()).experiment(Toy((5, 6, 7, 8))).record.metrics)
