"""FedMA: permuted clients, widths, phases."""

import pytest
import torch
from problems import node, ran
from torch.nn import functional as F

from fedloom import nets
from fedloom.errors import UsageError
from fedloom.methods.aggregate._layers import assembled, layers_of, rows_of, scattered
from fedloom.methods.aggregate._matching import match
from fedloom.methods.aggregate.fedma import FedMA
from fedloom.node import Client, Server
from fedloom.tasks.toy import Toy


def test_rows_are_taken_apart_and_put_together_again():
    made = ran(FedMA(), Toy(), rounds=1)
    client = node(made.site, 0)
    w = client.network("mlp:5")
    assert layers_of(w.layout) == ["body.0", "head"]
    assert torch.equal(assembled(client, rows_of(w)).flat, w.flat)


@pytest.mark.parametrize("shrink", [True, False])
def test_a_round_with_one_client_keeps_its_network_up_to_the_shrinkage(shrink):
    task = Toy(sizes=(30,))
    made = ran(FedMA(shrink=shrink, passes=2), task, rounds=1)
    assert len(made.server.model) == len(made.site.initial)
    client = node(made.site, 0)
    first, _ = client.descend(made.site.initial, lr=0.05, epochs=2, batch=10)
    factor = 0.5 if shrink else 1.0
    torch.testing.assert_close(rows_of(made.server.model)[0], factor * rows_of(first)[0])


def test_the_global_network_may_be_wider_and_clients_return_to_their_width():
    made = ran(FedMA(gamma=1e6, shrink=False, lr=0.1, epochs=3), Toy(), rounds=4)
    wide = len(rows_of(made.server.model)[0])
    assert 8 < wide <= 32 and made.record.metrics[-1]["server/width"] == wide
    for state in made.engine.states.values():
        assert len(state["rows"][0]) == wide and len(state["known"][0]) == 8
    assert made.record.final["global_test_accuracy"] > 0.6


class Deep(Toy):
    """Two hidden layers, of 7 and 5 neurons."""

    def network(self):
        return self.build("mlp:7,5")


def scored(layers, x):
    """What layers [(weight, bias), ...] with ReLUs between them make of inputs."""
    for number, (weight, bias) in enumerate(layers):
        x = (x.relu() if number else x) @ weight.T + bias
    return x


def trained(layers, first, batches, lr):
    """Such layers after descent on those from number `first` on."""
    moving = [[part.clone().requires_grad_(number >= first) for part in layer] for number, layer in enumerate(layers)]
    for batch in batches:
        parts = [part for layer in moving[first:] for part in layer]
        gradients = torch.autograd.grad(F.cross_entropy(scored(moving, batch.x), batch.y), parts)
        with torch.no_grad():
            for part, gradient in zip(parts, gradients, strict=True):
                part -= lr * gradient
    return [[part.detach() for part in layer] for layer in moving]


@pytest.mark.parametrize(("task", "shrink"), [(Toy(), True), (Deep(), False)], ids=["one layer", "two layers"])
def test_two_rounds_by_hand(task, shrink):
    lr, epochs, gamma = 0.1, 2, 50.0
    made = ran(FedMA(lr=lr, epochs=epochs, gamma=gamma, sigma0=2.0, shrink=shrink), task, rounds=2)
    site, server = made.site, Server(made.site, 4)
    counts = [torch.bincount(task.data(k, "train").y, minlength=3).float() for k in range(4)]
    initial = [[rows[:, :-1], rows[:, -1]] for rows in rows_of(site.initial)]
    begin, depth = [initial] * 4, len(initial)
    for round in (1, 2):
        server.begin("train", round)
        whole, places, own = [], [[] for _ in range(4)], begin
        for number in range(depth):
            head_alone = number == depth - 1
            for k in range(4):
                client = Client(site, k, {}, "train", round, number)
                batches = list(client.batches(10, epochs=3 * epochs if head_alone else epochs))
                rate = lr / 10 if head_alone else lr
                own = [trained(net, number, batches, rate) if j == k else net for j, net in enumerate(own)]
            if head_alone:
                break
            rows = [torch.cat([net[number][0], net[number][1][:, None]], 1) for net in own]
            merged, found = match(rows, server.rng("matching"), gamma=gamma, sigma0=2.0)
            if not shrink:  # the plain mean of the rows in a neuron
                joined = torch.cat(rows).double()
                mine = torch.cat(found)
                merged = torch.stack([joined[mine == place].mean(0) for place in range(len(merged))])
            merged = merged.float()
            whole.append([merged[:, :-1], merged[:, -1]])
            for k in range(4):
                places[k].append(found[k])
                weight = torch.zeros(len(own[k][number + 1][0]), len(merged))
                weight[:, found[k]] = own[k][number + 1][0]
                after = [[weight, own[k][number + 1][1]], *own[k][number + 2 :]]
                own = [[*whole, *after] if j == k else net for j, net in enumerate(own)]
        share = torch.stack(counts) / sum(counts)
        head = [sum(share[k].view(-1, *[1] * (part - 1)) * own[k][-1][2 - part] for k in range(4)) for part in (2, 1)]
        whole.append(head)
        begin = []
        for k in range(4):  # the client's own neurons of every layer, and what leads to them from its own before
            net, before = [], slice(None)
            for number, (weight, bias) in enumerate(whole):
                mine = places[k][number] if number < depth - 1 else slice(None)
                net.append([weight[mine][:, before], bias[mine]])
                before = mine
            begin.append(net)
    assert len(whole[0][1]) > len(initial[0][1]), "the global network is wider"
    assert [len(rows) for rows in rows_of(made.server.model)] == [len(bias) for _, bias in whole]
    # New neurons are numbered in any order that rounding likes; the network's outputs do not depend on it.
    client = node(site, 0)
    scores = client.scores(assembled(client, rows_of(made.server.model)), task.x)
    torch.testing.assert_close(scores, scored(whole, task.x), rtol=1e-3, atol=1e-4)


def test_layers_that_are_matched_stay_while_the_rest_is_trained():
    made = ran(FedMA(), Toy(), rounds=1)
    matched = rows_of(made.server.model)[0]
    for state in made.engine.states.values():
        assert torch.equal(state["rows"][0], matched)


def test_a_class_row_is_weighted_by_the_samples_of_that_class():
    made = ran(FedMA(), Toy(), rounds=1)
    heads = torch.stack([made.engine.states[k]["rows"][-1] for k in range(4)])
    counts = torch.stack([torch.bincount(made.task.data(k, "train").y, minlength=3) for k in range(4)]).float()
    expected = torch.einsum("kc,kcd->cd", counts / counts.sum(0), heads)
    torch.testing.assert_close(rows_of(made.server.model)[-1], expected)


def test_a_round_sends_each_layer_once_each_way():
    made = ran(FedMA(), Toy(), rounds=2)
    lines = [li for li in made.record.ledger if li["round"] == 2 and li["kind"] == "train"]
    up = sum(li["bytes"] * len(li["clients"]) for li in lines if li["field"] == "rows")
    wide = len(rows_of(made.server.model)[0])
    assert up == pytest.approx(4 * (4 * (8 * 7) + 4 * 3 * (wide + 1)), rel=0.2)
    down = sum(li["bytes"] * len(li["clients"]) for li in lines if li["field"] == "layer")
    assert down < 4 * (4 * wide * 7 + 60)


ABSENT = {"cohort": 2, "dropout": 0.5, "lost": 0.1, "deadline": 1.0, "availability": "markov:0.5"}.items()


@pytest.mark.parametrize(("setting", "value"), ABSENT)
def test_an_absent_client_is_refused(setting, value):
    with pytest.raises(UsageError, match=rf"fedma does not go with {setting}={value}: every client takes part"):
        ran(FedMA(), Toy(), rounds=1, **{setting: value})


def test_networks_that_cannot_be_matched_are_refused():
    with pytest.raises(UsageError, match="a network of plain layers with weights and biases is needed"):
        ran(FedMA(), Toy(norm=True), rounds=1)


class Images(Toy):
    """The toy's clouds as images of 16 x 16 for a convolutional network."""

    model = "lenet:4,6,12,8"

    def __init__(self, sizes=(12, 7, 30, 25)):
        super().__init__(sizes=sizes)
        self.x = torch.nn.functional.pad(self.x.repeat(1, 40), (0, 256 - 40 * self.x.shape[1])).view(-1, 1, 16, 16)

    def network(self):
        return self.build(self.model)

    def build(self, model):
        return nets.build(model, (1, 16, 16), 3)


@pytest.mark.parametrize("model", ["lenet:4,6,12,8", "cnn:4,6,12"])
def test_convolutions_are_matched_by_filters(model, monkeypatch):
    monkeypatch.setattr(Images, "model", model)
    made = ran(FedMA(gamma=1e6, shrink=False), Images(), rounds=2)
    wide = [len(rows) for rows in rows_of(made.server.model)]
    assert all(was < is_ for was, is_ in zip([4, 6, 12], wide, strict=False))
    assert made.record.metrics[-1]["server/width"] == sum(wide[:-1])
    client = node(made.site, 0)
    assert torch.equal(assembled(client, rows_of(made.server.model)).flat, made.server.model.flat)


def test_a_client_whose_filters_are_permuted_by_the_matching_has_the_same_outputs():
    made = ran(FedMA(), Images(), rounds=1)
    client = node(made.site, 0)
    w = client.initial
    x = made.task.data(0, "train").x
    rows = rows_of(w)
    for number in range(len(rows) - 1):  # layer by layer as a phase does: own neurons to other places of a wider layer
        where = torch.randperm(len(rows[number]) + 3, generator=torch.Generator().manual_seed(number))
        wider = rows[number].new_zeros(len(rows[number]) + 3, rows[number].shape[1])
        mine = where[: len(rows[number])]
        wider[mine] = rows[number]
        rows = [*rows[:number], wider, scattered(rows[number + 1], mine, len(wider)), *rows[number + 2 :]]
    torch.testing.assert_close(client.scores(assembled(client, rows), x), client.scores(w, x))
