"""FedGH: the head that the server trains, extractors that differ."""

import torch
from problems import node, ran

from manyhands.methods.heterogeneous.fedgh import FedGH
from manyhands.methods.personalize.local import Local
from manyhands.tasks.toy import Toy

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
        client = node(made.site, k)
        w = made.engine.states[k]["model"]
        x, y = client.data.all()
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
