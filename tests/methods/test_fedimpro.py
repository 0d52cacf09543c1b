"""FedImpro: what is drawn, whose gradient it moves, how a client estimates its features, and FedAvg without it."""

import numpy as np
import pytest
import torch
from problems import network, node, ran
from torch import nn
from torch.nn import functional as F

from fedloom import encoding
from fedloom.errors import UsageError
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.fedimpro import FedImpro, drawn
from fedloom.random import stream
from fedloom.tasks.saddle import toy as saddle
from fedloom.tasks.toy import Toy

QUIET = {"noise": 0.0}


def sent_to(made):
    return {"model": made.server.model, "means": made.server.means, "stds": made.server.stds}


@pytest.mark.parametrize("norm", [False, True])
def test_without_weight_it_is_fedavg_bitwise(norm):
    task = Toy(norm=norm, sizes=(30, 20, 25, 35))
    mine, plain = (ran(m, task, rounds=3) for m in (FedImpro(lr=0.1, epochs=2, weight=0.0), FedAvg(lr=0.1, epochs=2)))
    assert torch.equal(mine.server.model.flat, plain.server.model.flat)


def test_the_first_round_is_fedavgs_and_the_weight_grows_by_the_ramp_up_to_its_end():
    task, seen = Toy(), []

    class Watched(FedImpro):
        def round(self, server, cohort):
            FedImpro.round(self, server, Spied(cohort, seen))

    class Spied:
        def __init__(self, cohort, seen):
            self.cohort, self.seen = cohort, seen

        def mean(self, *function, share, **msg):
            self.seen.append(share)
            return self.cohort.mean(*function, share=share, **msg)

    first, plain = (ran(m, task, rounds=1) for m in (FedImpro(lr=0.1), FedAvg(lr=0.1)))
    assert torch.equal(first.server.model.flat, plain.server.model.flat)
    ran(Watched(lr=0.1, weight=0.8, ramp=4), task, rounds=7)
    assert seen == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_features_are_drawn_of_all_classes_alike_around_their_means():
    means = torch.arange(3.0)[:, None, None].expand(3, 2, 2) * 10
    stds = torch.tensor([0.0, 1.0, 2.0])[:, None, None].expand(3, 2, 2)
    h, c = drawn(means, stds, 4000, stream(0, "test", "draw"))
    assert len(h) >= 4000 and torch.bincount(c).tolist() == [1334] * 3
    for k in range(3):
        assert h[c == k].mean().item() == pytest.approx(10 * k, abs=0.1)
        assert h[c == k].std().item() == pytest.approx(k, abs=0.1)
    assert [len(drawn(means, stds, count, stream(0, "x"))) for count in (1, 3, 4)] == [3, 3, 6]
    assert not h.requires_grad


def test_the_upper_layers_of_all_clients_get_one_gradient_and_the_lower_none():
    made = ran(FedImpro(lr=0.1, **QUIET), Toy(), rounds=2)
    w, found = made.server.model, []
    for k in range(2):
        here = node(made.site, k)
        features = drawn(made.server.means, made.server.stds, 10, stream(0, "test", "draw"))
        found.append(here.grad(w, features, here.task.loss_above("body.1"), statistics=False))
    assert torch.equal(found[0].flat, found[1].flat)
    assert not found[0].select("body.*").flat.any() and found[0].select("head.*").flat.abs().max() > 1e-3


def test_steps_of_a_client_by_hand():
    """Two full batches: from the model and the H that came, in numpy, with the same draws."""
    made = ran(FedImpro(lr=0.1, **QUIET), Toy(), rounds=2)
    method = FedImpro(lr=0.2, epochs=2, batch=0, beta=0.7, cut="body.0", **QUIET)
    task, here = made.task, node(made.site, 1, 3)
    means, stds = (t.double() for t in (made.server.means, made.server.stds))
    assert made.method.place(here) == "body.1" and made.method.cut == ""
    got = method.local(here, **sent_to(made), share=0.6)
    draw = node(made.site, 1, 3).rng("features")
    net = network(task, made.server.model).double()
    x, y = (t.double() if t.is_floating_point() else t for t in task.data(1, "train").all())
    mu, sigma = means.numpy().copy(), stds.numpy().copy()
    for _ in range(2):
        h = net.body[0](x)
        made_up, c = drawn(made.server.means, made.server.stds, len(y), draw)
        loss = F.cross_entropy(net.head(net.body[1](h)), y)
        loss = loss + 0.6 * F.cross_entropy(net.head(net.body[1](made_up.double())), c)
        h = h.detach().numpy()
        for label in (0, 2):  # client 1 lacks class 1
            here = h[y.numpy() == label]
            mu[label] = 0.7 * mu[label] + 0.3 * here.mean(0)
            sigma[label] = np.minimum(0.1, 0.7 * sigma[label] + 0.3 * here.std(0, ddof=1))
        net.zero_grad()
        loss.backward()
        with torch.no_grad():
            for param in net.parameters():
                param -= 0.2 * param.grad
    reached = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert torch.allclose(reached, (made.server.model + got["delta"]).flat.double(), atol=1e-6)
    assert np.allclose(mu, (made.server.means + got["means"]).double(), atol=1e-6)
    assert np.allclose(sigma, (made.server.stds + got["stds"]).double(), atol=1e-6)
    assert not got["means"][1].any() and not got["stds"][1].any()
    assert np.abs(mu - means.numpy()).max() > 0.01 and got["n"] == 20


def test_the_server_takes_means_by_samples_of_models_and_of_features():
    method = FedImpro(lr=0.1, **QUIET)
    before, after = (ran(method, Toy(sizes=(30, 10)), rounds=r) for r in (1, 2))
    replies = [method.local(node(before.site, k, 2), **sent_to(before), share=0.1) for k in range(2)]
    for name in ("model", "means", "stds"):
        field = "delta" if name == "model" else name
        moved = (30 * replies[0][field] + 10 * replies[1][field]) * (1 / 40)
        assert moved.flat.abs().max() > 0 if name == "model" else moved.abs().max() > 0
        want = getattr(before.server, name) + moved
        got = getattr(after.server, name)
        assert torch.allclose(*(v.flat if name == "model" else v for v in (want, got)), atol=1e-6)


def test_deviations_stay_within_their_bound_and_one_sample_has_none():
    method = FedImpro(sigma=0.3, beta=0.5)
    means, stds = torch.zeros(3, 2), torch.full((3, 2), 0.2)
    h, y = torch.tensor([[9.0, 0.0], [1.0, 2.0], [1.0, 2.2]]), torch.tensor([0, 2, 2])
    mu, sigma = method.estimate(means, stds, h, y)
    assert torch.allclose(mu, torch.tensor([[4.5, 0.0], [0.0, 0.0], [0.5, 1.05]]))
    assert torch.allclose(sigma, torch.tensor([[0.2, 0.2], [0.2, 0.2], [0.1, 0.5 * 0.2 + 0.5 * 0.02**0.5]]))
    assert torch.equal(method.estimate(means, stds, 100 * h, y)[1][2], torch.tensor([0.1, 0.3]))
    made = ran(FedImpro(lr=0.1, noise=1.0), Toy(), rounds=4)
    assert made.server.stds.min() >= 0 and made.server.stds.max() <= 0.1


def test_h_begins_between_zero_and_one_with_the_largest_deviation():
    server = ran(FedImpro(lr=0.1, sigma=0.4, cut="body"), Toy(), rounds=1).server
    FedImpro(sigma=0.4, cut="body").setup(server, None)
    assert server.means.shape == (3, 8) and (server.stds == torch.tensor(0.4)).all()
    assert 0 <= server.means.min() < 0.2 and 0.8 < server.means.max() <= 1


def test_the_noise_on_what_a_client_sends_of_its_features():
    made = ran(FedImpro(lr=0.1, **QUIET), Toy(), rounds=2)
    quiet, noisy = (
        FedImpro(lr=0.1, noise=noise).local(node(made.site, 1, 3), **sent_to(made), share=0.0) for noise in (0.0, 0.5)
    )
    assert torch.equal(quiet["delta"].flat, noisy["delta"].flat)
    for field in ("means", "stds"):
        noise = noisy[field] - quiet[field]
        assert noise.std().item() == pytest.approx(0.5, rel=0.4) and abs(noise.mean().item()) < 0.4
    assert not torch.allclose(noisy["means"] - quiet["means"], noisy["stds"] - quiet["stds"], atol=1e-3)


def test_a_message_has_two_numbers_a_class_and_feature_beside_the_model_whatever_the_data():
    whole = encoding.sizes({"means": torch.zeros(3, 8)})["means"]
    assert 0 < whole - 3 * 8 * 4 < 32
    for sizes in ((30, 20), (9, 90)):
        made = ran(FedImpro(lr=0.1, cut="body"), Toy(sizes=sizes), rounds=1)
        lines = [line for line in made.record.ledger if line["kind"] == "train"]
        for field in ("means", "stds"):
            (up,), (down,) = (
                {line["bytes"] for line in lines if line["field"] == field and line["direction"] == way}
                for way in ("up", "down")
            )
            assert up == down == whole - len("means") + len(field)


def test_batch_norm_keeps_statistics_of_real_features():
    made = ran(FedImpro(lr=0.1, cut="body.0", **QUIET), Toy(norm=True, sizes=(30, 20, 25, 35)), rounds=1)
    far = {**sent_to(made), "means": made.server.means + 1000}
    method = FedImpro(lr=1e-6, epochs=2, batch=0, cut="body.0", **QUIET)
    one, other = (method.local(node(made.site, 1, 2), **sent, share=1.0) for sent in (sent_to(made), far))
    assert torch.allclose(one["delta"].buffers.flat, other["delta"].buffers.flat, atol=1e-4)


class Whole(Toy):
    """Its network says nothing of its parts."""

    def network(self):
        return nn.Linear(6, 3)


def test_what_has_no_classes_or_no_cuts_is_refused_with_a_sentence():
    with pytest.raises(UsageError, match="fedimpro needs classes, and this problem has none"):
        ran(FedImpro(), saddle(), rounds=1)
    with pytest.raises(UsageError, match="fedimpro needs a network that can be cut"):
        ran(FedImpro(), Whole(), rounds=1)
    with pytest.raises(UsageError, match=r"cannot be cut at 'body.9'.*are body.0, body.1, body$"):
        ran(FedImpro(cut="body.9"), Toy(), rounds=1)


def test_privacy_of_samples_is_refused_since_features_are_told_beside_gradients():
    with pytest.raises(UsageError, match=r"fedimpro does not go with dp=sample:noise=1: clients tell means"):
        ran(FedImpro(), Toy(), rounds=1, dp="sample:noise=1")


@pytest.mark.parametrize("dp", ["client:noise=50,clip=1", "local:gaussian,epsilon=0.5"])
def test_one_noise_covers_the_model_and_both_parts_of_the_features(dp):
    made, plain = (ran(FedImpro(lr=0.1, beta=1.0, sigma=1e4), Toy(), rounds=1, dp=kind) for kind in (dp, None))
    before, after = ((s.model.flat, s.means, s.stds) for s in (plain.server, made.server))
    moved = [now - was for now, was in zip(after, before, strict=True)]
    moved[2] = moved[2][moved[2] < -0.01]  # deviations begin at their upper bound
    assert len(moved[2]) > 6
    sizes = [float(part.square().mean().sqrt()) for part in moved]
    assert min(sizes) > 5 and max(sizes) < 1.6 * min(sizes)
    assert "epsilon" in made.manifest["dp"][0]


def test_it_learns_where_clients_lack_classes():
    made = ran(FedImpro(lr=0.1), Toy(), rounds=12)
    assert made.record.final["global_test_accuracy"] > 0.9
