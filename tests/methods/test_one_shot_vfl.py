"""One-shot VFL: pseudo-labels out of gradients, one exchange."""

import pytest
import torch
from problems import node, ran
from torch.nn import functional as F

import fedloom
from fedloom.methods.structure import one_shot_vfl
from fedloom.methods.structure.one_shot_vfl import OneShotVFL, consistent
from fedloom.node import Server
from fedloom.ops.kmeans import kmeans
from fedloom.random import stream
from fedloom.site import Site
from fedloom.task import Data
from fedloom.tasks.vertical import toy

QUICK = {"epochs": 2, "server_epochs": 2}


def features(site, k):
    return node(site, k).features(site.network(f"party:{k},3"), site.task.data(k, "train").x)


def gradients(site):
    """(G_k by the method, G_k by hand) for a linear g: W_k' (p - e_y)."""
    server = Server(site, 4)
    parts = {k: features(site, k) for k in range(4)}
    weight, bias = (server.model[f"head.{name}"] for name in ("weight", "bias"))
    p = (torch.cat([*parts.values()], 1) @ weight.T + bias).softmax(1)
    by_hand = ((p - F.one_hot(site.task.labels)) @ weight).split(8, 1)
    return OneShotVFL().pulls(server, parts), by_hand


def test_the_pull_is_each_samples_own_gradient():
    for mine, theirs in zip(*gradients(Site(toy(), seed=0)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_clusters_of_gradients_are_the_classes(seed):
    site = Site(toy(), seed)
    for pull in gradients(site)[0]:
        found = kmeans(pull, 3, stream(0, "test"))
        table = F.one_hot(site.task.labels).T @ F.one_hot(found)
        assert table.max(0).values.sum() > 0.95 * len(found), "purity"


def test_without_others_a_party_trains_on_its_clusters():
    site, rule = Site(toy(), seed=0), OneShotVFL(epochs=3, lam=0.0)
    (pull, *_), _ = gradients(site)
    client = node(site, 0)
    sent = rule.learn(client, pull=pull)
    labels = client.state["clusters"]
    again = node(site, 0)
    start = again.network("party:0,3")
    data = Data(again.data.x, labels)
    w, _ = again.descend(start, lr=rule.lr, momentum=rule.momentum, epochs=3, batch=rule.batch, data=data)
    torch.testing.assert_close(client.state["model"].flat, w.flat, rtol=1e-5, atol=1e-6)
    assert (w - start).norm() > 0.1
    torch.testing.assert_close(sent["features"], again.features(w, again.data.x), rtol=1e-5, atol=1e-5)


def test_samples_without_a_label_change_what_is_learned_where_the_party_is_sure():
    plain, more, unsure = (
        ran(OneShotVFL(epochs=4, **fields), toy(), 1).engine.states[0]["model"].flat
        for fields in ({"lam": 0.0}, {"sure": 0.5}, {"sure": 1.0})
    )
    assert not torch.allclose(plain, more, atol=1e-3)
    torch.testing.assert_close(plain, unsure, rtol=1e-5, atol=1e-6)  # but for rounding, nobody is surer than 1


def crossed(made, *names):
    """Bytes of fields that crossed in training."""
    lines = [line for line in made.record.ledger if line["kind"] == "train" and line["field"] in names]
    return sum(line["bytes"] * len(line["clients"]) for line in lines)


def test_three_features_a_sample_cross_whatever_the_epochs():
    few, many = (ran(OneShotVFL(epochs=epochs), toy(), 12) for epochs in (1, 7))
    numbers = 3 * 36 * 4 * 8 * 4
    assert numbers < crossed(few, "features", "pull") < numbers + 12 * 60
    assert crossed(few, "features", "pull") == crossed(many, "features", "pull")
    assert few.record.final["round"] == 1
    fields = {(line["direction"], line["field"]) for line in few.record.ledger if line["kind"] == "train"}
    assert fields - {("down", "envelope"), ("up", "envelope")} == {("up", "features"), ("down", "pull")}


def test_few_shot_costs_one_exchange_more():
    one, few = (ran(OneShotVFL(few_shot=shot, **QUICK), toy(), 1) for shot in (False, True))
    alone = 30 + 20 + 25 + 35
    extra = crossed(few, "features", "pull") - crossed(one, "features", "pull")
    assert (36 * 4 + alone) * 8 * 4 < extra < (36 * 4 + alone) * 8 * 4 + 8 * 60
    assert alone * 2 < crossed(few, "told") < alone * 2 + 4 * 60
    assert not crossed(one, "told", "clusters")


def test_labels_that_the_server_adds_are_right_in_the_partys_own_names():
    task = toy()
    site, rule = Site(task, seed=0), OneShotVFL(sure=0.9)
    made = ran(rule, task, 1)
    trained = [node(site, k) for k in range(4)]
    for k, client in enumerate(trained):
        client.state["model"] = made.engine.states[k]["model"]
    parts = {k: rule.encode(client)["features"] for k, client in enumerate(trained)}

    def labelled(k, clusters, rule=rule):
        u = rule.encode(trained[k], "alone")["features"]
        return rule.labelled(Server(site, 4), made.server.model, k, u, parts, clusters)

    for k in range(4):
        clusters = made.engine.states[k]["clusters"]
        told, truth = labelled(k, clusters), task.truth[task.alone[k]]
        kept = told >= 0
        names = (F.one_hot(task.labels).T @ F.one_hot(clusters)).argmax(1)
        assert kept.sum() > 5 and (told[kept] == names[truth][kept]).double().mean() > 0.8
        sure, said = made_up(k, parts, rule.encode(trained[k], "alone")["features"], made.server.model)
        alone = rule.trained(Server(site, 4), site.initial, {k: parts[k]})
        _, agreed = made_up(k, {k: parts[k]}, rule.encode(trained[k], "alone")["features"], alone)
        assert torch.equal(told, names[said].where((sure > 0.9) & (said == agreed), -1).short())
        renamed = labelled(k, (clusters + 1) % 3)
        assert torch.equal(renamed, ((told + 1) % 3).where(kept, -1)), "it does not matter what clusters are called"
        assert (labelled(k, clusters, OneShotVFL(sure=1.0)) == -1).all(), "nobody is surer than 1"


def made_up(k, parts, u, w):
    """How sure a linear classifier is, and of what, of each of party k's samples, the others' features made up."""
    found = []
    for row in u:
        near = torch.stack([row @ h / 8**0.5 for h in parts[k]]).softmax(0)
        joint = [
            sum(a * h for a, h in zip(near, parts[j], strict=True)) if j in parts else torch.zeros(8) for j in range(4)
        ]
        joint[k] = row
        found.append((w["head.weight"] @ torch.cat(joint) + w["head.bias"]).softmax(0).max(0))
    return torch.stack([p for p, _ in found]), torch.stack([c for _, c in found])


@pytest.mark.parametrize("few_shot", [False, True])
def test_the_server_learns_from_what_was_sent_last(monkeypatch, few_shot):
    calls, plain = [], OneShotVFL.trained

    def trained(self, server, w, parts):
        calls.append((w, parts, plain(self, server, w, parts)))
        return calls[-1][2]

    monkeypatch.setattr(OneShotVFL, "trained", trained)
    made = ran(OneShotVFL(few_shot=few_shot, sure=0.4, **QUICK), toy(), 1)
    assert len(calls) == (1 + 4 + 1 if few_shot else 1)
    w, parts, after = calls[-1]
    assert torch.equal(w.flat, calls[0][2].flat if few_shot else made.site.initial.flat)
    assert torch.equal(made.server.model.flat, after.flat) and not torch.equal(after.flat, w.flat)
    for k in range(4):
        client = node(made.site, k)
        client.state["model"] = made.engine.states[k]["model"]
        torch.testing.assert_close(parts[k], OneShotVFL().encode(client)["features"], rtol=1e-5, atol=1e-5)
    if few_shot:
        assert not torch.allclose(parts[0], calls[0][1][0], atol=1e-3)


def test_what_a_party_sends_first_depends_on_its_own_columns_only():
    task, other = toy(), toy()
    object.__setattr__(other, "parts", (task.parts[0], *(part.flip(1) for part in task.parts[1:])))
    one, same = (features(Site(t, seed=0), 0) for t in (task, other))
    assert torch.equal(one, same)
    assert not torch.equal(*(features(Site(t, seed=0), 1) for t in (task, other)))


def test_a_party_that_is_silent_does_not_stop_the_others():
    made = ran(OneShotVFL(**QUICK), toy(), 1, lost=0.4, seed=3)
    assert 0 < len(made.server.parties) < 4
    assert made.record.final["global_test_accuracy"] > 0.6


def test_halves_of_digits():
    fields = {"lr": 0.05, "epochs": 20, "lam": 0.0}
    final = fedloom.run("one_shot_vfl", "digits", fields=fields, problem="vertical:0.2").final
    assert final["global_test_accuracy"] > 0.85 and final["validation_accuracy"] > 0.8


def test_the_weak_view_names_the_class_and_the_strong_one_learns_it(monkeypatch):
    site, seen = Site(toy(), seed=0), []

    def noted(net, batch, task, views, rule):
        seen.append(views)
        return consistent(net, batch, task, views, rule)

    monkeypatch.setattr(one_shot_vfl, "consistent", noted)
    monkeypatch.setattr(one_shot_vfl, "weak", lambda x, draw: x + 1)
    monkeypatch.setattr(one_shot_vfl, "strong", lambda x, draw: x + 3)
    OneShotVFL(epochs=2).learn(node(site, 0), pull=gradients(site)[0][0])
    assert seen and all(torch.allclose(other - one, torch.full_like(one, 2.0)) for one, other in seen)
    others = site.task.data(0, "alone").x
    for one, _ in seen:
        apart = (one[:, None] - 1 - others).abs().amax(2).min(1).values
        assert (apart < 1e-4).all(), "views are of samples that are not aligned"


@pytest.mark.parametrize(("sure", "lam"), [(0.5, 2.0), (0.0, 0.3)])
def test_the_loss_of_two_views_by_hand(sure, lam):
    site = Site(toy(), seed=0)
    client = node(site, 0)
    net = client.net(site.network("party:0,3"))
    batch, draw = next(client.batches(10)), stream(0, "test")
    batch = type(batch)(batch.x, torch.arange(10) % 3)
    one, other = torch.randn(12, 2, generator=draw), torch.randn(12, 2, generator=draw)
    expected, sures = 0.0, 0
    for p, s in zip(net(3 * one).softmax(1), net(other).log_softmax(1), strict=True):
        if p.max() > sure:
            sures += 1
            expected = expected - s[p.argmax()] / 12
    assert sures > 0 and (sures < 12 or not sure)
    value = consistent(net, batch, site.task, (3 * one, other), OneShotVFL(sure=sure, lam=lam))
    torch.testing.assert_close(value, F.cross_entropy(net(batch.x), batch.y) + lam * expected)


def test_clusters_are_of_the_gradients_whatever_the_features():
    client = node(Site(toy(), seed=0), 0)
    kinds = torch.randint(3, (36,), generator=stream(0, "kinds"))
    pull = 5.0 * torch.eye(3, 8)[kinds] + 0.1 * torch.randn(36, 8, generator=stream(0, "noise"))
    OneShotVFL(epochs=1).learn(client, pull=pull)
    pairs = set(zip(kinds.tolist(), client.state["clusters"].tolist(), strict=True))
    assert len(pairs) == 3 == len({cluster for _, cluster in pairs})
