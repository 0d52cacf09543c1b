"""DFedSAM: the ascent, the gossip, and what is charged to whom."""

import pytest
import torch
from problems import Quadratics, ran

from manyhands.methods.decentralized.dfedsam import DFedSAM
from manyhands.methods.optimize.fedavg import FedAvg
from manyhands.tasks.toy import Toy


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
    class Six(Quadratics):
        centers = torch.arange(12, dtype=torch.float64).view(6, 2).sin() * 3
        curvatures = Quadratics.curvatures.repeat(3, 1, 1)

    task, lr, rho = Six(sizes=(3,) * 6), 0.1, 0.2
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


def test_more_gossip_brings_models_closer():
    spread = [
        (w := models(ran(DFedSAM(gossip=q, graph="ring"), Toy(sizes=(12,) * 8), rounds=3))).sub(w.mean(0)).norm()
        for q in (1, 4)
    ]
    assert spread[1] < 0.7 * spread[0]


def test_bytes_are_the_edges_and_two_gradients_a_step():
    made = ran(DFedSAM(gossip=2, graph="ring"), Toy(sizes=(12,) * 6), rounds=1)
    row, plain = made.record.metrics[0], ran(FedAvg(), Toy(sizes=(12,) * 6), rounds=1).record.metrics[0]
    assert row["gradient_steps"] == 2 * plain["gradient_steps"]
    model = 4 * made.site.bench.layout.size
    assert 2 * 12 * model < row["peer_bytes"] < 2 * 12 * (model + 200), "Q times each of the ring's edges, both ways"
    assert row["up_bytes"] == 0 and row["eval_up_bytes"] > 6 * model, "only measuring gathers models"
