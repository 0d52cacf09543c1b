"""FedKSeed: replay, span, bytes."""

import pytest
import torch
from problems import node, ran

from manyhands.errors import UsageError
from manyhands.methods.foundation.fedkseed import FedKSeed, noise
from manyhands.tasks.toy import Toy

LONE = Toy(sizes=(30,))


def up(made, field):
    lines = [
        li for li in made.record.ledger if li["field"] == field and li["direction"] == "up" and li["kind"] == "train"
    ]
    return {li["bytes"] for li in lines}


def test_the_server_rebuilds_the_model_of_a_lone_client():
    method = FedKSeed(steps=12, seeds=5)
    made = ran(method, LONE, rounds=1)
    client, w = node(made.site, 0), made.site.initial.params.flat.double()
    reply = method.local(client, torch.zeros(5), None, made.server.master)
    assert len(reply["index"]) == 12
    for k, g in zip(reply["index"].tolist(), reply["slope"].tolist(), strict=True):
        w = w - method.lr * g * noise(made.server.master, k, w)
    torch.testing.assert_close(made.server.model.flat.double(), w, rtol=1e-5, atol=1e-6)
    back = method.rebuilt(made.server.start, made.server.coefficients.float(), made.server.master)
    assert torch.equal(back.flat, made.server.model.flat)


def test_a_slope_is_the_gradient_along_the_noise():
    method = FedKSeed(steps=1, batch=0, seeds=3)
    made = ran(method, LONE, rounds=1)
    reply = method.local(node(made.site, 0), torch.zeros(3), None, made.server.master)
    client = node(made.site, 0)
    z = noise(made.server.master, int(reply["index"]), made.site.initial.params.flat)
    expected = float(client.grad(client.initial, client.data.all()).params.flat @ z)
    assert float(reply["slope"]) == pytest.approx(expected, rel=2e-2, abs=2e-2)


def test_all_models_lie_in_the_span_of_the_noises():
    steps = []
    for rounds in (1, 2, 3, 4):
        made = ran(FedKSeed(seeds=2, steps=5), Toy(), rounds=rounds)
        steps.append((made.server.model - made.site.initial).flat.double())
    basis = torch.stack([noise(made.server.master, k, steps[0]) for k in range(2)], 1)
    for step in steps:
        inside = basis @ torch.linalg.lstsq(basis, step[:, None]).solution
        assert float((inside[:, 0] - step).norm()) < 1e-5 * float(step.norm())
    assert torch.linalg.matrix_rank(torch.stack(steps), rtol=1e-4) <= 2


def test_bytes_are_4_k_down_and_6_tau_up_whatever_the_model():
    class Large(Toy):
        def network(self):
            return self.build("mlp:500,8")

    method = FedKSeed(seeds=4096, steps=200)
    small, large = (ran(method, task, rounds=1) for task in (Toy(sizes=(9, 9)), Large(sizes=(9, 9))))
    assert len(large.site.initial) > 50 * len(small.site.initial)
    totals = [made.record.metrics[0]["up_bytes"] + made.record.metrics[0]["down_bytes"] for made in (small, large)]
    assert totals[0] == totals[1]
    a_client = totals[0] / 2
    assert 4 * 4096 + 6 * 200 < a_client < 4 * 4096 + 6 * 200 + 250 < 18_000
    assert up(small, "index") == {next(iter(up(large, "index")))} and next(iter(up(small, "slope"))) < 4 * 200 + 30


def test_pro_draws_what_has_had_large_slopes():
    method = FedKSeed(pro=True, seeds=4)
    even = method.odds(torch.stack([torch.ones(4), torch.ones(4)]))
    torch.testing.assert_close(even, torch.full((4,), 0.25))
    odds = method.odds(torch.tensor([[0.0, 5.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]]))
    assert odds.argmax() == 1 and float(odds.max() / odds.min()) == pytest.approx(2.71828, rel=1e-3)
    made = ran(FedKSeed(pro=True, seeds=4, steps=10), Toy(), rounds=2)
    assert made.server.past[1].sum() == 4 + 2 * 4 * 10


@pytest.mark.parametrize("fields", [{"seeds": 0}, {"eps": 0.0}])
def test_fields_without_a_sense_are_refused(fields):
    with pytest.raises(UsageError, match="fedkseed"):
        FedKSeed(**fields)


def test_clients_count_by_their_samples():
    task, method = Toy(sizes=(10, 90)), FedKSeed(steps=7, seeds=16)
    made = ran(method, task, rounds=1)
    expected = torch.zeros(16, dtype=torch.float64)
    for k, share in enumerate((0.1, 0.9)):
        reply = method.local(node(made.site, k), torch.zeros(16), None, made.server.master)
        expected.index_add_(0, reply["index"].long(), share * reply["slope"].double())
    torch.testing.assert_close(made.server.coefficients, expected)
