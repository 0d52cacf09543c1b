"""AGLFOP: where disparity comes from, by canonical examples and brute force; what bounds on it cost."""

import functools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from problems import ran

import fedloom
from fedloom.errors import UsageError
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.personalize.local import Local
from fedloom.methods.trust._disparity import decomposed, entropy, information, least_error, parity_gap, within
from fedloom.methods.trust.aglfop import AGLFOP, stacked
from fedloom.random import numpy_stream
from fedloom.tasks.toy import Toy

GRID = 401


def drawn(number, shape=(2, 2, 2)):
    return numpy_stream(number, "tests", "aglfop").dirichlet(np.ones(int(np.prod(shape)))).reshape(shape)


def of(*cells, shape=(2, 2, 2)):
    p = np.zeros(shape)
    for cell in cells:
        p[cell] += 1 / len(cells)
    return p


def parts(p):
    return [pytest.approx(decomposed(p)[f"{name}_disparity"], abs=1e-6)
            for name in ("global", "local", "unique", "redundant", "masked")]  # fmt: skip


def test_canonical_examples():
    told_by_group = of(*[(s, z, z) for s in (0, 1) for z in (0, 1)])
    assert parts(told_by_group) == [1, 1, 1, 0, 0], "Yh = Z"
    assert parts(of((0, 0, 0), (1, 1, 1))) == [1, 0, 0, 1, 0], "Yh = S = Z: fair within clients, unfair between"
    assert parts(of(*[(s, z, z ^ s) for s in (0, 1) for z in (0, 1)])) == [0, 1, 0, 0, 1], "Yh = Z xor S: masked"
    p = drawn(1)
    independent = p.sum((1, 2))[:, None, None] * p.sum((0, 2))[None, :, None] * p.sum((0, 1))[None, None]
    assert parts(independent) == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("number", range(6))
def test_the_parts_add_up_and_the_unique_one_is_the_least_of_all(number):
    p = drawn(number)
    found = decomposed(p)
    assert found["global_disparity"] == pytest.approx(found["unique_disparity"] + found["redundant_disparity"])
    assert found["local_disparity"] == pytest.approx(found["unique_disparity"] + found["masked_disparity"])
    assert min(found.values()) >= 0
    sites = information(p.sum(2))  # I(Z; S)
    given_yh = within(p.transpose(2, 0, 1))  # I(S; Z | Yh)
    assert found["redundant_disparity"] - found["masked_disparity"] == pytest.approx(sites - given_yh)
    assert found["unique_disparity"] == pytest.approx(brute(p), abs=1e-5)


def brute(p):
    """The least I_Q(Z; Yh | S) on a grid over the couplings of yh and s, one number for each z."""
    groups, sites, ways = p.sum(0), p.sum(2).T, []
    for z in (0, 1):
        low = max(0.0, groups[z, 0] + sites[z, 0] - groups[z].sum())
        ways.append(np.linspace(low, min(groups[z, 0], sites[z, 0]), GRID))
    q = np.zeros((2, 2, 2, GRID, GRID))  # s, z, yh
    for z, both in enumerate(np.meshgrid(*ways, indexing="ij")):
        q[0, z, 0], q[1, z, 0] = both, groups[z, 0] - both
        q[0, z, 1], q[1, z, 1] = sites[z, 0] - both, groups[z, 1] - sites[z, 0] + both
    q = q.clip(0)

    def bits(x):
        x = x.reshape(-1, GRID, GRID)
        return -(x * np.log2(np.where(x > 0, x, 1))).sum(0)

    return float((bits(q.sum(2)) + bits(q.sum(1)) - bits(q.sum((1, 2))) - bits(q)).min())


def test_one_client_has_nothing_but_a_unique_part():
    found = decomposed(drawn(3, (1, 2, 2)))
    assert found["local_disparity"] == pytest.approx(found["global_disparity"]) == found["unique_disparity"]
    assert found["redundant_disparity"] == pytest.approx(0) and found["masked_disparity"] == pytest.approx(0)


def test_groups_classes_and_clients_may_be_more_than_two():
    found = decomposed(drawn(4, (4, 3, 5)))
    assert 0 < found["unique_disparity"] < min(found["global_disparity"], found["local_disparity"])
    empty = np.zeros((3, 3, 2))
    empty[:2, :2] = drawn(5)
    assert decomposed(empty) == pytest.approx(decomposed(drawn(5)), abs=1e-9), "empty cells are no cells"


def test_gaps_of_parity():
    assert parity_gap(np.array([[0.1, 0.3], [0.3, 0.3]])) == pytest.approx(0.25)
    assert parity_gap(np.array([[0.2, 0.8], [0.0, 0.0]])) == 0.0


@functools.cache
def all_predictors(number):
    """On a grid of P(yh = 1 | s, z), of a drawn table [2, 2, 2]: the error of each, and I(Z; Yh) and I(Z; Yh | S)."""
    p, steps = drawn(number), np.linspace(0, 1, 41)
    r = np.stack(np.meshgrid(*[steps] * 4, indexing="ij"), -1).reshape(-1, 2, 2)
    share = p.sum(2)
    q = np.stack([share * (1 - r), share * r], -1)  # [grid, s, z, yh]

    def bits(x):
        return -(x * np.log2(np.where(x > 0, x, 1))).reshape(len(x), -1).sum(1)

    both, joint = bits(q.sum((1, 2))), q.sum(1)
    across = entropy(share.sum(0)) + both - bits(joint)
    inside = entropy(share) + bits(q.sum(2)) - entropy(share.sum(1)) - bits(q)
    return np.clip(q - p, 0, None).sum((1, 2, 3)), across, inside


def brute_error(number, eps_global, eps_local):
    """The least error over the grid of those within the bounds."""
    error, across, inside = all_predictors(number)
    return float(error[(across <= eps_global) & (inside <= eps_local)].min())


@pytest.mark.parametrize(("eps_global", "eps_local"), [(0.02, 0.02), (0.3, 0.01), (0.01, 0.3)])
def test_the_limit_is_that_of_a_grid(eps_global, eps_local):
    found, coarse = least_error(drawn(7), eps_global, eps_local), brute_error(7, eps_global, eps_local)
    assert found <= coarse + 1e-6 and coarse - found < 0.02


def test_a_looser_bound_costs_no_more_and_two_bounds_cost_no_more_than_their_mean():
    p, bounds = drawn(8), (0.0, 0.01, 0.05, 0.2)
    grid = np.array([[least_error(p, g, inner) for inner in bounds] for g in bounds])
    assert (np.diff(grid, axis=0) < 2e-5).all() and (np.diff(grid, axis=1) < 2e-5).all()
    assert grid[0, 0] > grid[1, 1] > grid[2, 2] > grid[3, 3]
    for one, other in [(0.0, 0.1), (0.02, 0.2)]:
        middle = (one + other) / 2
        assert least_error(p, middle, middle) <= (least_error(p, one, one) + least_error(p, other, other)) / 2 + 2e-5


def test_no_bound_no_error_and_independent_groups_cost_nothing():
    p = drawn(9)
    assert least_error(p, 1.0, 1.0) == pytest.approx(0, abs=1e-6)
    both = p.sum(1)  # S and Y
    free = both[:, None, :] * np.array([0.3, 0.7])[None, :, None]
    assert least_error(free, 0.0, 0.0) == pytest.approx(0, abs=1e-6)
    told = np.zeros((1, 2, 2))
    told[0, 0, 0], told[0, 1, 1] = 0.4, 0.6
    assert least_error(told, 0.0, 0.0) == pytest.approx(0.4), "Y = Z: the best that knows nothing of Z is constant"


def test_at_no_local_disparity_each_client_has_one_rate_and_at_no_global_one_all_groups():
    p = np.zeros((2, 2, 2))
    p[0, 0, 0] = p[1, 1, 1] = 0.5  # each client has one group, and one class
    assert least_error(p, 1.0, 0.0) == pytest.approx(0), "fair within clients costs nothing"
    assert least_error(p, 0.0, 1.0) == pytest.approx(0.5), "fair between them costs all"


class Uneven(Toy):
    """Toy whose first client has few rows to test on."""

    def data(self, client, split):
        data = super().data(client, split)
        return replace(data, rows=data.rows[:4]) if (client, split) == (0, "test") else data


def audited(made):
    return {name.removeprefix("server/"): value for name, value in made.record.final.items() if "server/" in name}


def test_the_audit_is_of_the_models_predictions_on_test_rows():
    task = Uneven()
    made = ran(AGLFOP(bounds=(0.0, 0.05), headroom=True), task, rounds=2)
    net = made.server.net(made.server.model)
    counts = np.zeros((4, 2, 3, 3))
    for k in range(4):
        data = task.data(k, "test")
        for z, y, yh in zip(data["sex"].tolist(), data.y.tolist(), net(data.x).argmax(1).tolist(), strict=True):
            counts[k, z, y, yh] += 1
    p, found = counts / counts.sum(), audited(made)
    for name, value in decomposed(p.sum(2)).items():
        assert found[name] == pytest.approx(value, abs=1e-6)
    assert found["parity_gap"] == pytest.approx(parity_gap(p.sum((0, 2))), abs=1e-6)
    assert found["worst_parity_gap"] == pytest.approx(max(parity_gap(one.sum(1)) for one in p), abs=1e-6)
    assert found["limit_0.05"] == pytest.approx(1 - least_error(p.sum(3), 0.05, 0.05), abs=1e-6)
    accuracy = made.record.final["global_test_accuracy"]
    assert found["headroom"] == pytest.approx(found["limit"] - accuracy, abs=1e-6) and found["headroom"] >= -1e-5
    assert found["limit_0"] <= found["limit_0.05"]


def test_training_is_that_of_the_inner_method_and_a_table_is_all_that_leaves():
    plain, made = ran(FedAvg(), Toy(), rounds=2), ran(AGLFOP(), Toy(), rounds=2)
    assert torch.equal(plain.server.model.flat, made.server.model.flat)
    lines = [line for line in made.record.ledger if line["function"] == "count"]
    assert {(line["kind"], line["direction"], line["field"]) for line in lines if line["direction"] == "up"} >= {
        ("evaluate", "up", "table")
    }
    assert all(line["kind"] == "evaluate" for line in lines), "training costs nothing more"


def test_personal_models_are_audited_by_what_each_client_would_use():
    made = ran(AGLFOP(inner=Local()), Toy(), rounds=2)
    assert made.record.final["global_test_accuracy"] is None and audited(made)["local_disparity"] > 0


@dataclass(frozen=True)
class Standing(FedAvg):
    """What is judged in place of the model?"""

    def observe(self, server, clients):
        return 0 * server.model


def test_what_the_inner_method_has_judged_in_place_of_its_model_is_judged():
    made, plain = (ran(method, Toy(), rounds=1) for method in (AGLFOP(inner=Standing()), Standing()))
    loss = "global_test_loss"
    assert made.record.final[loss] == plain.record.final[loss] == pytest.approx(np.log(3), rel=1e-4)


def test_trials_look_at_no_test_row():
    made = ran(AGLFOP(), Toy(), rounds=1, blind=True)
    assert not audited(made)


def test_clients_without_a_group_and_without_rows():
    small, large = torch.ones(1, 2, 2, dtype=torch.int32), torch.ones(2, 2, 2, dtype=torch.int32)
    counts = stacked([small, large])
    assert counts.shape == (2, 2, 2, 2) and counts.dtype == np.float64 and counts[0, 1].sum() == 0
    assert stacked([]) is None


class Without(Toy):
    """Toy without columns, or with one of fractions."""

    def __init__(self, column=None):
        super().__init__()
        self.beside = {} if column is None else {"sex": column(len(self.y))}


@pytest.mark.parametrize(
    ("method", "task", "told"),
    [
        (AGLFOP(), Without(), "sensitive=sex is a column beside x and y .* and there is none; set metadata=sex"),
        (AGLFOP(), Without(torch.rand), "it holds fractions"),
        (AGLFOP(bounds=()), Toy(), "at least one bound"),
        (AGLFOP(bounds=(-0.1,)), Toy(), "none below 0|must be"),
    ],
    ids=["none", "fractions", "no bound", "negative"],
)
def test_what_cannot_be_audited_is_refused(method, task, told):
    with pytest.raises(UsageError, match=told):
        ran(method, task, rounds=1)


def test_from_a_table_by_name(tmp_path):
    draw = numpy_stream(0, "tests", "rows")
    x, sex = draw.normal(size=400), draw.integers(0, 2, 400)
    rows = [
        f"{a:.3f},{b:.3f},{'fm'[z]},{int(a + 2 * z > 1)}" for a, b, z in zip(x, draw.normal(size=400), sex, strict=True)
    ]
    (tmp_path / "t.csv").write_text("\n".join(["a,b,sex,label", *rows]) + "\n")
    given = {"data": str(tmp_path / "t.csv"), "clients": 2, "partition": "iid", "rounds": 3}
    made = fedloom.run("aglfop", **given, metadata=("sex",), keep=("sex",), inner={"name": "fedavg", "lr": 0.3})
    final = made.final
    assert final["server/global_disparity"] > 0.05 and 0 <= final["server/redundant_disparity"] < 0.02
    assert {"global_test_accuracy@sex f", "global_test_accuracy@sex m"} <= final.keys()
