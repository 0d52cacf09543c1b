"""Model extraction: parts, their mean, and the policies that cut them."""

import math

import pytest
import torch
from problems import network, node, ran
from torch import nn

from fedloom import nets
from fedloom.channels import channels
from fedloom.errors import UsageError
from fedloom.methods.heterogeneous.model_extraction import ModelExtraction
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.random import stream
from fedloom.task import Data
from fedloom.tasks.toy import Toy
from fedloom.vector import Vector

EQUAL = Toy(sizes=(20, 20, 20, 20))


POLICIES = ["static", "ordered", "rolling", "random", "magnitude"]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_whole_models_are_fedavg(policy, norm):
    task = Toy(sizes=(20, 20, 20, 20), norm=norm)
    made, plain = (ran(m, task, rounds=3) for m in (ModelExtraction(levels=(1.0,), policy=policy), FedAvg()))
    torch.testing.assert_close(made.server.model.flat, plain.server.model.flat, rtol=0, atol=1e-5)


class Narrow(nn.Module):
    """The toy's network of some of its hidden neurons: no zeros, and a division by the width if it is scaled."""

    def __init__(self, state, kept, divisor):
        super().__init__()
        self.divisor = divisor
        self.hidden, self.norm, self.head = nn.Linear(6, len(kept)), nn.BatchNorm1d(len(kept)), nn.Linear(len(kept), 3)
        self.to(state["head.bias"].dtype)
        self.hidden.load_state_dict({name: state[f"body.0.{name}"][kept] for name in ("weight", "bias")})
        names = ("weight", "bias", "running_mean", "running_var")
        self.norm.load_state_dict({name: state[f"body.1.{name}"][kept] for name in names}, strict=False)
        self.head.load_state_dict({"weight": state["head.weight"][:, kept], "bias": state["head.bias"]})

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.hidden(x) / self.divisor)))

    def back(self, state, kept):
        """Writes its numbers into the whole network's."""
        for name in ("weight", "bias"):
            state[f"body.0.{name}"][kept] = getattr(self.hidden, name).data
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"body.1.{name}"][kept] = getattr(self.norm, name).data
        state["head.weight"][:, kept] = self.head.weight.data
        state["head.bias"] = self.head.bias.data.clone()


class Double(Toy):
    """In double precision: in single, what BatchNorm and a ReLU make of rounding differs from processor to processor
    (3e-4 of a running variance after three rounds, seen with ATEN_CPU_CAPABILITY=default)."""

    def __init__(self, **shape):
        super().__init__(**shape)
        self.x = self.x.double()

    def network(self):
        return super().network().double()


@pytest.mark.parametrize("policy", POLICIES[:-1])
@pytest.mark.parametrize("fields", [{}, {"scaler": True}, {"clip": 0.3}, {"scaler": True, "clip": 0.3}], ids=str)
def test_rounds_by_hand_with_narrow_networks_and_batchnorm(policy, fields):
    task, levels = Double(sizes=(30, 25, 20, 12), norm=True), (0.5, 1.0, 0.25)
    method = ModelExtraction(lr=0.2, epochs=2, levels=levels, policy=policy, **fields)
    made = ran(method, task, rounds=3, cohort=3)
    w = {name: made.site.initial[name].clone() for name in made.site.initial}
    for round in (1, 2, 3):
        draw = stream(0, "server", "train", round, "masks", 0)
        moved = {name: torch.zeros_like(value) for name, value in w.items()}
        holders = {name: torch.zeros_like(value) for name, value in w.items()}
        for k in made.world.choose(round):
            level, state = levels[k % 3], {name: value.clone() for name, value in w.items()}
            held = list(range(8))[: math.ceil(level * 8)]
            if policy == "rolling":
                held = [(c + round) % 8 for c in held]
            if policy == "random":
                held = torch.randperm(8, generator=draw)[: len(held)].tolist()
                torch.randperm(3, generator=draw)  # the head's rows, all of which are taken
            client = node(made.site, k, round)
            widths = client.rng("widths")
            for batch in client.batches(10, 2):
                kept, width = held, level
                if policy == "ordered":
                    narrower = [one for one in levels if one <= level]
                    width = narrower[int(torch.randint(len(narrower), (), generator=widths))]
                    kept = list(range(math.ceil(width * 8)))
                net = Narrow(state, kept, width if method.scaler else 1.0)
                optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
                nn.functional.cross_entropy(net(batch.x), batch.y).backward()
                if method.clip:
                    norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()  # torch's own adds 1e-6
                    for p in net.parameters():
                        p.grad *= (method.clip / norm).clamp(max=1)
                optimizer.step()
                net.back(state, kept)
            for name in w:
                part = torch.zeros_like(w[name])
                part[(slice(None), held) if name == "head.weight" else slice(None) if name == "head.bias" else held] = 1
                moved[name] += part * (state[name] - w[name])
                holders[name] += part
        w = {name: w[name] + moved[name] / holders[name].clamp(min=1) for name in w}
    for name in w:
        assert torch.allclose(made.server.model[name], w[name], rtol=0, atol=1e-9 * (1 + w[name].abs().max())), name
    for k in range(4) if policy in ("static", "ordered") else ():
        here = node(made.site, k)
        kept = list(range(math.ceil(levels[k % 3] * 8)))
        net = Narrow(w, kept, levels[k % 3] if method.scaler else 1.0).eval()
        x = task.data(k, "test").x
        judged = here.scores(made.method.predict(here, made.server.model), x)
        assert torch.allclose(judged, net(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("clip", [None, 0.3])
def test_rounds_by_hand_of_the_largest_weights(clip):
    task, levels = Toy(sizes=(30, 25, 20, 12), norm=True), (0.5, 1.0, 0.25)
    made = ran(ModelExtraction(lr=0.2, levels=levels, policy="magnitude", clip=clip), task, rounds=2)
    w, split = made.site.initial.flat.clone(), made.site.initial.layout.split
    for round in (1, 2):
        moved, holders = torch.zeros_like(w), torch.zeros_like(w)
        for k in range(4):
            mask = torch.ones_like(w)
            count = math.ceil(levels[k % 3] * split)
            ranked = sorted(range(split), key=lambda p: -abs(w[p].item()))
            mask[ranked[count:]] = 0
            client, start = node(made.site, k, round), w * mask
            end = start
            for batch in client.batches(10, 1):
                net = network(task, Vector(end, made.site.initial.layout)).train()
                grads = torch.autograd.grad(task.loss(net, batch), list(net.parameters()))
                g = torch.cat([grad.flatten() for grad in grads]) * mask[:split]
                if clip:
                    g = g * min(1.0, clip / g.norm())
                statistics = torch.cat([b for name, b in net.named_buffers() if b.is_floating_point()])
                end = torch.cat([end[:split] - 0.2 * g, statistics])
            moved, holders = moved + mask * (end - start), holders + mask
        w = w + moved / holders.clamp(min=1)
    assert torch.allclose(made.server.model.flat, w, rtol=0, atol=2e-5)
    assert (w[split:] != made.site.initial.flat[split:]).all(), "statistics move"


def small(vector, mask, net):
    """A narrow network that holds the chosen coordinates, made by hand."""
    views = dict(zip(vector.layout.names, vector.layout.views(mask), strict=True))
    state = {}
    for name in vector:
        entry, chosen = vector[name], views[name]
        rows = chosen.flatten(1).any(1) if chosen.dim() > 1 else chosen
        entry = entry[rows]
        if chosen.dim() > 1:
            entry = entry[:, chosen[rows][0].flatten(1).any(1) if chosen.dim() > 2 else chosen[rows][0]]
        state[name] = entry.clone()
    net.load_state_dict(state)
    return net


@pytest.mark.parametrize(
    ("name", "narrow", "shape"),
    [("mlp:12,8", "mlp:6,4", (1, 4, 4)), ("mlp:9", "mlp:5", (7,))],
)
def test_a_part_is_the_narrow_network_exactly(name, narrow, shape):
    net = nets.build(name, shape, 3)
    w = Vector.of(net)
    mask = channels(w, 0.5)
    whole = nets.build(name, shape, 3)
    nn.utils.vector_to_parameters(w.where(mask).flat, whole.parameters())
    part = small(w, mask, nets.build(narrow, shape, 3))
    x, y = torch.randn(5, *shape), torch.randint(3, (5,))
    torch.testing.assert_close(whole(x), part(x))
    for one in (whole, part):
        nn.functional.cross_entropy(one(x), y).backward()
    flat = torch.cat([p.grad.flatten() for p in whole.parameters()])
    assert (flat[~mask] == 0).all(), "what is not there does not move"
    torch.testing.assert_close(flat[mask], torch.cat([p.grad.flatten() for p in part.parameters()]))


def test_a_convolutions_channels_are_blocks_once_they_are_flat():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 3))
    w = Vector.of(net)
    views = dict(zip(w.layout.names, w.layout.views(channels(w, 0.5)), strict=True))
    assert views["0.bias"].tolist() == [True, True, False, False]
    assert views["3.weight"][0].tolist() == [True] * 8 + [False] * 8 and views["3.bias"].all()
    x = torch.randn(2, 1, 4, 4)
    narrow = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 4, 3))
    narrow.load_state_dict(
        {
            "0.weight": w["0.weight"][:2],
            "0.bias": w["0.bias"][:2],
            "3.weight": w["3.weight"][:, :8],
            "3.bias": w["3.bias"],
        }
    )
    for name, value in zip(w, w.where(channels(w, 0.5)).layout.views(w.where(channels(w, 0.5)).flat), strict=True):
        dict(net.named_parameters())[name].data.copy_(value)
    torch.testing.assert_close(net(x), narrow(x))


def test_what_nobody_holds_is_bitwise_unchanged_and_what_somebody_holds_is_their_mean():
    task = Toy(sizes=(20, 20))
    method = ModelExtraction(levels=(0.25, 0.5), lr=0.1)
    made = ran(method, task, rounds=1)
    start, after = made.site.initial.flat, made.server.model.flat
    masks = [channels(made.site.initial, level) for level in (0.25, 0.5)]
    assert torch.equal(after[~masks[1]], start[~masks[1]]) and (~masks[1]).any()
    ends = []
    for k in range(2):
        client = node(made.site, k)
        ends.append(client.descend(Vector(start * masks[k], client.layout), lr=0.1, epochs=1, batch=10)[0].flat)
    both, one = masks[0], masks[1] & ~masks[0]
    torch.testing.assert_close(after[both], ((ends[0] + ends[1]) / 2)[both])
    torch.testing.assert_close(after[one], ends[1][one])


def test_rolling_masks_cover_everything_and_static_ones_never_do():
    for policy, covered in (("rolling", True), ("static", False)):
        made = ran(ModelExtraction(levels=(0.25,), policy=policy), EQUAL, rounds=8)
        untouched = made.server.model.flat == made.site.initial.flat
        assert bool(untouched.any()) != covered
    rows = ran(ModelExtraction(levels=(1.0, 0.5)), EQUAL, rounds=1).record.metrics
    assert rows[0]["server/coverage"] == 2 and 0 < rows[0]["server/noise"] < 1


class Scaled(nn.Module):
    """A network whose hidden layers' outputs are divided by a width, as HeteroFL's are."""

    def __init__(self, net, level):
        super().__init__()
        self.net, self.level = net, level

    def forward(self, x):
        layers = [module for module in self.net.modules() if isinstance(module, nn.Linear)]
        x = x.flatten(1)
        for layer in layers[:-1]:
            x = torch.relu(layer(x) / self.level)
        return layers[-1](x)


def test_the_scaler_is_a_division_of_hidden_outputs():
    task = Toy(sizes=(20,))
    made = ran(ModelExtraction(levels=(0.5,), scaler=True, lr=0.1, batch=20, epochs=3), task, rounds=1)
    w = made.site.initial
    mask = channels(w, 0.5)
    net = task.network()
    nn.utils.vector_to_parameters(w.where(mask).flat, net.parameters())
    used = Scaled(net, 0.5)
    x, y = task.data(0, "train").all()
    for _ in range(3):
        loss = nn.functional.cross_entropy(used(x), y)
        for p, g in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True):
            p.data -= 0.1 * g
    expected = w.flat + (nn.utils.parameters_to_vector(net.parameters()) - w.flat) * mask
    torch.testing.assert_close(made.server.model.flat, expected.detach())
    judged = made.method.predict(node(made.site, 0), made.server.model)
    torch.testing.assert_close(node(made.site, 0).scores(judged, x), used(x))


def test_messages_have_the_part_only():
    def up(level):
        made = ran(ModelExtraction(levels=(level,)), Toy(sizes=(9, 9)), rounds=1)
        return next(li["bytes"] for li in made.record.ledger if li["field"] == "delta"), made.site.initial

    (half, w), (whole, _) = up(0.5), up(1.0)
    entries = int(channels(w, 0.5).sum())
    assert entries < 0.6 * len(w) and 4 * entries < half < 4 * entries + len(w) / 8 + 40 < whole + len(w) / 8


def test_a_client_is_judged_by_its_own_part():
    made = ran(ModelExtraction(levels=(0.5, 1.0)), EQUAL, rounds=2)
    w = made.server.model
    assert torch.equal(made.method.predict(node(made.site, 0), w).flat, w.where(channels(w, 0.5)).flat)
    assert torch.equal(made.method.predict(node(made.site, 1), w).flat, w.flat)


def test_networks_that_are_no_chains_and_levels_that_are_no_shares_are_refused():
    with pytest.raises(UsageError, match="levels are"):
        ModelExtraction(levels=(0.5, 1.5))
    with pytest.raises(UsageError, match=r"no chain of layers|does not belong"):
        channels(Vector.of(nets.build("resnet8:group", (3, 8, 8), 4)), 0.5)
    with pytest.raises(UsageError, match="magnitude cuts no widths"):
        ModelExtraction(scaler=True, policy="magnitude")


@pytest.mark.parametrize("policy", POLICIES)
def test_shortcuts_are_refused_before_any_round_where_channels_are_cut(policy):
    class Shortcuts(Toy):
        def network(self):
            return nets.build("resnet8", (3, 8, 8), 3)

        def data(self, client, split):
            plain = super().data(client, split)
            return Data(plain.inputs[:, :1, None, None].expand(-1, 3, 8, 8).contiguous(), plain.labels, plain.rows)

        def global_test(self):
            plain = super().global_test()
            return Data(plain.inputs[:, :1, None, None].expand(-1, 3, 8, 8).contiguous(), plain.labels, plain.rows)

    class Begun(ModelExtraction):
        def round(self, server, cohort):
            raise AssertionError("a round has begun")

    task = Shortcuts(sizes=(4, 4))
    if policy == "magnitude":
        made = ran(ModelExtraction(policy=policy), task, rounds=1)
        assert not torch.equal(made.server.model.flat, made.site.initial.flat)
    else:
        with pytest.raises(UsageError, match=r"no chain of layers|does not belong"):
            ran(Begun(policy=policy), task, rounds=1)


@pytest.mark.parametrize("policy", POLICIES)
def test_statistics_at_home_are_refused_where_channels_come_and_go(policy):
    method = ModelExtraction(policy=policy)
    if policy in ("static", "magnitude"):
        ran(method, Toy(norm=True), rounds=1, buffers="local")
    else:
        with pytest.raises(UsageError, match="channels come and go"):
            ran(method, Toy(norm=True), rounds=1, buffers="local")
    ran(method, Toy(), rounds=1, buffers="local")
    made = ran(method, Toy(norm=True), rounds=1, buffers="ignore")
    assert torch.equal(made.server.model.buffers.flat, made.site.initial.buffers.flat)
