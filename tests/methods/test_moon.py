"""MOON: the contrast, term by term, and which models it contrasts."""

import copy
from functools import partial
from math import exp, log
from types import SimpleNamespace

import pytest
import torch
from problems import close, descended, network, node, ran
from torch import nn
from torch.nn import functional as F

from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.moon import Moon, contrastive
from fedloom.random import stream
from fedloom.task import Batch
from fedloom.tasks.toy import Toy


def cosine(a, b):
    dot = sum(p * q for p, q in zip(a, b, strict=True))
    return dot / (sum(p * p for p in a) ** 0.5 * sum(q * q for q in b) ** 0.5)


def bodies(count):
    """Linear bodies [6 -> 4] with a head, and a batch of 5 for them."""
    draw = stream(0, "moon")
    nets = []
    for _ in range(count):
        net = nn.Module()
        net.body, net.head = nn.Linear(6, 4, dtype=torch.float64), nn.Linear(4, 3, dtype=torch.float64)
        for p in net.parameters():
            p.data = torch.randn(p.shape, generator=draw, dtype=torch.float64)
        nets.append(net)
    x = torch.randn(5, 6, generator=draw, dtype=torch.float64)
    return nets, Batch(x, torch.tensor([0, 1, 2, 1, 0]))


def test_the_loss_is_the_papers_sample_by_sample():
    (net, glob, prev), batch = bodies(3)
    mu, tau, total = 1.7, 0.5, 0.0
    for x, y in zip(batch.x, batch.y, strict=True):
        z, z_glob, z_prev = (one.body(x).tolist() for one in (net, glob, prev))
        near, far = exp(cosine(z, z_glob) / tau), exp(cosine(z, z_prev) / tau)
        scores = net.head(net.body(x)).tolist()
        supervised = -log(exp(scores[y]) / sum(map(exp, scores)))
        total += supervised - mu * log(near / (near + far))
    criterion = lambda outputs, batch: F.cross_entropy(outputs, batch.y)  # noqa: E731 - the task's, in a line
    loss = contrastive(net, batch, criterion, glob.body, prev.body, mu, tau)
    assert loss.item() == pytest.approx(total / 5, abs=1e-12)


def test_the_gradient_is_that_of_the_loss():
    (net, glob, prev), batch = bodies(3)
    loss = partial(
        contrastive,
        criterion=lambda outputs, batch: outputs.sum() * 0,
        anchor=glob.body,
        last=prev.body,
        mu=1.0,
        temperature=0.5,
    )
    loss(net, batch).backward()
    weight, step = net.body.weight, 1e-6
    for place in ((0, 0), (1, 3), (3, 5)):
        with torch.no_grad():
            weight[place] += step
            above = loss(net, batch)
            weight[place] -= 2 * step
            below = loss(net, batch)
            weight[place] += step
        assert weight.grad[place].item() == pytest.approx(float(above - below) / (2 * step), abs=1e-7)
        assert abs(weight.grad[place]) > 1e-4


def test_the_contrast_pulls_to_the_global_and_away_from_the_last_features():
    (net, glob, prev), batch = bodies(3)
    pull = partial(contrastive, criterion=lambda outputs, batch: outputs.sum() * 0, mu=1.0, temperature=0.5)

    def advantage():
        z = net.body(batch.x)
        return (F.cosine_similarity(z, glob.body(batch.x)) - F.cosine_similarity(z, prev.body(batch.x))).mean()

    before = advantage()
    pull(net, batch, anchor=glob.body, last=prev.body).backward()
    for p in net.body.parameters():
        p.data -= 0.01 * p.grad
    assert advantage() > before


@pytest.mark.parametrize("norm", [False, True])
def test_it_contrasts_the_model_received_with_the_clients_last_one(norm):
    task, share = Toy(sizes=(20, 40), norm=norm), (1 / 3, 2 / 3)
    made = ran(Moon(lr=0.1, epochs=2, mu=2.0), task, rounds=3)
    w = network(task, made.site.initial).eval()
    last = [w, w]
    for round in (1, 2, 3):
        for k in (0, 1):
            bodies = {"anchor": w.body, "last": last[k].body}
            bent = SimpleNamespace(
                loss=partial(contrastive, criterion=task.criterion, mu=2.0, temperature=0.5, **bodies)
            )
            batches = list(node(made.site, k, round).batches(10, epochs=2))
            last[k] = descended(w, bent, batches, lr=0.1).eval()
        held = [net.state_dict() for net in last]
        w = copy.deepcopy(w)
        w.load_state_dict({name: share[0] * held[0][name] + share[1] * held[1][name] for name in held[0]})
    assert close(made.server.model, w.state_dict(), atol=1e-5)


def test_the_contrast_begins_in_the_second_round():
    # The first is that of FedAvg: test_identities.py.
    contrasted, plain = (ran(method, Toy(), rounds=2).server.model for method in (Moon(mu=5.0), FedAvg()))
    assert (contrasted - plain).norm() > 1e-3
