"""The reference networks: their sizes worked out by hand, their two halves, and what they refuse."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedloom.errors import UsageError
from fedloom.nets import NETS, build, describe
from fedloom.random import seeded, stream

MNIST, CIFAR, DIGITS, ADULT, TEXT = (1, 28, 28), (3, 32, 32), (1, 8, 8), (14,), (12,)
VOCABULARY = 30

EVERY = [
    ("linear", ADULT),
    ("linear", DIGITS),
    ("mlp", ADULT),
    ("mlp:12,7", CIFAR),
    ("dnn", MNIST),
    ("cnn", (1, 16, 16)),
    ("cnn", (3, 20, 33)),
    ("lenet", (1, 12, 12)),
    ("lenet", (3, 32, 40)),
    ("resnet8", (1, 5, 5)),
    ("resnet8:batch", (3, 8, 6)),
    ("resnet8:group", (1, 1, 1)),
    ("resnet18", (3, 9, 9)),
    ("resnet", (3, 8, 6)),
    ("resnet:2,group", (1, 1, 1)),
    ("lstm:16", TEXT),
    ("transformer", TEXT),
    ("transformer:16", TEXT),
    ("transformer:8,3", TEXT),
]
every = pytest.mark.parametrize(("name", "shape"), EVERY)


def vocabulary_of(name: str) -> int:
    return VOCABULARY if "text" in NETS[name.partition(":")[0]].needs else 0


def fresh(name: str, shape: tuple[int, ...], classes: int = 5, seed: int = 0) -> nn.Module:
    with seeded(seed, "model", "init"):
        return build(name, shape, classes, vocabulary_of(name))


def rows(name: str, shape: tuple[int, ...], count: int) -> torch.Tensor:
    """A batch without padding, the same on every call."""
    draw = stream(0, "test", "rows")
    if vocabulary_of(name):
        return torch.randint(1, VOCABULARY, (count, *shape), generator=draw)
    return torch.randn((count, *shape), generator=draw)


LSTM_LAYER_1 = 4 * 256 * (8 + 256) + 2 * 4 * 256
LSTM_LAYER_2 = 4 * 256 * (256 + 256) + 2 * 4 * 256
ATTENTION_LAYER = (4 * 64 * 64 + 4 * 64) + (2 * 4 * 64 * 64 + 4 * 64 + 64) + 2 * 2 * 64


@pytest.mark.parametrize(
    ("name", "shape", "classes", "vocabulary", "parameters"),
    [
        ("linear", MNIST, 10, 0, 784 * 10 + 10),
        ("mlp", ADULT, 2, 0, 15 * 64 + 65 * 2),
        ("mlp:64", (64,), 10, 0, 65 * 64 + 65 * 10),
        ("mlp:128,64", MNIST, 10, 0, 785 * 128 + 129 * 64 + 65 * 10),
        ("dnn", MNIST, 10, 0, 785 * 100 + 101 * 10),
        ("cnn", MNIST, 10, 0, 582_026),
        ("cnn", CIFAR, 10, 0, 878_538),
        ("lenet", MNIST, 10, 0, 61_706),
        ("lenet", CIFAR, 10, 0, 62_006),
        ("resnet8", CIFAR, 10, 0, 78_042),
        ("resnet8:group", CIFAR, 10, 0, 78_042),
        ("resnet18", CIFAR, 10, 0, 11_173_962),
        ("resnet:2", CIFAR, 10, 0, 78_042 + sum(2 * 9 * maps**2 + 4 * maps for maps in (16, 32, 64))),
        ("lstm", (80,), 80, 80, 80 * 8 + LSTM_LAYER_1 + LSTM_LAYER_2 + 257 * 80),
        ("transformer", (12,), 10, 30, 30 * 64 + 12 * 64 + 2 * ATTENTION_LAYER + 2 * 64 + 65 * 10),
    ],
)
def test_parameter_count(name, shape, classes, vocabulary, parameters):
    assert sum(p.numel() for p in build(name, shape, classes, vocabulary).parameters()) == parameters


@every
def test_is_a_body_and_a_linear_head(name, shape):
    net = fresh(name, shape).eval()
    assert [child for child, _ in net.named_children()] == ["body", "head"]
    assert isinstance(net.head, nn.Linear)
    x = rows(name, shape, 3)
    features = net.features(x)
    assert features.shape == (3, net.head.in_features)
    assert net(x).shape == (3, 5)
    assert torch.equal(net(x), net.head(features))


@every
def test_a_batch_of_one_trains_every_parameter(name, shape):
    net = fresh(name, shape).train()
    F.cross_entropy(net(rows(name, shape, 1)), torch.tensor([2])).backward()
    assert not [key for key, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    # A single row may leave a whole layer of ReLU dead, so that every parameter moves is asked of a batch.
    net.zero_grad()
    F.cross_entropy(net(rows(name, shape, 8)), torch.arange(8) % 5).backward()
    assert not [key for key, p in net.named_parameters() if not p.grad.any()]


@every
def test_rows_are_judged_alone(name, shape):
    net = fresh(name, shape).eval()
    x = rows(name, shape, 4)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]), atol=1e-5, rtol=1e-5)


@every
def test_initialisation_follows_the_seed(name, shape):
    one, same, other = fresh(name, shape), fresh(name, shape), fresh(name, shape, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)


@pytest.mark.parametrize("name", ["lstm:16", "transformer:16,2"])
def test_weights_can_be_exchanged_from_outside(name):
    """`nn.LSTM` keeps a second list of its weights; a functional call must not read the old ones."""
    net, other = fresh(name, TEXT), fresh(name, TEXT, seed=1)
    x = rows(name, TEXT, 3)
    assert torch.equal(torch.func.functional_call(net, dict(other.named_parameters()), (x,)), other(x))


def test_every_layer_starts_from_its_own_weights():
    first, second = fresh("transformer:16,2", TEXT).body.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


def test_cnn_is_the_network_of_pfllib():
    net = fresh("cnn", MNIST, classes=10)
    (w1, b1, w2, b2, w3, b3), x = net.body.parameters(), rows("cnn", MNIST, 4)
    hidden = F.max_pool2d(F.relu(F.conv2d(x, w1, b1)), 2)
    hidden = F.max_pool2d(F.relu(F.conv2d(hidden, w2, b2)), 2)
    by_hand = net.head(F.relu(F.linear(hidden.flatten(1), w3, b3)))
    ours = net(x)
    assert torch.equal(ours, by_hand)
    for gradient, expected in zip(
        torch.autograd.grad(ours.square().sum(), list(net.parameters())),
        torch.autograd.grad(by_hand.square().sum(), list(net.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(("shape", "border"), [((1, 28, 28), 2), ((3, 32, 40), 0), ((1, 30, 40), 2)])
def test_lenet_by_hand(shape, border):
    """Images below the 32 pixels that it was drawn for get a border of two, as MNIST's did."""
    net, x = fresh("lenet", shape, classes=10), rows("lenet", shape, 3)
    w1, b1, w2, b2, w3, b3, w4, b4 = net.body.parameters()
    hidden = F.max_pool2d(F.relu(F.conv2d(F.pad(x, [border] * 4), w1, b1)), 2)
    hidden = F.max_pool2d(F.relu(F.conv2d(hidden, w2, b2)), 2)
    hidden = F.relu(F.linear(F.relu(F.linear(hidden.flatten(1), w3, b3)), w4, b4))
    torch.testing.assert_close(net(x), F.linear(hidden, net.head.weight, net.head.bias))


@pytest.mark.parametrize(("name", "hidden"), [("linear", []), ("mlp", [64]), ("mlp:12,7", [12, 7]), ("dnn", [100])])
def test_a_perceptron_by_hand(name, hidden):
    net, x = fresh(name, DIGITS), rows(name, DIGITS, 3)
    *layers, head = zip(*[iter(net.parameters())] * 2, strict=True)
    values = x.flatten(1)
    for weight, bias in layers:
        values = (values @ weight.T + bias).clamp(min=0)
    torch.testing.assert_close(net(x), values @ head[0].T + head[1])
    assert [len(bias) for _, bias in layers] == hidden


@pytest.mark.parametrize(("asked", "widths"), [("", [32, 64, 512]), (":8", [8, 64, 512]), (":8,5", [8, 5, 512])])
def test_widths_that_are_left_out_are_the_networks_own(asked, widths):
    body = fresh(f"cnn{asked}", MNIST).body
    assert [len(layer.bias) for layer in (body.conv1, body.conv2, body.fc1)] == widths


def test_resnet_by_hand():
    """A block is relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)); a mean over all pixels comes before the head."""
    net, x = fresh("resnet8:group", CIFAR), rows("resnet8:group", CIFAR, 2)
    with torch.no_grad():  # norms that do something
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=stream(p.numel(), "test")))
    left = iter(net.body.parameters())

    def step(maps, stride=1):
        kernel = next(left)
        maps = F.conv2d(maps, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        return F.group_norm(maps, 2, next(left), next(left))

    maps = F.relu(step(x))
    for stage in range(3):
        stride = 2 if stage else 1
        residue = step(F.relu(step(maps, stride)))
        maps = F.relu(residue + (step(maps, stride) if stage else maps))
    assert maps.shape == (2, 64, 8, 8) and not list(left)
    torch.testing.assert_close(net(x), F.linear(maps.mean((2, 3)), net.head.weight, net.head.bias))


def test_a_residual_network_of_one_block_a_stage_is_resnet8_and_more_blocks_follow_the_first():
    one, eight = fresh("resnet:1,group", CIFAR), fresh("resnet8:group", CIFAR)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), eight.parameters(), strict=True))
    net, x = fresh("resnet:2", CIFAR).eval(), rows("resnet:2", CIFAR, 2)
    sides = []
    for name, child in net.body.named_children():
        x = child(x)
        sides += [x.shape[1:]] if name.startswith("stage") else []
    assert sides == [(16, 32, 32)] * 2 + [(32, 16, 16)] * 2 + [(64, 8, 8)] * 2


def test_the_norm_is_batch_norm_unless_group_norm_is_asked_for():
    batch, group = nn.BatchNorm2d, nn.GroupNorm
    for name, kind, other in (("", batch, group), (":batch", batch, group), (":group", group, batch)):
        kinds = {type(module) for module in build(f"resnet8{name}", CIFAR, 10).modules()}
        assert kind in kinds and other not in kinds


def test_the_lstm_by_hand():
    net, tokens = fresh("lstm:5", TEXT), rows("lstm", TEXT, 3)
    weights = dict(net.body.lstm.named_parameters())
    values = net.body.embedding.weight[tokens]
    for layer in range(2):
        w, u, a, b = (weights[f"{name}_l{layer}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        state, cell, states = torch.zeros(3, 5), torch.zeros(3, 5), []
        for x in values.unbind(1):
            i, f, g, o = (x @ w.T + a + state @ u.T + b).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            state = o.sigmoid() * cell.tanh()
            states.append(state)
        values = torch.stack(states, 1)
    torch.testing.assert_close(net.features(tokens), values[:, -1])
    gap = tokens.clone()
    gap[:, 3] = 0
    states = net.body.lstm(net.body.embedding(gap))[0]
    torch.testing.assert_close(net.features(gap), states[:, -1], msg="padding in between does not cut the end off")


def test_the_transformer_by_hand():
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)); a last norm, and the mean."""
    net, tokens = fresh("transformer:8,2", TEXT).train(), rows("transformer", TEXT, 3)
    body = net.body

    def attention(layer, x):
        q, k, v = (x @ layer.in_proj_weight.T + layer.in_proj_bias).view(3, 12, 3, 4, 2).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(2, 3) / 2**0.5).softmax(3) @ v  # four heads of two
        return layer.out_proj(mixed.transpose(1, 2).flatten(2))

    x = body.embedding.weight[tokens] + body.position.weight
    for layer in body.layers:
        x = x + attention(layer.self_attn, layer.norm1(x))
        x = x + layer.linear2(layer.linear1(layer.norm2(x)).relu())
    torch.testing.assert_close(net.features(tokens), body.norm(x).mean(1))


def test_group_norm_keeps_no_statistics():
    batch, group = build("resnet8", CIFAR, 10), build("resnet8:group", CIFAR, 10)
    # The stem, two norms a block, and the shortcuts of the two blocks that change shape; a mean and a variance each.
    assert sum(b.is_floating_point() for b in batch.buffers()) == 2 * (1 + 3 * 2 + 2)
    assert not list(group.buffers())
    assert {m.num_groups for m in group.modules() if isinstance(m, nn.GroupNorm)} == {2}


def test_a_residual_block_halves_and_adds():
    block = build("resnet8", CIFAR, 10).eval().body.stage2_block1
    x = torch.randn((2, 16, 9, 8), generator=stream(0, "test", "maps"))
    nn.init.zeros_(block.norm2.weight)  # silences the two convolutions
    torch.testing.assert_close(block(x), F.relu(block.shortcut(x)))
    assert block(x).shape == (2, 32, 5, 4)
    after = build("resnet18", CIFAR, 10).body.stage2_block2
    assert after(torch.zeros(2, 128, 5, 4)).shape == (2, 128, 5, 4) and not list(after.shortcut.parameters())


@pytest.mark.parametrize("name", ["lstm:16", "transformer:16,2"])
@pytest.mark.parametrize("training", [True, False])
def test_padding_says_nothing(name, training):
    net = fresh(name, TEXT).train(training)
    assert not net.body.embedding.weight[0].any()
    short = rows(name, (7,), 3)
    torch.testing.assert_close(net(F.pad(short, (0, 5))), net(short))
    with torch.no_grad():
        torch.testing.assert_close(net(F.pad(short, (0, 5))), net(short))


@pytest.mark.parametrize("name", ["lstm:16", "transformer:16,2"])
@pytest.mark.parametrize("training", [True, False])
def test_a_row_of_padding_alone_is_finite(name, training):
    net = fresh(name, TEXT).train(training)
    x = rows(name, TEXT, 3)
    x[1] = 0
    net(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    with torch.no_grad():
        assert net(x).isfinite().all()


def test_the_order_of_tokens_counts():
    x = rows("lstm", TEXT, 2)
    for name in ("lstm:16", "transformer:16,2"):
        net = fresh(name, TEXT)
        assert not torch.allclose(net(x), net(x.flip(1)), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "vocabulary", "says"),
    [
        ("cnnn", MNIST, 10, 0, r"unknown model 'cnnn'; did you mean 'cnn'\?"),
        ("", MNIST, 10, 0, r"unknown model ''.*linear"),
        ("cnn", DIGITS, 10, 0, "'cnn' needs images of at least 16x16 pixels, got 8x8; take mlp:64 or resnet8"),
        ("cnn", (1, 15, 40), 10, 0, "at least 16x16 pixels, got 15x40"),
        ("lenet", DIGITS, 10, 0, "'lenet' needs images of at least 12x12 pixels, got 8x8"),
        ("resnet18", DIGITS, 10, 0, "at least 9x9 pixels, got 8x8; take resnet18:group or mlp:64"),
        ("resnet8", (1, 4, 4), 10, 0, "at least 5x5 pixels, got 4x4"),
        ("cnn", ADULT, 2, 0, r"'cnn' reads images, got numbers of shape \(14,\); take linear or mlp or dnn"),
        (
            "mlp:64",
            TEXT,
            5,
            30,
            r"'mlp:64' reads images or numbers, got text of shape \(12,\); take lstm or transformer",
        ),
        ("linear", TEXT, 5, 30, "take lstm or transformer"),
        ("resnet8", TEXT, 5, 30, "take lstm or transformer"),
        ("lstm", MNIST, 10, 0, r"'lstm' reads text or windows, got images of shape \(1, 28, 28\); take cnn or lenet"),
        ("transformer", ADULT, 2, 0, "reads text or windows, got numbers"),
        ("linear:3", ADULT, 2, 0, "'linear:3' has options that do not fit; expected linear$"),
        ("cnn:", MNIST, 2, 0, "'cnn:' has options that do not fit; expected cnn:WIDTH"),
        ("cnn:8,8,8,8", MNIST, 2, 0, "'8,8,8,8' do not fit; expected cnn:MAPS,MAPS,HIDDEN"),
        ("mlp:", ADULT, 2, 0, "expected mlp:WIDTH"),
        ("mlp:64,", ADULT, 2, 0, "'64,' do not fit; expected mlp:WIDTH,... with positive whole numbers"),
        ("mlp:0", ADULT, 2, 0, "'0' do not fit"),
        ("mlp:-3", ADULT, 2, 0, "'-3' do not fit"),
        ("mlp:wide", ADULT, 2, 0, "'wide' do not fit"),
        ("lstm:8,8", TEXT, 5, 30, "'8,8' do not fit; expected lstm:HIDDEN"),
        ("transformer:8,2,2", TEXT, 5, 30, "expected transformer:WIDTH,LAYERS"),
        ("transformer:10", TEXT, 5, 30, "do not divide its width 10; take a multiple of 4"),
        ("resnet8:layer", CIFAR, 10, 0, "no norm 'layer'; take resnet8:batch or resnet8:group"),
        ("resnet:2,layer", CIFAR, 10, 0, "'resnet:2' has no norm 'layer'; take resnet:2,batch or resnet:2,group"),
        ("resnet:0", CIFAR, 10, 0, "expected resnet:BLOCKS,NORM with positive whole numbers"),
        ("linear", ADULT, 0, 0, "at least one class, got 0"),
    ],
)
def test_refuses(name, shape, classes, vocabulary, says):
    with pytest.raises(UsageError, match=says) as refusal:
        build(name, shape, classes, vocabulary)
    assert "\n" not in str(refusal.value)


def test_describe_lists_every_network_without_loading_torch():
    assert [syntax.partition(":")[0] for syntax, _, _ in describe()] == list(NETS)
    listing = "import sys, fedloom.nets as nets; nets.describe(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", listing], check=False).returncode == 0
