"""Early exits: networks of several heads, of which clients train the first few."""

from itertools import accumulate

import pytest
import torch
from problems import node, ran
from torch import nn
from torch.nn import functional as F

from fedloom import nets
from fedloom.errors import UsageError
from fedloom.methods.heterogeneous.early_exit import EarlyExit, summed
from fedloom.nets.exits import exiting
from fedloom.random import seeded
from fedloom.task import Batch
from fedloom.tasks.toy import Toy

DEEP = {"blocks": 3}  # four blocks, so four exits; client k has the first 1 + k modulo 4 of them


class Hand:
    """The toy's network with exits, from a vector's entries, without the library."""

    def __init__(self, w, exits):
        self.weights = {name: w[name].clone().requires_grad_() for name in w if place(name) <= exits}
        self.exits = exits

    def outputs(self, x):
        def linear(name, h):
            return h @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

        h = linear("body.0", x).relu()
        for m in range(self.exits):
            h = h + linear(f"body.{1 + m}.layers.0", h).relu() if m else h
            yield linear(f"exits.{m}", h)

    def train(self, batches, lr):
        for x, y in batches:
            loss = sum(F.cross_entropy(out, y) for out in self.outputs(x))
            slopes = torch.autograd.grad(loss, list(self.weights.values()))
            moved = {name: (w - lr * g).detach() for (name, w), g in zip(self.weights.items(), slopes, strict=True)}
            self.weights = {name: w.requires_grad_() for name, w in moved.items()}
        return {name: w.detach() for name, w in self.weights.items()}


def place(name):
    """The first exit whose network has an entry of the toy's."""
    kind, number, *_ = name.split(".")
    return int(number) + 1 if kind == "exits" else max(1, int(number))


def whole(made):
    return made.site.nets["exit4"]


@pytest.mark.parametrize("exits", [(), (4, 2)])
def test_a_round_by_hand(exits):
    sizes = (16, 40, 24, 31, 12, 19)
    method = EarlyExit(0.2, epochs=2, batch=8, exits=exits)
    made = ran(method, Toy(sizes, **DEEP), rounds=1)
    start, trained = whole(made), {}
    for k, n in enumerate(sizes):
        depth = (exits or (1, 2, 3, 4))[k % len(exits or (1, 2, 3, 4))]
        after = Hand(start, depth).train(node(made.site, k).batches(8, 2), 0.2)
        for name, value in after.items():
            trained.setdefault(name, []).append((n, value))
    assert trained.keys() == set(start)
    for name, replies in trained.items():
        mean = sum(n * value for n, value in replies) / sum(n for n, _ in replies)
        torch.testing.assert_close(made.server.model[name], mean, rtol=0, atol=2e-6)


def test_the_loss_is_the_sum_of_all_exits_and_a_head_learns_from_its_own_alone():
    made = ran(EarlyExit(), Toy(**DEEP), rounds=1)
    client = node(made.site, 0)
    net, batch = client.net(whole(made)).requires_grad_(True), client.data.all()
    criterion = client.task.criterion
    outs = list(net.outputs(batch.x))
    assert len(outs) == 4
    torch.testing.assert_close(summed(net, batch, criterion), sum(F.cross_entropy(out, batch.y) for out in outs))
    for m, out in enumerate(outs):
        heads = [head.weight for head in net.exits]
        alone = torch.autograd.grad(F.cross_entropy(out, batch.y), heads, retain_graph=True, allow_unused=True)
        assert [g is not None for g in alone] == [n == m for n in range(4)]
        together = torch.autograd.grad(summed(net, batch, criterion), heads)
        torch.testing.assert_close(together[m], alone[m])


def test_the_network_of_the_first_exits_is_the_whole_one_up_to_there():
    made = ran(EarlyExit(0.2), Toy(**DEEP), rounds=2)
    client, x = node(made.site, 0), made.server.task.global_test().x
    outs = list(client.net(made.server.model).outputs(x))
    for name, out in zip(("exit1", "exit2", "exit3", "exit4"), outs, strict=True):
        part = made.server.model.select(*made.site.nets[name])
        assert torch.equal(client.net(part)(x), out)
    for hand, out in zip(Hand(made.server.model, 4).outputs(x), outs, strict=True):
        torch.testing.assert_close(hand, out)


def test_every_exit_is_judged_and_every_client_by_its_own_last():
    task = Toy(**DEEP)
    made = ran(EarlyExit(0.2), task, rounds=2)
    final, data = made.record.final, task.global_test()
    for m, out in enumerate(Hand(made.server.model, 4).outputs(data.x), start=1):
        assert final[f"global_test_loss@exit{m}"] == pytest.approx(F.cross_entropy(out, data.y).item(), rel=1e-5)
    assert final["global_test_loss"] == final["global_test_loss@exit4"]
    right = []
    for k in range(4):
        (x, y) = task.data(k, "test").all()
        right.append(list(Hand(made.server.model, 4).outputs(x))[k].argmax(1) == y)
    assert final["personal_test_accuracy"] == pytest.approx(torch.cat(right).double().mean().item())


def test_what_lies_above_the_deepest_client_stays_bitwise_heads_too():
    for rounds in (1, 2, 3, 4):
        made = ran(EarlyExit(0.2), Toy(**DEEP), rounds=rounds, cohort=1)
        asked = {k for x in made.record.ledger if x["kind"] == "train" for k in x["clients"]}
        reached, start = 1 + max(asked), whole(made)
        stayed = {name for name in start if torch.equal(made.server.model[name], start[name])}
        assert stayed == {name for name in start if place(name) > reached}


def test_a_clients_messages_grow_with_its_exits():
    made = ran(EarlyExit(), Toy(**DEEP), rounds=1)
    numbers = [4 * sum(whole(made)[n].numel() for n in whole(made) if place(n) <= exits) for exits in (1, 2, 3, 4)]
    for way in ("up", "down"):
        lines = [x for x in made.record.ledger if (x["kind"], x["direction"]) == ("train", way)]
        found = [sum(x["bytes"] for x in lines if k in x["clients"]) for k in range(4)]
        assert all(size <= one < size + 500 for size, one in zip(numbers, found, strict=True))
        assert found == sorted(set(found))


def test_the_server_trains_the_whole_network_on_its_own_data():
    task = Toy((20, 20, 20, 20), **DEEP)
    plain, more = (ran(EarlyExit(0.1, batch=0, server_epochs=n), task, rounds=1) for n in (0, 2))
    expected = Hand(plain.server.model, 4).train([task.public().all()] * 2, 0.1)
    for name, value in expected.items():
        torch.testing.assert_close(more.server.model[name], value, rtol=0, atol=2e-6)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_exits_stand_behind_every_few_blocks_and_at_the_end(every):
    with seeded(0, "model", "init"):
        plain = nets.build("resnet:2", (3, 8, 8), 5)
        ends = [name for name, _ in plain.body.named_children() if "block" in name]
        ends = ["relu", *ends[:-1], "flatten"]
        net = exiting(plain, (3, 8, 8), every).eval()
    wanted = sorted({*range(every - 1, 7, every), 6})
    assert [head.in_features for head in net.exits] == [(16, 16, 16, 32, 32, 64, 64)[end] for end in wanted]
    x, states = torch.randn(2, 3, 8, 8), {}
    h = x
    for name, child in net.body.named_children():
        h = states[name] = child(h)
    for end, head, out in zip(wanted, net.exits, net.outputs(x), strict=True):
        state = states[ends[end]]
        torch.testing.assert_close(out, head(state.mean((2, 3)) if state.dim() == 4 else state))
    assert list(accumulate(net.sizes))[-1] == len(net.body)


def test_the_last_exit_stands_at_the_end_though_it_comes_sooner():
    made = ran(EarlyExit(every=3), Toy(**DEEP), rounds=1)
    assert list(made.site.nets) == ["exit1", "exit2"]
    assert {name for name in made.server.model if name.startswith("body.4.")}


@pytest.mark.parametrize("exits", [(0, 4), (1, 3), (5,)])
def test_exits_that_do_not_fit_are_refused(exits):
    with pytest.raises(UsageError, match=r"early_exit.exits are .*; each must be at least 1, and the largest 4"):
        ran(EarlyExit(exits=exits), Toy(**DEEP), rounds=1)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(UsageError, match=r"early_exit\.every is 4: that leaves a single exit; take fewer blocks"):
        ran(EarlyExit(every=4), Toy(**DEEP), rounds=1)
    with pytest.raises(UsageError, match=r"early_exit\.server_epochs is 1; that needs public data: set public=0.05"):
        ran(EarlyExit(server_epochs=1), NoneOfItsOwn(**DEEP), rounds=1)
    odd = nn.Sequential()
    odd.body, odd.head = nn.Sequential(nn.Linear(2, 2)), nn.Identity()
    with pytest.raises(UsageError, match="exits are linear heads, and the network's own is a Identity"):
        exiting(odd, (2,), 1)


class NoneOfItsOwn(Toy):
    def public(self):
        return None


def test_states_of_any_shape_have_an_exit():
    odd = nn.Module()
    odd.body, odd.head = nn.Sequential(nn.Conv1d(2, 4, 1)), nn.Linear(4, 3)
    net, x = exiting(odd, (2, 5), 1), torch.randn(3, 2, 5)
    torch.testing.assert_close(net(x), net.exits[0](odd.body[0](x).mean(2)))
    loss = summed(net, Batch(x, torch.tensor([0, 1, 2])), lambda out, batch: F.cross_entropy(out, batch.y))
    assert loss.dim() == 0
