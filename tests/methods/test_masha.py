"""MASHA: extragradient without compression, exact solutions with it."""

import pytest
import torch
from problems import node, ran

from fedloom.errors import UsageError
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.masha import MASHA, operator
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.tasks.saddle import Saddle, operator_norm, toy


def distance(made):
    return float((made.server.model.flat - made.task.solution()).norm())


@pytest.mark.parametrize("variant", ["masha1", "masha2"])
def test_without_compression_it_is_extragradient(variant):
    task, gamma = toy(), 0.2
    made = ran(MASHA(gamma=gamma, keep=1.0, refresh=1.0, variant=variant), task, rounds=5)
    z = made.site.initial.flat.clone()

    def full(z):  # F of the mean over clients, which have as many samples each
        point = task.network()
        torch.nn.utils.vector_to_parameters(z, point.parameters())
        gu, gv = torch.autograd.grad(point(task.x).mean(), list(point.parameters()))
        return torch.cat([gu, -gv])

    for _ in range(5):
        z = z - gamma * full(z - gamma * full(z))
    torch.testing.assert_close(made.server.model.flat, z, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["bilinear", "regression"])
@pytest.mark.parametrize("variant", ["masha1", "masha2"])
def test_compressed_both_ways_it_reaches_the_solution_itself(variant, kind):
    task = Saddle(kind, width=4, sizes=(4,) * 3, reg=2.0)
    method = MASHA(gamma=0.1, keep=0.5, variant=variant)
    far, near = (ran(method, task, rounds=n) for n in (20, 120))
    assert distance(near) < 1e-5 and distance(near) < 1e-3 * distance(far), "no ball of noise is left"


FATES = (
    {"cohort": 2},
    {"lost": 0.2},
    {"cohort": 2, "lost": 0.2},
    {"cohort": 2, "overselect": 1.5},
    {"availability": "bernoulli:0.6"},
)


def test_increments_come_from_the_cohort_and_the_operator_from_everybody():
    gamma, rounds = 0.2, 4
    made = ran(MASHA(gamma=gamma, keep=1.0, refresh=1.0), toy(), rounds=rounds, cohort=2)
    clients, z = [node(made.site, k) for k in range(4)], made.site.initial
    for round in range(1, rounds + 1):
        full = sum((operator(client, z) for client in clients[1:]), operator(clients[0], z)) / 4
        half = z - gamma * full
        chosen = made.world.choose(round)
        assert len(chosen) == 2
        parts = [operator(clients[k], half) - operator(clients[k], z) for k in chosen]
        z = half - gamma * (parts[0] + parts[1]) / 2
    torch.testing.assert_close(made.server.model.flat, z.flat, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fate", (*FATES, {"lost": 0.4}), ids=str)
def test_the_server_knows_what_its_clients_know(fate):
    counts = set()
    spec = Spec.of({"method": MASHA(refresh=0.6).to_spec(), "partition": "given", "rounds": 8, "eval_every": 8, **fate})
    made = Experiment(spec, toy(), MASHA(refresh=0.6)).begin(None)
    for row in made.rounds():
        if row["round"] == 1:
            continue
        server, states = made.server, made.engine.states
        for k in server.insync:
            assert torch.equal(states[k]["z"].flat, server.model.flat) and torch.equal(
                states[k]["w"].flat, server.w.flat
            )
            assert torch.equal(states[k]["full"].flat, server.full.flat)
        own = [states[k]["own"] for k in range(4)]
        torch.testing.assert_close(server.full.flat, sum(one.flat for one in own) / 4, rtol=0, atol=1e-13)
        for k in {0, 1, 2, 3} - {*server.behind}:
            torch.testing.assert_close(own[k].flat, operator(node(made.site, k), server.w).flat, rtol=0, atol=1e-13)
        counts |= {len(server.insync), 10 + len(server.behind)}
    assert len(counts & {1, 2, 3}) and (10 in counts)


def test_descent_and_ascent_diverge_where_masha_does_not():
    task = Saddle("bilinear", width=4, reg=0.0)
    z = task.network()
    start = operator_norm(z, task.global_test())
    for _ in range(300):
        gu, gv = torch.autograd.grad(z(task.x).mean(), list(z.parameters()))
        with torch.no_grad():
            z.body.w -= 0.1 * gu
            z.head.w += 0.1 * gv
    assert operator_norm(z, task.global_test()) > 2 * start
    assert ran(MASHA(gamma=0.4, keep=1.0), task, rounds=80).record.final["global_test_solved"] > 0.5


def test_clients_hold_bitwise_what_the_server_holds():
    made = ran(MASHA(refresh=0.5), toy(), rounds=6)
    for state in made.engine.states.values():
        assert torch.equal(state["z"].flat, made.server.model.flat) and torch.equal(state["w"].flat, made.server.w.flat)
        assert torch.equal(state["full"].flat, made.server.full.flat)
    assert not torch.equal(made.server.model.flat, made.server.w.flat) or made.server.round < 6


def topped(whole):
    kept = whole.abs().topk(2).indices
    return torch.zeros_like(whole).index_put((kept,), whole[kept])


def test_error_feedback_loses_nothing():
    rounds, method = 5, MASHA(variant="masha2", refresh=1e-9)  # w never moves
    made = ran(method, toy(), rounds=rounds)
    site, mean = made.site, torch.zeros(8, dtype=torch.float64)
    z = w = made.site.initial
    full = made.server.full
    clients = [node(site, k) for k in range(4)]
    own = [operator(client, w) for client in clients]
    sent, errors = torch.zeros_like(mean), [torch.zeros_like(mean)] * 4
    server_error = torch.zeros_like(mean)
    for _ in range(rounds):
        half = z - 1e-9 * (z - w) - method.gamma * full
        increments = [method.gamma * (operator(c, half) - o).flat for c, o in zip(clients, own, strict=True)]
        mean = mean + sum(increments) / 4
        parts = []
        for k in range(4):
            whole = increments[k] + errors[k]
            part = topped(whole)
            errors[k] = whole - part
            parts.append(part)
        whole = server_error + sum(parts) / 4
        part = topped(whole)
        server_error, sent = whole - part, sent + part
        z = half - type(half)(part, half.layout)
    torch.testing.assert_close(sum(errors) / 4 + server_error + sent, mean)
    torch.testing.assert_close(made.server.model.flat, z.flat, rtol=0, atol=1e-10)
    torch.testing.assert_close(made.server.error.flat, server_error, rtol=0, atol=1e-10)


def test_the_compressed_mean_is_unbiased():
    client = node(ran(MASHA(), toy(), rounds=1).site, 0)
    flat, zero = torch.arange(1.0, 9.0, dtype=torch.float64), client.initial.zeros_like()
    drawn = torch.stack([MASHA(keep=0.25).squeezed(flat, zero, client)[0].dense() for _ in range(1500)])
    assert ((drawn != 0).sum(1) == 2).all()
    torch.testing.assert_close(drawn.mean(0), flat, rtol=0.25, atol=0)


def test_compression_saves_bytes_and_full_exchanges_are_counted():
    little, much = (ran(MASHA(keep=keep), Saddle(width=50), rounds=8).record.metrics for keep in (0.05, 1.0))
    assert sum(row["up_bytes"] for row in little[1:]) < 0.3 * sum(row["up_bytes"] for row in much[1:])


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match=r"masha.keep is 0.0"):
        MASHA(keep=0.0)
    from fedloom.tasks.toy import Toy

    with pytest.raises(UsageError, match="masha needs a problem of the kind saddle"):
        ran(MASHA(), Toy(), rounds=1)
    assert ran(FedAvg(epochs=1, lr=0.01), toy(), rounds=2).record.final["global_test_accuracy"] is None


@pytest.mark.parametrize("fate", FATES[2:], ids=str)
@pytest.mark.parametrize("variant", ["masha1", "masha2"])
def test_it_reaches_the_solution_itself_whoever_takes_part_and_is_heard(variant, fate):
    made = ran(MASHA(gamma=0.2, keep=0.5, variant=variant), toy(), rounds=250, **fate)
    assert distance(made) < 1e-12
