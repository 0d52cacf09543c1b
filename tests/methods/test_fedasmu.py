"""FedASMU: how much a model counts, the refresh in the middle of the work, and the coefficients' steps."""

from math import log, sqrt

import pytest
import torch
from arrivals import by_hand, trained
from problems import Quadratics, ran

from fedloom.methods.asynchronous.fedasmu import FedASMU
from fedloom.tasks.toy import Toy

ZERO = torch.zeros(2, dtype=torch.float64)


@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_without_a_refresh_the_server_is_fedasync_with_learned_weights(rate):
    task, lr, rounds = Quadratics((2, 7)), 0.1, 9
    made = ran(FedASMU(lr=lr, epochs=1, batch=1, refresh=1.0, server_rate=rate, iota=0.1), task, rounds)
    models, weights = [ZERO], [[1.0, 0.5, 0.1], [1.0, 0.5, 0.1]]
    for t, [(c, stale)] in enumerate(by_hand([2.0, 7.0], rounds), start=1):
        lam, sigma, iota = weights[c]
        start, w = models[-1 - stale], models[-1]
        mine, d = trained(task, c, start, lr, [2, 7][c]), stale + 1
        xi = lam / (sqrt(t) * d**sigma) + iota
        alpha = xi / (1 + xi)
        # The chain rule through alpha, with (start - mine) / (lr steps) for the gradient of the loss.
        down = float((start - mine) @ (mine - w)) / (lr * [2, 7][c]) / (1 + xi) ** 2
        weights[c] = [
            max(lam - rate * down / (sqrt(t) * d**sigma), 1e-6),
            max(sigma + rate * down * lam * log(d) / (sqrt(t) * d**sigma), 0.0),
            max(iota - rate * down, 0.0),
        ]
        models.append(w + alpha * (mine - w))
    assert torch.allclose(made.server.model.flat, models[-1], rtol=0, atol=1e-10)
    assert [made.server.weights[c] for c in (0, 1)] == [pytest.approx(weights[c]) for c in (0, 1)]
    assert (made.server.weights[1][1] != 0.5) == (rate > 0), "the slow one's work was old"


def test_alpha_falls_with_staleness_and_with_time():
    made = ran(FedASMU(server_rate=0.0, refresh=1.0), Toy(sizes=(10, 10, 60)), 12).record.metrics
    shares = {(t, row["server/staleness"]): row["server/alpha"] for t, row in enumerate(made, start=1)}
    assert len({stale for _, stale in shares}) > 1
    for (t, stale), alpha in shares.items():
        assert alpha == pytest.approx(1 / (1 + sqrt(t * (1 + stale))))


def test_a_fresh_device_does_not_feel_the_refresh():
    task = Toy(sizes=(25,))
    plain, without = (ran(FedASMU(batch=0, epochs=4, mu_b=mu), task, 3) for mu in (1.0, 0.0))
    assert torch.equal(plain.server.model.flat, without.server.model.flat)
    whole = ran(FedASMU(batch=0, epochs=4, refresh=1.0), task, 3)
    assert torch.allclose(plain.server.model.flat, whole.server.model.flat, rtol=0, atol=1e-6)


def test_a_refresh_mixes_the_newest_model_in_and_learns_how_much():
    """Client 1 takes eight steps; after four of them client 0 has moved the model twice."""
    task, lr, rate = Quadratics((2, 8)), 0.1, 0.05
    made = ran(FedASMU(lr=lr, epochs=1, batch=1, server_rate=0.0, client_rate=rate, mu_b=2.0), task, 5)
    models = [ZERO]
    for [(c, _)] in by_hand([2.0, 8.0], 5)[:2]:
        assert c == 0
        alpha = 1 / (1 + sqrt(len(models)))
        models.append(models[-1] + alpha * (trained(task, 0, models[-1], lr, 2) - models[-1]))
    g, age = 2, 2  # client 0's second model comes at 4 s too, but its work was submitted later than client 1's
    half = trained(task, 1, ZERO, lr, 4)
    phi = 1 / sqrt(g) * (1 - 0.5 / sqrt(age))
    beta = 2 * phi / (1 + 2 * phi)
    away = models[1] - half
    mixed = half + beta * away
    slope = rate * float(task.gradient(1, mixed) @ away) * 2 / (1 + 2 * phi) ** 2
    gamma = 1 - slope / sqrt(g) * (1 - 0.5 / sqrt(age))
    upsilon = 0.5 + slope / sqrt(g) / sqrt(age)
    assert made.engine.states[1]["refresh"] == pytest.approx([gamma, upsilon])
    arrived = trained(task, 1, mixed, lr, 4)
    assert slope != 0 and (arrived - trained(task, 1, ZERO, lr, 8)).norm() > 0.1
    last = [row["server/staleness"] for row in made.record.metrics].index(3.0)
    before, after = (
        ran(FedASMU(lr=lr, epochs=1, batch=1, server_rate=0.0, client_rate=rate, mu_b=2.0), task, r)
        for r in (last, last + 1)
    )
    x, alpha = before.server.model.flat, 1 / (1 + sqrt((last + 1) * 4))
    assert torch.allclose(after.server.model.flat, x + alpha * (arrived - x), rtol=0, atol=1e-12)


def test_the_download_of_a_refresh_is_counted_once():
    made = ran(FedASMU(), Toy(sizes=(10, 60)), 6)
    down = [line for line in made.record.ledger if line["kind"] == "train" and line["direction"] == "down"]
    newer = [line for line in down if line["function"] == "end" and line["field"] == "newer"]
    models = [line for line in down if line["function"] == "begin" and line["field"] == "model"]
    whole = max(line["bytes"] for line in models)
    assert sum(len(line["clients"]) for line in newer if line["bytes"] > whole / 2) > 0
    assert any(line["bytes"] < whole / 2 for line in newer), "and a model that is the newest already is not sent"


def test_work_that_is_too_old_is_dropped():
    made = ran(FedASMU(tau=0), Toy(), 4)
    assert torch.equal(made.server.model.flat, made.site.initial.flat) and made.server.version == 1
    assert ran(FedASMU(tau=1), Toy(), 4).server.version > 1
