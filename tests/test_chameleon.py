"""Chameleon: its loss against a direct formula, its two stages by hand, its radius, and that its backdoor lasts."""

import math

import numpy as np
import pytest
import torch
from problems import node, ran
from test_attack import tapped
from torch import nn

import fedloom
from fedloom.boundary.attack import Attack, build, part
from fedloom.boundary.attack.chameleon import Chameleon, body_and_head, rates
from fedloom.errors import UsageError
from fedloom.method import build as method
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.random import stream
from fedloom.site import Site
from fedloom.task import Batch, Data
from fedloom.tasks.toy import Toy
from fedloom.vector import Layout, Vector

TOY = Toy((30, 20, 25, 35, 22, 28, 31, 19))
NORMED = Toy((30, 20, 25, 35), norm=True)


class Pass(nn.Module):
    """A network whose body gives its input back."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Identity(), nn.Linear(3, 2)


def contrastive(x, y, target, peers, tau):
    """Anchor by anchor, in numpy."""
    z = x / np.linalg.norm(x, axis=1, keepdims=True)
    total = 0.0
    for a in range(len(z)):
        alike = [p for p in range(len(z)) if p != a and y[p] == y[a]]
        others = sum(math.exp(z[a] @ z[b] / tau) for b in range(len(z)) if b != a)
        logs = [math.log(math.exp(z[a] @ z[p] / tau) / others) for p in alike]
        s = peers if y[a] == target else 1.0
        total -= s * sum(logs) / len(alike) if alike else 0.0
    return total / len(z)


@pytest.mark.parametrize("peers", [1.0, 6.0])
@pytest.mark.parametrize("tau", [0.07, 0.5])
def test_its_loss_is_the_papers(peers, tau):
    for seed in range(4):
        x = torch.randn(9, 3, generator=stream(seed, "contrast"), dtype=torch.float64)
        y = torch.tensor([0, 1, 1, 2, 0, 1, 3, 2, 1])  # 3 has no other of its kind
        loss = Chameleon(1, target=1, peers=peers, tau=tau).contrast(Pass(), Batch(x, y))
        assert loss.item() == pytest.approx(contrastive(x.numpy(), y.tolist(), 1, peers, tau), rel=1e-9)


def test_a_sample_alone_and_a_batch_without_pairs_have_no_loss_and_no_gradient():
    kind = Chameleon(1, target=1)
    for count in (1, 3):
        x = torch.randn(count, 3, generator=stream(0, "alone"), requires_grad=True)
        loss = kind.contrast(Pass(), Batch(x, torch.arange(count)))
        (g,) = torch.autograd.grad(loss, x)
        assert loss.item() == 0 and not g.any() and g.isfinite().all()


def test_rates_drop_from_the_named_epochs_on():
    assert rates(10, 1.0, 0.1, (3, 5, 7, 9)) == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]
    )
    assert rates(0, 1.0, 0.1, (3,)) == []


def trained(text, task=TOY, client=0):
    kind = part(f"chameleon:1,target=1,{text}").fit(task)
    one = node(Site(task, 0), client)
    w = one.initial
    theta, steps = kind.train(one, one.descend, w, 0.05)
    return one, w, theta, steps


def apart(w, theta, pattern):
    return (theta.params.select(pattern) - w.params.select(pattern)).norm().item()


def test_the_first_samples_of_every_batch_get_trigger_noise_and_label():
    kind = part("chameleon:1,target=1,poisons=3,batch=8,noise=0").fit(TOY)
    one, plain = (node(Site(TOY, 0), 0) for _ in range(2))
    loud = part("chameleon:1,target=1,poisons=3,batch=8,noise=0.5").fit(TOY)
    other = node(Site(TOY, 0), 0)
    triples = zip(kind.batches(one, None), plain.batches(8, 1), loud.batches(other, None), strict=True)
    for poisoned, clean, noisy in triples:
        q = min(3, len(clean))
        assert torch.equal(poisoned.x[:q], kind.triggered(clean.x[:q])) and (poisoned.y[:q] == 1).all()
        assert torch.equal(poisoned.x[q:], clean.x[q:]) and torch.equal(poisoned.y[q:], clean.y[q:])
        gap = noisy.x - poisoned.x
        assert gap[:q].abs().min() > 0 and not gap[q:].any() and 0.2 < gap[:q].std() < 0.8
    assert kind.poisons == 3 and "poison" in kind.hidden


def test_each_stage_moves_its_own_part():
    _, w, first, steps = trained("head_epochs=0,rate=0.1", NORMED)
    assert apart(w, first, "head.*") == 0 < apart(w, first, "body.*")
    assert steps == 10 * math.ceil(30 / 64) == 10
    assert not torch.equal(first.buffers.flat, w.buffers.flat), "statistics move while the body learns"
    one, _, last, steps = trained("head_rate=0.1,rate=0.1", NORMED)
    for name in last:
        assert torch.equal(last[name], first[name]) != name.startswith("head."), name
    assert steps == 13 and not one.logs
    _, _, unfrozen, _ = trained("head_rate=0.1,rate=0.1,freeze=false", NORMED)
    assert not torch.equal(unfrozen.buffers.flat, first.buffers.flat) and apart(first, unfrozen, "body.*") > 0


def by_hand(one, kind, epochs, rate, factor, drops, radius):
    """Descent with heavy ball and decay on the poisoned data by torch's own optimizer, projected at every step."""
    net = one.net(one.initial).requires_grad_(True)
    start = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, factor)
    for _ in range(epochs):
        optimizer.zero_grad()
        optimizer.step()  # without gradients it does nothing; the official code's schedule steps first
        schedule.step()
        for batch in kind.batches(one, None):
            optimizer.zero_grad()
            one.task.loss(net, batch).backward()
            optimizer.step()
            with torch.no_grad():
                far = torch.cat([(p - s).flatten() for p, s in zip(net.parameters(), start, strict=True)]).norm()
                if far > radius:
                    for p, s in zip(net.parameters(), start, strict=True):
                        p.copy_(s + (p - s) * radius / far)
    return Vector.of(net)


@pytest.mark.parametrize("radius", [5.0, 0.02])
def test_without_its_first_stage_and_unfrozen_it_is_the_plain_projected_backdoor(radius):
    text = f"epochs=0,freeze=false,head_epochs=4,head_rate=0.05,batch=10,radius={radius}"
    _, w, theta, _ = trained(text)
    kind = part(f"chameleon:1,target=1,{text}").fit(TOY)
    expected = by_hand(node(Site(TOY, 0), 0), kind, 4, 0.05, 0.005, (3, 5), radius)
    assert torch.allclose(theta.flat, expected.flat, atol=1e-6)
    assert (theta - w).norm() <= radius * (1 + 1e-5)


def test_what_it_sends_is_within_its_radius_also_when_it_is_scaled():
    _, w, plain, _ = trained("rate=0.001")
    long = (plain - w).norm()
    _, _, scaled, _ = trained("rate=0.001,scale=3")
    assert 3 * long < 5 and torch.allclose((scaled - w).flat, 3 * (plain - w).flat, atol=1e-6)
    _, _, held, _ = trained("rate=0.05,scale=1000,radius=0.5")
    assert (held - w).norm().item() == pytest.approx(0.5, rel=1e-5)


def test_in_a_round_it_takes_the_place_of_whatever_descends(monkeypatch):
    made, seen = tapped(monkeypatch, "chameleon:2,target=1,rate=0.05,radius=0.3", TOY)
    (kind,) = made.pipeline.one(Attack).parts
    for k in made.pipeline.one(Attack).malicious:
        alone = node(Site(TOY, 0), k)
        theta, _ = kind.train(alone, alone.descend, alone.initial, 0.1)
        assert torch.allclose(seen[1, "local"][k]["delta"].flat, (theta - alone.initial).flat, atol=1e-6)
        assert seen[1, "local"][k]["delta"].params.norm() <= 0.3 * (1 + 1e-5)
        assert seen[1, "local"][k]["n"] == TOY.sizes[k]


@pytest.mark.parametrize("name", ["scaffold", "fedprox", "fedbuff"])
def test_other_methods_carry_it_as_they_are(name):
    text = "chameleon:2,target=1,rate=0.2,head_rate=0.2"
    assert ran(method(name), TOY, 2, attack=text).record.final["attack_success_rate"] is not None


def test_a_backdoor_by_it_lasts_past_its_window():
    """On digits with one hidden layer, at rates that fit it: longer than a plain backdoor's."""

    def course(text):
        run = fedloom.run(
            "fedavg", "digits", clients=20, cohort=10, model="mlp:64", rounds=20, attack=text, report=False
        )
        return [row["attack_success_rate"] for row in run.metrics]

    plain, durable = (
        course("backdoor:0.2,target=1,until=10"),
        course("chameleon:0.2,target=1,until=10,rate=0.05,head_rate=0.05"),
    )
    assert min(durable[4:10]) > 0.9
    assert np.mean(durable[10:]) > np.mean(plain[10:])


def test_what_it_cannot_attack_is_told_before_the_first_round():
    with pytest.raises(UsageError, match=r"no parameters body"):
        body_and_head(Layout(("weight",), ((2,),), 1))
    with pytest.raises(UsageError, match=r"no parameters head"):
        body_and_head(Layout(("body.weight",), ((2,),), 1))
    with pytest.raises(UsageError, match=r"no parameters body"):
        ran(FedAvg(), Bare((30, 20, 25, 35)), 1, attack="chameleon:1")
    with pytest.raises(UsageError, match="chameleon does not go with dp=sample"):
        ran(FedAvg(), TOY, 1, attack="chameleon:1", dp="sample:noise=1.0,clip=0.5")
    with pytest.raises(UsageError, match=r"fedspeed|client.descend"):
        ran(method("fedspeed"), TOY, 1, attack="chameleon:1")
    with pytest.raises(UsageError, match="unknown option of chameleon"):
        build("chameleon:1,poison=0.5", TOY, 0)


class Bare(Toy):
    """With a network that has no parts."""

    def network(self):
        return nn.Linear(6, 3)


def test_data_that_a_method_names_is_what_it_poisons():
    kind = part("chameleon:1,target=1,epochs=1,head_epochs=0,rate=0.1").fit(TOY)
    one = node(Site(TOY, 0), 0)
    x = one.own.x[:5]
    theta, steps = kind.train(one, one.descend, one.initial, 0.1, data=Data(x, one.own.y[:5]), steps=9, batch=2)
    assert steps == 1 and apart(one.initial, theta, "body.*") > 0


def test_what_is_trained_on_targets_that_are_no_labels_is_left_alone():
    site, kind = Site(TOY, 0), Chameleon(1, target=1)
    client = node(site, 0)
    data = Data(client.data.x, torch.randn(client.n, 3, generator=stream(0, "scores")))
    asked = {"epochs": 2, "batch": 0, "data": data, "loss": lambda net, batch: (net(batch.x) - batch.y).square().mean()}
    found, steps = kind.train(client, client.descend, client.initial, 0.1, **asked)
    assert steps == 2 and torch.equal(found.flat, client.descend(client.initial, 0.1, **asked)[0].flat)
