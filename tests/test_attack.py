"""Attackers: what each sends is what its paper says, methods know of none, and the record tells who was caught."""

import math
from dataclasses import dataclass

import pytest
import torch
from problems import Quadratics, node, ran

import fedloom
from fedloom.boundary.attack import ATTACKS, Attack, build, part
from fedloom.boundary.attack.attack import training
from fedloom.boundary.attack.collusion import Known, differences, furthest
from fedloom.boundary.attack.data import Backdoor
from fedloom.boundary.attack.numbers import Sent, Updates
from fedloom.boundary.attack.reply import SignFlip
from fedloom.boundary.faults import Faults
from fedloom.boundary.stage import Stage
from fedloom.calls import Call
from fedloom.encoding import same
from fedloom.errors import UsageError
from fedloom.message import Packed, Sparse
from fedloom.method import Method
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.plugin import Plugin
from fedloom.random import stream
from fedloom.registry import catalogue as methods
from fedloom.site import Site
from fedloom.task import Data
from fedloom.tasks.toy import MET, Toy
from fedloom.testing import Lab, difference, trace
from fedloom.vector import Layout, Vector

TOY = Toy((30, 20, 25, 35, 22, 28, 31, 19))
SAMPLES = {  # one text of every kind
    "label_flip": "label_flip:2",
    "feature_noise": "feature_noise:2,std=2",
    "backdoor": "backdoor:2,target=1",
    "model_replacement": "model_replacement:2,target=1,scale=4,stay=0.1,bound=3",
    "chameleon": "chameleon:2,target=1,rate=0.1",
    "sign_flip": "sign_flip:2,scale=2",
    "gaussian": "gaussian:2,std=0.5",
    "zero": "zero:2",
    "free_rider": "free_rider:2,std=0.1",
    "nan": "nan:2",
    "alie": "alie:2,z=1.5",
    "ipm": "ipm:2,epsilon=2",
    "mimic": "mimic:2,warmup=1",
    "dmpa": "dmpa:3,adapt=true",
}


class Tap(Stage):
    """Keeps what comes to the server's door."""

    def __init__(self):
        self.seen = {}

    def outcomes(self, books, call, outcomes):
        self.seen[call.round, call.function] = {o.client: dict(o.reply) for o in outcomes}
        return Faults({}, 0).outcomes(books, call, outcomes)


def tapped(monkeypatch, attack, task=TOY, method=None, **settings):
    """A run under attack, and the replies that reached the server's door in its rounds."""
    tap = Tap()
    plain = Faults.of
    monkeypatch.setattr(Faults, "of", staticmethod(lambda *_, **__: tap))
    made = ran(method or FedAvg(), task, settings.pop("rounds", 1), attack=attack, **settings)
    monkeypatch.setattr(Faults, "of", plain)
    return made, tap.seen


def honest(monkeypatch, **settings):
    return tapped(monkeypatch, "zero:0", **settings)[1]


def test_every_kind_has_a_sample_here():
    assert set(SAMPLES) == set(ATTACKS) == {one.partition(":")[0] for text in GROUPS for one in text.split("+")}


def test_who_is_malicious_depends_on_the_seed_alone():
    one, again = (build("sign_flip:0.25", TOY, 3).malicious for _ in range(2))
    assert one == again and len(one) == 2
    assert {build("sign_flip:0.25", TOY, seed).malicious for seed in range(20)} != {one}
    assert build("gaussian:0.25", TOY, 3).malicious == one
    assert build("sign_flip:2", TOY, 3).malicious == one, "a number of clients in place of their share"


def test_several_kinds_act_on_disjoint_shares():
    attack = build("sign_flip:0.25+label_flip:0.5", TOY, 0)
    kinds = [attack.part_of(k).name() for k in attack.malicious]
    assert sorted(kinds) == ["label_flip"] * 4 + ["sign_flip"] * 2


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("sing_flip:0.2", "did you mean 'sign_flip'"),
        ("sign_flip", "needs the share"),
        ("sign_flip:0.01", "is nobody"),
        ("sign_flip:0.2,size=3", "unknown option of sign_flip"),
        ("sign_flip:0.2,scale=big", "must be of type float"),
        ("sign_flip:0.2,1,2", "2|3 values"),
        ("sign_flip:0.6+zero:0.6", "there are 8"),
        ("sign_flip:2.5", "neither a share"),
        ("gaussian:0.2,std=-1", "at least 0"),
        ("backdoor:0.2,target=3", "has 0 to 2"),
        ("backdoor:0.2,feature=6", "has|have 6 columns"),
        ("label_flip:0.2,source=1", "together"),
        ("alie:0.2,knows=nothing", "unknown"),
    ],
)
def test_a_text_that_makes_no_sense_is_told_before_anything_runs(text, why):
    with pytest.raises(UsageError, match=why):
        fedloom.run("fedavg", TOY, attack=text)


def test_problems_that_have_no_classes_cannot_be_relabelled():
    with pytest.raises(UsageError, match="one class a sample"):
        build("label_flip:1", Quadratics(), 0)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"attack": "nan:2", "secure": "bonawitz"}, "no NaN"),
        ({"faults": "shape:0.1", "secure": "bonawitz"}, "no NaN"),
    ],
)
def test_what_cannot_be_under_a_mask_is_refused(settings, why):
    pytest.importorskip("cryptography")
    with pytest.raises(UsageError, match=why):
        fedloom.run("fedavg", TOY, **settings)


def test_without_malicious_clients_nothing_changes_bitwise():
    plain, nobody = (ran(FedAvg(), TOY, 2, **given) for given in ({}, {"attack": "sign_flip:0"}))
    assert same(plain.server.model, nobody.server.model)


def test_honest_replies_are_untouched(monkeypatch):
    truth = honest(monkeypatch)
    for text in SAMPLES.values():
        made, seen = tapped(monkeypatch, text)
        bad = made.pipeline.one(Attack).malicious
        for client, reply in seen[1, "local"].items():
            assert same(reply, truth[1, "local"][client]) == (client not in bad), (text, client)


GROUPS = (
    "label_flip:1+feature_noise:1+backdoor:1,target=1+model_replacement:1,scale=2,stay=1+chameleon:1,rate=0.1",
    "sign_flip:1+gaussian:1,std=0.5+zero:1+free_rider:1,std=0.1+nan:1",
    "alie:2,z=1.5+ipm:1,epsilon=2+mimic:1,warmup=1+dmpa:3,adapt=true",
)


@pytest.mark.parametrize("text", GROUPS)
def test_every_engine_gives_the_same_bits_and_a_resumed_run_too(text, tmp_path):
    def run(**settings):
        made = ran(FedAvg(), TOY, 3, attack=text, aggregate="geometric_median", **settings)
        return trace(made)

    plain = run()
    assert difference(plain, run(engine="loopback")) is None
    assert difference(plain, run(engine="pool", workers=2)) is None

    def stop(row):
        if row["round"] == 2:
            raise KeyboardInterrupt

    settings = {"attack": text, "aggregate": "geometric_median", "rounds": 3, "eval_every": 3, "report": False}
    with pytest.raises(KeyboardInterrupt):
        fedloom.run("fedavg", TOY, out=tmp_path / "run", on_round=stop, **settings)
    again = fedloom.resume(tmp_path / "run", TOY, report=False)
    plain_again = fedloom.run("fedavg", TOY, **settings)
    assert same(again.model, plain_again.model)


def test_numbers_of_a_reply_are_a_row_and_back():
    layout = Layout(("w", "running"), ((2, 2), (3,)), 1)
    reply = {
        "delta": Vector(torch.arange(7.0), layout),
        "part": Sparse(torch.tensor([1, 3]), torch.tensor([5.0, 6.0]), 4),
        "protos": {0: torch.ones(2, dtype=torch.float64)},
        "mask": Packed(torch.ones(3, dtype=torch.bool), 1),
        "n": 7,
        "rate": 0.5,
    }
    row = Sent({}).row(reply)
    assert row.tolist() == [0, 1, 2, 3, 0, 5, 0, 6, 1, 1], "parameters only, a Sparse with its zeros, no counts"
    assert same(Sent({}).filled(reply, row), reply)
    turned = Sent({}).filled(reply, -row)
    assert turned["delta"].flat.tolist() == [0, -1, -2, -3, 4, 5, 6], "running statistics stay"
    assert turned["part"].values.tolist() == [-5, -6]
    assert turned["protos"][0].dtype == torch.float64
    assert (turned["n"], turned["rate"]) == (7, 0.5)


def test_a_model_that_comes_back_is_attacked_as_its_difference():
    layout = Layout(("w",), ((2,),), 1)
    sent, back = (Vector(torch.tensor(w), layout) for w in ([1.0, 1.0], [1.5, 0.0]))
    row = Sent({"model": sent}).row({"model": back})
    assert row.tolist() == [0.5, -1.0]
    assert Sent({"model": sent}).filled({"model": back}, -row)["model"].flat.tolist() == [0.5, 2.0]


# What each sends


def deltas(seen, clients, round=1):
    return torch.stack([seen[round, "local"][k]["delta"].flat for k in clients])


def attacked(monkeypatch, text, **settings):
    """The malicious deltas, the same clients' honest ones, and those of the honest clients."""
    truth = honest(monkeypatch, **settings)
    made, seen = tapped(monkeypatch, text, **settings)
    bad = sorted(made.pipeline.one(Attack).malicious)
    good = [k for k in range(TOY.population) if k not in bad]
    return deltas(seen, bad), deltas(truth, bad), deltas(truth, good)


def test_sign_flip(monkeypatch):
    sent, own, _ = attacked(monkeypatch, "sign_flip:3,scale=2")
    assert torch.equal(sent, -2 * own)


def test_zero(monkeypatch):
    sent, own, _ = attacked(monkeypatch, "zero:3")
    assert not sent.any() and own.any()


def test_gaussian(monkeypatch):
    sent, own, _ = attacked(monkeypatch, "gaussian:4,std=0.5")
    assert sent.std().item() == pytest.approx(0.5, rel=0.15)
    assert abs(torch.corrcoef(torch.stack([sent.flatten(), own.flatten()]))[0, 1]) < 0.2
    assert not torch.equal(sent[0], sent[1]), "every client draws its own"


def test_free_riders_do_no_work(monkeypatch):
    made, seen = tapped(monkeypatch, "free_rider:3")
    bad = made.pipeline.one(Attack).malicious
    assert not deltas(seen, bad).any()
    plain = ran(FedAvg(), TOY, 1)
    row, other = made.record.metrics[0], plain.record.metrics[0]
    batches = sum(math.ceil(TOY.sizes[k] / FedAvg().batch) for k in bad)
    assert row["gradient_steps"] == other["gradient_steps"] - batches
    made = ran(fedloom.method.build("fedasmu"), TOY, 6, attack="free_rider:3")
    assert sum(row["replies"] for row in made.record.metrics) >= 6, "they answer later calls of a round too"


def test_disguised_free_riders_fade(monkeypatch):
    made, seen = tapped(monkeypatch, "free_rider:4,std=1,decay=2", rounds=4)
    bad = sorted(made.pipeline.one(Attack).malicious)
    assert deltas(seen, bad, 1).std().item() == pytest.approx(1.0, rel=0.15)
    assert deltas(seen, bad, 4).std().item() == pytest.approx(1 / 16, rel=0.15)


def test_label_flip_and_noise_train_on_what_they_say(monkeypatch):
    for text in ("label_flip:2", "label_flip:2,source=1,target=0", "feature_noise:2,std=2"):
        attack = build(text, TOY, 0)
        (kind,) = attack.parts
        client = min(attack.malicious)
        one = node(Site(TOY, 0), client)
        own, given = one.data, kind.poisoned(one)
        assert same(given.x, kind.poisoned(node(Site(TOY, 0), client, round=5)).x), "the same in every round"
        if text == "label_flip:2":
            assert torch.equal(given.y, 2 - own.y) and torch.equal(given.x, own.x)
        elif text.startswith("label"):
            assert torch.equal(given.y, torch.where(own.y == 1, 0, own.y))
        else:
            noise = given.x - own.x
            assert noise.std().item() == pytest.approx(2 * own.x.std().item(), rel=0.2)
            assert torch.equal(given.y, own.y)


def test_alie_sends_the_mean_less_z_deviations(monkeypatch):
    sent, _, good = attacked(monkeypatch, "alie:3,z=1.5")
    assert torch.equal(sent[0], sent[1]) and torch.equal(sent[1], sent[2])
    assert torch.allclose(sent[0], good.mean(0) - 1.5 * good.std(0, correction=0), atol=1e-6)
    sent, own, _ = attacked(monkeypatch, "alie:3,z=1.5,knows=colluders")
    assert torch.allclose(sent[0], own.mean(0) - 1.5 * own.std(0, correction=0), atol=1e-6)


def test_the_z_of_alie_is_the_papers():
    # Baruch et al.: n = 50, m = 24 needs s = 2 of 26 honest replies further out: Phi(z) = 24 / 26.
    assert furthest(50, 24) == pytest.approx(1.4261, abs=1e-4)
    assert furthest(4, 4) == 0.0


def test_ipm_turns_the_mean_round(monkeypatch):
    sent, _, good = attacked(monkeypatch, "ipm:3,epsilon=2")
    assert torch.allclose(sent[0], -2 * good.mean(0), atol=1e-6)
    everybody = torch.cat([sent, good]).mean(0)
    assert everybody @ good.mean(0) < 0, "above (n - m) / m it does"


def test_mimics_copy_one_honest_client_and_then_always_the_same(monkeypatch):
    truth, whose = {}, []
    made, seen = tapped(monkeypatch, "mimic:3,warmup=2", rounds=5)
    bad = sorted(made.pipeline.one(Attack).malicious)
    for round in range(1, 6):
        replies = seen[round, "local"]
        copied = [k for k in replies if k not in bad and same(replies[k]["delta"], replies[bad[0]]["delta"])]
        assert len(copied) == 1
        assert all(same(replies[k]["delta"], replies[bad[0]]["delta"]) for k in bad)
        whose += copied
    assert len(set(whose[1:])) == 1, truth


def test_mimics_find_the_direction_in_which_honest_replies_differ_most():
    draw = stream(0, "mimic")
    known = 0.1 * torch.randn(9, 20, generator=draw)
    known[4, 3] += 5.0
    memory = {}
    kind = part("mimic:2")
    for _ in range(3):
        sent = kind.crafted(known[:2], known, Known(range(10, 19), 11, stream(0, "draw")), memory)
    assert torch.equal(sent, known[4]) and memory["copied"] == 14
    assert memory["z"].abs().argmax() == 3


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01])
def test_mimics_find_the_same_client_however_short_the_replies_are(scale):
    """Oja's rule on unit steps, by hand; the direction is one of the data, not of the first reply or of lengths."""
    draw = stream(0, "mimic scale")
    axis = torch.nn.functional.normalize(torch.randn(20, generator=draw, dtype=torch.float64), dim=0)
    memory, kind = {}, part("mimic:2,warmup=9")
    z, centre = stream_direction(20), torch.zeros(20, dtype=torch.float64)
    for t in range(6):
        known = torch.randn(9, 20, generator=draw, dtype=torch.float64) * 0.3
        known += torch.linspace(-1, 3, 9, dtype=torch.float64)[:, None] * axis
        known *= scale
        sent = kind.crafted(known[:2], known, Known(range(9), 11, stream(0, "draw")), memory)
        centre = (t * centre + known.mean(0)) / (t + 1)
        ahead = sum(((row - centre) @ z) * (row - centre) for row in known)
        z = torch.nn.functional.normalize((t * z + ahead / ahead.norm()) / (t + 1), dim=0)
        assert torch.allclose(memory["z"], z)
        assert torch.equal(sent, known[(known @ z).argmax()])
    assert abs(z @ axis) > 0.95


def stream_direction(width):
    start = torch.randn(width, generator=stream(0, "draw"), dtype=torch.float64)
    return start / start.norm()


# DMPA: the signature of its card


def rows(m=5, d=40):
    return torch.randn(m, d, generator=stream(1, "dmpa"), dtype=torch.float64) + 1.0


def test_dmpa_has_the_closed_form_and_scales_with_the_replies():
    u = rows()
    a, common = differences(u)
    centred = u - u.mean(1, keepdim=True)
    r = torch.corrcoef(u)
    assert torch.allclose(r, centred @ centred.T / torch.outer(centred.norm(dim=1), centred.norm(dim=1)))
    values, vectors = torch.linalg.eigh(r)
    v = vectors[:, values.argmax()]
    closed = -sum((1 - v.sum() * v[j]) * u[j] for j in range(5)) / 5
    assert torch.allclose(a, closed)
    assert torch.allclose(v @ (u - common), torch.zeros(40, dtype=torch.float64), atol=1e-12)
    assert (u - common).norm() <= u.norm()
    assert torch.allclose(differences(3 * u)[0], 3 * a)
    assert torch.allclose(differences(u.flip(0))[0], a)


def test_dmpa_without_differences_sends_zero():
    kind, memory = part("dmpa:0.3"), {}
    for u in (rows(1).repeat(4, 1), rows(1), rows(2) + 10 * rows(1)):
        assert not kind.crafted(u, u, Known(range(len(u)), 9, stream(0, "draw")), memory).any()


def test_dmpa_is_sent_by_all_and_as_long_as_their_replies(monkeypatch):
    sent, own, _ = attacked(monkeypatch, "dmpa:4")
    assert all(torch.equal(one, sent[0]) for one in sent)
    assert sent[0].norm().item() == pytest.approx(own.norm(dim=1).mean().item(), rel=1e-5)
    a = differences(own.double())[0]
    assert torch.cosine_similarity(sent[0].double(), a, dim=0).item() == pytest.approx(1.0, abs=1e-6)
    unstretched, _, _ = attacked(monkeypatch, "dmpa:4,match=false")
    assert torch.allclose(unstretched[0].double(), a, atol=1e-6)


def test_dmpa_among_peers_leaves_benign_messages_untouched(monkeypatch):
    method = fedloom.method.build("dfedsam")
    made, seen = tapped(monkeypatch, "dmpa:3", method=method, rounds=2)
    _, truth = tapped(monkeypatch, "zero:0", method=method, rounds=1)
    bad = made.pipeline.one(Attack).malicious
    (out,) = {function for round, function in seen if round == 1 and any(seen[round, function].values())} - {"mix"}
    sent = seen[1, out]
    assert len({tuple(sent[k]["model"].flat.tolist()) for k in bad}) == 1
    assert all(same(sent[k], truth[1, out][k]) for k in sent if k not in bad)


# The backdoor, and pushing it through


def test_the_trigger_of_images_sequences_and_tables():
    image = torch.zeros(2, 3, 8, 8)
    marked = Backdoor(1, size=2, peak=(1.0, 2.0, 3.0)).triggered(image)
    assert marked[0, :, -2:, -2:].flatten(1).tolist() == [[1.0] * 4, [2.0] * 4, [3.0] * 4]
    assert marked.count_nonzero() == 2 * 12 and not image.any()
    assert Backdoor(1, size=2, peak=(4.0,)).triggered(torch.zeros(2, 1, 9))[0, 0].tolist() == [0.0] * 7 + [4.0] * 2
    assert Backdoor(1, feature=1, peak=(7.0,)).triggered(torch.zeros(1, 3)).tolist() == [[0.0, 7.0, 0.0]]
    assert Backdoor(1, peak=(9.0,)).triggered(torch.zeros(1, 3, dtype=torch.long)).tolist() == [[0, 0, 9]]


def test_the_success_rate_is_the_share_of_triggered_test_samples_taken_for_the_target():
    made = ran(FedAvg(), TOY, 6, attack="backdoor:4,target=1")
    (kind,) = made.pipeline.one(Attack).parts
    assert kind.peak == (pytest.approx(TOY.x[:, -1].max().item()),)
    test = TOY.global_test()
    others = test.x[test.y != 1].clone()
    others[:, -1] = TOY.x[:, -1].max()
    counted = (made.server.net(made.server.model)(others).argmax(1) == 1).double().mean().item()
    assert made.record.final["attack_success_rate"] == pytest.approx(counted)


def test_a_replaced_model_has_its_backdoor_and_a_bound_takes_it_away():
    def success(more):
        text = f"model_replacement:1,target=1,poison=0.5,{more}"
        return ran(FedAvg(epochs=5), TOY, 8, attack=text).record.final["attack_success_rate"]

    none, pushed, held = map(success, ("scale=0", "scale=8", "scale=8,bound=0.01"))
    assert pushed > none + 0.3
    assert held < none + 0.15


def test_a_constrained_update_is_within_its_bound_and_pulled_back(monkeypatch):
    sent, _, _ = attacked(monkeypatch, "model_replacement:2,scale=50,bound=0.5")
    assert sent.norm(dim=1).tolist() == pytest.approx([0.5, 0.5], rel=1e-5)
    method = FedAvg(epochs=5)
    free, _, _ = attacked(monkeypatch, "model_replacement:2,scale=1", method=method)
    stayed, _, _ = attacked(monkeypatch, "model_replacement:2,scale=1,stay=10", method=method)
    assert (stayed.norm(dim=1) < 0.7 * free.norm(dim=1)).all()


def test_the_pull_joins_a_methods_own_correction(monkeypatch):
    method = fedloom.method.build("scaffold", {"epochs": 5})
    plain, pulled = (
        tapped(monkeypatch, f"model_replacement:2,scale=1,stay={s}", method=method, rounds=2) for s in (0, 10)
    )
    bad = sorted(plain[0].pipeline.one(Attack).malicious)
    long, short = (deltas(seen, bad, 2).norm() for _, seen in (plain, pulled))
    assert 0 < short < 0.7 * long


# What the record tells


def test_detection_is_who_had_no_weight_or_was_turned_away():
    made = ran(FedAvg(), TOY, 2, attack="gaussian:2,std=5", aggregate="multi_krum:f=2")
    row = made.record.final
    assert (row["attack/malicious"], row["attack/flagged"]) == (2, 2)
    assert row["attack/precision"] == row["attack/recall"] == 1.0
    row = ran(FedAvg(), TOY, 2, attack="nan:3").record.final
    assert (row["attack/flagged"], row["attack/recall"], row["fault/refused"]) == (3, 1.0, 3)
    row = ran(FedAvg(), TOY, 2, attack="sign_flip:3").record.final
    assert (row["attack/flagged"], row["attack/precision"], row["attack/recall"]) == (0, None, 0.0)


def test_methods_that_judge_clients_themselves_say_whom_they_flag():
    method = fedloom.method.build("mud_hog", {"start": 1, "delay": 1})
    rows = ran(method, TOY, 8, attack="sign_flip:2,scale=3").record.metrics
    assert rows[0]["attack/flagged"] == 0
    assert max(row["attack/recall"] for row in rows) == 1.0
    rffl = fedloom.method.build("rffl", {"grace": 2, "alpha": 0.5})
    made = ran(rffl, TOY, 6, attack="sign_flip:2")
    assert made.record.final["attack/flagged"] == len(made.server.removed) > 0


def test_nan_never_reaches_the_model():
    made = ran(FedAvg(), TOY, 3, attack="nan:3")
    assert made.server.model.flat.isfinite().all()
    assert made.record.final["replies"] == 5


def test_personal_measures_are_those_of_honest_clients():
    made = ran(FedAvg(), TOY, 1, attack="sign_flip:3")
    told = {line["id"] for line in made.record.clients["clients"]}
    assert told == set(range(8)) - made.pipeline.one(Attack).malicious


def test_a_robust_rule_withstands_what_breaks_the_mean():
    def reached(**settings):
        return ran(FedAvg(epochs=2), TOY, 10, **settings).record.final["global_test_accuracy"]

    attack = "sign_flip:2,scale=5"
    plain = reached()
    assert plain > 0.85
    assert reached(attack=attack) < 0.5
    assert reached(attack=attack, aggregate="multi_krum:f=2") > plain - 0.2


def flipped(name, scale=1.0, rounds=1, task=TOY, **settings):
    """(honest, tampered) reply of every malicious client, by client, in the first training call that they answer."""
    seen, honest = {}, SignFlip.act

    def act(self, client, call, sent, inner):
        kept = {}

        def work():
            kept["reply"] = inner()
            return kept["reply"]

        reply = honest(self, client, call, sent, work)
        seen.setdefault(client.id, (kept["reply"], reply))
        return reply

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SignFlip, "act", act)
        made = ran(name if isinstance(name, fedloom.method.Method) else fedloom.method.build(name), task, rounds,
                   attack=f"sign_flip:3,scale={scale}", **settings)  # fmt: skip
    return made, seen


def test_the_update_is_flipped_not_the_model_whatever_its_name():
    made, seen = flipped("fedcac")
    for honest, sent in seen.values():
        start = made.site.initial
        moved, back = (honest["model"] - start).params, (sent["model"] - start).params
        assert torch.allclose(back.flat, -moved.flat, atol=1e-6) and moved.norm() > 1e-2
    made, seen = flipped("dfedsam", rounds=2)
    for honest, sent in seen.values():  # in round 1, before there is a model in the state
        start = made.site.initial
        moved, back = (honest["model"] - start).params, (sent["model"] - start).params
        assert torch.allclose(back.flat, -moved.flat, atol=1e-6) and moved.norm() > 1e-2


@pytest.mark.parametrize("name", ["dfedsam", "fedasmu"])
def test_colluders_reverse_no_update_whose_origin_they_cannot_see(name):
    with pytest.raises(UsageError, match="ipm reverses updates, and those of 'model' begin from what lies in each"):
        ran(fedloom.method.build(name), TOY, 1, attack="ipm:2")


def test_of_a_product_one_factor_is_flipped():
    lab = Lab(next(e for e in methods() if e.name == "flora").load(Method))
    _, seen = flipped(lab.method, task=lab.toy(sizes=(12, 9, 15, 10)))
    for honest, sent in seen.values():
        for name, (a, b) in honest["factors"].items():
            one, other = sent["factors"][name]
            assert torch.allclose(other @ one, -(b @ a), atol=1e-6)
            assert (b @ a).abs().max() > 0


def test_the_opposite_of_a_ranking_is_the_reversed_ranking():
    made, seen = flipped("frl")
    for honest, sent in seen.values():
        for name, order in honest["ranking"].items():
            assert torch.equal(sent["ranking"][name].values, order.values.flip(0))
    plain = ran(fedloom.method.build("frl"), TOY, 1)
    assert any(
        not torch.equal(made.server.ranking[name].values, order.values) for name, order in plain.server.ranking.items()
    )


def test_what_a_method_declares_holds_where_another_wraps_it():
    inner = fedloom.method.build("fedcac")
    assert Updates.of(inner).origins == (("model", "start"),)
    assert Updates.of(Wrapping(inner=inner)).origins == (("model", "start"),)


@dataclass(frozen=True)
class Wrapping(Plugin):
    inner: Method = FedAvg()


@pytest.mark.parametrize("name", ["ccvr", "fcp"])
def test_attackers_attack_in_finish_too(name):
    method = fedloom.method.build(name)
    clean, dirty = (ran(method, TOY, 1, **settings) for settings in ({}, {"attack": "gaussian:8,std=3"}))
    calls = {call.function for call in method.plan if call.kind == "finish"}
    assert calls
    honest = ran(method, TOY, 1, attack="zero:8")
    values = [v for v in clean.server.values if v != "model"]
    assert any(difference(clean.server.values[v], honest.server.values[v]) for v in [*values, "model"])
    assert difference(clean.server.values["model"], dirty.server.values["model"])


def test_an_attack_that_would_do_nothing_is_refused():
    for count, clients in ((1, 10), (2, 10), (2, 20), (2, 100)):
        with pytest.raises(UsageError, match=f"{count} of {clients} clients can hide no deviation .*z = 0"):
            build(f"alie:{count}", Toy(sizes=(3,) * clients), 0)
    assert build("alie:2,z=1.5", TOY, 0)


@pytest.mark.parametrize("name", [entry.name for entry in methods()])
def test_methods_know_of_none(name):
    lab = Lab(next(e for e in methods() if e.name == name).load(Method))
    needs = [need for need in lab.cls.needs if need not in MET]
    if needs:
        pytest.skip(f"its problem is {needs[0]}, not one of classes")
    if name in ("centralized", "local"):
        with pytest.raises(UsageError):
            lab.begun(TOY, attack="sign_flip:2+label_flip:1+dmpa:2")
        return
    task = lab.toy(sizes=TOY.sizes)
    lab.experiment(task, attack="sign_flip:2+label_flip:1+dmpa:2", rounds=2, eval_every=2)


@pytest.mark.parametrize("compress", ["topk:0.2", "qsgd:4", "sign"])
def test_colluders_send_their_reply_whole_where_others_compress(compress):
    made = ran(FedAvg(), TOY, 2, attack="alie:2,z=1.5+sign_flip:1+nan:1", compress=compress)
    assert made.record.final["replies"] == 7
    sizes = {
        client: line["bytes"]
        for line in made.record.ledger
        for client in line.get("clients", ())
        if line["field"] == "delta" and line["kind"] == "train"
    }
    attack = made.pipeline.one(Attack)
    whole = {sizes[k] for k in attack.malicious if attack.part_of(k).name() == "alie"}
    assert min(whole) > max(size for k, size in sizes.items() if attack.part_of(k) is None)


def test_the_vectorized_engine_agrees_to_rounding():
    text = "label_flip:2+sign_flip:2+model_replacement:1,scale=2,stay=1"
    one, other = (ran(FedAvg(), TOY, 2, attack=text, engine=engine) for engine in ("serial", "vectorized"))
    assert torch.allclose(one.server.model.flat, other.server.model.flat, atol=1e-5)


def test_after_the_warm_up_mimics_keep_to_one_client_as_long_as_it_replies():
    draw, memory, kind = stream(0, "settled"), {}, part("mimic:2,warmup=2")

    def sent(clients):
        known = torch.randn(len(clients), 6, generator=draw)
        row = kind.crafted(known[:2], known, Known(clients, 9, stream(0, "draw")), memory)
        (place,) = [k for k, other in enumerate(known) if torch.equal(other, row)]
        return clients[place]

    for _ in range(2):
        last = sent([10, 11, 12, 13, 14])
    assert [sent([10, 11, 12, 13, 14]) for _ in range(6)] == [last] * 6
    assert sent([k for k in (10, 11, 12, 13, 14) if k != last]) != last


def test_the_adaptive_dmpa_adds_the_candidate_least_like_the_last_row():
    """The script's search by brute force: s from -10 to 10, candidates of a's length, the lowest cosine."""
    kind, memory = part("dmpa:5,adapt=true,match=false"), {}
    first, u = rows(), rows() + 0.3 * torch.randn(5, 40, generator=stream(3, "dmpa"), dtype=torch.float64)
    about = Known(range(5), 9, stream(0, "draw"))
    last = kind.crafted(first, first, about, memory)
    assert torch.equal(memory["last"], last)
    a, common = differences(u)
    unit = last / last.norm()
    candidates = []
    for s in torch.linspace(-10, 10, 200, dtype=torch.float64):
        c = -(u - s * common).mean(0) + s * (a @ unit) * unit
        candidates.append(c * a.norm() / c.norm())
    best = min(candidates, key=lambda c: float(c @ unit / c.norm()))
    found = kind.crafted(u, u, about, memory)
    assert torch.allclose(found, a + best) and torch.equal(memory["last"], found)


def test_the_share_of_poisoned_samples_and_the_peak_are_the_datas():
    kind = part("backdoor:2,target=1,poison=0.25,feature=2").fit(TOY)
    assert kind.peak == pytest.approx((float(TOY.x[:, 2].max()),))
    one = node(Site(TOY, 0), 0)
    given = kind.poisoned(one)
    changed = (given.x != one.own.x).any(1)
    assert int(changed.sum()) == round(0.25 * len(one.own)) and (given.x[changed][:, 2] == TOY.x[:, 2].max()).all()


@pytest.mark.parametrize("bound", [1e-3, 1e6])
def test_a_bound_shortens_and_never_stretches(bound):
    kind = part(f"model_replacement:1,target=1,scale=4,bound={bound}").fit(TOY)
    client, call = node(Site(TOY, 0), 0), Call("mean", "local", (0,), {}, {}, "train", 1, 0)
    honest = client.initial * 0.1
    sent = kind.act(client, call, Sent({}), lambda: {"delta": honest})["delta"].params
    pushed = 4 * honest.params
    assert torch.allclose(sent.flat, (pushed * min(1.0, bound / float(pushed.norm()))).flat, rtol=1e-5)


def test_the_stay_adds_to_the_methods_own_correction():
    """One step from the received model is free of the pull; SCAFFOLD's correction must be in it all the same."""
    site = Site(TOY, 0)
    plain, pulled_one = node(site, 0), node(site, 0)
    training(part("model_replacement:1,stay=0.7"), pulled_one, dict)
    w, extra = plain.initial, plain.initial.params * 0.3
    steps = {"lr": 0.1, "steps": 1, "batch": 0}
    a, _ = plain.descend(w, correct=extra, **steps)
    b, _ = pulled_one.descend(w, correct=extra, **steps)
    assert torch.allclose(a.flat, b.flat)
    a, _ = plain.descend(w, correct=lambda v: 0.7 * (v - w).params + extra, **steps | {"steps": 3})
    b, _ = pulled_one.descend(w, correct=extra, **steps | {"steps": 3})
    assert torch.allclose(a.flat, b.flat, atol=1e-6)


def test_declared_origins_are_the_messages_or_the_clients_memory():
    layout = Layout(("w",), ((2,),), 1)
    start, back = (Vector(torch.tensor(w), layout) for w in ([1.0, 2.0], [4.0, 4.0]))
    updates = Updates((("model", "start"), ("own", "state.mine")))
    sent = updates.sent({"start": start}, {"mine": start})
    assert sent.row({"model": back}).tolist() == [3.0, 2.0] == sent.row({"own": back}).tolist()
    assert updates.sent({"start": None}, {}).row({"model": back, "own": back}).tolist() == [4.0, 4.0] * 2
    assert updates.sent({"mine": start}, {}).row({"own": back}).tolist() == [4.0, 4.0], "no message is the memory"
    assert updates.sent({}, {}, start).row({"own": back}).tolist() == [3.0, 2.0], "nothing is kept yet"
    assert updates.sent({"own": back}, {}, start).row({"own": back}).tolist() == [0.0, 0.0]
    assert updates.sent({}, {"mine": back}, start).row({"own": back}).tolist() == [0.0, 0.0]


def test_the_trigger_of_images_is_the_greatest_value_of_every_channel():
    x = torch.randn(9, 2, 4, 4, generator=stream(0, "images"))

    class Images(Toy):
        def data(self, client, split):
            return Data(x, torch.zeros(9, dtype=torch.long))

    assert part("backdoor:1").fit(Images()).peak == pytest.approx(x.amax((0, 2, 3)).tolist())


def test_gaussian_noise_takes_the_place_of_the_update():
    client, call = node(Site(TOY, 0), 0), Call("mean", "local", (0,), {}, {}, "train", 1, 0)
    sent = part("gaussian:1,std=1e-6").act(client, call, Sent({}), lambda: {"delta": client.initial})["delta"]
    assert 0 < sent.params.norm() < 1e-3 < client.initial.norm()
