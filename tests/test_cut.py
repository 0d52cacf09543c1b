"""Inside a network: where it can be cut, its states there, what runs on from them, and gradients across a cut."""

from dataclasses import dataclass

import pytest
import torch
from problems import node, ran
from torch import nn
from torch.nn import functional as F

from fedloom.boundary.privacy.base import Unprotected
from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.nets import build, cut
from fedloom.nets.net import Net
from fedloom.random import seeded, stream
from fedloom.site import Site
from fedloom.task import Batch
from fedloom.tasks.toy import Toy, toy_for
from fedloom.vector import Vector

WORDS = 30
TEXT = (7,)
EVERY = {
    ("linear", (14,)): "body.0 body",
    ("mlp:12,7", (1, 4, 4)): "body.0 body.fc1 body.relu1 body.fc2 body.relu2 body",
    ("cnn:4,6,9", (1, 16, 16)): "body.conv1 body.pool1 body.relu1 body.conv2 body.pool2 body.relu2 body.flatten"
    " body.fc1 body.relu3 body",
    ("resnet8", (3, 8, 8)): "body.conv body.norm body.relu body.stage1_block1 body.stage2_block1 body.stage3_block1"
    " body.pool body.flatten body",
    ("transformer:8,2", TEXT): "body.embedding body.layers.0 body.layers.1 body.layers body.norm body",
    ("lstm:6", TEXT): "body",
}
every = pytest.mark.parametrize(("name", "shape"), EVERY)


def fresh(name, shape):
    words = WORDS if shape == TEXT else 0
    with seeded(0, "test", "init"):
        net = build(name, shape, 5, words).eval()
    if not words:
        return net, torch.randn(6, *shape, generator=stream(0, "test", "x"))
    x = torch.randint(1, words, (6, *shape), generator=stream(0, "test", "x"))
    x[0, 3:], x[1], x[2, :3], x[3, 2:4] = 0, 0, 0, 0  # padding behind, alone, before and between
    return net, x


@every
def test_the_cuts_of_a_network_are_named_from_the_inputs_on(name, shape):
    net, _ = fresh(name, shape)
    assert list(cut.cuts(net)) == EVERY[name, shape].split()


@every
def test_what_runs_on_from_states_ends_where_the_network_does(name, shape):
    net, x = fresh(name, shape)
    found = cut.cuts(net)
    for at in found:
        h = cut.states(net, x, at)
        assert torch.equal(cut.resume(net, h, at), net(x))
        for until in found:
            if found[until] > found[at]:
                assert torch.equal(cut.resume(net, h, at, until), cut.states(net, x, until))
    assert torch.equal(cut.states(net, x, "body"), net.body(x))


def test_states_are_what_the_parts_before_the_cut_make_of_inputs():
    net, x = fresh("cnn:4,6,9", (1, 16, 16))
    first = F.relu(F.max_pool2d(F.conv2d(x, net.body.conv1.weight, net.body.conv1.bias), 2))
    assert torch.allclose(cut.states(net, x, "body.relu1"), first)
    assert torch.allclose(
        cut.states(net, x, "body.conv2"), F.conv2d(first, net.body.conv2.weight, net.body.conv2.bias), atol=1e-6
    )
    net, x = fresh("mlp:12,7", (1, 4, 4))
    assert torch.allclose(
        cut.states(net, x, "body.fc1"), F.linear(x.flatten(1), net.body.fc1.weight, net.body.fc1.bias)
    )


@pytest.mark.parametrize("at", ["body.embedding", "body.layers.0", "body.layers"])
def test_states_of_a_text_are_zero_exactly_where_there_is_padding(at):
    net, x = fresh("transformer:8,2", TEXT)
    h = cut.states(net, x, at)
    assert torch.equal((h != 0).any(2), x != 0)
    alone = torch.cat([net(row[None]) for row in x])  # what a text is does not hang on the others of its batch
    assert torch.allclose(cut.resume(net, h, at), alone, atol=1e-6)


def test_a_cut_that_does_not_exist_is_answered_by_those_that_do():
    net, x = fresh("cnn:4,6,9", (1, 16, 16))
    with pytest.raises(UsageError, match=r"Net cannot be cut at 'body.conv3'; did you mean 'body.conv\d'\?; its cuts"):
        cut.states(net, x, "body.conv3")
    for at in ("head", ""):  # behind the last part there is nothing to resume
        with pytest.raises(UsageError, match=r"inputs on, are body.conv1, body.pool1, .*, body.relu3, body$"):
            cut.resume(net, x, at)
    for until in ("body.conv1", "body.conv2"):
        with pytest.raises(UsageError, match=f"'body.conv2' does not stand before '{until}'"):
            cut.resume(net, x, "body.conv2", until)


class Aside(Net):
    """It runs otherwise than the class whose parts it has."""

    def forward(self, x):
        return self.head(self.body(x)) + 1


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


class Described(Aside):
    def parts(self):
        return {"body": self.body, "head": self.head, "shift": lambda scores: scores + 1}


def test_only_what_a_network_says_of_its_own_forward_pass_counts():
    body, head, x = Doubled(nn.Linear(4, 3), nn.ReLU()), nn.Linear(3, 2), torch.ones(5, 4)
    assert list(cut.cuts(Net(body, head))) == ["body"]
    assert torch.equal(cut.resume(Net(body, head), cut.states(Net(body, head), x, "body"), "body"), head(body(x)))
    with pytest.raises(UsageError, match="Aside cannot be cut at 'body'; it does not say that it runs parts in a row"):
        cut.states(Aside(body, head), x, "body")
    told = Described(body, head)
    assert list(cut.cuts(told)) == ["body", "head"]
    assert torch.equal(cut.resume(told, cut.states(told, x, "head"), "head"), told(x))


def test_graphs_are_cut_before_the_head_alone():
    site = Site(toy_for(("graph",)), seed=0)
    server = node(site, 0)
    assert server.cuts == ("body",) and server.states_shape("body") == (site.bench.net.head.in_features,)
    x = site.task.data(0, "train").x
    h = server.states(server.initial, x, "body")
    assert torch.equal(server.resume(server.initial, h, "body"), server.scores(server.initial, x))


def test_a_node_gives_states_of_any_vector_and_gradients_through_them():
    here = node(Site(Toy(), seed=0), 1)
    x, y = here.data.all()
    assert here.cuts == ("body.0", "body.1", "body") and here.states_shape("body.0") == (8,)
    w, x = Vector((here.initial * 2).flat.requires_grad_(), here.initial.layout), x.clone().requires_grad_()
    h = here.states(w, x, "body.0")
    assert torch.allclose(h, F.linear(x, w["body.0.weight"], w["body.0.bias"]))
    by_w, by_x = torch.autograd.grad(F.cross_entropy(here.resume(w, h, "body.0"), y), [w.flat, x])
    whole = here.grad(Vector(w.flat.detach(), w.layout), Batch(x.detach(), y))
    assert torch.allclose(by_w, whole.flat, atol=1e-6)
    assert torch.allclose(by_x, here.input_grad(w, x, lambda net, x: F.cross_entropy(net(x), y)), atol=1e-6)
    assert here.steps == 2, "forward passes are on no meter, gradients are"


@pytest.mark.parametrize("buffers", ["average", "local"])
def test_training_mode_normalizes_by_the_batch_and_moves_nothing(buffers):
    here = node(Site(Toy(norm=True), seed=0, buffers=buffers), 1)
    batch = here.data.all()
    w = here.initial.clone()
    w.flat += 0.1
    before = w.flat.clone()
    if buffers == "local":
        here.grad(w, batch)
        assert torch.equal(w.flat, before)
    linear = F.linear(batch.x, w["body.0.weight"], w["body.0.bias"])
    scale, shift = w["body.1.weight"], w["body.1.bias"]
    held = here.net(w).body[1]
    mean, var = held.running_mean, held.running_var
    by_batch = F.batch_norm(linear, None, None, scale, shift, training=True)
    by_running = F.batch_norm(linear, mean.clone(), var.clone(), scale, shift)
    assert not torch.allclose(by_batch, by_running, atol=1e-2)
    for train, right in ((True, by_batch), (False, by_running)):
        assert torch.allclose(here.states(w, batch.x, "body.1", train), right, atol=1e-5)
        assert torch.allclose(here.resume(w, linear, "body.0", "body.1", train), right, atol=1e-5)
    assert torch.equal(w.flat, before)
    assert torch.equal(here.net(w).body[1].running_mean, mean)


def test_the_loss_above_a_cut_has_no_gradient_below_it():
    here = node(Site(Toy(), seed=0), 1)
    w, (x, y) = here.initial, here.data.all()
    for at, below in (("body.0", ("body.0.*",)), ("body", ("body.*",))):
        h = here.states(w, x, at)
        found, whole = here.grad(w, Batch(h, y), here.task.loss_above(at)), here.grad(w, Batch(x, y))
        assert not found.select(*below).flat.any()
        assert torch.allclose(found.flat, whole.merge(whole.select(*below).zeros_like()).flat, atol=1e-7)
    head = here.grad(w, Batch(here.features(w, x), y), here.task.head_loss)
    assert torch.equal(head.flat, found.flat)
    assert here.task.loss_above("body") == here.task.loss_above("body") != here.task.loss_above("body.0")


def pulled(net, batch):
    """What has (dz / dw)' G as its gradient, for G in place of the labels."""
    return (cut.states(net, batch.x, "body.conv") * batch.y).sum()


def frozen_middle(net):
    """The task's network whose middle is frozen."""
    for name, param in net.named_parameters():
        param.requires_grad_(not name.startswith(("body.stage1", "body.stage2")))
    return net


class Images(Toy):
    """The toy's labels, with images for inputs."""

    def __init__(self):
        super().__init__((9, 9))
        self.x = torch.randn(len(self.y), 3, 8, 8, generator=stream(0, "test", "images"))

    def network(self):
        return build("resnet8:group", (3, 8, 8), 3)


def test_three_parties_with_a_part_each_take_the_gradient_of_the_whole():
    """As in U-shaped split learning: the middle is frozen, and gradients reach the front through it."""
    here = node(Site(Images(), seed=0), 0)
    w = here.derive(frozen_middle)
    x, y = here.data.all()
    front, back = "body.conv", "body.stage2_block1"
    z = here.states(w, x, front)  # up
    h = here.resume(w, z, front, back)  # down
    above = here.task.loss_above(back)
    by_back = here.grad(w, Batch(h, y), above)
    by_h = here.input_grad(w, h, lambda net, h: above(net, Batch(h, y)))  # up
    by_z = here.input_grad(w, z, lambda net, z: (cut.resume(net, z, front, back) * by_h).sum())  # down
    by_front = here.grad(w, Batch(x, by_z), pulled)
    whole = here.grad(w, Batch(x, y))
    assert not any(name.startswith("body.stage2") for name in w.layout.names)
    assert by_front["body.conv.weight"].abs().max() > 1e-4
    assert torch.allclose((by_front + by_back)["body.conv.weight"], whole["body.conv.weight"], atol=1e-6)
    for name in w.select("body.stage3*", "head.*"):
        assert torch.allclose(by_back[name], whole[name], atol=1e-6)


@dataclass(frozen=True)
class Peeking(Method):
    """Trains on states of its data."""

    batch: int = 8
    private = ("delta",)

    def round(self, server, cohort):
        server.model = server.model + cohort.mean(self.local, model=server.model).delta

    @client
    def local(self, client, model):
        for batch in client.batches(self.batch):
            h = client.states(model, batch.x, "body.0")
            model = model - 0.1 * client.grad(model, Batch(h, batch.y), client.task.loss_above("body.0"))
        return {"delta": model * 0}


def test_privacy_of_samples_refuses_states_of_private_data():
    pytest.importorskip("opacus")
    with pytest.raises(Unprotected, match=r"batch\.x"):
        ran(Peeking(), Toy(), rounds=1, dp="sample:noise=1.0,clip=0.5")
