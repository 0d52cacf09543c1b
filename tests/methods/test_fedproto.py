"""FedProto: what a prototype is, the pull to it, and prediction by the nearest."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from problems import network, node, ran
from torch.nn import functional as F

from fedloom.method import client
from fedloom.methods.heterogeneous.fedproto import FedProto, pulled
from fedloom.tasks.toy import Toy


def body_of(task, w):
    return network(task, w).eval().body


@pytest.mark.parametrize("norm", [False, True])
def test_a_prototype_is_the_plain_mean_over_its_clients_of_their_mean_features(norm):
    task = Toy(norm=norm)
    made = ran(FedProto(lr=0.1), task, rounds=2)
    assert set(made.server.protos) == {0, 1, 2}
    for c, prototype in made.server.protos.items():
        means = []
        for k in range(task.population):
            x, y = task.data(k, "train").all()
            if (y == c).any():
                with torch.no_grad():
                    features = body_of(task, made.engine.states[k]["model"])(x)
                means.append(sum(f for f, label in zip(features, y, strict=True) if label == c) / (y == c).sum())
        assert len(means) == 3, "every class is missing at one client"
        assert torch.allclose(prototype, sum(means) / len(means), rtol=0, atol=1e-5)


def test_the_loss_is_cross_entropy_plus_the_mean_square_to_known_prototypes():
    task, lam = Toy(), 0.7
    net, batch = task.network(), task.data(0, "train").all()
    protos = {2: torch.arange(8.0)}  # class 1 has none; client 0 lacks class 0
    features = net.body(batch.x)
    squares = 0.0
    for z, y in zip(features.tolist(), batch.y.tolist(), strict=True):
        squares += sum((a - b) ** 2 for a, b in zip(z, range(8), strict=True)) if y == 2 else 0.0
    entropy = F.cross_entropy(net.head(features), batch.y).item()
    loss = partial(pulled, net, batch, task.criterion)
    assert 0 < (batch.y == 2).sum() < len(batch)
    assert loss(protos, lam).item() == pytest.approx(entropy + lam * squares / (len(batch) * 8), rel=1e-5)
    assert loss({}, lam).item() == entropy


def test_the_nearest_prototype_is_predicted_and_no_other_class():
    task = Toy()
    made = ran(FedProto(lr=0.1), task, rounds=2)
    protos = {c: made.server.protos[c] for c in (2, 0)}
    here = node(made.site, 1)
    here.state = made.engine.states[1]
    x = task.data(1, "test").x
    predicted = made.method.predict(here, protos)(x).argmax(1).tolist()
    with torch.no_grad():
        features = body_of(task, here.state["model"])(x)
    nearest = [min(protos, key=lambda c: ((z - protos[c]) ** 2).sum().item()) for z in features]
    assert predicted == nearest
    assert set(predicted) == {0, 2}


def test_before_the_first_prototypes_the_own_head_predicts():
    made = ran(FedProto(), Toy(), rounds=1)
    assert made.method.predict(node(made.site, 0), {}) is made.site.initial


def test_only_prototypes_travel():
    made = ran(FedProto(), Toy(), rounds=2)
    assert {line["field"] for line in made.record.ledger if line["kind"] == "train"} == {"protos", "envelope"}
    assert torch.equal(made.server.model.flat, made.site.initial.flat)


def test_the_prototype_of_a_class_that_the_cohort_lacks_stays():
    # Client k lacks class k; a cohort of one therefore leaves one prototype as it was.
    made, before = (ran(FedProto(), Toy(sizes=(12, 12, 12)), rounds=r, cohort=1, seed=1) for r in (3, 2))
    (lacking,) = made.world.choose(3)
    assert set(before.server.protos) == {0, 1, 2}
    for c in range(3):
        assert torch.equal(made.server.protos[c], before.server.protos[c]) == (c == lacking)


def test_clients_with_models_of_their_own_learn_together():
    made = ran(FedProto(models=("mlp:4,8", "mlp:30,8"), lr=0.1), Toy(), rounds=10)
    sizes = [len(state["model"]) for _, state in sorted(made.engine.states.items())]
    assert sizes[0] == sizes[2] < sizes[1] == sizes[3]
    assert made.record.final["personal_test_accuracy"] > 0.75
    assert all(len(prototype) == 8 for prototype in made.server.protos.values())


def test_the_prototypes_of_the_last_round_go_down():
    seen = {}

    @dataclass(frozen=True)
    class Watched(FedProto):
        @client
        def local(self, client, protos):
            seen.setdefault(client.round, protos)
            return FedProto.local(self, client, protos)

    made = ran(Watched(), Toy(), rounds=3)
    before = ran(FedProto(), Toy(), rounds=2).server.protos
    assert seen[1] == {} and seen[3].keys() == before.keys()
    assert all(torch.equal(seen[3][c], before[c]) for c in before)
    assert any(not torch.equal(made.server.protos[c], before[c]) for c in before)
