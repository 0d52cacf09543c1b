"""FED-PUB: the row of similarities, the loss of weights and masks, and who mixes with whom."""

from dataclasses import replace

import pytest
import torch
from problems import node, ran
from torch.nn import functional as F

from fedloom.errors import UsageError
from fedloom.message import Seed
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.structure.fed_pub import FedPub, attention, masked, matrices, random_graph
from fedloom.tasks.graph import toy
from fedloom.tasks.toy import Toy


def unmasked(**fields):
    """Without what pulls weights and masks beside the loss."""
    return FedPub(l1=0.0, l2=0.0, weight_decay=0.0, **fields)


def test_rows_are_shares_and_oneself_comes_first():
    e = torch.randn(5, 8)
    e[3] = e[1]
    shares = attention(e, 3.0)
    torch.testing.assert_close(shares.sum(1), torch.ones(5))
    torch.testing.assert_close(shares[1], shares[3])
    assert (shares.diagonal() >= shares.max(1).values - 1e-6).all()
    cosine = float(F.cosine_similarity(e[0], e[2], dim=0))
    own = float(shares[0, 2] / shares[0, 0])
    assert own == pytest.approx(torch.tensor(3.0 * (cosine - 1)).exp().item(), rel=1e-4)
    assert torch.equal(attention(e, 0.0), torch.full((5, 5), 0.2))
    lonely = attention(e[[0, 1, 2]], 1e9)
    assert torch.equal(lonely, torch.eye(3))


def test_without_sharpness_everybody_gets_the_plain_mean():
    made = ran(unmasked(tau=0.0), toy(), rounds=1)
    starts = torch.stack([made.server.starts[k].flat for k in range(4)])
    assert torch.equal(starts, starts[:1].expand_as(starts))
    assert not torch.allclose(starts[0], made.server.model.flat), "the global model weighs by samples"


def test_very_sharp_everybody_gets_its_own_back():
    made = ran(unmasked(tau=1e9, epochs=1), toy(), rounds=1)
    for k in range(4):
        # One step of Adam moves every coordinate that has a gradient by its rate, whatever the mask.
        moved = made.server.starts[k].flat - made.site.initial.flat
        client = node(made.site, k)
        g = client.grad(made.site.initial, client.data.all())
        clear = g.flat.abs() > 1e-5
        torch.testing.assert_close(moved[clear], -0.01 * g.flat.sign()[clear], rtol=0.01, atol=1e-5)
    assert not torch.equal(made.server.starts[0].flat, made.server.starts[1].flat)


def test_the_mix_by_hand():
    fields = {"l1": 0.02, "l2": 0.0, "epochs": 25, "lr": 0.05}
    made = ran(FedPub(tau=3.0, **fields), toy(), rounds=1)
    alone = ran(FedPub(tau=1e9, **fields), toy(), rounds=1)
    pairs = [(made.engine.states[k], alone.server.starts[k]) for k in range(4)]
    assert all((matrices(state["model"]).flat == 0).any() for state, _ in pairs), "some masks are pruned"
    graph = random_graph(made.server.proxy, 5, made.task.graphs.x)
    e = torch.stack([node(made.site, 0).net(state["model"]).body.embed(*graph).mean(0) for state, _ in pairs])
    mixed = attention(e, 3.0) @ torch.stack([w.flat for _, w in pairs])
    torch.testing.assert_close(torch.stack([made.server.starts[k].flat for k in range(4)]), mixed)


def test_weights_and_masks_against_autograd():
    task, method = toy(), FedPub(lr=0.02, epochs=4, l1=1e-2, l2=0.3, tau=2.0)
    made = ran(method, task, rounds=1)
    again = ran(method, task, rounds=2)
    start = made.server.starts[1]
    net, state = task.network(), made.engine.states[1]
    w = {name: start[name].clone().requires_grad_() for name in start}
    m = {name: state["mask"][name].clone().requires_grad_() for name in state["mask"]}
    assert set(w) - set(m) == {"body.first.bias", "body.second.bias", "head.bias"}
    adam = torch.optim.Adam([*w.values(), *m.values()], lr=0.02, weight_decay=1e-6)
    for values, part in ((w, "w"), (m, "mask")):
        moments = state["moments"][part]
        for name, value in values.items():
            adam.state[value] = {
                "step": torch.tensor(float(moments["steps"])),
                "exp_avg": moments["first"][name].clone(),
                "exp_avg_sq": moments["second"][name].clone(),
            }
    batch = task.data(1, "train").all()
    for _ in range(4):
        adam.zero_grad()
        used = {name: value * m[name] if name in m else value for name, value in w.items()}
        loss = F.cross_entropy(torch.func.functional_call(net, used, (batch.x,)), batch.y)
        loss = loss + 1e-2 * sum(v.abs().sum() for v in m.values())
        (loss + 0.3 * sum((v - start[name]).square().sum() for name, v in w.items())).backward()
        adam.step()
    for name in again.engine.states[1]["mask"]:
        torch.testing.assert_close(again.engine.states[1]["mask"][name], m[name].detach(), rtol=1e-3, atol=1e-4)
    pruned = {n: torch.where(m[n].abs() >= 1e-2, v * m[n], 0.0) if n in m else v for n, v in w.items()}
    for name, value in pruned.items():
        torch.testing.assert_close(
            again.engine.states[1]["model"][name],
            value.detach(),
            rtol=1e-3,
            atol=1e-4,
            msg=lambda s, n=name: f"{n}: {s}",
        )


def test_the_first_round_has_no_pull_to_what_came():
    plain, pulled = (ran(FedPub(l2=l2), toy(), rounds=1) for l2 in (0.0, 5.0))
    assert torch.equal(plain.server.model.flat, pulled.server.model.flat)
    assert not torch.equal(
        ran(FedPub(l2=0.0), toy(), rounds=2).server.model.flat, ran(FedPub(l2=5.0), toy(), rounds=2).server.model.flat
    )


def test_small_masks_are_pruned_and_the_personal_model_is_judged():
    made = ran(FedPub(l1=0.02, epochs=20, lr=0.05), toy(), rounds=3)
    state = made.engine.states[0]
    small = state["mask"].flat.abs() < 0.02
    assert small.any() and not small.all()
    assert torch.equal(matrices(state["model"]).flat == 0, small)
    client = node(made.site, 0)
    client.state.update(state)
    assert made.method.predict(client, made.server.model) is state["model"]
    assert torch.equal(made.method.predict(node(made.site, 0), made.server.model).flat, made.server.model.flat), (
        "who never trained uses the mean"
    )


def test_masks_scale_matrices_only():
    made = ran(FedPub(), toy(), rounds=1)
    w = made.server.model
    half = masked(w, 0.5 * matrices(w).map(torch.ones_like))
    for name in w:
        expected = w[name] if name.endswith("bias") else 0.5 * w[name]
        assert torch.equal(half[name], expected)


def test_the_random_graph_is_one_for_all_and_has_no_edge_across():
    like = torch.zeros(1, 7)
    (x, a), (again, b) = (random_graph(Seed(5), 3, like, size=40) for _ in range(2))
    assert torch.equal(x, again) and torch.equal(a.to_dense(), b.to_dense()) and x.shape == (120, 7)
    joined = a.to_dense() > 0
    blocks = torch.block_diag(*[torch.ones(40, 40)] * 3).bool()
    assert not (joined & ~blocks).any() and torch.equal(joined, joined.T) and joined.diagonal().all()
    degrees = joined.view(3, 40, 120).sum((1, 2)) / 40 - 1
    assert ((degrees > 2.5) & (degrees < 5.5)).all(), "39 others, a tenth of them joined, in every community"
    torch.testing.assert_close(a.to_dense(), joined / (joined.sum(0) * joined.sum(1)[:, None]).sqrt())


def test_what_a_client_says_of_itself_depends_on_its_model_alone():
    task = toy()
    site = ran(FedPub(), task, rounds=1).site
    net = node(site, 0).net(site.initial)
    x, a = random_graph(Seed(5), 2, task.graphs.x, size=30)
    order = torch.randperm(60)
    turned = a.to_dense()[order][:, order].to_sparse()
    torch.testing.assert_close(net.body.embed(x[order], turned).mean(0), net.body.embed(x, a).mean(0))


def test_masks_stay_and_the_embedding_is_all_that_comes_on_top():
    task = toy()
    pub, plain = (ran(method, task, rounds=1) for method in (FedPub(), FedAvg()))
    width = 8
    extra = pub.record.metrics[0]["up_bytes"] - plain.record.metrics[0]["up_bytes"]
    assert 4 * (4 * width) <= extra <= 4 * (4 * width + 40), "four clients, 8 numbers of 4 bytes and a field's name"


def test_clients_of_one_group_mix_more_with_each_other():
    # Two planted groups that name the classes of the same features otherwise: 0, 2, 4 and 1, 3, 5.
    made = ran(FedPub(lr=0.02, epochs=10, l1=0.0, l2=0.0, tau=5.0), toy(sizes=(40,) * 6), rounds=6)
    models = {k: made.server.starts[k] for k in range(6)}
    same = [(models[a] - models[b]).norm() for a in range(6) for b in range(a) if a % 2 == b % 2]
    other = [(models[a] - models[b]).norm() for a in range(6) for b in range(a) if a % 2 != b % 2]
    assert max(same) < min(other)


def test_it_beats_one_model_where_groups_disagree():
    task = toy(sizes=(12,) * 6)
    own, one = (ran(method, task, rounds=12).record.final for method in (FedPub(epochs=5), FedAvg(lr=0.1)))
    assert own["personal_test_accuracy"] > one["personal_test_accuracy"] + 0.1


def test_who_is_away_keeps_its_start_and_a_newcomer_gets_the_mean():
    one, two = (ran(unmasked(tau=1e9), toy(), rounds=rounds, cohort=2) for rounds in (1, 2))
    came = sorted(one.server.starts)
    n = torch.tensor([float(len(one.task.data(k, "train"))) for k in came])
    assert len(came) == 2 and n[0] != n[1]
    mean = sum(share * one.server.starts[k].flat for k, share in zip(came, n / n.sum(), strict=True))
    torch.testing.assert_close(one.server.model.flat, mean)
    steps = {k: state["moments"]["w"]["steps"] for k, state in two.engine.states.items()}
    away = [k for k in came if steps[k] == 3]
    assert away and all(torch.equal(one.server.starts[k].flat, two.server.starts[k].flat) for k in away)
    (new,) = (k for k in steps if k not in came)
    # Three steps of Adam move no coordinate by more than about three times its rate.
    assert (two.server.starts[new].flat - one.server.model.flat).abs().max() < 0.04


def test_other_problems_and_networks_are_refused():
    with pytest.raises(UsageError, match="fed_pub needs a problem of the kind graph"):
        ran(FedPub(), Toy(), rounds=1)
    with pytest.raises(UsageError, match="take a network that has some: model=gcn"):
        ran(FedPub(), replace(toy(), model="mlp:8"), rounds=1)


def test_from_the_second_round_on_own_models_are_mixed():
    method = FedPub(tau=1e9, l2=0.0)
    one, two = (ran(method, toy(), rounds=rounds) for rounds in (1, 2))
    for k in range(4):
        client = node(one.site, k, round=2)
        client.state.update(one.engine.states[k])
        start = one.server.starts[k]
        reply = method.local(client, start, one.server.proxy)
        torch.testing.assert_close(two.server.starts[k].flat, (start + reply["delta"]).flat)
        assert not torch.allclose(two.server.starts[k].flat, (one.server.model + reply["delta"]).flat, atol=1e-3)
