"""When attackers attack, attacks of one's own, training in place of the method's, and what the record tells of each."""

import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from problems import node, ran
from test_attack import TOY, flipped, tapped

import fedloom
from fedloom.boundary.attack import ATTACKS, Attack, Part, build, part
from fedloom.boundary.attack.numbers import Updates
from fedloom.boundary.attack.reply import SignFlip
from fedloom.encoding import same
from fedloom.errors import UsageError
from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.runs.record import Run
from fedloom.site import Site
from fedloom.testing import difference, trace

# Windows of rounds


def deltas_of(seen, k, round):
    return seen[round, "local"][k]["delta"].params.flat


def test_attackers_are_honest_before_from_and_after_until(monkeypatch):
    """Clients that overfit nothing: with scale 0 an attacker sends zeros in its window, and only there."""
    made, seen = tapped(monkeypatch, "sign_flip:3,scale=0,from=2,until=3", rounds=5)
    bad = made.pipeline.one(Attack).malicious
    for round in range(1, 6):
        silent = {k for k in range(8) if not deltas_of(seen, k, round).any()}
        assert silent == (bad if round in (2, 3) else set()), round
    rows = made.record.metrics
    assert [row["attack/malicious"] for row in rows] == [0, 3, 3, 0, 0]
    assert [row["attack/recall"] for row in rows] == [None, 0.0, 0.0, None, None]


@pytest.mark.parametrize("kind", list(ATTACKS.own))
def test_every_kind_leaves_the_rounds_before_its_window_alone(kind):
    text = f"{kind}:3,from=3" + (",z=1.5" if kind == "alie" else "")
    plain, late = ran(FedAvg(), TOY, 2), ran(FedAvg(), TOY, 2, attack=text.replace("from=3", "from=2"))
    assert not same(plain.server.model, late.server.model), "in round 2 it acts"
    with pytest.raises(UsageError, match=f"{kind} begins in round 3, and the run has 2"):
        ran(FedAvg(), TOY, 2, attack=text)
    one, other = (ran(FedAvg(), TOY, 3, eval_every=1, **given).record.metrics for given in ({"attack": text}, {}))
    for row, as_honest in zip(one[:2], other, strict=False):
        assert row["global_test_loss"] == as_honest["global_test_loss"] and row["attack/malicious"] == 0
    assert one[2]["global_test_loss"] != other[2]["global_test_loss"]
    ended = ran(FedAvg(), TOY, 1, attack=text.replace("from=3", "until=1"))
    assert not same(ended.server.model, ran(FedAvg(), TOY, 1).server.model), "the last round of the window is in it"


def test_whoever_is_flagged_outside_the_window_was_honest():
    text = "gaussian:2,std=5,until=1"
    rows = ran(FedAvg(), TOY, 2, attack=text, aggregate="multi_krum:f=2").record.metrics
    assert (rows[0]["attack/precision"], rows[0]["attack/recall"]) == (1.0, 1.0)
    assert (rows[1]["attack/flagged"], rows[1]["attack/precision"], rows[1]["attack/recall"]) == (2, 0.0, None)


def test_windows_of_kinds_that_attack_together_are_their_own(monkeypatch):
    made, seen = tapped(monkeypatch, "zero:2,until=1+sign_flip:1,scale=0,from=2", rounds=2)
    first, second = ({k for k in range(8) if not deltas_of(seen, k, r).any()} for r in (1, 2))
    attack = made.pipeline.one(Attack)
    assert first == {k for k in attack.malicious if attack.part_of(k).name() == "zero"}
    assert second == attack.malicious - first
    assert [row["attack/malicious"] for row in made.record.metrics] == [2, 1]


def test_colluders_see_those_who_are_honest_for_now(monkeypatch):
    made, seen = tapped(monkeypatch, "alie:3,z=1.5+zero:2,until=1", rounds=2)
    attack = made.pipeline.one(Attack)
    us = [k for k in attack.malicious if attack.part_of(k).name() == "alie"]
    them = torch.stack([deltas_of(seen, k, 2) for k in range(8) if k not in us])
    crafted = them.mean(0) - 1.5 * them.std(0, correction=0)
    assert len(them) == 5 and torch.allclose(deltas_of(seen, us[0], 2), crafted, atol=1e-6)


def test_submitted_work_is_an_attack_where_it_was_asked_for_in_the_window():
    rows = ran(fedloom.method.build("fedbuff"), TOY, 4, attack="sign_flip:8,until=2").record.metrics
    assert rows[0]["attack/malicious"] > 0 and rows[-1]["attack/malicious"] < rows[-1]["replies"]
    rows = ran(Overlapping(), TOY, 4, attack="sign_flip:8,until=2").record.metrics
    assert [row["attack/malicious"] for row in rows] == [0, 8, 8, 0]


@dataclass(frozen=True)
class Overlapping(Method):
    """A server that takes up a round's work in the next one."""

    def round(self, server, cohort):
        if cohort.working:
            server.model = server.model + cohort.wait().mean("delta").delta
        cohort.submit(self.local, model=server.model)

    @client
    def local(self, client, model):
        return {"delta": client.descend(model, lr=0.1)[0] - model}


@pytest.mark.parametrize("name", ["fedbuff", "fedasync"])
def test_whoever_is_turned_away_counts_where_it_is_however_late_its_reply_is(name):
    """Submitted work is looked at together, and arrives one after the other: nobody honest is flagged in any round."""
    rows = ran(method := fedloom.method.build(name), TOY, 4, attack="nan:3").record.metrics
    assert sum(row["attack/flagged"] for row in rows) >= 3, method
    assert {row["attack/precision"] for row in rows} <= {1.0, None}
    assert {row["attack/recall"] for row in rows} <= {1.0, None}


def test_in_finish_the_last_round_counts():
    method = fedloom.method.build("ccvr")
    clean, early, late = (
        ran(method, TOY, 2, **given) for given in ({}, {"attack": "zero:8,until=1,from=1"}, {"attack": "zero:8,from=2"})
    )
    honest = ran(FedAvg(), TOY, 1)
    assert not same(clean.server.model, late.server.model)
    assert not same(early.server.model, late.server.model) and not same(early.server.model, honest.server.model)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("zero:2,from=3,until=2", "from=3 to until=2 is no round"),
        ("zero:2,from=0", "zero:from is 0; it must be greater than 0"),
        ("zero:2,until=0", "zero:until is 0; it must be greater than 0"),
        ("zero:2,from_=2", "unknown option of zero"),
        ("sign_flip:2,from=1.5", "must be of type int"),
        ("zero:2,1", "got 2 values without a name; its options are share, from, until"),
    ],
)
def test_a_window_that_is_none_is_told(text, why):
    with pytest.raises(UsageError, match=why):
        build(text, TOY, 0)


def test_options_without_a_name_are_the_kinds_own():
    assert part("sign_flip:2,3") == SignFlip(2.0, 3.0) == part("sign_flip:2,scale=3,from=1")
    assert part("sign_flip:2,3,until=4").until == 4


# Attacks in files

SHRINK = '''
from dataclasses import dataclass
from fedloom.boundary.attack import Part
from fedloom.ranges import Signed


@dataclass(frozen=True)
class Shrink(Part):
    """Sends a part of its update."""

    factor: Signed[float] = 0.1  # which part

    def act(self, client, call, sent, inner):
        reply = inner()
        return sent.filled(reply, self.factor * sent.row(reply))
'''


@pytest.fixture
def shrink(tmp_path):
    path = tmp_path / "my_attack.py"
    path.write_text(SHRINK)
    return path


def test_an_attack_in_a_file_is_asked_for_by_its_path(shrink, monkeypatch, tmp_path):
    text = f"{shrink}:3,factor=-2"
    made, other = (ran(FedAvg(), TOY, 2, attack=given) for given in (text, "sign_flip:3,scale=2"))
    assert same(made.server.model, other.server.model)
    for engine in ({"engine": "loopback"}, {"engine": "pool", "workers": 2}):
        assert difference(trace(made), trace(ran(FedAvg(), TOY, 2, attack=text, **engine))) is None
    monkeypatch.chdir(tmp_path)

    def stop(row):
        raise KeyboardInterrupt

    settings = {"rounds": 2, "report": False}
    with pytest.raises(KeyboardInterrupt):
        fedloom.run("fedavg", TOY, attack="my_attack.py:3,-2+zero:1", out="run", on_round=stop, **settings)
    assert Run(tmp_path / "run").spec.attack == f"{shrink.resolve()}:3,-2+zero:1"
    monkeypatch.chdir("/")
    again = fedloom.resume(tmp_path / "run", TOY, report=False)
    assert same(again.model, fedloom.run("fedavg", TOY, attack=f"{text}+zero:1", **settings).model)


def test_an_attack_travels_to_a_process_that_knows_its_file_only(shrink):
    kind = part(f"{shrink}:3,factor=0.25,from=2")
    sent = ForkingPickler.dumps(kind).tobytes().hex()
    code = f"import pickle; print(repr(pickle.loads(bytes.fromhex({sent!r}))))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == repr(kind) and "factor=0.25" in repr(kind) and "from_=2" in repr(kind)
    assert ForkingPickler.loads(ForkingPickler.dumps(kind)) == kind


def test_attacks_made_in_python_are_asked_for_as_they_are(shrink, tmp_path):
    kind = type(part(f"{shrink}:1"))
    one = fedloom.run("fedavg", TOY, attack=kind(3.0, factor=-2.0), rounds=2, report=False)
    two = fedloom.run("fedavg", TOY, attack=f"{shrink}:3,factor=-2", rounds=2, report=False)
    assert same(one.model, two.model)
    mixed = fedloom.run("fedavg", TOY, attack=[SignFlip(2.0, from_=2), kind(1.0)], rounds=2, report=False)
    text = f"sign_flip:2,from=2+{shrink}:1"
    assert same(mixed.model, fedloom.run("fedavg", TOY, attack=text, rounds=2, report=False).model)


@pytest.mark.parametrize(
    "text", ["sign_flip:2.0,scale=3.0,until=4", "dmpa:3,match=false", "backdoor:2,target=1,size=2"]
)
def test_a_parts_text_asks_for_it_again(text):
    assert part(part(text).to_text()) == part(text)


@dataclass(frozen=True)
class Quiet(Part):
    """In a file that is imported."""


def test_what_is_no_attack_is_told(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no attack file"):
        build(f"{tmp_path}/nowhere.py:0.2", TOY, 0)
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    with pytest.raises(UsageError, match="expected exactly one class derived from Part, found 0"):
        build(f"{empty}:0.2", TOY, 0)
    with pytest.raises(UsageError, match=r"attack is 3\.5, of type float"):
        fedloom.run("fedavg", TOY, attack=3.5, report=False)
    assert Path(Quiet(1.0).to_text().split(":")[0]) == Path(__file__).resolve()
    monkeypatch.setattr(Quiet, "__module__", "__main__")
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    with pytest.raises(UsageError, match="is in no file"):
        Quiet(1.0).to_text()


# In place of local training


LAZY = '''
from dataclasses import dataclass
from fedloom.boundary.attack import Part


@dataclass(frozen=True)
class Lazy(Part):
    """Takes the method's training at a rate of its own."""

    rate: float = 0.0  # times the method's

    def train(self, client, honest, w, lr, **options):
        return honest(w, self.rate * lr, **options)
'''


@pytest.fixture
def lazy(tmp_path):
    path = tmp_path / "lazy.py"
    path.write_text(LAZY)
    return lambda rate=0.0, more="": f"{path}:3,rate={rate}{more}"


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedprox", "ditto", "fedbuff", "fedopt"])
def test_training_is_replaced_whatever_the_method_gave_to_its_own(name, monkeypatch, lazy):
    """At a rate as it is, nothing changes bitwise; at none, the attackers alone do not move."""
    method = fedloom.method.build(name)
    plain, same_rate = (ran(method, TOY, 2, **given) for given in ({}, {"attack": lazy(1.0)}))
    assert difference(trace(plain)["server"], trace(same_rate)["server"]) is None
    if name in ("fedavg", "fedprox", "scaffold"):
        made, seen = tapped(monkeypatch, lazy(0.0, ",from=2"), method=method, rounds=2)
        bad = made.pipeline.one(Attack).malicious
        still = {k for k in range(8) if not deltas_of(seen, k, 2).any()}
        assert still == (bad if name != "fedprox" else still & bad) and len(still) == 3
        assert all(deltas_of(seen, k, 1).any() for k in range(8)), "before the window they train"


@pytest.mark.parametrize("name", ["fedspeed", "dfedsam", "fedkseed"])
def test_a_loop_in_the_open_is_refused_before_the_first_round(name, tmp_path, lazy):
    method = fedloom.method.build(name)
    for text in (lazy(), "model_replacement:3,stay=0.1"):
        with pytest.raises(UsageError, match=r"trains in place of client.descend, and the method takes its steps"):
            fedloom.run(method, TOY, attack=text, out=tmp_path / "run", report=False)
    assert not (tmp_path / "run").exists()
    if name != "fedkseed":
        ran(method, TOY, 1, attack="model_replacement:3")


@dataclass(frozen=True)
class Later(Method):
    """Trains by descent, and from its third round on in the open."""

    def round(self, server, cohort):
        server.model = server.model + cohort.mean(self.local, model=server.model, alone=server.round > 2).delta

    @client
    def local(self, client, model, alone):
        if not alone:
            return {"delta": client.descend(model, lr=0.1)[0] - model}
        return {"delta": -0.1 * client.grad(model, client.data.all())}


@dataclass(frozen=True)
class Guess(Method):
    """Takes no gradient at all."""

    def round(self, server, cohort):
        server.model = server.model + cohort.mean(self.local, model=server.model).delta

    @client
    def local(self, client, model):
        return {"delta": 0.1 * (client.data.x.mean() * model)}


def test_a_method_that_takes_no_steps_is_refused_too(lazy):
    with pytest.raises(UsageError, match=r"attack=lazy trains in place of client.descend"):
        ran(Guess(), TOY, 1, attack=lazy())
    ran(Guess(), TOY, 1, attack="sign_flip:3")


def test_a_loop_in_the_open_that_shows_later_stops_the_run(lazy):
    ran(Later(), TOY, 2, attack=lazy())
    ran(Later(), TOY, 3, attack=lazy(0.0, ",until=2"))
    with pytest.raises(fedloom.errors.RunError, match="in a loop of its own"):
        ran(Later(), TOY, 3, attack=lazy())


# Several backdoors


def test_the_success_of_every_backdoor_is_in_the_record():
    text = "backdoor:2,target=1+sign_flip:1+model_replacement:1,target=2,feature=0,until=1"
    made = ran(FedAvg(), TOY, 3, attack=text, eval_every=1)
    first, _, second = made.pipeline.one(Attack).parts
    last = made.record.final
    assert last["attack_success_rate"] == first.success(made.server, made.server.model)
    assert last["attack_success_rate@2"] == second.success(made.server, made.server.model)
    assert first.target == 1 and second.target == 2 and last["attack_success_rate"] != last["attack_success_rate@2"]
    assert all("attack_success_rate@2" in row and "attack_success_rate@3" not in row for row in made.record.metrics)
    one = ran(FedAvg(), TOY, 1, attack="backdoor:2").record.final
    assert "attack_success_rate" in one and "attack_success_rate@2" not in one


# Between peers


@dataclass(frozen=True)
class Gossip(Method):
    """Clients average with a neighbour, and declare nothing."""

    global_model = False

    def round(self, server, cohort):
        cohort.exchange(self.tell, self.mix, {k: [(k + 1) % 8] for k in cohort})

    @client
    def tell(self, client):
        w, _ = client.descend(client.state.get("model", client.initial), lr=0.1)
        client.state["fresh"] = w
        return {"model": w}

    @client
    def mix(self, client, inbox):
        client.state["model"] = sum((m["model"] for m in inbox.values()), client.state["fresh"]) / (1 + len(inbox))

    @client
    def predict(self, client):
        return client.state.get("model", client.initial)


def test_between_peers_a_model_is_attacked_as_its_difference_from_what_its_sender_had():
    made, seen = flipped(Gossip(), scale=2.0)
    for honest, sent in seen.values():
        moved, back = (honest["model"] - made.site.initial).params, (sent["model"] - made.site.initial).params
        assert torch.allclose(back.flat, -2 * moved.flat, atol=1e-6) and moved.norm() > 1e-2
    plain = [ran(Gossip(), TOY, 2), ran(Gossip(), TOY, 2, attack="sign_flip:3")]
    lengths = [sum(state["model"].norm() for state in run.engine.states.values()) for run in plain]
    assert lengths[1] > 0.6 * lengths[0], "honest models are not halved"


def test_what_a_peer_remembers_by_that_name_comes_before_its_initial_model_and_the_message_before_both():
    one = node(Site(TOY, 0), 0)
    w, own, told = one.initial, one.initial * 2.0, one.initial * 3.0
    updates = Updates(differences=(("delta", "model"),))

    def begun(message, state, field="model"):
        sent = updates.sent(message, state, w, peer=True)
        return (5.0 * w).params.flat - sent.row({field: w * 5.0})

    assert torch.allclose(begun({}, {}), w.params.flat)
    assert torch.allclose(begun({}, {"model": own}), own.params.flat)
    assert torch.allclose(begun({"model": told}, {"model": own}), told.params.flat)
    assert not begun({}, {"delta": own}, "delta").any(), "a difference is one already"
    assert not begun({}, {"other": own}, "fresh").any()
    assert not (5.0 * w).params.flat.sub(updates.sent({}, {"model": own}, w).row({"model": w * 5.0})).any()


def test_colluders_reverse_nothing_between_peers():
    with pytest.raises(UsageError, match="ipm reverses updates"):
        ran(Gossip(), TOY, 1, attack="ipm:2")
    ran(Gossip(), TOY, 1, attack="alie:3,z=1.5")
