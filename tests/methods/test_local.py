"""Local training: nobody hears from anybody."""

import torch
from problems import close, descended, network, node, ran

from fedloom.methods.personalize.local import Local
from fedloom.tasks.toy import Toy


def test_nothing_is_sent_but_the_request():
    assert {line["field"] for line in ran(Local(), Toy(), rounds=2).record.ledger if line["kind"] == "train"} == {
        "envelope"
    }


def test_every_client_goes_on_with_its_own_model():
    task = Toy(norm=True)
    made = ran(Local(lr=0.1, epochs=2), task, rounds=3)
    for k in range(task.population):
        net = network(task, made.site.initial)
        for round in (1, 2, 3):
            net = descended(net, task, list(node(made.site, k, round).batches(10, epochs=2)), lr=0.1)
        assert close(made.engine.states[k]["model"], net.state_dict())


def test_the_global_model_stays_untrained_and_is_not_judged():
    made = ran(Local(), Toy(), rounds=2)
    assert torch.equal(made.server.model.flat, made.site.initial.flat)
    assert made.record.final["global_test_accuracy"] is None


def test_networks_are_dealt_in_turn():
    made = ran(Local(models=("mlp:4", "mlp:9", "mlp:5,4")), Toy(), rounds=1)
    sizes = [len(state["model"]) for _, state in sorted(made.engine.states.items())]
    assert sizes[0] == sizes[3] and len(set(sizes)) == 3
    never = node(made.site, 1)
    assert torch.equal(made.method.predict(never).flat, never.network("mlp:9").flat)
    never.state.update(made.engine.states[1])
    assert made.method.predict(never) is never.state["model"]
