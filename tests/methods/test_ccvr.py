"""CCVR: pooled moments, virtual features, and a body that stays."""

import pytest
import torch
from problems import node, ran

from manyhands.methods.optimize.fedavg import FedAvg
from manyhands.methods.optimize.fedprox import FedProx
from manyhands.methods.trust.ccvr import CCVR, pooled
from manyhands.tasks.toy import Toy


@pytest.mark.parametrize("sizes", [(30, 20, 25, 35), (1, 9, 12, 20)])
def test_pooled_moments_are_those_of_all_features_together(sizes):
    made = ran(FedAvg(), Toy(sizes=sizes), rounds=2)
    method, model, clients = CCVR(), made.server.model, [node(made.site, k) for k in range(4)]
    sums = [method.moments(client, model) for client in clients]
    n, mean, covariance = pooled(*(sum(one[name] for one in sums) for name in ("n", "first", "second")))
    z = torch.cat([client.features(model, client.data.x) for client in clients]).double()
    y = torch.cat([client.data.y for client in clients])
    for c in range(3):
        mine = z[y == c]
        assert n[c] == len(mine)
        torch.testing.assert_close(mean[c], mine.mean(0))
        torch.testing.assert_close(covariance[c], mine.T.cov(), rtol=1e-8, atol=1e-10)


def test_virtual_features_have_the_moments():
    made = ran(FedAvg(), Toy(), rounds=1)
    covariance = torch.tensor([[2.0, 0.6], [0.6, 1.0]]).double().expand(3, 2, 2)
    mean = torch.tensor([[0.0, 1.0], [5.0, -3.0], [9.0, 9.0]]).double()
    z, y = CCVR(virtual=20000).drawn(made.server.rng("virtual"), torch.tensor([9.0, 1.0, 5.0]), mean, covariance)
    assert y.unique().tolist() == [0, 2], "a class with one sample has no covariance"
    for c in (0, 2):
        torch.testing.assert_close(z[y == c].mean(0), mean[c], rtol=0, atol=0.05)
        torch.testing.assert_close(z[y == c].T.cov(), covariance[c], rtol=0, atol=0.1)


@pytest.mark.parametrize("inner", [FedAvg(), FedProx(mu=0.3)])
def test_the_body_stays_and_training_is_the_inner_methods(inner):
    made, plain = ran(CCVR(inner), Toy(), rounds=4), ran(inner, Toy(), rounds=4)
    for name in plain.server.model:
        same = torch.equal(made.server.model[name], plain.server.model[name])
        assert same == name.startswith("body."), f"{name}: only the head is calibrated"
    for one, other in zip(made.record.metrics[:3], plain.record.metrics[:3], strict=True):
        assert one["up_bytes"] == other["up_bytes"]


def test_the_upload_does_not_depend_on_the_samples():
    def moments(sizes):
        made = ran(CCVR(), Toy(sizes=sizes), rounds=1)
        fields = ("n", "first", "second")
        return {
            line["field"]: line["bytes"]
            for line in made.record.ledger
            if line["kind"] == "finish" and line["field"] in fields
        }

    small, large = moments((5, 6)), moments((50, 60))
    assert small == large
    numbers = 3 * (1 + 8 + 8 * 9 // 2)
    assert 8 * numbers < sum(small.values()) < 8 * numbers + 60


def test_it_rescues_classes_that_a_skewed_head_forgot():
    class OneClass(Toy):
        """Client k has class k only; the server hears from all but trains for long at each."""

        def data(self, client, split):
            data = super().data(client, split)
            if split != "train":
                return data
            everything = torch.cat([super(OneClass, self).data(k, "train").rows for k in range(self.population)])
            return type(data)(self.x, self.y, everything[self.y[everything] == client])

    task = OneClass(sizes=(30, 30, 30))
    skewed = FedAvg(lr=0.3, epochs=5)
    before = ran(skewed, task, rounds=3, cohort=1).record.final["global_test_accuracy"]
    after = ran(CCVR(skewed), task, rounds=3, cohort=1).record.final["global_test_accuracy"]
    assert after > before + 0.2
