"""FedDisco: weights by size and by how far a client's labels are from uniform, around any method that averages."""

import math
from types import SimpleNamespace

import pytest
import torch

from fedloom.cohort import Cohort
from fedloom.methods.aggregate.feddisco import METRICS, FedDisco
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.fedprox import FedProx
from fedloom.methods.optimize.scaffold import Scaffold
from fedloom.node import Client
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.tasks.toy import Toy
from fedloom.testing import difference


def ran(method, task=None, **settings):
    spec = Spec.of({"method": method.to_spec(), "partition": "given", "rounds": 3, **settings})
    made = Experiment(spec, task or Toy(), method).begin(None)
    made.go()
    return made


def weights(method, sizes, d, among=None):
    """What clients of such sizes and discrepancies count, as shares."""
    cohort = [*range(len(sizes))] if among is None else among

    class Known(list):
        def info(self, k):
            return {"n": sizes[k]}

    found = method.weigh(SimpleNamespace(discrepancy=dict(enumerate(d))), Known(cohort))
    return {k: weight / sum(found.values()) for k, weight in found.items()}


def by_hand(sizes, d, a, b, among, scaled=True):
    p = {k: sizes[k] / sum(sizes[j] for j in among) for k in among}
    whole = sum(d[j] for j in among) if scaled else 1.0
    q = {k: max(0.0, p[k] - a * (d[k] / whole if whole else 0.0) + b) for k in among}
    if not sum(q.values()):
        q = p
    return {k: q[k] / sum(q.values()) for k in among}


@pytest.mark.parametrize("settings", [{}, {"cohort": 2}, {"lost": 0.5}, {"engine": "pool", "workers": 2}])
def test_without_discrepancy_and_offset_it_is_fedavg_bitwise(settings):
    disco, plain = ran(FedDisco(FedAvg(lr=0.1), a=0, b=0), **settings), ran(FedAvg(lr=0.1), **settings)
    assert torch.equal(disco.server.model.flat, plain.server.model.flat)


def test_a_clients_discrepancy_is_the_divergence_of_its_labels_from_uniform():
    task = Toy(sizes=(9, 7, 12, 5))
    made = ran(FedDisco(a=0.5), task)
    for k in range(4):
        y = task.data(k, "train").y.tolist()
        shares = [y.count(c) / len(y) for c in range(3)]
        assert made.server.discrepancy[k] == pytest.approx(sum(p * math.log(3 * p) for p in shares if p), abs=1e-12)
    assert made.server.discrepancy[0] > 0.3, "client 0 lacks a class"
    assert made.server.discrepancy[3] < 0.05, "client 3 lacks none"


def test_metrics():
    shares = torch.tensor([0.7, 0.3, 0.0]).double()
    by = {name: float(metric(shares)) for name, metric in METRICS.items()}
    assert by["kl"] == pytest.approx(0.7 * math.log(2.1) + 0.3 * math.log(0.9))
    assert by["l1"] == pytest.approx(0.7 - 1 / 3 + 1 / 3 - 0.3 + 1 / 3)
    assert by["l2"] == pytest.approx(math.sqrt((0.7 - 1 / 3) ** 2 + (0.3 - 1 / 3) ** 2 + 1 / 9))
    assert by["cosine"] == pytest.approx(1 - (1 / 3) / (math.sqrt(0.58) * math.sqrt(1 / 3)))
    none = torch.zeros(3).double()
    assert float(METRICS["kl"](none)) == 0 and float(METRICS["cosine"](none)) == 0


@pytest.mark.parametrize("among", [[0, 1, 2, 3], [1, 3], [0, 2, 3]])
@pytest.mark.parametrize("metric", ["kl", "l1"])
def test_weights_are_those_of_the_rounds_participants(among, metric):
    sizes, d = [30, 20, 25, 35], [0.4, 0.0, 0.9, 0.2]
    found = weights(FedDisco(a=0.4, b=0.1, metric=metric), sizes, d, among)
    assert found == pytest.approx(by_hand(sizes, d, 0.4, 0.1, among, scaled=metric == "kl"))


def test_equal_distributions_pull_towards_equal_weights():
    sizes = [10, 20, 30, 40]
    for d in (0.0, 0.7):
        found = weights(FedDisco(a=0 if d else 0.5, b=0.2), sizes, [d] * 4)
        assert found == pytest.approx({k: (n / 100 + 0.2) / (1 + 0.2 * 4) for k, n in enumerate(sizes)})


def test_who_is_farther_counts_less_and_at_last_nothing():
    found = weights(FedDisco(a=0.9, b=0.0), [10] * 4, [0.0, 0.1, 0.3, 0.6])
    assert found[0] > found[1] > found[2] == found[3] == 0 and sum(found.values()) == pytest.approx(1)
    # p + b = a e exactly: nothing is left
    assert weights(FedDisco(a=1.0, b=0.25), [10] * 2 + [20], [1.0, 1.0, 0.0])[0] == pytest.approx(0, abs=1e-12)


def test_if_nobody_counted_clients_count_by_their_samples():
    assert weights(FedDisco(a=1.0, b=0.0, metric="l1"), [10, 30], [2.0, 2.0]) == pytest.approx({0: 0.25, 1: 0.75})


def test_the_model_is_the_mean_with_these_weights():
    task, method = Toy(), FedDisco(FedAvg(lr=0.1, epochs=2), a=0.6, b=0.05)
    made = ran(method, task, rounds=1)
    start = made.site.initial
    moved = []
    for k in range(4):
        alone = Client(made.site, k, {}, "train", 1, 0)
        moved.append(FedAvg(lr=0.1, epochs=2).local(alone, start)["delta"].flat.double())
    shares = by_hand(task.sizes, made.server.discrepancy, 0.6, 0.05, range(4))
    expected = start.flat.double() + sum(shares[k] * moved[k] for k in range(4))
    torch.testing.assert_close(made.server.model.flat.double(), expected, rtol=0, atol=1e-6)


def test_around_scaffold_its_equal_weights_give_way():
    plain, disco = ran(Scaffold(lr=0.1), rounds=1), ran(FedDisco(Scaffold(lr=0.1), a=0, b=0), rounds=1)
    assert difference(plain.server.model, disco.server.model) is not None
    fedavg = ran(FedAvg(lr=0.1), rounds=1)  # SCAFFOLD's first round, with weights by samples
    assert torch.allclose(disco.server.model.flat, fedavg.server.model.flat, atol=1e-6)


def test_a_round_costs_what_it_costs_inside_and_the_run_one_number_more_a_client():
    disco, plain = (ran(method) for method in (FedDisco(FedProx(mu=0.1)), FedProx(mu=0.1)))

    def seen(made, kind):
        return [
            (line["field"], line["direction"], line["bytes"], len(line["clients"]))
            for line in made.record.ledger
            if line["kind"] == kind
        ]

    assert seen(disco, "train") == seen(plain, "train")
    up = [line for line in seen(disco, "setup") if line[1] == "up" and line[0] != "envelope"]
    assert up == [("discrepancy", "up", up[0][2], 4)] and up[0][2] <= 24


def test_cohort_of_a_round_is_what_it_is_asked_for():
    made = ran(FedDisco(FedAvg(lr=0.1)), rounds=1)
    method, everybody = made.method, made.everybody
    some = Cohort([1, 3], everybody.boundary)
    found = method.weigh(made.server, some)
    expected = by_hand(made.task.sizes, made.server.discrepancy, 0.5, 0.1, [1, 3])
    assert {k: w / sum(found.values()) for k, w in found.items()} == pytest.approx(expected)
