"""FedCAC: masks, overlaps, who shares what with whom."""

import pytest
import torch
from problems import ran

from manyhands.errors import UsageError
from manyhands.methods.optimize.fedavg import FedAvg
from manyhands.methods.personalize.fedcac import FedCAC, largest, overlaps, partners
from manyhands.tasks.toy import Toy
from manyhands.vector import Vector


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


def test_clients_with_the_same_data_join_each_other():
    class Twins(Toy):
        def data(self, client, split):
            return super().data(client if client > 1 else 0, split)

    made = ran(FedCAC(batch=0, beta=100), Twins(sizes=(30, 30, 25, 35)), rounds=2)
    assert torch.equal(made.server.starts[0].flat, made.server.starts[1].flat)
    assert not torch.equal(made.server.starts[0].flat, made.server.starts[2].flat)


def test_after_beta_rounds_sensitive_weights_come_back_bitwise():
    method = FedCAC(beta=1, tau=0.5)
    made = ran(method, Toy(), rounds=2)  # t / beta is 2: beyond everybody
    before = ran(method, Toy(), rounds=1)
    for k, start in made.server.starts.items():
        w = made.engine.states[k]["model"]
        mask = largest((w - before.server.starts[k]).params * w.params, 0.5)
        assert torch.equal(start.params.flat[mask], w.params.flat[mask])
        assert torch.equal(start.params.flat[~mask], made.server.model.params.flat[~mask])


def test_a_message_is_one_model_and_a_bit_a_weight():
    made = ran(FedCAC(), Toy(), rounds=2)
    sizes = {}
    for line in made.record.ledger:
        if line["kind"] == "train" and line["round"] == 2:
            sizes[line["direction"], line["field"]] = line["bytes"]
    weights = made.site.bench.layout.size
    assert 4 * weights < sizes["up", "model"] < 4 * weights + 200
    assert weights / 8 <= sizes["up", "mask"] < weights / 8 + 40
    assert sizes["down", "start"] == pytest.approx(sizes["up", "model"], abs=8)


@pytest.mark.parametrize("fields", [{"tau": 1.5}, {"beta": 0}])
def test_fields_without_a_sense_are_refused(fields):
    with pytest.raises(UsageError, match="fedcac"):
        FedCAC(**fields)
