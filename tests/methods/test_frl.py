"""FRL: what a vote is, what stays frozen, and how little one client can do."""

import math
from dataclasses import dataclass

import pytest
import torch
from problems import node, ran
from torch.nn import functional as F

from fedloom.errors import UsageError
from fedloom.message import Packed
from fedloom.method import client
from fedloom.methods.robust.frl import Frl, frozen, packed, places_of, ranked, scores
from fedloom.random import stream
from fedloom.site import Site
from fedloom.tasks.toy import Toy

LAYERS = {"body.0.weight": 48, "head.weight": 24}


def permutation(n, seed):
    return torch.randperm(n, generator=stream(seed, "test"))


@dataclass(frozen=True)
class Scripted(Frl):
    """Clients whose votes do not depend on data: all the same, or client 0 another kind."""

    odd: str = ""

    @client
    def local(self, client, ranking):
        votes = {name: permutation(n, 1) for name, n in LAYERS.items()}
        if client.id == 0 and self.odd == "constant":
            return {"ranking": {name: Packed(torch.zeros(n, dtype=torch.int64), 6) for name, n in LAYERS.items()}}
        if client.id == 0 and self.odd == "short":
            return {"ranking": {"head.weight": packed(votes["head.weight"])}}
        if client.id == 0 and self.odd == "reversed":
            return {"ranking": {name: packed(vote.flip(0)) for name, vote in votes.items()}}
        return {"ranking": {name: packed(vote) for name, vote in votes.items()}}


@pytest.mark.parametrize("odd", ["", "constant", "short", "reversed"])
def test_what_all_send_is_the_next_ranking_and_one_voice_or_no_ranking_cannot_change_it(odd):
    made = ran(Scripted(odd=odd), Toy(), rounds=1)
    for name, n in LAYERS.items():
        assert torch.equal(made.server.ranking[name].values, permutation(n, 1))


def test_a_vote_is_the_sum_of_places_not_of_indices():
    made = ran(Frl(lr=0.4, epochs=1), Toy(sizes=(5, 30, 12, 8)), rounds=1)
    site = made.site
    first = ran(Frl(lr=0.4, epochs=1), Toy(sizes=(5, 30, 12, 8)), rounds=1, dropout=1.0).server.ranking
    replies = [Frl(lr=0.4, epochs=1).local(node(site, k), first)["ranking"] for k in range(4)]
    for name, n in LAYERS.items():
        votes = [0] * n
        for reply in replies:
            for place, edge in enumerate(reply[name].values.tolist()):
                votes[edge] += place
        assert made.server.ranking[name].values.tolist() == sorted(range(n), key=votes.__getitem__)


def test_one_client_moves_an_edges_vote_by_less_than_the_layers_size():
    n = 24
    places = places_of(packed(permutation(n, 3)), packed(permutation(n, 4)))
    assert sorted(places.tolist()) == list(range(n))
    assert places[permutation(n, 3)].tolist() == list(range(n)), "the place of every edge"
    assert places_of(Packed(torch.zeros(n, dtype=torch.int64), 5), packed(permutation(n, 4))) is None
    assert places_of(packed(permutation(n - 1, 3)), packed(permutation(n, 4))) is None
    assert places_of(None, packed(permutation(n, 4))) is None
    assert places_of(packed(permutation(n, 3)).values, packed(permutation(n, 4))) is None, "a tensor is no ranking"


def test_weights_are_signed_constants_that_never_change_and_the_network_uses_the_top_half():
    made = ran(Frl(), Toy(), rounds=4)
    initial, used = made.site.initial, made.server.model
    for name, n in LAYERS.items():
        inputs = {"body.0.weight": 6, "head.weight": 8}[name]
        constant = initial[name].sign() * math.sqrt(2 / inputs)
        on = used[name] != 0
        assert torch.allclose(used[name][on], constant[on])
        assert on.sum() == n - int(0.5 * n)
        order = made.server.ranking[name].values
        assert set(on.flatten().nonzero().flatten().tolist()) == set(order[n // 2 :].tolist())
    assert all(used[name].abs().max() == 0 for name in used if name.endswith("bias"))


def test_scores_are_at_any_time_the_same_sorted_numbers():
    made = ran(Frl(), Toy(), rounds=3)
    early = ran(Frl(), Toy(), rounds=1)
    layout = made.site.initial.layout
    one, other = (scores(layout, m.server.ranking) for m in (early, made))
    assert not torch.equal(one, other)
    for name, start, stop in ranked(layout):
        assert torch.equal(one[start:stop].sort().values, other[start:stop].sort().values)
        assert torch.equal(other[start:stop].argsort(), made.server.ranking[name].values)


def test_a_step_goes_straight_through_the_mask():
    task = Toy(sizes=(10,) * 4)
    site = Site(task, seed=0)
    weights = frozen(site.initial)
    ranking = {name: packed(permutation(n, 5)) for name, n in LAYERS.items()}
    method = Frl(lr=0.3, momentum=0.7, weight_decay=0.01, epochs=2, batch=0)
    s = scores(site.initial.layout, ranking)
    moment = torch.zeros_like(s)
    layers = ranked(site.initial.layout)
    x, y = task.data(1, "train").all()
    for lr in (0.3, 0.15):  # a cosine of two epochs
        mask = torch.ones_like(s)
        for _, a, b in layers:
            mask[a:b] = (s[a:b] > s[a:b].sort().values[int(0.5 * (b - a)) - 1]).float()
        mask.requires_grad_()
        hidden, head = (weights[name] for name in LAYERS)
        m1, m2 = (mask[a:b].view_as(w) for (_, a, b), w in zip(layers, (hidden, head), strict=True))
        loss = F.cross_entropy(F.relu(x @ (hidden * m1).t()) @ (head * m2).t(), y)
        (grad,) = torch.autograd.grad(loss, mask)
        moment = 0.7 * moment + grad + 0.01 * s
        s = s - lr * moment
    sent = method.local(node(site, 1), ranking)["ranking"]
    for name, a, b in layers:
        assert torch.equal(sent[name].values, s[a:b].argsort())


def test_the_learning_rate_falls_over_rounds():
    task = Toy()
    site = Site(task, seed=0)
    ranking = {name: packed(permutation(n, 5)) for name, n in LAYERS.items()}
    late = Frl(lr=0.4, lr_decay=0.5, batch=0).local(node(site, 1, round=4), ranking)["ranking"]
    early = Frl(lr=0.05, lr_decay=1.0, batch=0).local(node(site, 1, round=1), ranking)["ranking"]
    assert all(torch.equal(late[name].values, early[name].values) for name in LAYERS)


def test_a_reply_is_the_bits_of_its_rankings_whatever_the_data():
    made = ran(Frl(), Toy(), rounds=2)
    sizes = {
        (line["client"] if "client" in line else tuple(line["clients"]), line["bytes"])
        for line in made.record.ledger
        if line["field"] == "ranking" and line["direction"] == "up"
    }
    assert len({size for _, size in sizes}) == 1
    (size,) = {size for _, size in sizes}
    bits = sum(math.ceil(n * math.ceil(math.log2(n)) / 8) for n in LAYERS.values())
    names = sum(len(name) for name in LAYERS)
    assert bits < size < bits + names + 60, "rankings, their names and short headers"
    assert {line["field"] for line in made.record.ledger if line["direction"] == "up" and line["kind"] == "train"} == {
        "ranking",
        "envelope",
    }


@pytest.mark.parametrize("keep", [0.0, 1.5])
def test_the_share_of_edges_is_a_share(keep):
    with pytest.raises(UsageError, match="share of the edges"):
        Frl(keep=keep)
    assert ran(Frl(keep=1.0, epochs=1), Toy(), rounds=1).server.model["head.weight"].all()


def test_the_number_of_samples_is_no_weight():
    task = Toy()
    made, again = (ran(Scripted(odd="reversed"), Toy(sizes=sizes), rounds=1) for sizes in (task.sizes, (300, 5, 5, 5)))
    for name in LAYERS:
        assert torch.equal(made.server.ranking[name].values, again.server.ranking[name].values)


def test_a_reversing_minority_does_not_stop_the_learning():
    @dataclass(frozen=True)
    class Reversed(Frl):
        @client
        def local(self, client, ranking):
            reply = Frl.local(self, client, ranking)["ranking"]
            return {"ranking": {k: packed(v.values.flip(0)) if client.id < 2 else v for k, v in reply.items()}}

    made = ran(Reversed(), Toy(sizes=(30,) * 10), rounds=15)
    assert made.record.final["global_test_accuracy"] > 0.8
