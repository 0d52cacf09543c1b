"""FLoRA: exact products, fresh adapters, bytes."""

import pytest
import torch
from problems import node, ran
from torch.nn import functional as F

from fedloom.errors import UsageError
from fedloom.methods.foundation.flora import FLoRA, adapters, factor, heads, updates
from fedloom.nets.adapters import SCALE, LowRank
from fedloom.tasks.finetune import toy


def first(made, client):
    """A client's reply in the first round: it is sent the task's head, and nothing was merged yet."""
    return made.method.local(client, head=heads(made.site.initial), version=0, news={"stacks": []})


@pytest.mark.parametrize("ranks", [(4,), (1, 3, 2)])
def test_the_update_is_the_exact_mean_of_the_products(ranks):
    task, method = toy(), FLoRA(ranks=ranks)
    made = ran(method, task, rounds=1)
    (name,) = adapters(made.server.model.layout)
    expected, total = torch.zeros(8, 6, dtype=torch.float64), 110
    for k in range(4):
        reply = first(made, node(made.site, k))
        a, b = (t.double() for t in reply["factors"][name])
        assert len(a) == b.shape[1] == ranks[k % len(ranks)]
        expected += reply["n"] / total * SCALE * b @ a
    torch.testing.assert_close(made.server.model[f"{name}.update"].double(), expected, rtol=1e-5, atol=1e-6)
    assert expected.norm() > 1e-2


def test_adapters_begin_at_zero_and_the_update_outgrows_the_ranks():
    made = ran(FLoRA(ranks=(1,)), toy(), rounds=4)
    (name,) = adapters(made.server.model.layout)
    assert (made.server.model[factor(made.server.model.layout, name, "lora_B")] == 0).all()
    assert torch.linalg.matrix_rank(made.server.model[f"{name}.update"], rtol=1e-4) > 1


def test_a_lone_client_gives_its_adapter_merged():
    task = toy(sizes=(30,))
    made = ran(FLoRA(), task, rounds=1)
    client = node(made.site, 0)
    (name,) = adapters(made.server.model.layout)
    reply = first(made, client)
    fresh = client.network("merging:4").clone()
    for part, value in zip(("lora_A", "lora_B"), reply["factors"][name], strict=True):
        fresh[factor(fresh.layout, name, part)].copy_(value)
    for entry, value in reply["head"].items():
        fresh[entry].copy_(value)
    torch.testing.assert_close(
        client.scores(fresh, task.x), client.scores(made.server.model, task.x), rtol=1e-4, atol=1e-5
    )


def test_uploads_do_not_grow_with_the_clients():
    sizes = []
    for count in (2, 6):
        made = ran(FLoRA(), toy(sizes=(20,) * count), rounds=1)
        sizes.append({line["bytes"] for line in made.record.ledger if line["field"] == "factors"})
    assert sizes[0] == sizes[1] and len(sizes[0]) == 1


def down(made, round):
    """Bytes that each client is sent of what was merged."""
    wanted = {"field": "news", "kind": "train", "direction": "down", "round": round}
    (line,) = [line for line in made.record.ledger if wanted.items() <= line.items()]
    return line["bytes"]


def test_stacks_come_down_once_and_grow_with_the_clients():
    for count in (1, 2, 3):
        made = ran(FLoRA(ranks=(1,)), toy(sizes=(20,) * count), rounds=3)
        assert down(made, 1) < 20
        for round in (2, 3):
            assert 0 < down(made, round) - 4 * count * (6 + 8) < 60


def test_a_client_has_the_servers_update_bit_by_bit():
    class Watched(FLoRA):
        def round(self, server, cohort):
            seen[server.version] = updates(server.model) if server.version else None
            super().round(server, cohort)

    for settings in ({}, {"cohort": 2}, {"cohort": 2, "lost": 0.4}):
        seen = {}
        made = ran(Watched(ranks=(1,)), toy(), rounds=8, **settings)
        for k, state in made.engine.states.items():
            for name, update in seen[made.server.holds[k]].items():
                assert torch.equal(update, state["merged"][name])
        if settings:
            assert len(set(made.server.holds.values())) > 1


def test_who_has_missed_too_much_is_sent_the_whole_update():
    made = ran(FLoRA(ranks=(1,)), toy(), rounds=6)  # a stack of four clients has 4 * 14 numbers, the update 48
    assert made.server.version == 6 and made.server.stacks == []
    few = ran(FLoRA(ranks=(1,)), toy(sizes=(30,)), rounds=6)
    assert len(few.server.stacks) == 3
    fresh, late = few.method.news(few.server, 99), {"stacks": few.server.stacks[-2:]}
    (name,) = fresh["whole"]
    assert torch.equal(fresh["whole"][name], few.server.model[f"{name}.update"])
    few.server.holds = {0: 4}
    sent = few.method.news(few.server, 0)
    assert sent.keys() == {"stacks"} and len(sent["stacks"]) == 2
    client = node(few.site, 0)
    client.state["merged"] = {name: torch.zeros(8, 6)}
    merged = few.method.merged(client, 6, late, {})
    (a, b), (c, d) = (stack[name] for stack in few.server.stacks[-2:])
    assert torch.equal(merged[name], SCALE * b @ a + SCALE * d @ c)


def test_a_low_rank_layer_by_hand():
    layer = LowRank(torch.nn.Linear(5, 3), 2)
    x = torch.randn(4, 5)
    torch.testing.assert_close(layer(x), layer.base(x))
    with torch.no_grad():
        layer.lora_B.weight.normal_()
        layer.get_buffer("update").normal_()
    delta = SCALE * layer.lora_B.weight @ layer.lora_A.weight + layer.get_buffer("update")
    torch.testing.assert_close(layer(x), layer.base(x) + x @ delta.T)
    assert not layer.base.weight.requires_grad


def test_ranks_without_a_sense_are_refused():
    with pytest.raises(UsageError, match=r"flora\.ranks are"):
        FLoRA(ranks=(4, 0))


def test_the_merged_update_cannot_stay_at_home():
    with pytest.raises(UsageError, match="flora does not go with buffers=local"):
        ran(FLoRA(), toy(), rounds=1, buffers="local")


def test_heads_are_averaged_by_samples_and_trained_from_the_servers():
    made = ran(FLoRA(), toy(), rounds=2)
    before = ran(FLoRA(), toy(), rounds=1)
    weight = {}
    for k, n in enumerate((30, 20, 25, 35)):
        client = node(before.site, k, round=2)
        news = before.method.news(before.server, k)
        reply = before.method.local(client, head=heads(before.server.model), version=1, news=news)
        for name, value in reply["head"].items():
            weight[name] = weight.get(name, 0) + n / 110 * value
    assert weight
    for name, value in weight.items():
        torch.testing.assert_close(made.server.model[name], value)
        assert (value - before.server.model[name]).norm() > 1e-3


def test_every_round_and_client_draws_an_a_of_its_own_within_kaimings_bound():
    made, method = ran(FLoRA(), toy(), rounds=1), FLoRA(lr=1e-9, ranks=(40, 8))
    made.site.nets = method.networks(made.site)
    (name,), start = adapters(made.server.model.layout), {"head": heads(made.site.initial), "version": 0}
    drawn = {}
    for k, round in ((0, 1), (1, 1), (2, 1), (0, 2)):
        client = node(made.site, k, round)
        a, b = method.local(client, **start, news={"stacks": []})["factors"][name]
        assert b.abs().max() < 1e-6 and a.shape == ((40, 8)[k % 2], 6)
        assert -(6**-0.5) <= a.min() < -0.3 and 0.3 < a.max() <= 6**-0.5
        drawn[k, round] = a
    assert not torch.allclose(drawn[0, 1], drawn[0, 2], atol=0.1)
    assert not torch.allclose(drawn[0, 1], drawn[2, 1], atol=0.1)


def test_a_client_starts_from_what_was_merged_and_the_servers_head():
    made, method = ran(FLoRA(), toy(), rounds=1), FLoRA(batch=0, lr=0.3)
    client, draw = node(made.site, 1, round=2), torch.Generator().manual_seed(0)
    (name,) = adapters(made.server.model.layout)
    merged = torch.randn(8, 6, generator=draw)
    head = {entry: torch.randn(value.shape, generator=draw) for entry, value in heads(made.site.initial).items()}
    reply = method.local(client, head=head, version=3, news={"whole": {name: merged}})
    net = client.net(method.network(client, 1))
    a, b = reply["factors"][name]
    net.body[0].get_buffer("update").copy_(merged)
    net.body[0].lora_A.weight.data.copy_(a)  # where B is 0, A does not move
    for entry, value in head.items():
        net.get_parameter(entry).data.copy_(value)
    trained = [net.body[0].lora_B.weight, *(net.get_parameter(entry) for entry in head)]
    for param in trained:
        param.requires_grad_()
    of_b, *of_head = torch.autograd.grad(F.cross_entropy(net(client.data.x), client.data.y), trained)
    assert b.norm() > 1e-2
    torch.testing.assert_close(b, -0.3 * of_b, rtol=1e-4, atol=1e-6)
    for (entry, value), g in zip(head.items(), of_head, strict=True):
        torch.testing.assert_close(reply["head"][entry], value - 0.3 * g, rtol=1e-4, atol=1e-6)
