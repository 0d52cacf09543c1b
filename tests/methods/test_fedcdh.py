"""FedCDH: sums of features in place of rows, tests of independence, and the directions of edges."""

import numpy as np
import pytest
import torch
from problems import node, ran
from scipy import stats

from fedloom.methods.structure.fedcdh import FedCDH, covariance, independence, square
from fedloom.random import numpy_stream
from fedloom.tasks.causal import Causal

F64 = {"dtype": torch.float64}


def features(x, omega, shift):
    """phi of rows [n, d], in numpy: [n, d h]."""
    h = omega.shape[1]
    return np.concatenate(
        [np.sqrt(2 / h) * np.cos(np.outer(x[:, j], omega[j]) + shift[j]) for j in range(x.shape[1])], 1
    )


def drawn(d, h, seed=0):
    draw = numpy_stream(seed, "features")
    return draw.standard_normal((d, h)), draw.uniform(0, 2 * np.pi, (d, h))


def parts_of(rows, cuts, omega, shift):
    """What clients that have these rows send of rows that are standardized."""
    found = []
    for part in np.split(rows, cuts):
        z = features(part, omega, shift)
        found.append((len(part), torch.tensor(z.sum(0)), torch.tensor(z.T @ z)))
    return found


def p_value(rows, x, y, z, gamma=1e-3):
    """Of blocks of columns: by residuals of ridge regression on centered rows, and scipy's gamma distribution."""
    c = np.cov(rows.T, bias=True)
    n = len(rows)

    def left(a, b):
        if not z:
            return c[np.ix_(a, b)]
        return (
            c[np.ix_(a, b)]
            - c[np.ix_(a, z)] @ np.linalg.inv(c[np.ix_(z, z)] + gamma * np.eye(len(z))) @ c[np.ix_(z, b)]
        )

    statistic = n * (left(x, y) ** 2).sum()
    mean = np.trace(left(x, x)) * np.trace(left(y, y))
    variance = 2 * (left(x, x) ** 2).sum() * (left(y, y) ** 2).sum()
    return stats.gamma.sf(statistic, mean**2 / variance, scale=variance / mean)


def test_a_client_sends_sums_of_features_of_rows_standardized_alike():
    task = Causal(variables=3, sizes=(7, 12))
    made = ran(FedCDH(features=3), task, rounds=1)
    center, scale = torch.tensor([1.0, -2.0, 0.5], **F64), torch.tensor([2.0, 0.5, 3.0], **F64)
    omega, shift = map(torch.tensor, drawn(3, 3))
    reply = made.method.sums(node(made.site, 1), center, scale, omega, shift)
    x = (task.data(1, "train").x - center) / scale
    z = features(x.numpy(), omega.numpy(), shift.numpy())
    np.testing.assert_allclose(reply["first"], z.sum(0))
    np.testing.assert_allclose(square(reply["second"]), z.T @ z)
    assert len(reply["second"]) == 9 * 10 // 2 and reply["n"] == 12
    moments = made.method.moments(node(made.site, 0))
    x = task.data(0, "train").x
    np.testing.assert_allclose(moments["first"], x.mean(0))
    np.testing.assert_allclose(moments["second"], (x**2).mean(0))


def test_the_server_sends_the_moments_of_all_rows_and_every_seed_draws_other_features():
    task, seen = Causal(variables=3, sizes=(7, 30)), []
    plain = FedCDH.sums

    def sums(self, client, **sent):
        seen.append(sent)
        return plain(self, client, **sent)

    sums.__client__ = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FedCDH, "sums", sums)
        ran(FedCDH(features=200), task, rounds=1)
        ran(FedCDH(features=200), task, rounds=1, seed=1)
    np.testing.assert_allclose(seen[0]["center"], task.x.mean(0))
    np.testing.assert_allclose(seen[0]["scale"], task.x.std(0, correction=0))
    assert torch.equal(seen[0]["omega"], seen[1]["omega"]) and not torch.equal(seen[0]["omega"], seen[2]["omega"])
    assert abs(seen[0]["omega"].std() - 1) < 0.1 and abs(seen[0]["shift"].mean() - np.pi) < 0.3
    assert seen[0]["shift"].min() >= 0 and 6 < seen[0]["shift"].max() < 2 * np.pi


def test_the_covariance_of_features_and_of_who_the_client_is():
    rows = numpy_stream(0, "rows").standard_normal((40, 3))
    omega, shift = drawn(3, 2)
    n, c = covariance(parts_of(rows, [9, 25], omega, shift))
    who = np.repeat(np.eye(3), (9, 16, 15), axis=0)
    np.testing.assert_allclose(
        c, np.cov(np.concatenate([features(rows, omega, shift), who], 1).T, bias=True), atol=1e-12
    )
    assert n == 40


@pytest.mark.parametrize("given", [[], [4, 5], [4, 5, 6, 7]])
def test_the_test_of_independence_by_hand(given):
    draw = numpy_stream(3, "rows")
    rows = draw.standard_normal((60, 8))
    rows[:, 4:8] += 0.4 * rows[:, :4]
    rows[:, 2] += 0.2 * rows[:, 0]
    c = torch.tensor(np.cov(rows.T, bias=True))
    found = independence(c, torch.tensor(60.0, **F64), [0, 1], [2, 3], given, 1e-3)
    assert found == pytest.approx(p_value(rows, [0, 1], [2, 3], given), rel=1e-6) and 1e-4 < found < 0.999
    assert found == pytest.approx(independence(c, torch.tensor(60.0, **F64), [2, 3], [0, 1], given, 1e-3), rel=1e-6)
    assert independence(torch.zeros(4, 4, **F64), 9, [0, 1], [2, 3], [], 1e-3) == 1.0


def test_independent_variables_have_all_p_values_and_dependent_ones_small_ones():
    found = {"apart": [], "joined": [], "chain": [], "given": []}
    x, y, z = (list(range(5 * k, 5 * k + 5)) for k in range(3))
    for seed in range(200):
        draw = numpy_stream(seed, "rows")
        rows = draw.standard_normal((300, 3))
        independent, chained = rows.copy(), rows.copy()
        chained[:, 2] += 1.5 * np.tanh(rows[:, 0])
        chained[:, 1] += 1.5 * chained[:, 2]
        for label, those, given in (("apart", independent, []), ("chain", chained, []), ("given", chained, z)):
            standard = (those - those.mean(0)) / those.std(0)
            n, c = covariance(parts_of(standard, [], *drawn(3, 5, seed)))
            found[label].append(independence(c, n, x, y, given, 1e-3))
    apart = np.array(found["apart"])
    assert 0.01 < (apart < 0.05).mean() < 0.12 and 0.35 < np.median(apart) < 0.65
    assert np.mean(np.array(found["chain"]) < 0.01) > 0.95
    assert np.mean(np.array(found["given"]) < 0.01) < 0.5


def test_without_who_the_client_is_any_split_of_the_rows_gives_one_graph():
    task = Causal(sizes=(40, 30, 50), seed=3)
    rows = ((task.x - task.x.mean(0)) / task.x.std(0, correction=0)).numpy()
    omega, shift = drawn(6, 5)
    method = FedCDH(surrogate=False)
    graphs = [method.graph(parts_of(rows, cuts, omega, shift), 6) for cuts in ([], [40, 70], [3, 8, 100])]
    assert torch.equal(graphs[0], graphs[1]) and torch.equal(graphs[0], graphs[2]) and graphs[0].any()


def test_the_order_of_clients_does_not_matter():
    task = Causal(sizes=(40, 30, 50, 60), seed=2)
    rows = ((task.x - task.x.mean(0)) / task.x.std(0, correction=0)).numpy()
    parts = parts_of(rows, [40, 70, 120], *drawn(6, 5))
    graphs = [FedCDH().graph([parts[k] for k in order], 6) for order in ((0, 1, 2, 3), (3, 1, 0, 2))]
    assert torch.equal(*graphs) and graphs[0].any()


def two(clients, size, link, seed):
    """Rows of a cause and its effect whose mechanisms change from client to client, independently."""
    draw = numpy_stream(seed, "two")
    rows, cuts = [], []
    for _ in range(clients):
        x = draw.uniform(-2, 2) + draw.uniform(0.5, 1.5) * draw.standard_normal(size)
        y = draw.uniform(0.5, 2) * link(x) + draw.uniform(-2, 2) + 0.5 * draw.standard_normal(size)
        rows.append(np.stack([x, y], 1))
        cuts.append(len(rows) * size)
    whole = np.concatenate(rows)
    return (whole - whole.mean(0)) / whole.std(0), cuts[:-1]


@pytest.mark.parametrize("effect", [1, 0])
def test_of_two_that_change_the_cause_is_that_whose_mechanism_does_not_follow_the_other(effect):
    right = 0
    for seed in range(20):
        rows, cuts = two(30, 100, np.tanh, seed)
        rows = rows if effect else rows[:, ::-1]
        graph = FedCDH(features=20).graph(parts_of(rows, cuts, *drawn(2, 20, seed)), 2)
        assert graph.sum() == 1
        right += bool(graph[1 - effect, effect])
    assert right >= 14


def test_how_much_cause_and_mechanism_change_together_by_hand():
    rows, _ = two(6, 40, np.tanh, 0)
    cuts, (omega, shift) = [30, 95, 120, 170, 220], drawn(2, 3)
    parts, method = parts_of(rows, cuts, omega, shift), FedCDH(features=3, ridge=0.02)
    causes, maps = [], []
    for part in np.split(rows, cuts):
        z = features(part, omega, shift)
        x, y = z[:, :3], z[:, 3:]
        causes.append(x.mean(0))
        maps.append((y.T @ x @ np.linalg.inv(x.T @ x + 0.02 * len(x) * np.eye(3))).T.flatten())
    a, b = (np.stack(one) - np.mean(one, 0) for one in (causes, maps))
    expected = ((a.T @ b / 6) ** 2).sum() / (np.trace(a.T @ a / 6) * np.trace(b.T @ b / 6))
    assert method.dependence(parts, 0, 1) == pytest.approx(expected, rel=1e-6)
    assert method.dependence(parts, 1, 0) != pytest.approx(expected, rel=1e-2)


def test_who_the_client_is_turns_edges_to_what_changes_and_helps():
    """Two variables alone have no direction; if one of them changes with the client, it is the effect."""
    draw, wrong = numpy_stream(0, "rows"), 0
    for seed in range(10):
        x = draw.standard_normal((10, 100))
        y = x * draw.uniform(0.8, 1.6, (10, 1)) + draw.uniform(-2, 2, (10, 1)) + draw.standard_normal((10, 100))
        rows = np.stack([y.flatten(), x.flatten()], 1)
        rows = (rows - rows.mean(0)) / rows.std(0)
        graph = FedCDH().graph(parts_of(rows, list(range(100, 1000, 100)), *drawn(2, 5, seed)), 2)
        wrong += not (graph[1, 0] and not graph[0, 1])
    assert wrong <= 2
    with_it, without = (
        [ran(FedCDH(surrogate=s), Causal("general", seed=seed), 1, seed=seed).record.final for seed in range(6)]
        for s in (True, False)
    )
    distance = [sum(one["global_test_shd"] for one in finals) / 6 for finals in (with_it, without)]
    assert distance[0] < 3 < distance[1]


def test_an_edge_between_what_does_not_change_has_no_direction_and_gets_any():
    for seed in range(8):
        rows = numpy_stream(seed, "rows").standard_normal((400, 2))
        rows[:, 1] += 2 * rows[:, 0]
        parts = parts_of((rows - rows.mean(0)) / rows.std(0), [100, 200, 300], *drawn(2, 5, seed))
        assert FedCDH(alpha=1e-3).graph(parts, 2).tolist() == [[False, False], [True, False]]


def test_uploads_are_as_large_as_the_sums_however_many_rows():
    for size in (20, 80):
        made = ran(FedCDH(features=4), Causal(variables=5, sizes=(size,) * 3), rounds=1)
        up = [line for line in made.record.ledger if (line["direction"], line["function"]) == ("up", "sums")]
        numbers = sum(line["bytes"] for line in up if 0 in line["clients"]) / 8
        assert 0 <= numbers - (20 * 21 / 2 + 20 + 1) < 12


def test_a_graph_is_what_is_judged_and_lost_replies_are_left_out():
    task = Causal(sizes=(60,) * 8, seed=4)
    made = ran(FedCDH(), task, rounds=3)
    assert len(made.record.metrics) == 1, "one exchange, however many rounds"
    expected = task.judge(made.server.graph, task.global_test())
    final = made.record.final
    assert (final["global_test_shd"], final["personal_test_skeleton_f1"]) == (expected["shd"], expected["skeleton_f1"])
    assert final["global_test_direction_f1"] == expected["direction_f1"] and expected["shd"] < 4
    assert not ran(FedCDH(), task, rounds=1, lost=1.0).server.graph.any()
    assert ran(FedCDH(), task, rounds=1, lost=0.3).server.graph.any()
