"""FedLabel: the expert, agreement, and what remains without pseudo-labels."""

import pytest
import torch
from problems import network, node, ran
from torch.nn import functional as F

from fedloom.data.augment import strong, weak
from fedloom.errors import UsageError
from fedloom.methods.labels import fedlabel
from fedloom.methods.labels.fedlabel import FedLabel, confidence, selective
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.tasks.partial import toy
from fedloom.tasks.toy import Toy


def test_nothing_accepted_is_fedavg_on_the_labelled_samples():
    task = toy(sizes=(30, 30, 30))  # equal, as FedAvg would weigh by labelled samples
    label = ran(FedLabel(beta=1.1, batch=100, steps=3), task, rounds=3)
    plain = ran(FedAvg(batch=100, epochs=3), task, rounds=3)
    assert torch.equal(label.server.model.flat, plain.server.model.flat)
    assert not torch.equal(
        ran(FedLabel(beta=0.4, batch=100, steps=3), task, rounds=3).server.model.flat, plain.server.model.flat
    )


def test_the_loss_by_hand():
    made = ran(FedAvg(lr=0.2), toy(), rounds=6)
    client, rule = node(made.site, 0), FedLabel(beta=0.9, lam=0.7, unlabelled=0.4)
    net, batch = client.net(made.server.model), client.data.all()
    u = made.task.data(0, "unlabelled").x
    views = weak(u, client.rng("a")), strong(u, client.rng("b"))
    theirs = client.net(made.site.initial + 0.3 * made.server.model)(views[0]).softmax(1)
    value = selective(net, batch, made.task, views, theirs, rule)
    mine, scores, parts, count, kinds = net(views[0]).softmax(1), net(views[1]), [], 0, set()
    for p_l, p_g, s in zip(mine, theirs, scores, strict=True):
        e, o = (p_l, p_g) if p_l.var(correction=0) >= p_g.var(correction=0) else (p_g, p_l)
        if e.max() < 0.9:
            continue
        count += 1
        label = int(e.argmax())
        part = F.cross_entropy(s, torch.tensor(label))
        kinds.add(int(o.argmax()) == label)
        if int(o.argmax()) == label:
            ratio = o.var(correction=0) / e.var(correction=0)
            assert ratio <= 1
            part = part + 0.7 * ratio * (o * (o.log() - s.log_softmax(0))).sum()
        parts.append(part)
    assert 0 < count < len(u) and True in kinds
    torch.testing.assert_close(value, F.cross_entropy(net(batch.x), batch.y) + 0.4 * sum(parts) / count)


def test_at_the_start_both_teachers_agree_fully():
    made = ran(FedAvg(), toy(), rounds=2)
    client = node(made.site, 0)
    u = made.task.data(0, "unlabelled").x
    p = client.scores(made.server.model, u).softmax(1)
    torch.testing.assert_close(p, client.net(made.server.model)(u).softmax(1))
    torch.testing.assert_close(confidence(p), p.var(1, correction=0))


def test_no_gradient_flows_into_the_teacher():
    made = ran(FedAvg(lr=0.2), toy(), rounds=6)
    client = node(made.site, 0)
    x, rule = torch.randn(5, 6), FedLabel(beta=0.0)
    views = (x.clone().requires_grad_(), x.clone().requires_grad_())
    theirs = client.scores(made.server.model, x).softmax(1).detach()
    net = client.net(made.server.model).requires_grad_()
    value = selective(net, client.data.all(), made.task, views, theirs, rule)
    one, other = torch.autograd.grad(value, views, allow_unused=True)
    assert one is None and other.abs().sum() > 0


def test_it_gains_from_samples_without_labels_and_costs_what_fedavg_costs():
    task = toy(sizes=(40, 40, 40, 40))
    label, plain = ran(FedLabel(beta=0.8), task, rounds=15), ran(FedAvg(batch=20, epochs=5), task, rounds=15)
    assert label.record.final["global_test_accuracy"] >= plain.record.final["global_test_accuracy"] - 0.02
    assert label.record.metrics[0]["up_bytes"] == plain.record.metrics[0]["up_bytes"]


def test_fully_labelled_data_are_refused():
    with pytest.raises(UsageError, match="fedlabel needs a problem of the kind partial"):
        ran(FedLabel(), Toy(), rounds=1)


def test_the_global_teacher_is_what_came_and_judges_the_weak_view_in_every_step(monkeypatch):
    made, seen = ran(FedAvg(lr=0.2), toy(), rounds=4), []

    def noted(net, batch, task, views, theirs, rule):
        seen.append((views, theirs, net.head.weight.detach().clone()))
        return selective(net, batch, task, views, theirs, rule)

    monkeypatch.setattr(fedlabel, "selective", noted)
    monkeypatch.setattr(fedlabel, "weak", lambda x, draw: x + 0.5)
    monkeypatch.setattr(fedlabel, "strong", lambda x, draw: x - 3.0)
    model, others = made.server.model, made.task.data(1, "unlabelled")
    reply = FedLabel(lr=0.5, batch=4, steps=6).local(node(made.site, 1), model)
    assert len(seen) == 6, "every step has samples without a label"
    for (one, other), theirs, _ in seen:
        torch.testing.assert_close(one - other, torch.full_like(one, 3.5))
        torch.testing.assert_close(theirs, network(made.task, model).eval()(one).softmax(1))
    assert not torch.allclose(seen[0][2], seen[-1][2], atol=1e-2), "the local model has moved meanwhile"
    for (one, _), _, _ in seen:
        apart = (one[:, None] - 0.5 - others.x).abs().amax(2).min(1).values
        assert (apart < 1e-4).all(), "views are of samples without a label"
    assert reply["n"] == 20 == len(made.task.data(1, "train")) + len(others)
