"""FLoRA: exact products, fresh adapters, bytes."""

import pytest
import torch
from problems import node, ran

from manyhands.errors import UsageError
from manyhands.methods.foundation.flora import FLoRA, adapters, factor
from manyhands.nets.adapters import SCALE, LowRank
from manyhands.tasks.finetune import toy


def start(made, name):
    """What the first round sends: the task's head, and nothing merged yet."""
    empty = made.site.network(f"merging:{made.method.ranks[0]}").merge(made.site.initial.select("head.*"))
    return empty.select("head.*", f"{name}.update")


@pytest.mark.parametrize("ranks", [(4,), (1, 3, 2)])
def test_the_update_is_the_exact_mean_of_the_products(ranks):
    task, method = toy(), FLoRA(ranks=ranks)
    made = ran(method, task, rounds=1)
    (name,) = adapters(made.server.model.layout)
    expected, total = torch.zeros(8, 6, dtype=torch.float64), 110
    for k in range(4):
        reply = method.local(node(made.site, k), start(made, name))
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
    reply = made.method.local(client, start(made, name))
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
