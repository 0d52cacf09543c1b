"""FedGH: the head that the server trains, extractors that differ."""

from dataclasses import dataclass

import pytest
import torch
from problems import close, descended, network, node, ran

from fedloom.errors import UsageError
from fedloom.method import client
from fedloom.methods.heterogeneous.fedgh import FedGH
from fedloom.methods.heterogeneous.fedproto import FedProto
from fedloom.methods.personalize.local import Local
from fedloom.tasks.toy import Toy

MIXED = ("mlp:4,8", "mlp:30,8")


def test_clients_with_different_networks_share_one_head():
    made = ran(FedGH(models=MIXED, lr=0.1), Toy(), rounds=10)
    sizes = [len(state["model"]) for _, state in sorted(made.engine.states.items())]
    assert sizes[0] == sizes[2] < sizes[1] == sizes[3]
    assert made.record.final["personal_test_accuracy"] > 0.75


def test_what_is_sent_does_not_depend_on_the_network():
    def up(models):
        made = ran(FedGH(models=models), Toy(), rounds=2)
        return [line for line in made.record.ledger if line["direction"] == "up" and line["kind"] == "train"]

    small, large = up(("mlp:4,8",)), up(("mlp:300,8",))
    assert small == large
    (line,) = {line["bytes"] for line in small if line["field"] == "protos" and line["clients"] == [0, 1, 2]} or {0}
    assert 2 * 8 * 4 < line < 2 * 8 * 4 + 60, "two classes, eight features each"


def test_the_servers_step_by_hand():
    made = ran(FedGH(server_epochs=3, server_lr=0.2, server_batch=100), Toy(), rounds=1)
    weight, bias = (made.site.initial[f"head.{name}"].clone().requires_grad_() for name in ("weight", "bias"))
    pairs = []
    for k in range(4):
        w = made.engine.states[k]["model"]
        x, y = made.site.task.data(k, "train").all()
        z = torch.relu(x @ w["body.0.weight"].T + w["body.0.bias"])
        pairs += [(z[y == c].mean(0), c) for c in range(3) if (y == c).any()]
    r, c = torch.stack([r for r, _ in pairs]), torch.tensor([int(c) for _, c in pairs])
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(r @ weight.T + bias, c)
        gw, gb = torch.autograd.grad(loss, (weight, bias))
        weight, bias = (weight - 0.2 * gw).detach().requires_grad_(), (bias - 0.2 * gb).detach().requires_grad_()
    torch.testing.assert_close(made.server.model["head.weight"], weight.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(made.server.model["body.0.weight"], made.site.initial["body.0.weight"])


def test_a_head_that_the_server_does_not_train_stays_and_reaches_everybody():
    made = ran(FedGH(server_lr=0.0), Toy(), rounds=3)
    assert torch.equal(made.server.model.flat, made.site.initial.flat)


def test_before_the_first_head_it_is_local_training_bitwise():
    gh, alone = ran(FedGH(), Toy(), rounds=1), ran(Local(), Toy(), rounds=1)
    for k in range(4):
        assert torch.equal(gh.engine.states[k]["model"].flat, alone.engine.states[k]["model"].flat)


def test_the_head_is_what_goes_down():
    made = ran(FedGH(), Toy(), rounds=2)
    down = {
        (line["round"], line["field"]): line["bytes"]
        for line in made.record.ledger
        if line["kind"] == "train" and line["direction"] == "down"
    }
    assert down[1, "head"] < 10 and 27 * 4 < down[2, "head"] < 27 * 4 + 120


@pytest.mark.parametrize("method", [FedGH, FedProto])
def test_networks_whose_heads_differ_are_refused_before_any_round(method):
    with pytest.raises(UsageError, match=r"head of mlp:4,9 is .*, that of the run's own network is"):
        ran(method(models=("mlp:4,8", "mlp:4,9")), Toy(), rounds=1)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("cohort", [None, 2])
def test_rounds_by_hand(norm, cohort):
    task = Toy(norm=norm)
    made = ran(FedGH(lr=0.1, epochs=2, server_epochs=4, server_lr=0.3, server_batch=0), task, rounds=3, cohort=cohort)
    nets = {k: network(task, made.site.initial) for k in range(4)}
    weight, bias = (made.site.initial[f"head.{name}"].clone() for name in ("weight", "bias"))
    for round in (1, 2, 3):
        pairs = []
        for k in made.world.choose(round):
            if round > 1:
                nets[k].head.weight.data, nets[k].head.bias.data = weight.clone(), bias.clone()
            nets[k] = descended(nets[k], task, list(node(made.site, k, round).batches(10, 2)), lr=0.1)
            x, y = task.data(k, "train").all()
            with torch.no_grad():
                z = nets[k].eval().body(x)
            pairs += [(z[y == c].mean(0), c) for c in range(3) if (y == c).any()]
        r, labels = torch.stack([r for r, _ in pairs]), torch.tensor([c for _, c in pairs])
        for _ in range(4):
            weight, bias = weight.requires_grad_(), bias.requires_grad_()
            loss = torch.nn.functional.cross_entropy(r @ weight.T + bias, labels)
            gw, gb = torch.autograd.grad(loss, (weight, bias))
            weight, bias = (weight - 0.3 * gw).detach(), (bias - 0.3 * gb).detach()
        assert torch.allclose(made.server.model["head.weight"], weight, rtol=0, atol=1e-5) == (round == 3)
    assert torch.allclose(made.server.model["head.bias"], bias, rtol=0, atol=1e-5)
    for k, state in made.engine.states.items():
        assert close(state["model"], nets[k].state_dict(), atol=1e-5)


def test_the_servers_gradient_is_clipped_as_a_whole():
    lr, clip = 0.5, 0.01
    made = ran(FedGH(server_epochs=1, server_lr=lr, server_batch=0, clip=clip), Toy(), rounds=1)
    moved = made.server.model - made.site.initial
    assert moved.norm().item() == pytest.approx(lr * clip, rel=1e-4)
    free = ran(FedGH(server_epochs=1, server_lr=lr, server_batch=0), Toy(), rounds=1)
    assert (free.server.model - made.site.initial).norm() > 2 * lr * clip


def test_the_server_goes_over_the_pairs_in_batches():
    @dataclass(frozen=True)
    class Fixed(FedGH):
        @client
        def local(self, client, head):
            return {"protos": {c: torch.eye(8)[c + client.id % 2] for c in range(3)}}

    runs = {
        (batch, epochs): ran(Fixed(server_batch=batch, server_epochs=epochs), Toy(), rounds=1).record.metrics
        for batch, epochs in ((0, 1), (5, 1), (5, 4))
    }
    taken = {fields: rows[0]["gradient_steps"] for fields, rows in runs.items()}
    assert taken == {(0, 1): 1, (5, 1): 3, (5, 4): 12}, "twelve pairs"
