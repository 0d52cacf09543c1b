"""CCVR: pooled moments, virtual features, and a body that stays."""

import pytest
import torch
from problems import node, ran
from torch.nn import functional as F

from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.fedprox import FedProx
from fedloom.methods.trust.ccvr import CCVR, pooled
from fedloom.random import stream
from fedloom.tasks.toy import Toy


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


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize("inner", [FedAvg(), FedProx(mu=0.3)])
def test_the_body_stays_and_training_is_the_inner_methods(inner, norm):
    made, plain = (ran(method, Toy(norm=norm), rounds=4) for method in (CCVR(inner), inner))
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


def test_the_trained_head_goes_on_by_sgd_with_momentum_and_decay(monkeypatch):
    z = torch.randn(60, 8, generator=stream(0, "test")).double()
    y = torch.arange(60) % 3
    monkeypatch.setattr(CCVR, "drawn", lambda self, generator, *moments: (z, y))
    made = ran(CCVR(head_lr=0.1, head_epochs=6, head_batch=0, weight_decay=0.2), Toy(), rounds=2)
    plain = ran(FedAvg(), Toy(), rounds=2).server.model
    head = [plain[f"head.{name}"].clone().requires_grad_() for name in ("weight", "bias")]
    moved = [torch.zeros_like(w) for w in head]
    for _ in range(6):
        slopes = torch.autograd.grad(F.cross_entropy(z.float() @ head[0].T + head[1], y), head)
        with torch.no_grad():
            for w, v, g in zip(head, moved, slopes, strict=True):
                v.copy_(0.9 * v + g + 0.2 * w)
                w -= 0.1 * v
    for name, w in zip(("weight", "bias"), head, strict=True):
        assert (w - plain[f"head.{name}"]).norm() > 0.1
        torch.testing.assert_close(made.server.model[f"head.{name}"], w.detach(), rtol=1e-4, atol=1e-5)


def test_moments_and_labels_of_the_run_reach_the_head(monkeypatch):
    seen, plain = [], CCVR.drawn
    monkeypatch.setattr(CCVR, "drawn", lambda self, *given: seen.append(given[1:]) or plain(self, *given))
    made, trained = ran(CCVR(head_epochs=0), Toy(), rounds=2), ran(FedAvg(), Toy(), rounds=2).server.model
    ((n, mean, covariance),) = seen
    clients = [node(made.site, k) for k in range(4)]
    z = torch.cat([client.features(trained, client.data.x) for client in clients]).double()
    y = torch.cat([client.data.y for client in clients])
    for c in range(3):
        assert n[c] == pytest.approx(float((y == c).sum()))
        torch.testing.assert_close(mean[c], z[y == c].mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(covariance[c], z[y == c].T.cov(), rtol=1e-4, atol=1e-5)


def test_the_ridge_is_on_the_diagonal_and_grows_with_the_covariance():
    covariance = torch.diag(torch.tensor([100.0, 0.0])).double()[None]
    n, mean = torch.tensor([9.0]), torch.zeros(1, 2).double()
    z, _ = CCVR(virtual=40000, ridge=0.01).drawn(stream(0, "test"), n, mean, covariance)
    torch.testing.assert_close(z.T.cov().diagonal(), torch.tensor([101.01, 1.01]).double(), rtol=0.05, atol=0)
