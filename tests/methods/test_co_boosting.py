"""Co-Boosting: one upload, the ensemble's weights, the inputs that are made."""

import math
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from problems import network, node, ran
from torch.nn import functional as F

from fedloom.methods.distill.co_boosting import CoBoosting, divergence, ensemble, mixed
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.nets.generator import InputGenerator
from fedloom.random import seeded, stream
from fedloom.tasks.toy import Toy


def trained(rounds=8):
    made = ran(FedAvg(), Toy(), rounds=rounds)
    client = node(made.site, 0)
    return made, client.net(made.server.model), client.net(made.site.initial)


def test_a_client_is_asked_once_and_uploads_one_model():
    made = ran(CoBoosting(), Toy(), rounds=9)
    assert len(made.record.metrics) == 1 and made.record.metrics[0]["replies"] == 4
    lines = [li for li in made.record.ledger if li["direction"] == "up" and li["kind"] == "train"]
    assert {li["field"] for li in lines} == {"model", "n", "envelope"}


def test_without_a_step_the_ensemble_stays_uniform():
    still, moved = (ran(CoBoosting(mu=mu), Toy(), rounds=1).server.weights for mu in (0.0, 0.05))
    assert torch.equal(still, torch.full((4,), 0.25))
    assert not torch.equal(moved, still) and ((moved >= 0) & (moved <= 1)).all()


def test_the_ensemble_does_not_depend_on_the_scale_of_its_weights():
    scores = torch.randn(3, 5, 4, generator=stream(0, "test"))
    m = torch.tensor([0.2, 0.0, 0.7])
    torch.testing.assert_close(mixed(scores, m), mixed(scores, 0.1 * m))
    torch.testing.assert_close(mixed(scores, m)[1], (0.2 * scores[0, 1] + 0.7 * scores[2, 1]) / 0.9)


def test_a_client_that_answers_noise_loses_its_weight():
    made, good, noise = trained()
    x, y = made.task.global_test().all()
    weights = [torch.tensor([0.5, 0.5])]
    for _ in range(10):
        weights.append(CoBoosting().reweighted([good, noise], weights[-1], [(x, y)], step=0.05))
    falling = [float(one[1] / one.sum()) for one in weights]
    assert all(b <= a for a, b in pairwise(falling)) and falling[-1] < 0.2
    gone = CoBoosting().reweighted([noise], torch.tensor([0.01]), [(x, (y + 1) % 3)], step=1.0)
    assert gone.sum() > 0, "not all weights may vanish"


def test_inputs_are_made_that_the_ensemble_takes_for_their_label():
    made, good, _ = trained()
    method = CoBoosting(gen_steps=60, beta=0.0)
    x, y = method.synthesised(made.server, [good], torch.ones(1), good, made.server.rng("test"))
    assert x.shape == (32, 6) and not x.requires_grad
    assert (good(x).argmax(1) == y).double().mean() > 0.6, "a third by chance; Toy's points lie farther out"


def test_the_last_push_has_length_eps_and_follows_the_slope():
    made, good, _ = trained()
    x = made.task.global_test().x[:7]
    pushed = CoBoosting(eps=0.1).pushed([good], torch.ones(1), x, stream(3, "test"))
    torch.testing.assert_close((pushed - x).abs().max(), torch.tensor(0.1))
    u = 2 * torch.rand(7, 3, generator=stream(3, "test")) - 1
    answer = lambda x: (u * (ensemble([good], torch.ones(1), x) / 4).softmax(1)).sum()  # noqa: E731 - a formula
    assert answer(pushed) > answer(x)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_is_kl(temperature):
    a, b = torch.randn(2, 6, 3, generator=stream(0, "test")) * 3
    p, q = (a / temperature).softmax(1), (b / temperature).softmax(1)
    torch.testing.assert_close(divergence(a, b, temperature), (p * (p / q).log()).sum(1).mean())
    assert divergence(a, a, temperature).abs() < 1e-6


def test_the_student_comes_to_agree_with_the_ensemble():
    plain, taught = (
        ran(CoBoosting(warm=False, server_epochs=epochs, gen_lr=0.05, kd_lr=0.05), Toy(), rounds=1)
        for epochs in (0, 15)
    )
    models = [
        node(plain.site, k).net(plain.method.local(node(plain.site, k), plain.site.initial)["model"]) for k in range(4)
    ]
    x = torch.randn(500, 6, generator=stream(0, "test"))  # of the kind on which it was taught
    target = ensemble(models, torch.ones(4), x)
    apart = [float(divergence(target, node(plain.site, 0).net(one.server.model)(x), 1.0)) for one in (plain, taught)]
    assert torch.equal(plain.server.model.flat, plain.site.initial.flat)
    assert apart[1] < 0.5 * apart[0]


def sought(make, z, y, nets, m, student, hard, beta):
    """(x, what Adam goes down) by the paper's equations 6, 7 and 9, term by term."""
    x = make(z)
    answer = sum(share * net(x) for share, net in zip(m, nets, strict=True)) / m.sum()
    right = F.one_hot(y, answer.shape[1]).bool()
    p = answer.softmax(1)[right]
    p3, q3 = (answer / 3).softmax(1), (student(x) / 3).softmax(1)
    apart = 9 * (p3 * (p3 / q3).log()).sum(1)
    return x, ((1 - p.detach()) ** hard * -p.log() - beta * apart).mean()


@pytest.mark.parametrize(("hard", "beta"), [(1.0, 0.0), (2.0, 0.7)])
def test_synthesis_by_hand(hard, beta):
    made, good, noise = trained()
    student, m, method = noise, torch.tensor([0.2, 0.6]), CoBoosting(gen_steps=12, gen_lr=0.1, hard=hard, beta=beta)
    with seeded(5, "generators"):
        found = [method.synthesised(made.server, [good, noise], m, student, stream(1, "test")) for _ in range(2)]
    assert not torch.allclose(found[0][0], found[1][0], atol=0.1), "every batch has a generator of its own"
    with seeded(5, "generators"):
        make = made.server.net(made.server.network(InputGenerator, method.noise, (6,))).train().requires_grad_()
        for layer in (make.body[0], make.body[1], make.head[0]):
            layer.reset_parameters()
    draw = stream(1, "test")
    z = torch.randn(32, method.noise, generator=draw).requires_grad_()
    y = torch.randint(3, (32,), generator=draw)
    adam, seen = torch.optim.Adam([z, *make.parameters()], lr=0.1, betas=(0.5, 0.999)), []
    for _ in range(12):
        x, loss = sought(make, z, y, [good, noise], m, student, hard, beta)
        seen.append((loss.item(), x.detach()))
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert torch.equal(found[0][1], y)
    torch.testing.assert_close(found[0][0], min(seen, key=lambda one: one[0])[1], rtol=1e-3, atol=1e-3)


def test_the_best_inputs_are_kept_not_the_last():
    made, good, noise = trained()
    tried = []

    class Tiring(torch.nn.Module):
        """Surest the third time that it is asked."""

        def forward(self, x):
            tried.append(x)
            return good(x) * (1.0 if len(tried) == 3 else 0.01)

    method = CoBoosting(gen_steps=6, gen_lr=0.05, beta=0.0)
    best, _ = method.synthesised(made.server, [Tiring()], torch.ones(1), noise, stream(0, "test"))
    assert torch.equal(best, tried[2]) and not torch.equal(best, tried[5])


def test_the_ensembles_weights_take_signed_steps_down_the_loss():
    made, good, noise = trained()
    x, y = made.task.global_test().all()
    m = torch.tensor([0.5, 0.3])

    def loss(m):
        return F.cross_entropy((m[0] * good(x) + m[1] * noise(x)).double() / m.sum(), y)

    slopes = torch.stack([loss(m.double() + e) - loss(m.double() - e) for e in 1e-4 * torch.eye(2).double()])
    moved = CoBoosting().reweighted([good, noise], m, [(x, y)], step=0.02)
    torch.testing.assert_close(moved, m - 0.02 * slopes.sign().float())


class Given(CoBoosting):
    """Whose inputs, pushes and weights are given, and who notes what it was asked."""

    asked: ClassVar[list] = []  # emptied by the test

    def synthesised(self, server, nets, m, student, draw):
        return torch.randn(8, 6, generator=draw), torch.zeros(8).long()

    def reweighted(self, nets, m, pool, step):
        self.asked.append((step, len(pool)))
        return torch.tensor([0.1, 0.2, 0.3, 0.4])

    def pushed(self, nets, m, x, draw):
        return x + 0.5


def test_the_student_descends_to_the_ensemble_on_pushed_inputs():
    Given.asked.clear()
    method = Given(server_epochs=6, pool=3, mu=0.02, kd_lr=0.05)
    made = ran(method, Toy(), rounds=1)
    replies = [method.local(node(made.site, k), made.site.initial) for k in range(4)]
    assert [n for _, n in Given.asked] == [2, 3, 3, 3, 3]
    torch.testing.assert_close([step for step, _ in Given.asked], [0.02 * 0.99**epoch for epoch in range(1, 6)])
    nets = [network(made.task, up["model"]).eval() for up in replies]
    n = torch.tensor([30.0, 20.0, 25.0, 35.0]) / 110
    start = sum(share * up["model"].flat for share, up in zip(n, replies, strict=True))
    student = network(made.task, type(made.site.initial)(start, made.site.initial.layout))
    velocity = [torch.zeros_like(p) for p in student.parameters()]
    pool, draw = [], stream(0, "server", "train", 1, "synthesis", 0)
    for epoch in range(6):
        pool = [*pool, torch.randn(8, 6, generator=draw) + 0.5][-3:]
        m = torch.tensor([0.1, 0.2, 0.3, 0.4]) if epoch else torch.full((4,), 0.25)
        lr = 0.05 * (1 + math.cos(math.pi * epoch / 6)) / 2
        for x in pool:
            with torch.no_grad():
                p = (sum(share * net(x) for share, net in zip(m, nets, strict=True)) / 4).softmax(1)
            q = (student(x) / 4).softmax(1)
            slopes = torch.autograd.grad(16 * (p * (p / q).log()).sum(1).mean(), [*student.parameters()])
            bound = min(1.0, 10 / float(torch.stack([g.norm() for g in slopes]).norm()))
            with torch.no_grad():
                for w, v, g in zip(student.parameters(), velocity, slopes, strict=True):
                    v.copy_(0.9 * v + bound * g + 1e-4 * w)
                    w -= lr * v
    assert (made.server.model.flat - start).norm() > 0.05
    for name, w in student.named_parameters():
        torch.testing.assert_close(made.server.model[name], w.detach(), rtol=1e-3, atol=1e-4)


def test_a_warm_student_begins_at_the_mean_by_samples():
    made = ran(CoBoosting(server_epochs=0), Toy(), rounds=1)
    mean = sum(
        n / 110 * made.method.local(node(made.site, k), made.site.initial)["model"].flat
        for k, n in enumerate((30, 20, 25, 35))
    )
    torch.testing.assert_close(made.server.model.flat, mean)
