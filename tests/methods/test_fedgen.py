"""FedGen: what reduces to FedAvg, the generator's loss, and what travels."""

from typing import ClassVar

import pytest
import torch
from problems import node, ran
from torch import nn
from torch.nn import functional as F

from fedloom.methods.distill import fedgen
from fedloom.methods.distill.fedgen import FedGen, taught
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.nets.generator import FeatureGenerator, InputGenerator
from fedloom.random import stream
from fedloom.tasks.toy import Toy

SMALL = {"hidden": 16, "noise": 4, "gen_steps": 20}


def sizes(made, round, direction):
    lines = [li for li in made.record.ledger if li["round"] == round and li["direction"] == direction]
    return {li["field"]: li["bytes"] for li in lines if li["kind"] == "train"}


def test_without_weights_and_in_the_first_round_it_is_fedavg_bitwise():
    off, plain = ran(FedGen(alpha=0.0, beta=0.0, **SMALL), Toy(), rounds=3), ran(FedAvg(), Toy(), rounds=3)
    assert torch.equal(off.server.model.flat, plain.server.model.flat)
    first, one = ran(FedGen(**SMALL), Toy(), rounds=1), ran(FedAvg(), Toy(), rounds=1)
    assert torch.equal(first.server.model.flat, one.server.model.flat)
    assert not torch.equal(ran(FedGen(**SMALL), Toy(), rounds=3).server.model.flat, plain.server.model.flat)


def test_the_generator_goes_down_from_the_second_round_and_counts_go_up():
    made = ran(FedGen(**SMALL), Toy(), rounds=2)
    assert sizes(made, 1, "down")["generator"] < 12
    numbers = (4 + 3) * 16 + 16 + 2 * 16 + 2 * 16 + 16 * 8 + 8
    assert len(made.server.generator) == numbers
    assert 4 * numbers < sizes(made, 2, "down")["generator"] < 4 * numbers + 400
    assert sizes(made, 2, "up")["counts"] < 3 * 8 + 30


def test_a_generator_that_is_taught_makes_features_that_the_heads_take_for_their_labels():
    made = ran(FedAvg(), Toy(), rounds=12)
    method = FedGen(**SMALL | {"gen_steps": 300, "gen_lr": 1e-2})
    server = made.server
    server.declaring = True  # as in setup
    server.generator, server.moments, server.labels = method.networks(server.site)["generator"], {}, [0, 1, 2]
    head = server.model.select("head.*")

    def right():
        batch = method.drawn([0, 1, 2], server.generator, server.rng("test"))
        z = server.net(server.generator)(batch.x, batch.y)
        return float(((z @ head["head.weight"].T + head["head.bias"]).argmax(1) == batch.y).double().mean())

    before = right()
    method.teach(server, [head], torch.ones(1, 3))
    assert right() > 0.95 and right() > before


def test_a_head_without_a_label_has_no_say_on_it():
    made = ran(FedAvg(), Toy(), rounds=3)
    method, generators = FedGen(**SMALL), []
    head = made.server.model.select("head.*")
    for other in (head, head * -3.0):  # the second client holds class 2 only, of which nothing is drawn
        made.server.begin("train", 1)
        made.server.declaring = True  # as in setup
        made.server.generator, made.server.moments, made.server.labels = (
            method.networks(made.site)["generator"],
            {},
            [0, 1],
        )
        method.teach(made.server, [head, other], torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        generators.append(made.server.generator)
    assert torch.equal(generators[0].flat, generators[1].flat)


def test_the_clients_loss_by_hand():
    made = ran(FedAvg(), Toy(), rounds=1)
    client = node(made.site, 0)
    net, batch = client.net(made.server.model), next(client.batches(10))
    features = torch.rand(6, 8), torch.rand(10, 8)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    value = taught(net, batch, made.task, features, y, a=2.0, b=0.5)
    p, q = net.head(features[1]).softmax(1), net(batch.x).softmax(1)
    kl = (p * (p.log() - q.log())).sum() / 10
    by_hand = F.cross_entropy(net(batch.x), batch.y) + 0.6 * 2.0 * F.cross_entropy(net.head(features[0]), y) + 0.5 * kl
    torch.testing.assert_close(value, by_hand)


def test_generators_have_the_shapes_of_what_they_make():
    assert FeatureGenerator(5, 3, 8, 7)(torch.rand(4, 3), torch.tensor([0, 1, 4, 4])).shape == (4, 7)
    for shape in ((3, 32, 32), (1, 28, 28), (1, 9, 13), (1, 4, 4), (30,)):
        made = InputGenerator(10, shape, channels=8)(torch.randn(64, 10)).detach()
        assert made.shape == (64, *shape)
        assert abs(float(made.mean())) < 0.1 and 0.8 < float(made.std()) < 1.2


def test_features_come_from_noise_and_label_through_one_normalised_hidden_layer():
    make, noise, labels = FeatureGenerator(3, 2, 8, 5), torch.rand(6, 2), torch.tensor([0, 2, 1, 1, 0, 2])
    entry, norm, head = make.body[0], make.body[1], make.head
    hidden = torch.cat([noise, torch.eye(3)[labels]], 1) @ entry.weight.T + entry.bias
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + norm.eps).sqrt()
    torch.testing.assert_close(make(noise, labels), hidden.relu() @ head.weight.T + head.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 12, 10), (2, 8, 8), (5,)])
def test_generated_inputs_have_mean_zero_and_deviation_one_and_no_scale_is_learned(shape):
    make = InputGenerator(10, shape, channels=8)
    made = make(torch.randn(32, 10, generator=stream(0, "test"))).detach()
    axes = (0, 2, 3) if len(shape) == 3 else (0,)
    torch.testing.assert_close(made.mean(axes), torch.zeros(shape[0]), rtol=0, atol=1e-4)
    torch.testing.assert_close(made.std(axes, correction=0), torch.ones(shape[0]), rtol=0, atol=0.02)
    assert not list(make.norm.parameters())


def test_images_are_upsampled_twice_and_halve_their_maps_as_in_data_free_distillation():
    """DAFL's generator: norm, then twice (up, convolution, norm, leaky ReLU of 0.2), then a convolution to colours."""
    make, noise = InputGenerator(10, (3, 9, 13), channels=8), torch.randn(16, 10, generator=stream(0, "test"))
    left = iter([m for m in make.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)])

    def norm(maps):
        return F.batch_norm(maps, None, None, training=True)

    entry = next(left)
    maps = norm(F.linear(noise, entry.weight, entry.bias).view(16, 8, 3, 4))  # a quarter of each side, rounded up
    for wide in (8, 4):
        layer = next(left)
        maps = F.conv2d(maps.repeat_interleave(2, 2).repeat_interleave(2, 3), layer.weight, layer.bias, padding=1)
        assert maps.shape[1] == wide
        maps = F.leaky_relu(norm(maps), 0.2)
    last = next(left)
    maps = F.conv2d(maps, last.weight, last.bias, padding=1)[..., :9, :13]
    torch.testing.assert_close(make(noise), norm(maps), rtol=1e-3, atol=1e-4)
    assert not list(left)
    assert any(isinstance(m, torch.nn.Conv2d) for m in InputGenerator(10, (1, 8, 8)).modules()), "8 pixels are enough"
    assert not any(isinstance(m, torch.nn.Conv2d) for m in InputGenerator(10, (1, 8, 7)).modules())


class Noted(FedGen):
    """Whose teaching is noted and not done."""

    noted: ClassVar[list] = []  # emptied by the test

    def teach(self, server, heads, omega):
        self.noted.append((server.labels, heads, omega))


def test_every_clients_own_head_teaches_with_its_share_of_each_label():
    Noted.noted.clear()
    task = Toy(sizes=(30, 20))
    made = ran(Noted(**SMALL), task, rounds=1)
    ((labels, heads, omega),) = Noted.noted
    assert labels == [0, 1, 2]
    counts = torch.stack([task.data(k, "train").y.bincount(minlength=3) for k in range(2)]).double()
    torch.testing.assert_close(omega.double(), counts / counts.sum(0))
    assert (omega[0, 0], omega[1, 1]) == (0, 0), "client k lacks class k"
    for k, head in enumerate(heads):
        reply = made.method.local(node(made.site, k), made.site.initial, None, [], 0)
        trained = made.site.initial + reply["delta"]
        for name in ("head.weight", "head.bias"):
            torch.testing.assert_close(head[name], trained[name])
            assert not torch.allclose(head[name], made.site.initial[name], atol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 3.0])
def test_teaching_by_hand_over_two_rounds(eta):
    method = FedGen(**SMALL | {"gen_steps": 6, "gen_lr": 2e-2, "decay": 0.5, "eta": eta, "gen_batch": 9})
    made = ran(FedAvg(), Toy(), rounds=2)
    server, draw = made.server, stream(0, "heads")
    heads = []
    for _ in range(2):
        head = server.model.select("head.*").clone()
        for name in head:
            head[name].add_(0.5 * torch.randn(head[name].shape, generator=draw))
        heads.append(head)
    omega = torch.tensor([[0.2, 1.0, 0.5], [0.8, 0.0, 0.5]])
    server.declaring = True  # as in setup
    server.generator, server.moments, server.labels = method.networks(server.site)["generator"], {}, [0, 2]
    layer = server.net(server.generator).train().requires_grad_()
    adam = torch.optim.Adam(layer.parameters(), weight_decay=1e-2)
    for round in (1, 2):
        server.begin("train", round)
        adam.param_groups[0]["lr"] = 2e-2 * 0.5 ** (round - 1)
        draw = stream(0, "server", "train", round, "generator", 0)
        for _ in range(6):
            y = torch.tensor([0, 2])[torch.randint(2, (9,), generator=draw)]
            noise = torch.rand(9, 4, generator=draw)
            z, loss = layer(noise, y), 0.0
            for head, shares in zip(heads, omega, strict=True):
                p = (z @ head["head.weight"].T + head["head.bias"]).log_softmax(1)
                loss = loss - sum(shares[c] * p[i, c] for i, c in enumerate(y.tolist())) / 9
            pairs = [
                (z[i] - z[j]).abs().mean() * (noise[i] - noise[j]).square().mean() for i in range(9) for j in range(9)
            ]
            loss = loss + eta * torch.exp(-torch.stack(pairs).mean())
            adam.zero_grad()
            loss.backward()
            adam.step()
        method.teach(server, heads, omega)
    for name, value in layer.named_parameters():
        if name != "body.0.bias":  # BatchNorm takes it away: its gradient is rounding, which Adam makes a step of
            torch.testing.assert_close(server.generator[name], value.detach(), rtol=1e-2, atol=2e-3)


def test_weights_decay_from_the_second_round_on(monkeypatch):
    seen, plain = [], fedgen.taught

    def noted(net, batch, task, features, y, a, b):
        seen.append((a, b))
        return plain(net, batch, task, features, y, a, b)

    monkeypatch.setattr(fedgen, "taught", noted)
    ran(FedGen(alpha=4.0, beta=2.0, decay=0.9, **SMALL), Toy(sizes=(20, 20)), rounds=3)
    assert [pytest.approx(pair) for pair in sorted(set(seen), reverse=True)] == [(3.6, 1.8), (3.24, 1.62)]


def test_generated_features_are_of_the_labels_drawn_and_the_latent_term_of_the_batchs(monkeypatch):
    made, seen = ran(FedAvg(), Toy(), rounds=1), []
    method, client = FedGen(**SMALL), node(made.site, 0)
    make = client.net(method.networks(made.site)["generator"])
    with torch.no_grad():
        make.body[0].weight[:, :4] = 0  # features of the label alone
    made_of = lambda y: make(torch.zeros(len(y), 4), y)  # noqa: E731 - a formula

    def noted(net, batch, task, features, y, a, b):
        seen.append((batch.y, y, *features))
        return task.criterion(net(batch.x), batch)

    monkeypatch.setattr(fedgen, "taught", noted)
    generator = type(method.networks(made.site)["generator"]).of(make, method.networks(made.site)["generator"].layout)
    method.local(client, made.site.initial, generator, [0, 2], 1)
    assert len(seen) == 3
    for of_batch, drawn, one, other in seen:
        torch.testing.assert_close(one, made_of(drawn))
        torch.testing.assert_close(other, made_of(of_batch))
        assert set(drawn.tolist()) == {0, 2} and len(set(of_batch.tolist())) == 2


def test_the_latent_target_stands_still():
    layer = nn.Module()
    layer.head = nn.Linear(4, 3)
    layer.forward = lambda x: layer.head(x).detach()
    features, x = torch.randn(5, 4), torch.randn(5, 4)
    batch = fedgen.Batch(x, torch.zeros(5).long())
    value = taught(layer, batch, Toy(), (features, features), batch.y, a=0.0, b=1.0)
    assert not value.requires_grad
