"""How a round's clients are chosen: chances, who is out of reach, and that a draw is the round's."""

import numpy as np
import pytest
from problems import ran

from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.tasks.toy import Toy
from fedloom.world.participation import FORMS


def draws(form, wanted, there=None, rounds=2000, n=(1.0, 2.0, 3.0, 4.0)):
    chooser = FORMS[form](0, len(n))
    return [list(chooser.choose(round, there, wanted, {"n": np.array(n)})) for round in range(rounds)]


@pytest.mark.parametrize("form", ["uniform", "weighted"])
def test_so_many_without_repetition_in_ascending_order(form):
    assert all(len(set(ids)) == 2 and ids == sorted(ids) for ids in draws(form, 2, rounds=50))
    assert draws(form, 9, rounds=1) == draws(form, None, rounds=1) == [[0, 1, 2, 3]]
    there = np.array([True, False, False, True])
    assert all(ids == [0, 3] for ids in draws(form, 2, there, rounds=20))
    assert all(ids in ([0], [3]) for ids in draws(form, 1, there, rounds=20))


def test_weighted_chances_go_with_samples():
    counts = np.bincount(np.concatenate(draws("weighted", 1)), minlength=4)
    assert counts / 2000 == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.04)
    # Two without replacement, from all orders: P(i) = p_i + sum over j != i of p_j p_i / (1 - p_j).
    p = np.array([0.1, 0.2, 0.3, 0.4])
    chances = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)]
    counts = np.bincount(np.concatenate(draws("weighted", 2)), minlength=4)
    assert counts / 2000 == pytest.approx(chances, abs=0.04)


@pytest.mark.parametrize("there", [None, [True, False, True, True]])
def test_poisson_takes_each_client_by_itself_with_one_chance(there):
    mask = np.ones(4, dtype=bool) if there is None else np.array(there)
    found = draws("poisson", 1, None if there is None else mask)
    on = np.array([[k in ids for k in range(4)] for ids in found])
    sigma = (0.25 * 0.75 / 2000) ** 0.5
    assert np.abs(on.mean(0) - 0.25 * mask).max() < 5 * sigma, "of the population, whoever is out of reach"
    both, again = (on[:, 0] & on[:, 3]).mean(), (on[1:, 0] & on[:-1, 0]).mean()
    assert max(abs(both - 1 / 16), abs(again - 1 / 16)) < 5 * (15 / 256 / 2000) ** 0.5, "nothing follows from the other"
    assert all(ids == sorted(ids) for ids in found) and {len(ids) for ids in found} >= {0, 1, 2, 3}


def test_a_run_chooses_by_the_sizes_that_clients_registered():
    made = ran(FedAvg(), Toy(sizes=(2, 2, 60, 2)), 30, cohort=1, participation="weighted")
    lines = [line for line in made.record.ledger if line["direction"] == "down" and line["field"] == "model"]
    asked = [client for line in lines if line["kind"] == "train" for client in line["clients"]]
    assert len(asked) == 30 and asked.count(2) > 20
