"""FedCAC: masks, overlaps, who shares what with whom."""

import itertools

import numpy as np
import pytest
import torch
from problems import descended, network, node, ran

from fedloom.errors import UsageError
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.personalize.fedcac import FedCAC, largest, overlaps, partners
from fedloom.tasks.toy import Toy
from fedloom.vector import Vector


def test_without_sensitive_weights_it_is_fedavg():
    made, plain = ran(FedCAC(tau=0.0), Toy(), rounds=4), ran(FedAvg(), Toy(), rounds=4)
    torch.testing.assert_close(made.server.model.flat, plain.server.model.flat)
    for start in made.server.starts.values():
        assert torch.equal(start.flat, made.server.model.flat), "nobody gets a model of its own"


def test_the_largest_of_every_tensor():
    v = Vector.of(torch.nn.Linear(4, 3))
    mask = largest(v, 0.5)
    for name, count in (("weight", 6), ("bias", 1)):
        mine = Vector(mask.float(), v.layout)[name].bool()
        assert mine.sum() == count
        assert v[name][mine].abs().min() >= v[name][~mine].abs().max()
    assert not largest(v, 0.0).any() and largest(v, 1.0).all()
    assert largest(v * 0, 0.5).sum() == 7, "ties are broken: every mask has one size"


def test_overlaps_by_brute_force():
    masks = torch.zeros(4, 10, dtype=torch.bool)
    for row, hits in enumerate([(0, 1, 2), (0, 1, 2), (2, 3, 4), (7, 8, 9)]):
        masks[row, list(hits)] = True
    found = overlaps(masks)
    for i in range(4):
        for j in range(4):
            common = len(set(masks[i].nonzero().flatten().tolist()) & set(masks[j].nonzero().flatten().tolist()))
            assert found[i, j].item() == pytest.approx(common / 3)


def test_partners_grow_fewer():
    overlap = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]])
    # The others' mean is 0.4 and their maximum 0.9.
    assert partners(overlap, 0.01).tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    assert torch.equal(partners(overlap, 1.01), torch.eye(3, dtype=torch.bool)), "after beta rounds: nobody"
    assert partners(torch.ones(1, 1), 0.5).tolist() == [[True]]
    for size in range(3, 40):
        even = partners(torch.full((size, size), 0.1 * size / 7), 0.5)
        assert even.all(), "all are alike, whatever rounding makes of their mean"
    assert partners(torch.ones(2, 2), 1.0).all() and not partners(torch.ones(2, 2), 1.01).all(), "two are always equal"
    # Half way from 0.4 to 0.9 is 0.65.
    overlap[0, 1] = overlap[1, 0] = 0.66
    overlap[0, 2] = overlap[2, 0] = 0.9
    overlap[1, 2] = overlap[2, 1] = -0.36
    assert partners(overlap, 0.4).tolist() == [[True, True, True], [True, True, False], [True, False, True]]
    assert partners(overlap, 0.6).tolist() == [[True, False, True], [False, True, False], [True, False, True]]


def test_clients_with_the_same_data_join_each_other():
    class Twins(Toy):
        def data(self, client, split):
            return super().data(client if client > 1 else 0, split)

    made = ran(FedCAC(batch=0, beta=100), Twins(sizes=(30, 30, 25, 35)), rounds=2)
    assert torch.equal(made.server.starts[0].flat, made.server.starts[1].flat)
    assert not torch.equal(made.server.starts[0].flat, made.server.starts[2].flat)


@pytest.mark.parametrize("cohort", [None, 3])
@pytest.mark.parametrize("fields", [{"beta": 5}, {"beta": 2}, {"beta": 5, "tau": 0.2}])
def test_rounds_by_hand(fields, cohort):
    method, task = FedCAC(lr=0.1, epochs=2, **fields), Toy(sizes=(30, 20, 25, 35, 15))
    made = ran(method, task, rounds=3, cohort=cohort)
    start, offsets = made.site.initial, made.site.initial.layout.offsets
    g, starts = start.flat.double().numpy(), {}
    for round in (1, 2, 3):
        ends, masks = {}, {}
        for k in made.world.choose(round):
            s = starts.get(k, g)
            net = network(task, Vector(torch.from_numpy(s).float(), start.layout))
            net = descended(net, task, list(node(made.site, k, round).batches(10, 2)), lr=0.1)
            theta = ends[k] = Vector.of(net, start.layout).flat.double().numpy()
            c, masks[k] = np.abs((theta - s) * theta), np.zeros(len(theta), bool)
            for a, b in itertools.pairwise(offsets):
                masks[k][a + np.argsort(-c[a:b], kind="stable")[: int(method.tau * (b - a))]] = True
        g = sum(task.sizes[k] * ends[k] for k in ends) / sum(task.sizes[k] for k in ends)
        overlap = {(i, j): (masks[i] & masks[j]).sum() / masks[i].sum() for i in ends for j in ends if i != j}
        mean, top = np.mean(list(overlap.values())), max(overlap.values())
        for i in ends:
            near = [j for j in ends if j == i or overlap[i, j] >= top - (1 - round / method.beta) * (top - mean)]
            if round > method.beta:
                near = [i]
            starts[i] = g.copy()
            starts[i][masks[i]] = np.mean([ends[j] for j in near], axis=0)[masks[i]]
    assert np.allclose(made.server.model.flat.numpy(), g, rtol=0, atol=1e-5)
    assert made.server.starts.keys() == starts.keys()
    for k, s in starts.items():
        assert np.allclose(made.server.starts[k].flat.numpy(), s, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [(30, 20, 25, 35), (30, 25)])
def test_after_beta_rounds_sensitive_weights_come_back_bitwise(sizes):
    method = FedCAC(beta=1, tau=0.5)
    made = ran(method, Toy(sizes=sizes), rounds=2)  # t / beta is 2: beyond everybody, and beyond the other of two
    before = ran(method, Toy(sizes=sizes), rounds=1)
    for k, start in made.server.starts.items():
        w = made.engine.states[k]["model"]
        mask = largest((w - before.server.starts[k]).params * w.params, 0.5)
        assert torch.equal(start.params.flat[mask], w.params.flat[mask])
        assert torch.equal(start.params.flat[~mask], made.server.model.params.flat[~mask])


def test_running_statistics_are_averaged_and_the_same_for_all():
    task = Toy(norm=True)
    made = ran(FedCAC(), task, rounds=1)
    ends = [made.engine.states[k]["model"].buffers.flat for k in range(4)]
    mean = sum(n * statistics for n, statistics in zip(task.sizes, ends, strict=True)) / sum(task.sizes)
    for v in (made.server.model, *made.server.starts.values()):
        assert torch.allclose(v.buffers.flat, mean, rtol=0, atol=1e-6)
    assert not torch.allclose(ends[0], mean, rtol=0, atol=1e-3)


def test_judged_is_the_model_after_training():
    made = ran(FedCAC(), Toy(), rounds=2)
    client = node(made.site, 1)
    client.state.update(made.engine.states[1])
    assert made.method.predict(client, made.server.model) is client.state["model"]
    assert not torch.equal(client.state["model"].flat, made.server.starts[1].flat)
    assert made.method.predict(node(made.site, 1), made.server.model) is made.server.model


def test_a_message_is_one_model_and_a_bit_a_weight():
    made = ran(FedCAC(), Toy(), rounds=2)
    sizes = {}
    for line in made.record.ledger:
        if line["kind"] == "train" and line["round"] == 2:
            sizes[line["direction"], line["field"]] = line["bytes"]
    weights = made.site.bench.layout.size
    assert 4 * weights < sizes["up", "model"] < 4 * weights + 200
    assert weights / 8 <= sizes["up", "mask"] < weights / 8 + 40
    assert sizes["down", "model"] == pytest.approx(sizes["up", "model"], abs=8)


@pytest.mark.parametrize("fields", [{"tau": 1.5}, {"beta": 0}])
def test_fields_without_a_sense_are_refused(fields):
    with pytest.raises(UsageError, match="fedcac"):
        FedCAC(**fields)
