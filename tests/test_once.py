"""Values that a client is sent once, and by name from then on."""

from dataclasses import dataclass

import pytest
import torch

from fedloom import encoding
from fedloom.cohort import ByGroup, Each, Once
from fedloom.engines import build
from fedloom.errors import CodecError, RunError, UsageError
from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab, difference, trace

SIZES = (5, 6, 7, 8)
WHOLE = encoding.sizes({"frozen": torch.zeros(40)})["frozen"]
NAMES = len(encoding.encode({"_once": {"frozen": bytes(16)}})) - len(encoding.encode({}))


@dataclass(frozen=True)
class Holding(Method):
    """Sends a table that changes in some rounds only, and hears its sum."""

    moves: tuple[int, ...] = ()
    how: str = "all"  # all, each, groups, submit, tell, exchange, small
    global_model = False

    def setup(self, server, clients):
        server.frozen = torch.arange(40.0)
        server.heard = {}

    def round(self, server, cohort):
        if server.round in self.moves:
            server.frozen = server.frozen * -1.0
        frozen = server.frozen[:4].clone() if self.how == "small" else server.frozen
        message = {"frozen": Once(frozen), "round": server.round}
        if self.how == "each":
            message["frozen"] = Each({k: Once(frozen + k) for k in cohort})
        if self.how == "groups":
            means = cohort.means(
                self.local, {k: k % 2 for k in cohort}, frozen=ByGroup({g: Once(frozen + g) for g in (0, 1)})
            )
            server.heard = {g: float(mean.sum) for g, mean in means.items()}
            return
        if self.how == "tell":
            cohort.tell(self.hear, **message)
            return
        if self.how == "exchange":
            cohort.exchange(self.local, self.mix, {k: list(cohort) for k in cohort}, **message)
            return
        if self.how == "submit":
            cohort.idle.submit(self.local, **message)
            replies = cohort.wait()
        else:
            replies = cohort.call(self.local, **message)
        server.heard = {up.client: up.sum for up in replies}

    @client
    def local(self, client, frozen, round=0):
        client.state["asked"] = client.state.get("asked", 0) + 1
        return {"sum": float(frozen.sum())}

    @client
    def hear(self, client, frozen, round):
        client.state["sum"] = float(frozen.sum())

    @client
    def mix(self, client, inbox, frozen, round):
        client.state["sum"] = float(frozen.sum())

    def predict_message(self, server, clients):
        return {"frozen": Once(server.frozen)}

    @client
    def predict(self, client, frozen):
        assert frozen.sum() != 0
        return client.initial


def ran(method=None, engine="serial", **settings):
    made = build(engine, 2 if engine == "pool" else 0)
    return Lab(method or Holding()).experiment(Toy(SIZES), made, **{"rounds": 4} | settings)


def sent(made, field="frozen", kind="train"):
    """Bytes of a field by round and client."""
    booked = {}
    for line in made.record.ledger:
        if (line["direction"], line["field"], line["kind"]) == ("down", field, kind):
            for k in line["clients"]:
                booked[line["round"], k] = booked.get((line["round"], k), 0) + line["bytes"]
    return booked


@pytest.mark.parametrize("engine", ["serial", "loopback", "pool", "vectorized"])
def test_it_goes_down_once_and_by_name_from_then_on(engine):
    made = ran(engine=engine)
    assert sent(made) == {(1, k): WHOLE for k in range(4)}
    assert sent(made, "_once") == {(round, k): NAMES for round in (1, 2, 3, 4) for k in range(4)}
    assert made.server.heard == dict.fromkeys(range(4), 780.0)
    short = len(encoding.encode({"round": 2, "_once": {"frozen": bytes(16)}}))
    assert made.record.metrics[1]["down_bytes"] == 4 * short
    assert made.record.metrics[0]["down_bytes"] == 4 * (short + WHOLE)


def test_engines_leave_the_same_and_a_resumed_run_knows_who_holds_it():
    plain = trace(ran())
    for engine in ("loopback", "pool"):
        assert difference(plain, trace(ran(engine=engine))) is None
    lab = Lab(Holding())
    assert difference(lab.serial, lab.resumed()) is None


def test_another_value_takes_its_place():
    made = ran(Holding(moves=(2, 3)))
    assert sent(made) == {(round, k): WHOLE for round in (1, 2, 3) for k in range(4)}, "the first is gone by round 3"
    assert made.server.heard == dict.fromkeys(range(4), 780.0)
    for state in made.engine.states.values():
        assert set(state["_once"]) == {"frozen"}


@pytest.mark.parametrize("how", ["all", "submit"])
@pytest.mark.parametrize("settings", [{"lost": 0.5}, {"dropout": 0.5}, {"faults": "lost:0.5"}], ids=str)
def test_who_has_not_replied_is_sent_it_again(how, settings):
    made = ran(Holding(how=how), rounds=8, **settings)
    for k in range(4):
        rounds = [round for round in range(1, 9) if (round, k) in sent(made)]
        counted = made.engine.states[k]["asked"]
        assert rounds == list(range(1, len(rounds) + 1)), "in full until a reply has counted, and never again"
        assert 8 - len(rounds) + 1 >= counted
    assert {len([1 for r, k in sent(made) if k == one]) for one in range(4)} > {1} or how == "submit"
    assert max(round for round, _ in sent(made)) > 1


def test_a_round_that_is_taken_back_takes_back_what_was_held():
    @dataclass(frozen=True)
    class Undone(Holding):
        def round(self, server, cohort):
            cohort.call(self.local, frozen=Once(server.frozen), round=server.round)
            cohort.where([]).mean(self.local)

    made = ran(Undone(), rounds=2, dropout=0.01)
    assert sent(made) == {(round, k): WHOLE for round in (1, 2) for k in range(4)}


def test_each_and_groups_have_values_of_their_own():
    made = ran(Holding(how="each"))
    assert sent(made) == {(1, k): WHOLE for k in range(4)}
    assert made.server.heard == {k: 780.0 + 40 * k for k in range(4)}
    made = ran(Holding(how="groups"))
    assert sent(made) == {(1, k): WHOLE for k in range(4)}
    assert made.server.heard == {0: 780.0, 1: 820.0}


def test_several_are_kept_by_their_fields():
    @dataclass(frozen=True)
    class Two(Holding):
        def round(self, server, cohort):
            both = {"frozen": Once(server.frozen)}
            if server.round > 1:
                both["other"] = Each({k: Once(server.frozen + k) for k in cohort})
            server.heard = {up.client: up.sum for up in cohort.call(self.both, **both)}

        @client
        def both(self, client, frozen=None, other=None):
            return {"sum": sum(float(value.sum()) for value in (frozen, other) if value is not None)}

    made = ran(Two(), rounds=3)
    assert sent(made) == {(1, k): WHOLE for k in range(4)}
    assert {round for round, _ in sent(made, "other")} == {2}
    assert made.server.heard == {k: 2 * 780.0 + 40 * k for k in range(4)}, "one that all get, and one of each's own"


@pytest.mark.parametrize("how", ["tell", "exchange"])
def test_where_nobody_replies_it_is_not_kept(how):
    made = ran(Holding(how=how), rounds=2)
    times = 2 if how == "exchange" else 1  # out and mix
    assert sent(made) == {(round, k): times * WHOLE for round in (1, 2) for k in range(4)}
    assert all("_once" not in state for state in made.engine.states.values())
    assert all(state["sum"] == 780.0 for state in made.engine.states.values())


def test_evaluation_uses_what_is_held_and_leaves_no_trace():
    made = ran()
    assert not sent(made, kind="evaluate"), "by name only: training came first"
    assert {round for round, _ in sent(made, "_once", "evaluate")} == {1, 2, 3, 4}
    told = ran(Holding(how="tell"), rounds=2)
    assert {round for round, _ in sent(told, kind="evaluate")} == {1, 2}


def test_a_short_value_is_sent_as_it_is():
    made = ran(Holding(how="small"))
    assert {round for round, _ in sent(made)} == {1, 2, 3, 4} and not sent(made, "_once")


def test_settings_act_on_what_is_sent():
    plain = ran()
    cached = ran(cache=True)
    assert difference(plain.server.heard, cached.server.heard) is None
    assert sum(row["down_bytes"] for row in cached.record.metrics) <= sum(
        row["down_bytes"] for row in plain.record.metrics
    )

    @dataclass(frozen=True)
    class Model(Method):
        """FedAvg of one step from a model that never changes."""

        def round(self, server, cohort):
            server.model = cohort.mean(self.local, model=Once(server.site.initial)).model

        @client
        def local(self, client, model):
            return {"model": model - 0.1 * client.grad(model, client.data.all())}

    honest, flipped = (ran(Model(), attack=attack) for attack in (None, "sign_flip:0.99"))
    start = honest.site.initial
    moved = (honest.server.model - start).flat, (flipped.server.model - start).flat
    assert torch.allclose(moved[0], -moved[1], atol=1e-6), "attackers know what the model was that they hold"


def test_it_stands_for_a_whole_field():
    @dataclass(frozen=True)
    class Inside(Holding):
        def round(self, server, cohort):
            cohort.call(self.local, frozen={"a": Once(server.frozen)})

    with pytest.raises((CodecError, UsageError, RunError), match="Once"):
        ran(Inside())


@dataclass(frozen=True)
class Trusting(FedAvg):
    """FedAvg that sends its model once, or to each apart."""

    how: str = "once"

    def round(self, server, cohort):
        model = Once(server.model) if self.how == "once" else Each(dict.fromkeys(cohort, server.model))
        server.model = server.model + cohort.mean(self.local, weight="n", model=model).delta


@pytest.mark.parametrize("how", ["once", "each"])
def test_a_server_that_plays_a_client_refuses_what_it_would_not_hold(how):
    made = Lab(Trusting).begun(Toy(SIZES), aggregate="median")
    made.method = made.boundary.method = Trusting(how=how)
    made.go()
    refused = Experiment(
        Spec.of({"data": "a Toy given in Python", "partition": "given", "aggregate": "fltrust"}),
        Toy(SIZES),
        Trusting(how=how),
    )
    with pytest.raises(
        UsageError, match="aggregate=fltrust has the server play a client, and what clients are sent for local"
    ):
        refused.begin(None).go()


def test_names_matter_where_bits_do():
    def kept(name, value, other=1.0):
        return {0: {"_once": {"old": [name, torch.tensor([value])]}, "other": torch.tensor([other])}}

    one = kept(b"one", 2.0)
    assert difference(one, kept(b"one", 2.0)) is None
    assert "_once.old[0]" in difference(one, kept(b"other", 2.0))
    assert difference(one, kept(b"other", 2.000001), nearly=1e-5) is None
    assert "_once.old" in difference(one, kept(b"one", 2.1), nearly=1e-5)
    assert "other" in difference(one, kept(b"one", 2.0, 1.1), nearly=1e-5)
    assert difference(one, {0: {"_once": {}, "other": torch.ones(1)}}, nearly=1e-5)
