"""FedMA: permuted clients, widths, phases."""

import pytest
import torch
from problems import node, ran

from manyhands import nets
from manyhands.errors import UsageError
from manyhands.layers import assembled, layers_of, rows_of, scattered
from manyhands.methods.aggregate.fedma import FedMA
from manyhands.tasks.toy import Toy


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


@pytest.mark.parametrize(("setting", "value"), [("cohort", 2), ("dropout", 0.5), ("lost", 0.1)])
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
