"""DFedSAM: the ascent, the gossip, and what is charged to whom."""

import pytest
import torch
from problems import Six, close, network, node, ran, sharpness_aware

from fedloom.errors import UsageError
from fedloom.evaluator import STATISTICS
from fedloom.methods.decentralized.dfedsam import DFedSAM
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.node import Client
from fedloom.tasks.toy import Toy


def models(made):
    return torch.stack([made.engine.states[k]["model"].flat for k in range(made.task.population)])


def test_on_the_complete_graph_it_is_fedavg():
    task = Toy(sizes=(20, 20, 20, 20))  # so that FedAvg's weights are equal
    made, plain = ran(DFedSAM(rho=0.0, graph="complete"), task, rounds=3), ran(FedAvg(), task, rounds=3)
    for model in models(made):
        torch.testing.assert_close(model, plain.server.model.flat)
    torch.testing.assert_close(made.server.model.flat, plain.server.model.flat)


@pytest.mark.parametrize("gossip", [1, 3])
def test_a_round_on_a_ring_by_hand(gossip):
    task, lr, rho = Six(), 0.1, 0.2
    made = ran(DFedSAM(lr=lr, epochs=2, batch=0, rho=rho, gossip=gossip, graph="ring"), task, rounds=2)
    x = [torch.zeros(2, dtype=torch.float64)] * 6
    for _ in range(2):
        for k in range(6):
            for _ in range(2):
                g = task.gradient(k, x[k])
                x[k] = x[k] - lr * task.gradient(k, x[k] + rho * g / g.norm())
        trained = sum(x) / 6
        for _ in range(gossip):
            x = [(x[k - 1] + x[k] + x[(k + 1) % 6]) / 3 for k in range(6)]
        assert torch.allclose(sum(x) / 6, trained, atol=1e-12), "mixing keeps the mean"
    assert torch.allclose(models(made), torch.stack(x), rtol=0, atol=1e-10)
    assert torch.allclose(made.server.model.flat, sum(x) / 6, rtol=0, atol=1e-10)


@pytest.mark.parametrize("buffers", ["average", "local"])
def test_the_ascent_goes_along_the_whole_gradient_and_moves_no_running_statistics(buffers):
    task = Toy(sizes=(25,), norm=True)
    made = ran(DFedSAM(epochs=2, rho=0.5), task, rounds=1, buffers=buffers)
    batches = list(node(made.site, 0).batches(10, epochs=2))
    by_hand = sharpness_aware(network(task, made.site.initial), task, batches, lr=0.05, rho=0.5)
    state = made.engine.states[0]
    reached = state["model"]
    if buffers == "local":
        reached = reached.merge(type(reached)(state[STATISTICS], reached.buffers.layout))
    assert close(reached, by_hand.state_dict())


def test_a_client_is_judged_by_its_own_model():
    made = ran(DFedSAM(graph="ring"), Toy(sizes=(12,) * 6), rounds=2)
    for k, state in made.engine.states.items():
        assert torch.equal(DFedSAM().predict(Client(made.site, k, state)).flat, state["model"].flat)
    assert len({round(float(state["model"].norm()), 5) for state in made.engine.states.values()}) > 1
    accuracy = [
        Client(made.site, k, {}).evaluate(state["model"])["accuracy"] for k, state in made.engine.states.items()
    ]
    assert made.record.final["personal_test_accuracy"] == pytest.approx(sum(accuracy) / 6)


def test_more_gossip_brings_models_closer():
    spread = [
        (w := models(ran(DFedSAM(gossip=q, graph="ring"), Toy(sizes=(12,) * 8), rounds=3))).sub(w.mean(0)).norm()
        for q in (1, 4)
    ]
    assert spread[1] < 0.7 * spread[0]


def test_without_a_degree_of_its_own_the_random_graph_has_ten_neighbours():
    def peers(method, rounds=1):
        lines = ran(method, Toy(sizes=(8,) * 16), rounds).record.ledger
        return {edge for line in lines if line["direction"] == "peer" for edge in map(tuple, line["edges"])}

    edges = peers(DFedSAM())
    assert edges == peers(DFedSAM(degree=10)) and 16 * 6 < len(edges) <= 16 * 10
    assert len(peers(DFedSAM(degree=2))) == 16 * 2 < len(peers(DFedSAM(degree=2), rounds=2)), "and others in each round"
    assert peers(DFedSAM(degree=15)) == {(a, b) for a in range(16) for b in range(16) if a != b}


def test_settings_without_effect_are_refused():
    with pytest.raises(UsageError, match="degree is 4 and graph ring; only graph=random has a degree"):
        DFedSAM(graph="ring", degree=4)
    for fields in ({"gossip": 0}, {"degree": 0}):
        with pytest.raises(UsageError, match="without, nobody hears of others"):
            DFedSAM(**fields)


def test_bytes_are_the_edges_and_two_gradients_a_step():
    made = ran(DFedSAM(gossip=2, graph="ring"), Toy(sizes=(12,) * 6), rounds=1)
    row, plain = made.record.metrics[0], ran(FedAvg(), Toy(sizes=(12,) * 6), rounds=1).record.metrics[0]
    assert row["gradient_steps"] == 2 * plain["gradient_steps"]
    model = 4 * made.site.bench.layout.size
    assert 2 * 12 * model < row["peer_bytes"] < 2 * 12 * (model + 200), "Q times each of the ring's edges, both ways"
    assert row["up_bytes"] == 0 and row["eval_up_bytes"] > 6 * model, "only measuring gathers models"
