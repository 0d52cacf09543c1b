"""FedMD: the consensus on public samples, digested and revisited, by networks of different shapes."""

import copy

import pytest
import torch
from problems import close, descended, network, node, ran
from torch.nn import functional as F

from fedloom.message import Seed
from fedloom.methods.heterogeneous.fedmd import FedMD
from fedloom.methods.personalize.local import Local
from fedloom.tasks.toy import Toy

MIXED = ("mlp:4", "mlp:16,8")
PLAIN = {"lr": 0.1, "batch": 0, "digest_batch": 0, "digest_lr": 0.3}


class Alone(Toy):
    """One client."""

    def __init__(self):
        super().__init__(sizes=(30,))


def test_a_client_alone_agrees_with_itself_and_trains_locally_bitwise():
    made = ran(FedMD(**PLAIN, start_epochs=0), Alone(), rounds=3)
    local = ran(Local(lr=0.1, batch=0), Alone(), rounds=3)
    assert torch.equal(made.engine.states[0]["model"].flat, local.engine.states[0]["model"].flat)


def test_without_digestion_it_is_local_training():
    made = ran(FedMD(**PLAIN, digest_epochs=0, start_epochs=0), Toy(), rounds=3)
    local = ran(Local(lr=0.1, batch=0), Toy(), rounds=3)
    for k in range(4):
        assert torch.equal(made.engine.states[k]["model"].flat, local.engine.states[k]["model"].flat)


def test_clients_begin_with_their_own_data_once():
    made = ran(FedMD(**PLAIN, digest_epochs=0, start_epochs=4), Toy(), rounds=3)
    local = ran(Local(lr=0.1, batch=0), Toy(), rounds=7)
    for k in range(4):
        assert torch.equal(made.engine.states[k]["model"].flat, local.engine.states[k]["model"].flat)


@pytest.mark.parametrize("norm", [False, True])
def test_rounds_by_hand(norm):
    """Torch's own optimizer, every batch whole: begin, communicate, average, digest, revisit."""
    task = Toy(sizes=(30, 12, 25), norm=norm)
    method = FedMD(**PLAIN, start_epochs=2, digest_epochs=3, epochs=2)
    made = ran(method, task, rounds=2)
    x = task.shared_data().x
    wholes = [[task.data(k, "train").all()] for k in range(3)]
    nets = [descended(network(task, made.site.initial), task, wholes[k] * 2, lr=0.1) for k in range(3)]
    for _ in range(2):
        with torch.no_grad():
            consensus = sum(copy.deepcopy(net).eval()(x) for net in nets) / 3  # of equals, whatever data they have
        for k, net in enumerate(nets):
            net = copy.deepcopy(net).train()
            optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
            for _ in range(3):
                optimizer.zero_grad()
                F.l1_loss(net(x), consensus).backward()
                optimizer.step()
            nets[k] = descended(net, task, wholes[k] * 2, lr=0.1)
    for k, net in enumerate(nets):
        assert close(made.engine.states[k]["model"], net.state_dict(), atol=2e-5)


def test_networks_of_different_shapes_learn_from_each_other():
    made = ran(FedMD(lr=0.1, models=MIXED), Toy(), rounds=8)
    sizes = [len(state["model"]) for _, state in sorted(made.engine.states.items())]
    assert sizes[0] == sizes[2] != sizes[1] == sizes[3]
    assert made.record.final["personal_test_accuracy"] > 0.9


def knows(method, k):
    """How often client k, which has no sample of class k, takes other samples of that class for what they are."""
    made = ran(method, Toy(), rounds=12)
    public = Toy().public()  # drawn from the same clouds, with labels
    scores = node(made.site, k).scores(made.engine.states[k]["model"], public.x[public.y == k])
    return float((scores.argmax(1) == k).double().mean())


def test_clients_learn_from_others_what_they_have_no_sample_of():
    taught = [knows(FedMD(lr=0.05, digest_lr=0.5, digest_epochs=5), k) for k in range(3)]
    alone = [knows(FedMD(lr=0.05, digest_epochs=0), k) for k in range(3)]
    assert alone == [0, 0, 0] and sum(taught) / 3 > 0.5


def test_what_crosses_is_a_seed_scores_and_their_mean():
    made = ran(FedMD(models=MIXED, samples=10), Toy(), rounds=2)
    lines = [line for line in made.record.ledger if line["kind"] == "train" and line["field"] != "envelope"]
    crossed = {(line["verb"], line["function"], line["direction"], line["field"]) for line in lines}
    assert crossed == {
        ("mean", "communicate", "down", "draw"),
        ("mean", "communicate", "up", "scores"),
        ("tell", "digest", "down", "draw"),
        ("tell", "digest", "down", "consensus"),
    }
    scores = {line["bytes"] for line in lines if line["field"] == "scores"}
    (size,) = scores  # whatever the network
    assert 10 * 3 * 4 < size < 10 * 3 * 4 + 60


def test_every_round_has_samples_of_its_own_and_alike_at_all():
    made = ran(FedMD(), Toy(), rounds=1)
    method = FedMD(samples=10)
    at = [method.drawn(node(made.site, k), Seed(7)) for k in range(4)]
    assert all(torch.equal(one, at[0]) for one in at) and len(at[0].unique(dim=0)) == 10
    every = made.site.task.shared_data().x
    assert all((row == every).all(1).any() for row in at[0])
    assert not torch.equal(method.drawn(node(made.site, 0), Seed(8)), at[0])
    assert len(FedMD(samples=1000).drawn(node(made.site, 0), Seed(7))) == 36


def test_the_draw_changes_from_round_to_round():
    seen = []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FedMD, "drawn", noted(seen))
        ran(FedMD(), Toy(), rounds=3)
    assert len({*seen}) == 3 and len(seen) == 3 * 4 * 2


def noted(seen):
    plain = FedMD.drawn

    def drawn(self, client, draw):
        seen.append(draw.value)
        return plain(self, client, draw)

    return drawn


def test_who_was_not_asked_keeps_its_model():
    made = ran(FedMD(), Toy(), rounds=1, cohort=2)
    assert sorted(made.engine.states) == sorted(made.world.choose(1))


def test_a_client_whose_scores_are_lost_digests_the_others():
    made = ran(FedMD(), Toy(), rounds=6, lost=0.4)
    heard = [row["replies"] for row in made.record.metrics]
    assert min(heard) < 4 and all("model" in made.engine.states[k] for k in range(4))
