"""Codes over the air: quantizing with memory, a layer of the decoder by hand, whole counts, and what training gives."""

import math

import numpy as np
import pytest
import torch
from problems import node, ran
from torch.nn import functional as F

from fedloom.methods.aggregate._counting import Decoder, between, counted, whole
from fedloom.methods.aggregate.ota_codes import OTACodes, coding, sample
from fedloom.random import seeded, stream
from fedloom.task import Batch
from fedloom.tasks.toy import Toy

UNTAUGHT = {"train": 0}


def counts_of(rows, words, senders, seed=0):
    sent = torch.randint(words, (rows, senders), generator=stream(seed, "test", "sent"))
    return torch.zeros(rows, words).scatter_add(1, sent, torch.ones(rows, senders))


class Plain(OTACodes):
    """Its code does not overlap: words are axes, and what is received are counts."""

    def setup(self, server, clients):
        OTACodes.setup(self, server, clients)
        server.code = torch.eye(self.words)

    def decoded(self, server, received, popular, asked):
        assert torch.allclose(received, received.round(), atol=1e-4) and asked == 3
        return received.round(), int(received[0].sum().round())


def test_words_that_do_not_overlap_are_counted_exactly():
    code = torch.linalg.qr(torch.randn(40, 24, generator=stream(0, "test", "code")))[0].T
    for senders in (1, 3, 9):
        counts = counts_of(30, 24, senders)
        y = counts @ code
        assert torch.equal(whole(y @ code.T, y, code, senders), counts)
        noisy = y + 0.02 * torch.randn(y.shape, generator=stream(1, "test", "noise"))
        assert torch.equal(whole(noisy @ code.T, noisy, code, senders), counts)


def test_counts_are_whole_and_as_many_as_there_are_senders_whatever_was_estimated():
    code = F.normalize(torch.randn(24, 8, generator=stream(0, "test", "code")), dim=1)
    for senders in (1, 4, 30):
        x, y = (torch.randn(50, n, generator=stream(n, "test")) for n in (24, 8))
        found = whole(x, y, code, senders)
        assert found.min() >= 0 and torch.equal(found, found.round())
        assert (found.sum(1) == senders).all()


def test_a_few_words_are_fitted_anew_to_what_was_received():
    code = F.normalize(torch.randn(24, 12, generator=stream(3, "test", "code")), dim=1)
    counts = torch.zeros(1, 24)
    counts[0, [2, 7]] = torch.tensor([3.0, 1.0])
    rough = torch.zeros(1, 24)
    rough[0, [2, 7, 9, 11]] = torch.tensor([1.1, 1.0, 0.3, 0.2])  # the right words in wrong numbers
    assert torch.equal(whole(rough, counts @ code, code, 4), counts)


def oracle(net, y, popular, senders):
    """The layers on one batch of rows, number by number, in plain Python."""
    p = {name: value.detach().double().numpy() for name, value in net.named_parameters()}
    sigmoid = lambda v: 1 / (1 + math.exp(-v))  # noqa: E731
    c = p["words"] @ p["turn"]
    c = c / np.linalg.norm(c, axis=1, keepdims=True)
    (rows, d), n = y.shape, len(c)
    y, pi, k, most = y.double().numpy(), (popular / popular.sum()).double().numpy(), float(senders), max(8, 2 * senders)
    x, v, z, big, noise = np.zeros((rows, n)), np.ones((rows, n)), y.copy(), np.ones((rows, d)), np.full(rows, 100.0)
    alpha = 1 - np.exp(-k * pi)
    for t in range(len(net.networks)):
        lam = k * pi
        prior = 1 - np.exp(-lam)
        r, i = 1.15 + 0.85 * math.tanh(p["output"][t]), 1.25 + 0.75 * math.tanh(p["inverse"][t])
        old = big.copy()
        seen, var = np.zeros((rows, n)), np.zeros((rows, n))
        for b in range(rows):
            wide = np.array([sum(v[b, w] * c[w, j] ** 2 for w in range(n)) for j in range(d)])
            new = x[b] @ c - r * (y[b] - z[b]) / (noise[b] + old[b]) * wide
            damp = sigmoid(p["damping"][t])
            z[b], big[b] = damp * z[b] + (1 - damp) * new, damp * old[b] + (1 - damp) * wide
            inverse = i / (noise[b] + old[b])
            for w in range(n):
                var[b, w] = 1 / sum(inverse[j] * c[w, j] ** 2 for j in range(d))
                seen[b, w] = x[b, w] + var[b, w] * sum((y[b, j] - z[b, j]) * inverse[j] * c[w, j] for j in range(d))
        mean, active = np.zeros((rows, n)), np.zeros((rows, n))
        for b in range(rows):
            for w in range(n):
                weights = []
                for m in range(most + 1):
                    law = lam[w] ** m * math.exp(-lam[w]) / math.factorial(m)
                    before = 1 - alpha[w] if m == 0 else alpha[w] * law
                    weights.append(before * math.exp(-((seen[b, w] - m) ** 2) / (2 * var[b, w])))
                weights = np.array(weights) ** (1 / math.exp(p["heat"][t]))
                weights /= weights.sum()
                mean[b, w] = sum(m * q for m, q in enumerate(weights))
                v[b, w] = sum(m * m * q for m, q in enumerate(weights)) - mean[b, w] ** 2
                active[b, w] = 1 - weights[0]
        share = sigmoid(p["active"][t])
        alpha = (1 - share) * prior + share * active.mean(0)
        wide = np.broadcast_to
        shown = [seen, np.sqrt(var), mean, np.sqrt(v), wide(alpha, (rows, n)), wide(lam, (rows, n))]
        with torch.no_grad():
            learned = net.networks[t].double()(torch.from_numpy(np.stack(shown, 1)).double())[:, 0].numpy()
        blend = sigmoid(p["blend"][t])
        x = (1 - blend) * mean + blend * learned
        k = k + (2 * sigmoid(p["senders"][t]) if t else 1.0) * (mean.sum(1).mean() - k)
        step = sigmoid(p["popular"][t])
        pi = (1 - step) * pi + step * mean.sum(0) / mean.sum()
        step = sigmoid(p["level"][t])
        for b in range(rows):
            left = ((y[b] - z[b]) / (1 + big[b] / noise[b])) ** 2 + noise[b] * big[b] / (big[b] + noise[b])
            noise[b] = noise[b] ** (1 - step) * left.mean() ** step
    return x, k


def test_the_layers_by_hand():
    with seeded(0, "test", "decoder"):
        net = Decoder(5, 4, 3, 2, 0.3)
        with torch.no_grad():
            for param in net.parameters():
                param += 0.2 * torch.randn(param.shape)
    counts = counts_of(3, 5, 4)
    y = (counts @ net.code()).detach() + 0.1 * torch.randn(3, 4, generator=stream(0, "test", "y"))
    popular = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    with torch.no_grad():
        x, k = net(y, popular, 4)
    want, senders = oracle(net, y, popular, 4)
    assert np.allclose(x, want, atol=2e-3) and float(k) == pytest.approx(senders, abs=2e-3)
    assert np.abs(want).max() > 0.5


def test_numbers_keep_their_bounds_and_a_posterior_is_sure_where_there_is_no_noise():
    raw = torch.tensor([-100.0, 0.0, 100.0])
    assert torch.allclose(between(raw, 0.3, 2.0), torch.tensor([0.3, 1.15, 2.0]))
    seen, var = torch.tensor([[0.0, 2.0, 3.0]]), torch.full((1, 3), 1e-3)
    mean, v, active = counted(seen, var, torch.full((3,), 0.5), torch.ones(3), 8, torch.tensor(1.0))
    assert torch.allclose(mean, seen, atol=1e-4) and v.max() < 1e-3
    assert torch.allclose(active, torch.tensor([0.0, 1.0, 1.0]), atol=1e-4)


def test_the_loss_of_the_decoder_by_hand():
    with seeded(0, "test", "decoder"):
        net = Decoder(6, 4, 2, 2, 0.3)
    with torch.no_grad():
        net.turn += 0.1
    counts, noise, popular, asked = sample(6, 4, 8, 5, stream(0, "test", "sample"))
    code = net.code()
    signal = counts @ code
    y = torch.stack([row + z * row.square().mean().sqrt() for row, z in zip(signal, noise, strict=True)])
    x, k = net(y, popular, asked)
    want = (x - counts).square().mean() + 1e-3 * x.abs().mean() / counts.mean()
    want = (
        want + 1e-3 * torch.linalg.norm(net.turn.T @ net.turn - torch.eye(4)) ** 2 + 1e-2 * (k - counts.sum(1)[0]) ** 2
    )
    assert coding(net, Batch(counts, noise), popular, asked).item() == pytest.approx(want.item(), rel=1e-5)


def test_what_is_learned_from():
    levels, shares = [], []
    for seed in range(200):
        counts, noise, popular, asked = sample(6, 50, 4, 9, stream(seed, "test", "sample"))
        (senders,) = set(counts.sum(1).tolist())
        assert 1 <= senders <= asked <= 9 and asked - senders <= asked // 3
        assert popular.sum().item() == pytest.approx(1.0) and (popular.diff() <= 0).all()
        levels.append(-20 * math.log10(noise.square().mean().sqrt().item()))
        shares.append(asked - senders)
    assert min(levels) > -1.5 and max(levels) < 21.5 and np.mean(levels) == pytest.approx(10, abs=2)
    assert max(shares) > 0


def test_training_makes_the_decoder_count_better():
    taught, untaught = (ran(OTACodes(train=train), Toy(), rounds=1).server for train in (60, 0))
    draw, errors = stream(0, "test", "errors"), {taught: 0.0, untaught: 0.0}
    for _ in range(12):
        counts, noise, popular, asked = sample(32, 32, 32, 10, draw)
        for server in errors:
            net = server.net(server.decoder)
            signal = counts @ net.code()
            x, _ = net(signal + noise * signal.square().mean(1, keepdim=True).sqrt(), popular, asked)
            errors[server] += ((x - counts).square().sum() / counts.square().sum()).item() / 12
    assert errors[taught] < 0.6 * errors[untaught]
    assert torch.equal(taught.code, taught.net(taught.decoder).code())
    assert torch.allclose(taught.code.norm(dim=1), torch.ones(32), atol=1e-5)


def test_what_is_decoded_is_made_whole_for_as_many_as_were_found():
    server, method = ran(OTACodes(train=60), Toy(), rounds=1).server, OTACodes()
    net, popular = server.net(server.decoder), torch.arange(32.0, 0, -1)
    y = counts_of(9, 32, 6) @ server.code
    x, k = net(y, popular, 7)
    counts, senders = method.decoded(server, y, popular, 7)
    assert senders == round(float(k)) > 1 and torch.equal(counts, whole(x, y, server.code, senders))
    assert method.decoded(server, 0 * y, popular, 1)[1] == 1, "somebody has sent"


def test_the_quantizer_has_zeros_and_blocks_the_most_popular_first():
    blocks = torch.tensor([[9.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.1], [0.0, 0.0], [3.0, 3.0]])
    method = OTACodes(words=8, block=2)
    found, popular = method.quantizer(blocks, stream(0, "test"))
    assert found.shape == (8, 2) and {tuple(row) for row in blocks.tolist()} == {tuple(row) for row in found.tolist()}
    assert found[0].tolist() == [0.0, 1.0]
    assert (found == 0).all(1).sum() == 4, "none is chosen twice"
    assert torch.allclose(popular, torch.tensor([3.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0]) / 14)
    near = torch.cat([1e-9 * torch.rand(98, 2, generator=stream(0, "near")), torch.tensor([[5.0, 0.0]])])
    far, counts = OTACodes(words=2, block=2).quantizer(near, stream(0, "test"))
    assert far.tolist() == [[0.0, 0.0], [5.0, 0.0]] and torch.allclose(counts, torch.tensor([99.0, 2.0]) / 101)
    assert method.blocks(torch.arange(5.0)).tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 0.0]]


def test_what_was_sent_and_what_is_left_are_all_differences():
    made = ran(OTACodes(lr=0.1, **UNTAUGHT), Toy(), rounds=1)
    method, code, state = made.method, made.server.code, {}
    quantizer, _ = method.quantizer(method.blocks(made.server.model.flat - made.site.initial.flat), stream(0, "test"))
    sent, moved = torch.zeros(83), torch.zeros(83)
    for round in range(1, 4):
        here, again = node(made.site, 1, round), node(made.site, 1, round)
        here.state.update(state)
        reply = method.local(here, made.server.model, quantizer, code)
        w, _ = again.descend(made.server.model, lr=0.1, epochs=1, batch=10)
        moved += (w - made.server.model).flat
        nearest = torch.cdist(reply["symbols"], code).argmin(1)
        assert torch.equal(code[nearest], reply["symbols"]) and reply["symbols"].shape == (21, 32)
        mine = method.blocks((w - made.server.model).flat + state.get("residual", torch.zeros(83)))
        apart = (mine[:, None] - quantizer).square().sum(2)
        assert torch.allclose(apart.gather(1, nearest[:, None])[:, 0], apart.min(1).values)
        sent += quantizer[nearest].flatten()[:83]
        state = {"residual": here.state["residual"]}
    assert torch.allclose(sent + state["residual"], moved, atol=1e-6)
    assert state["residual"].abs().max() > 1e-3


@pytest.mark.parametrize("norm", [False, True])
def test_a_round_of_a_code_without_overlap_is_the_mean_of_quantized_differences(norm):
    task, sizes = Toy(norm=norm, sizes=(30, 20, 25)), {"words": 32, "length": 32, "server_lr": 0.5}
    before, after = (ran(Plain(lr=0.1, **sizes), task, rounds=r, seed=3) for r in (1, 2))
    method, seen = before.method, {}

    class Spied(Plain):
        def round(self, server, cohort):
            Plain.round(self, server, Cohort(cohort))

    class Cohort:
        def __init__(self, cohort):
            self.cohort = cohort

        def __len__(self):
            return len(self.cohort)

        def mean(self, function, **msg):
            seen.update(msg)
            return self.cohort.mean(function, **msg)

    again = ran(Spied(lr=0.1, **sizes), task, rounds=2, seed=3)
    assert torch.equal(again.server.model.flat, after.server.model.flat)
    assert torch.equal(seen["model"].flat, before.server.model.flat)
    total, statistics = 0.0, 0.0
    for k in range(3):
        here = node(before.site, k, 2)
        here.state.update(before.engine.states[k])
        reply = method.local(here, seen["model"], seen["quantizer"], torch.eye(32))
        total = total + seen["quantizer"][reply["symbols"].argmax(1)].flatten()
        statistics = statistics + reply["statistics"].flat / 3
    params = before.server.model.params.flat + 0.5 * total[: len(before.server.model.params)] / 3
    assert torch.allclose(after.server.model.params.flat, params, atol=1e-5)
    assert torch.allclose(after.server.model.buffers.flat, before.server.model.buffers.flat + statistics, atol=1e-5)


def test_uses_of_the_channel_are_rows_times_the_length_of_a_word():
    for count in (2, 5):
        made = ran(OTACodes(lr=0.1, **UNTAUGHT), Toy(sizes=(12,) * count, norm=True), rounds=2, channel="air:10")
        assert [row["channel/uses"] for row in made.record.metrics][-1] == math.ceil(99 / 4) * 32


def test_the_code_goes_down_once():
    made = ran(OTACodes(lr=0.1, **UNTAUGHT), Toy(), rounds=3)
    code = [line for line in made.record.ledger if line["field"] == "code" and line["direction"] == "down"]
    assert {line["round"] for line in code} == {1} and {line["bytes"] > 32 * 32 * 4 for line in code} == {True}


def test_it_learns_over_the_air_and_counts_who_sent():
    made = ran(OTACodes(lr=0.1), Toy(), rounds=12, channel="air:10", eval_every=1)
    assert made.record.final["global_test_accuracy"] > 0.85
