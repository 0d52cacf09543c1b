"""Fed-SB: a small matrix between two fixed ones, averaged exactly."""

import pytest
import torch
from problems import node, ran
from torch import nn
from torch.nn import functional as F

from fedloom.boundary.pipeline import Pipeline
from fedloom.errors import UsageError
from fedloom.methods.foundation.fed_sb import FedSB
from fedloom.nets.adapters import Core, Whole, adapted, cored, whole
from fedloom.random import seeded
from fedloom.runs.rehearsal import played, rehearsed
from fedloom.runs.spec import Spec
from fedloom.site import Site
from fedloom.tasks.finetune import toy
from fedloom.tasks.toy import toy_for

SIZES = (30, 20, 25, 35)
(LAYER,) = ("body.0",)


def parts(w):
    """B [out, r], R [r, r] and A [r, in] of the toy's one layer."""
    return (w[f"{LAYER}.{name}.weight"] for name in ("out", "core", "into"))


def update(w):
    """B R A, [out, in]."""
    b, r, a = parts(w)
    return b @ r @ a


def scores(site, x, d, head, bias):
    """What the toy's frozen network with its layer's weight moved by d puts out; without the library."""
    base = site.bench.net.body[0].base
    return (x @ (base.weight + d).T + base.bias).relu() @ head.T + bias


def slope(site, x, y, d):
    """The gradient of the mean loss by the layer's weight at d, with the first head."""
    d = d.clone().requires_grad_()
    start = site.initial
    loss = F.cross_entropy(scores(site, x, d, start["head.weight"], start["head.bias"]), y)
    return torch.autograd.grad(loss, d)[0]


def test_it_begins_with_the_best_rank_r_part_of_a_signed_step_on_the_summed_gradient():
    task = toy(SIZES)
    method = FedSB(rank=3, start=0.07, samples=12)
    begun, site = begun_by(method, task), Site(task, 0)
    total = torch.zeros(8, 6)
    for k in range(4):
        reply = begun["replies"][k]
        x, y = begun["batches"][k]
        assert len(y) == reply["n"] == 12
        mean = slope(site, x, y, torch.zeros(8, 6))
        torch.testing.assert_close(reply["grad"][f"{LAYER}.update.weight"], mean, rtol=1e-4, atol=1e-6)
        total += len(y) * mean
    u, s, v = torch.linalg.svd(-0.07 * total.sign(), full_matrices=False)
    torch.testing.assert_close(update(begun["model"]), (u[:, :3] * s[:3]) @ v[:3], rtol=1e-4, atol=1e-6)
    b, r, a = parts(begun["model"])
    torch.testing.assert_close(b.T @ b, torch.eye(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(a @ a.T, torch.eye(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(r, s[:3].diag(), rtol=1e-4, atol=1e-6)
    for name in ("head.weight", "head.bias"):
        assert torch.equal(begun["model"][name], site.initial[name])


def begun_by(method, task):
    """The model after the first round, and what each client was asked and has answered."""
    seen = {"replies": {}, "batches": {}}
    plain = FedSB.calibrate

    def calibrate(self, client):
        drawn = client.batches

        def kept(*args, **kwargs):
            for batch in drawn(*args, **kwargs):
                seen["batches"][client.id] = batch
                yield batch

        client.batches = kept
        seen["replies"][client.id] = plain(self, client)
        return seen["replies"][client.id]

    calibrate.__client__ = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FedSB, "calibrate", calibrate)
        seen["model"] = ran(method, task, rounds=1).server.model
    return seen


def test_small_clients_count_by_their_samples_in_the_first_gradient():
    task = toy((40, 3))
    begun = begun_by(FedSB(rank=6, start=0.1, samples=30), task)
    assert [len(begun["batches"][k]) for k in (0, 1)] == [30, 3]
    site = Site(task, 0)
    means = [slope(site, *begun["batches"][k], torch.zeros(8, 6)) for k in (0, 1)]
    summed, plain = (n * means[0] + m * means[1] for n, m in ((30, 3), (1, 1)))
    assert (summed.sign() != plain.sign()).any()
    torch.testing.assert_close(update(begun["model"]), -0.1 * summed.sign(), rtol=1e-4, atol=1e-6)


def test_the_gradient_by_the_core_is_the_best_that_the_two_fixed_matrices_can_do():
    made = ran(FedSB(rank=2), toy(SIZES), rounds=3)
    client, model = node(made.site, 0), made.server.model
    batch = client.data.all()
    found = client.grad(model, batch)[f"{LAYER}.core.weight"]
    d = update(model).clone().requires_grad_()
    out = scores(made.site, batch.x, d, model["head.weight"], model["head.bias"])
    (g,) = torch.autograd.grad(F.cross_entropy(out, batch.y), d)
    b, _, a = parts(model)
    torch.testing.assert_close(found, b.T @ g @ a.T, rtol=1e-4, atol=1e-6)
    nearest = (g - b @ found @ a).norm()
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = found + 0.1 * torch.randn(2, 2, generator=draw)
        assert (g - b @ other @ a).norm() > nearest


def test_a_round_is_exact_and_by_hand():
    task = toy((20, 40, 30, 10))
    method = FedSB(0.3, epochs=2, batch=10, rank=3)
    before, after = (ran(method, task, rounds=n) for n in (2, 3))
    b, r, a = parts(before.server.model)
    products, heads = [], []
    for k in range(4):
        held = [
            t.clone().requires_grad_()
            for t in (r, before.server.model["head.weight"], before.server.model["head.bias"])
        ]
        for x, y in node(before.site, k, round=3).batches(10, 2):
            loss = F.cross_entropy(scores(before.site, x, b @ held[0] @ a, *held[1:]), y)
            slopes = torch.autograd.grad(loss, held)
            held = [(t - 0.3 * g).detach().requires_grad_() for t, g in zip(held, slopes, strict=True)]
        products.append((b @ held[0] @ a).detach())
        heads.append(held[1].detach())
    mean = sum(products) / 4
    torch.testing.assert_close(update(after.server.model), mean, rtol=1e-4, atol=1e-5)
    assert (mean - update(before.server.model)).norm() > 0.05
    torch.testing.assert_close(after.server.model["head.weight"], sum(heads) / 4, rtol=1e-4, atol=1e-5)
    for name in ("out", "into"):
        entry = f"{LAYER}.{name}.weight"
        assert torch.equal(after.server.model[entry], before.server.model[entry])


def test_a_round_costs_the_core_and_the_head_however_many_clients_and_the_fixed_matrices_go_once():
    for count, rank in ((2, 4), (6, 4), (3, 6)):
        made = ran(FedSB(rank=rank), toy((20,) * count), rounds=4)
        size, fixed = 4 * (rank * rank + 8 * 3 + 3), 4 * rank * (8 + 6)
        lines = [line for line in made.record.ledger if line["kind"] == "train"]
        for way, field in (("up", "delta"), ("down", "model")):
            found = {line["bytes"] for line in lines if (line["direction"], line["field"]) == (way, field)}
            assert len(found) == 1 and 0 <= found.pop() - size < 120
        bases = [line["bytes"] for line in lines if line["field"] == "bases"]
        assert 0 <= bases[0] - fixed < 150 and all(size < 50 for size in bases[1:])


def test_until_somebody_has_replied_the_model_is_the_frozen_one():
    task = toy(SIZES)
    made = ran(FedSB(), task, rounds=3, lost=1.0)
    assert not made.server.begun and torch.equal(made.server.model.flat, made.site.nets["core"].flat)
    x = task.global_test().x
    expected = made.site.bench.copy(made.site.initial.layout.views(made.site.initial.flat)).eval()(x)
    torch.testing.assert_close(made.server.scores(made.server.model, x), expected)


def test_the_layers_by_hand():
    draw = torch.Generator().manual_seed(0)
    base, x = nn.Linear(5, 3).requires_grad_(False), torch.randn(4, 5, generator=draw)
    core, full = Core(base, 3, 5, 2), Whole(base, 3, 5)
    assert torch.equal(core(x), base(x)) and torch.equal(full(x), base(x))
    with torch.no_grad():
        for value in (core.out.weight, core.core.weight, core.into.weight, full.update.weight):
            value.copy_(torch.randn(value.shape, generator=draw))
    d = core.out.weight @ core.core.weight @ core.into.weight
    torch.testing.assert_close(core(x), base(x) + x @ d.T)
    torch.testing.assert_close(full(x), base(x) + x @ full.update.weight.T)
    assert [name for name, p in core.named_parameters() if p.requires_grad] == ["core.weight"]
    assert [name for name, p in full.named_parameters() if p.requires_grad] == ["update.weight"]


def test_pefts_adapters_are_replaced_too():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=2, n_head=2)
    asked = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    x = torch.arange(6)[None]
    for make in (whole, lambda net: cored(net, 2)):
        with seeded(0, "gpt2"):
            plain = transformers.GPT2Model(config).eval()
        expected = plain(x).last_hidden_state
        net = make(peft.inject_adapter_in_model(asked, plain)).eval()
        assert not adapted(net) and len([m for m in net.modules() if isinstance(m, Core | Whole)]) == 2
        torch.testing.assert_close(net(x).last_hidden_state, expected)
        first = next(m for m in net.modules() if isinstance(m, Core | Whole))
        states = torch.randn(1, 3, 8)
        assert first(states).shape == (1, 3, 24)


def test_a_rank_above_that_of_a_layer_is_refused_and_so_are_buffers_at_home():
    with pytest.raises(UsageError, match=r"adapters of rank 7 for body.0, a layer of \[8, 6\]; take a smaller rank"):
        ran(FedSB(rank=7), toy(), rounds=1)
    with pytest.raises(UsageError, match="fed_sb does not go with buffers=local"):
        ran(FedSB(), toy(), rounds=1, buffers="local")


@pytest.mark.parametrize("asked", [{"optimizer": "adam"}, {"dp": "client:noise=1,clip=1"}], ids=str)
def test_a_rank_for_which_the_rehearsals_problem_is_too_small_is_not_refused(asked):
    task, method = toy_for(("finetune",)), FedSB(rank=16)
    assert played(FedSB(), task, None).whole and not played(method, task, None).whole
    spec = Spec.of({"method": method.to_spec(), "partition": "given", **asked})
    assert rehearsed(method, Pipeline.of(spec, method, task)).stages
