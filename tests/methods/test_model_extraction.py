"""Model extraction: parts, their mean, and the policies that cut them."""

import pytest
import torch
from problems import node, ran
from torch import nn

from manyhands import nets
from manyhands.errors import UsageError
from manyhands.methods.heterogeneous.model_extraction import ModelExtraction, channels
from manyhands.methods.optimize.fedavg import FedAvg
from manyhands.tasks.toy import Toy
from manyhands.vector import Vector

EQUAL = Toy(sizes=(20, 20, 20, 20))


@pytest.mark.parametrize("policy", ["static", "ordered", "rolling", "random", "magnitude"])
def test_whole_models_are_fedavg_bitwise(policy):
    made = ran(ModelExtraction(levels=(1.0,), policy=policy), EQUAL, rounds=3)
    assert torch.equal(made.server.model.flat, ran(FedAvg(), EQUAL, rounds=3).server.model.flat)


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
