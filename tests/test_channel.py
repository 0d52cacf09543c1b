"""A noisy channel: on what, how much, whose noise is whose, in the air, and what it does not go with."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from problems import ran, stopped_and_resumed

import fedloom
from fedloom.boundary.channel import Awgn, amplitudes
from fedloom.cli import main
from fedloom.cohort import Once
from fedloom.errors import UsageError
from fedloom.message import Packed, Seed, Sparse
from fedloom.method import Method, build, client
from fedloom.methods.decentralized.dfedsam import DFedSAM
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.report.words import privacy_statement
from fedloom.runs.spec import Spec
from fedloom.tasks.toy import Toy
from fedloom.testing.lab import difference, trace
from fedloom.vector import Vector

MANY = 20_000
TASK = Toy(sizes=(12, 8, 10))
SEEN: dict[str, Any] = {}


def values(scale):
    """One of every kind of thing that a message may hold, with numbers of size `scale` where noise may be."""
    x = torch.full((MANY,), float(scale))
    return {
        "x": x,
        "half": x[:100].half(),
        "inside": [{"deep": x[:100]}, x[:100]],
        "sparse": Sparse(torch.arange(0, 200, 2), x[:100], 200),
        "whole": torch.arange(100),
        "mask": torch.tensor([True, False]),
        "bits": Packed(torch.arange(4), 3),
        "seed": Seed(3),
        "text": "text",
        "raw": b"raw",
        "number": 2.5,
        "many": 3,
        "nothing": None,
    }


NOISED = ("x", "half", "inside", "sparse")


@dataclass(frozen=True)
class Carrier(Method):
    """Sends everything to everybody and back."""

    verb: str = "call"
    scale: float = 1.0

    def setup(self, server, clients):
        server.came = None

    def round(self, server, cohort):
        SEEN.setdefault("down", {})
        sent = {**values(self.scale), "model": server.model}
        server.came = {up.client: dict(up.fields) for up in cohort.call(self.back, **sent)}

    @client
    def back(self, client, **msg):
        SEEN["down"][client.round, client.id] = msg
        return {**values(self.scale), "model": client.initial.clone()}


def carried(**settings):
    SEEN.clear()
    made = ran(Carrier(), Toy(sizes=(12, 8, 10), norm=True), **{"rounds": 1} | settings)
    return SEEN["down"], made.server.came, made


def tensor(value):
    match value:
        case Vector():
            return value.flat
        case Sparse():
            return value.values
        case list():
            return torch.cat([value[0]["deep"], value[1]])
    return value


@pytest.mark.parametrize(("text", "up", "down"), [
    ("awgn:10", 10**-0.5, 10**-0.5),
    ("awgn:snr=-6", 10**0.3, 10**0.3),
    ("awgn:20,up", 0.1, None),
    ("awgn:snr=20,way=down", None, 0.1),
    ("awgn:std=0.3,way=up+awgn:std=3,way=down", 0.1, 1.0),
])  # fmt: skip
def test_noise_has_its_strength_on_floating_tensors_of_each_way_and_leaves_the_rest(text, up, down):
    scale = 3.0
    SEEN.clear()
    made = ran(Carrier(scale=scale), Toy(sizes=(12, 8, 10), norm=True), rounds=1, channel=text)
    for came, level in ((made.server.came[1], up), (SEEN["down"][1, 1], down)):
        sent = values(scale) | {"model": made.site.initial}
        for name in sent.keys() - {*NOISED, "model"}:
            assert difference(sent[name], came[name]) is None, name
        for name in NOISED:
            noise = (tensor(came[name]).double() - tensor(sent[name]).double()) / scale
            assert tensor(came[name]).dtype == tensor(sent[name]).dtype
            if level is None:
                assert not noise.any()
            else:
                assert noise.std().item() == pytest.approx(level, rel=0.02 if name == "x" else 0.35)
                assert abs(noise.mean().item()) < 5 * level / len(noise) ** 0.5
        assert torch.equal(came["sparse"].index, sent["sparse"].index)
        split = sent["model"].layout.split
        noise = came["model"].flat - sent["model"].flat
        assert not noise[split:].any(), "running statistics are no amplitude"
        signal = sent["model"].flat[:split].square().mean().sqrt().item()
        if level is None:
            assert not noise.any()
        elif "snr" in text or ":10" in text or ":20" in text:
            assert noise[:split].std().item() == pytest.approx(level * signal, rel=0.35)
        else:
            assert noise[:split].std().item() == pytest.approx(level * scale, rel=0.35)


def test_every_link_way_call_and_field_has_noise_of_its_own():
    down, up, _ = carried(channel="awgn:0", rounds=2)
    found = [msg["x"] - 1 for (_, k), msg in down.items() if k < 3] + [fields["x"] - 1 for fields in up.values()]
    found += [Awgn(snr=0).on(torch.ones(MANY), 0, ("x",)) - 1]
    assert len(found) == 6 + 3 + 1
    stacked = torch.stack(found)
    assert (torch.corrcoef(stacked) - torch.eye(len(found))).abs().max() < 0.05
    inside = up[0]["inside"]
    assert not torch.equal(inside[0]["deep"], inside[1])


def test_the_sum_in_the_air_has_noise_once_relative_to_the_sum():
    @dataclass(frozen=True)
    class Adds(Method):
        weight: str = ""

        def setup(self, server, clients):
            server.came = None

        def round(self, server, cohort):
            server.came = dict(cohort.mean(self.back, weight=self.weight or None, told=torch.ones(2)).fields)

        @client
        def back(self, client, told):
            share = {"sparse": Sparse(torch.arange(client.id, 200, 4), torch.ones(len(range(client.id, 200, 4))), 200)}
            whole = {"x": torch.full((MANY,), 2.0 + client.id), "whole": torch.arange(1000), "number": 0.5 + client.id}
            return {**share, **whole, "model": client.initial.clone(), "n": client.n}

    sizes = torch.tensor([12.0, 8.0, 10.0])
    for weight, shares in (("", torch.ones(3)), ("n", sizes)):
        for channel, level in (("air:20+awgn:200,down", None), ("air:std=6", 6.0)):
            made = ran(Adds(weight=weight), Toy(sizes=(12, 8, 10), norm=True), rounds=1, channel=channel)
            came, total = made.server.came, shares.sum().item()
            mean = (shares @ torch.tensor([2.0, 3.0, 4.0])).item() / total
            std = 0.1 * mean if level is None else level / total
            assert came["x"].mean().item() == pytest.approx(mean, abs=5 * std / MANY**0.5)
            assert came["x"].std().item() == pytest.approx(std, rel=0.03)
            assert came["number"] == pytest.approx((shares @ torch.tensor([0.5, 1.5, 2.5])).item() / total)
            assert not torch.equal(came["whole"], torch.arange(1000.0)), "in the air whole numbers are amplitudes"
            split = made.site.initial.layout.split
            assert torch.allclose(came["model"].flat[split:], made.site.initial.flat[split:], atol=1e-6)
            assert came["sparse"].index.tolist() == [i for i in range(200) if i % 4 < 3], "and nobody's stays nobody's"
            assert (came["sparse"].values != 1).all()
            uses = MANY + 1000 + split + 150
            assert [row["channel/uses"] for row in made.record.metrics] == [uses]


def test_in_the_air_there_are_as_many_uses_however_many_are_added():
    few, many = (ran(FedAvg(lr=0.1), Toy(sizes=(10,) * k), rounds=2, channel="air:10") for k in (2, 9))
    assert few.record.metrics[-1]["channel/uses"] == many.record.metrics[-1]["channel/uses"] == 83
    for link in ("awgn:10", None):
        assert "channel/uses" not in ran(FedAvg(lr=0.1), TASK, rounds=1, channel=link).record.metrics[-1]


def test_a_group_has_a_sum_of_its_own_in_the_air():
    @dataclass(frozen=True)
    class Grouped(Method):
        def setup(self, server, clients):
            server.came = None

        def round(self, server, cohort):
            found = cohort.means(self.back, groups={0: "a", 1: "a", 2: "b"})
            server.came = {group: mean.x for group, mean in found.items()}

        @client
        def back(self, client):
            return {"x": torch.ones(MANY)}

    came = ran(Grouped(), TASK, rounds=1, channel="air:0").server.came
    noise = torch.stack([came["a"] - 1, came["b"] - 1])
    assert noise.std(1).tolist() == pytest.approx([1.0, 1.0], rel=0.05)
    assert torch.corrcoef(noise)[0, 1].abs() < 0.05


@dataclass(frozen=True)
class Peers(Method):
    """Everybody sends to everybody; what came is kept."""

    def round(self, server, cohort):
        cohort.exchange(self.out, self.mix, {k: [*cohort] for k in cohort}, told=torch.ones(MANY))

    @client
    def out(self, client, told):
        return {"x": torch.ones(MANY)}

    @client
    def mix(self, client, inbox, told):
        client.state["came"] = {sender: fields["x"] for sender, fields in inbox.items()}


def test_between_peers_every_edge_has_noise_of_its_own():
    made = ran(Peers(), TASK, rounds=1, channel="awgn:0,way=up")
    found = torch.stack([x - 1 for k in range(3) for x in made.engine.states[k]["came"].values()])
    assert len(found) == 9
    assert found.std(1).tolist() == pytest.approx([1.0] * 9, rel=0.05)
    assert (torch.corrcoef(found) - torch.eye(9)).abs().max() < 0.05
    made = ran(Peers(), TASK, rounds=1, channel="awgn:0,way=down")
    assert all((x == 1).all() for x in made.engine.states[0]["came"].values())


@dataclass(frozen=True)
class Holds(Method):
    """Sends one value once."""

    def round(self, server, cohort):
        cohort.call(self.keep, x=Once(torch.ones(MANY)))

    @client
    def keep(self, client, x):
        client.state[f"round{client.round}"] = x


def test_what_a_client_holds_came_with_noise_once():
    states = ran(Holds(), TASK, rounds=3, channel="awgn:0,way=down").engine.states
    for k in range(3):
        first = states[k]["round1"]
        assert (first - 1).std().item() == pytest.approx(1.0, rel=0.05)
        assert torch.equal(first, states[k]["round2"]) and torch.equal(first, states[k]["round3"])


SAME = [
    (FedAvg(lr=0.1), "awgn:10"),
    (FedAvg(lr=0.1), "air:10+awgn:10,way=down"),
    (DFedSAM(lr=0.1), "awgn:20,up"),
    (build("fedbuff", {"lr": 0.1}), "awgn:20"),
]


@pytest.mark.parametrize(("method", "channel"), SAME)
def test_engines_and_resumed_runs_have_the_same_noise(method, channel, tmp_path):
    task = Toy()
    spec = Spec.of({"method": method.to_spec(), "partition": "given", "rounds": 3, "channel": channel})
    found = trace(ran(method, task, 3, channel=channel, eval_every=1))
    clean = trace(ran(method, task, 3, eval_every=1))
    assert any(difference(found[part], clean[part]) for part in ("server", "states"))
    for engine in ("loopback", "pool"):
        again = trace(ran(method, task, 3, channel=channel, eval_every=1, engine=engine, workers=2))
        for part in ("server", "states", "metrics"):
            assert difference(found[part], again[part]) is None, (engine, part)
    resumed = trace(stopped_and_resumed(spec, task, method, tmp_path / "run"))
    assert difference(found["server"], resumed["server"]) is None
    assert difference(found["states"], resumed["states"]) is None


def test_another_seed_is_other_noise_and_a_weak_one_hardly_any():
    plain = ran(FedAvg(lr=0.1), TASK, 2).server.model
    weak = ran(FedAvg(lr=0.1), TASK, 2, channel="awgn:200").server.model
    assert torch.allclose(plain.flat, weak.flat, atol=1e-6)
    assert not torch.equal(Awgn(std=1.0).on(torch.ones(9), 0, ("x",)), Awgn(std=1.0).on(torch.ones(9), 1, ("x",)))


def test_evaluation_bytes_and_times_know_nothing_of_it():
    plain, noisy = (
        ran(FedAvg(lr=1e-9), TASK, 2, channel=channel, bandwidth=1.0) for channel in (None, "awgn:-20,down")
    )
    assert [*plain.record.ledger] == [*noisy.record.ledger]
    for row, other in zip(plain.record.metrics, noisy.record.metrics, strict=True):
        assert row["virtual_seconds"] == other["virtual_seconds"]
    assert torch.allclose(noisy.server.model.flat, plain.server.model.flat, atol=1e-5)
    final = [made.record.final["personal_test_accuracy"] for made in (plain, noisy)]
    assert final[0] == final[1] > 0, "clients are judged by the model itself"


def test_an_attackers_reply_gets_the_noise_of_its_link():
    honest, attacked = (
        ran(FedAvg(lr=0.1), TASK, 1, channel="awgn:std=1,way=up", attack=attack).server.model.flat
        for attack in (None, "sign_flip:1")
    )
    clean, flipped = (ran(FedAvg(lr=0.1), TASK, 1, attack=attack).server.model.flat for attack in (None, "sign_flip:1"))
    assert torch.allclose(honest - clean, attacked - flipped, atol=1e-5) and (honest - clean).std() > 0.2


REFUSED = [
    (FedAvg(), {"channel": "awgn"}, r"expected the signal over the noise in dB \(awgn:snr=10\)"),
    (FedAvg(), {"channel": "awgn:snr=10,std=1"}, "one of the two"),
    (FedAvg(), {"channel": "awgn:std=0"}, "std=0; it is a number over 0"),
    (FedAvg(), {"channel": "awgn:.inf"}, "snr is inf; it must be a finite number"),
    (FedAvg(), {"channel": "agwn:10"}, "unknown channel 'agwn'; did you mean 'awgn'"),
    (FedAvg(), {"channel": "awgn:10,way=sideways"}, "way"),
    (FedAvg(), {"channel": "air:10,way=down"}, "unknown option of channel: air 'way'"),
    (FedAvg(), {"channel": "awgn:10+awgn:20,way=down"}, "says twice what noise is on the way down; say it once"),
    (FedAvg(), {"channel": "air:10+awgn:20"}, "says twice what noise is on the way up"),
    (FedAvg(), {"channel": "awgn:10", "compress": "topk:0.1"}, "compressed differences are bits"),
    (FedAvg(), {"channel": "air:10", "compress": "topk:0.1"}, "compressed differences are bits"),
    (FedAvg(), {"channel": "awgn:10,way=up", "secure": "bonawitz"}, "of which noise leaves nothing"),
    (FedAvg(), {"channel": "awgn:10", "cache": True}, "what a client holds came with noise of its own"),
    (FedAvg(), {"channel": "air:10", "aggregate": "median"}, "only their sum arrives"),
    (FedAvg(), {"channel": "air:10", "faults": "lost:0.1"}, "no reply can be turned away"),
    (FedAvg(), {"channel": "air:10", "attack": "nan:0.5"}, "NaN is no amplitude"),
    (FedAvg(), {"channel": "awgn:10,way=up", "dp": "client:noise=1"}, "is no part of what is bounded"),
    (FedAvg(), {"channel": "awgn:std=1", "dp": "client:noise=1"}, "is no part of what is bounded"),
    (FedAvg(), {"channel": "air:10", "dp": "client:noise=1"}, "is no part of what is bounded"),
    (build("feddisco", {}), {"channel": "air:10"}, "in the air clients weigh their replies themselves"),
    (build("fedbuff", {}), {"channel": "air:10"}, "this one asks for each reply of local by submit; take awgn"),
    (DFedSAM(), {"channel": "air:10"}, "this one asks for each reply of .* by exchange"),
    (build("frl", {}), {"channel": "awgn:10"}, "floating tensors, and the clients of frl send none in its rounds"),
    (build("local", {}), {"channel": "awgn:10"}, "local"),
]


@pytest.mark.parametrize(("method", "settings", "why"), REFUSED)
def test_what_it_does_not_go_with_is_refused_in_a_sentence(method, settings, why):
    with pytest.raises(UsageError, match=why):
        ran(method, TASK, 1, **settings)


ALLOWED = [
    {"channel": "awgn:10,way=up", "cache": True},
    {"channel": "awgn:10,way=down", "compress": "topk:0.5"},
    {"channel": "awgn:20,way=down", "secure": "bonawitz"},
    {"channel": "awgn:20", "aggregate": "median", "faults": "nan:0.2"},
    {"channel": "awgn:30", "dp": "local:gaussian,epsilon=50,clip=0.5"},
    {"channel": "awgn:30", "dp": "sample:noise=1.0,clip=0.5"},
    {"channel": "air:std=0.01+awgn:30,way=down", "dp": "client:noise=1.0,clip=0.5"},
    {"channel": "air:10", "attack": "sign_flip:0.4", "lost": 0.3},
]


@pytest.mark.parametrize("settings", ALLOWED)
def test_what_it_goes_with_shows_its_effect_too(settings):
    both = ran(FedAvg(lr=0.1), TASK, 2, **settings)
    others = {name: value for name, value in settings.items() if name != "channel"}
    for less in (others, {"channel": settings["channel"]}):
        if less == others or not others.keys() & {"cache", "secure"}:  # which change no result
            assert not torch.equal(both.server.model.flat, ran(FedAvg(lr=0.1), TASK, 2, **less).server.model.flat)


def test_the_manifest_and_the_page_say_what_noise_there_was():
    made = ran(FedAvg(lr=0.1), TASK, 1, channel="air:10+awgn:std=0.5,way=down")
    told = made.record.manifest["channel"]
    assert told == [
        "Noise 10 dB below the signal is on the sum of what clients send, which is added in the air, in rounds.",
        "Noise of deviation 0.5 is on what each client receives in rounds.",
    ]
    assert privacy_statement(made.record.manifest)[-2:] == told
    assert "channel" not in ran(FedAvg(lr=0.1), TASK, 1).record.manifest


def test_the_command_line_python_and_comparisons_reach_it(tmp_path, capsys):
    common = ["--data", "digits", "--clients", "4", "--rounds", "1"]
    assert main(["run", "fedavg", "--channel", "awgn:snr=0,way=up", *common, "--out", str(tmp_path / "run")]) == 0
    run = fedloom.run("fedavg", data="digits", clients=4, rounds=1, channel="awgn:0,up")
    assert run.metrics[0]["global_test_loss"] == fedloom.Run(tmp_path / "run").metrics[0]["global_test_loss"]
    found = fedloom.compare(
        ["fedavg"], data="digits", clients=4, rounds=1, seeds=1, eval_every=1,
        settings={"clean": {}, "noisy": {"channel": "awgn:-20"}},
    )  # fmt: skip
    clean, noisy = (found.of(name, "fedavg")[0].run.metrics[0]["global_test_loss"] for name in ("clean", "noisy"))
    assert noisy > clean
    capsys.readouterr()


def test_amplitudes_are_found_at_their_places():
    places = []
    amplitudes({"a": [1, torch.ones(1)], "b": (torch.ones(1), "x")}, lambda x, *path: places.append(path) or x)
    assert places == [("a", 1), ("b", 0)]
