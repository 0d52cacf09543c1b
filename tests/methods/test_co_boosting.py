"""Co-Boosting: one upload, the ensemble's weights, the inputs that are made."""

from itertools import pairwise

import pytest
import torch
from problems import node, ran

from manyhands.methods.distill.co_boosting import CoBoosting, divergence, ensemble, mixed
from manyhands.methods.optimize.fedavg import FedAvg
from manyhands.random import stream
from manyhands.tasks.toy import Toy


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
