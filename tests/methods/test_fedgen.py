"""FedGen: what reduces to FedAvg, the generator's loss, and what travels."""

import torch
from problems import node, ran
from torch.nn import functional as F

from manyhands.methods.distill.fedgen import FedGen, taught
from manyhands.methods.optimize.fedavg import FedAvg
from manyhands.nets.generator import FeatureGenerator, InputGenerator
from manyhands.tasks.toy import Toy

SMALL = {"hidden": 16, "noise": 4, "gen_steps": 20}


def sizes(made, round, direction):
    lines = [li for li in made.record.ledger if li["round"] == round and li["direction"] == direction]
    return {li["field"]: li["bytes"] for li in lines if li["kind"] == "train"}


def test_without_weights_and_in_the_first_round_it_is_fedavg_bitwise():
    off, plain = ran(FedGen(alpha=0.0, beta=0.0, **SMALL), Toy(), rounds=3), ran(FedAvg(), Toy(), rounds=3)
    assert torch.equal(off.server.model.flat, plain.server.model.flat)
    first, one = ran(FedGen(**SMALL), Toy(), rounds=1), ran(FedAvg(), Toy(), rounds=1)
    assert torch.equal(first.server.model.flat, one.server.model.flat)
    assert not torch.equal(ran(FedGen(**SMALL), Toy(), rounds=3).server.model.flat, plain.server.model.flat)


def test_the_generator_goes_down_from_the_second_round_and_counts_go_up():
    made = ran(FedGen(**SMALL), Toy(), rounds=2)
    assert sizes(made, 1, "down")["generator"] < 12
    numbers = (4 + 3) * 16 + 16 + 2 * 16 + 2 * 16 + 16 * 8 + 8
    assert len(made.server.generator) == numbers
    assert 4 * numbers < sizes(made, 2, "down")["generator"] < 4 * numbers + 400
    assert sizes(made, 2, "up")["counts"] < 3 * 8 + 30


def test_a_generator_that_is_taught_makes_features_that_the_heads_take_for_their_labels():
    made = ran(FedAvg(), Toy(), rounds=12)
    method = FedGen(**SMALL | {"gen_steps": 300, "gen_lr": 1e-2})
    server = made.server
    server.generator, server.moments, server.labels = method.initial(server), {}, [0, 1, 2]
    head = server.model.select("head.*")

    def right():
        batch = method.drawn([0, 1, 2], server.generator, server.rng("test"))
        z = server.net(server.generator)(batch.x, batch.y)
        return float(((z @ head["head.weight"].T + head["head.bias"]).argmax(1) == batch.y).double().mean())

    before = right()
    method.teach(server, [head], torch.ones(1, 3))
    assert right() > 0.95 and right() > before


def test_a_head_without_a_label_has_no_say_on_it():
    made = ran(FedAvg(), Toy(), rounds=3)
    method, generators = FedGen(**SMALL), []
    head = made.server.model.select("head.*")
    for other in (head, head * -3.0):  # the second client holds class 2 only, of which nothing is drawn
        made.server.begin("train", 1)
        made.server.generator, made.server.moments, made.server.labels = method.initial(made.server), {}, [0, 1]
        method.teach(made.server, [head, other], torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        generators.append(made.server.generator)
    assert torch.equal(generators[0].flat, generators[1].flat)


def test_the_clients_loss_by_hand():
    made = ran(FedAvg(), Toy(), rounds=1)
    client = node(made.site, 0)
    net, batch = client.net(made.server.model), next(client.batches(10))
    features = torch.rand(6, 8), torch.rand(10, 8)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    value = taught(net, batch, made.task, features, y, a=2.0, b=0.5)
    p, q = net.head(features[1]).softmax(1), net(batch.x).softmax(1)
    kl = (p * (p.log() - q.log())).sum() / 10
    by_hand = F.cross_entropy(net(batch.x), batch.y) + 0.6 * 2.0 * F.cross_entropy(net.head(features[0]), y) + 0.5 * kl
    torch.testing.assert_close(value, by_hand)


def test_generators_have_the_shapes_of_what_they_make():
    assert FeatureGenerator(5, 3, 8, 7)(torch.rand(4, 3), torch.tensor([0, 1, 4, 4])).shape == (4, 7)
    for shape in ((3, 32, 32), (1, 28, 28), (1, 9, 13), (1, 4, 4), (30,)):
        made = InputGenerator(10, shape, channels=8)(torch.randn(64, 10)).detach()
        assert made.shape == (64, *shape)
        assert abs(float(made.mean())) < 0.1 and 0.8 < float(made.std()) < 1.2
