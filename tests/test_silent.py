"""The verbs to which nobody replies: `tell` goes one way down, `work` goes no way at all."""

from dataclasses import dataclass

import pytest
import torch

from fedloom import encoding
from fedloom.cohort import Each
from fedloom.engines import build
from fedloom.errors import NobodyReplied, RunError, UsageError
from fedloom.method import Method, client
from fedloom.method import build as build_method
from fedloom.report.words import privacy_statement
from fedloom.tasks.toy import Toy
from fedloom.testing import Backwards, Lab, difference, trace
from fedloom.world import World

SIZES = (9, 12, 7, 15, 8)
MBIT = 125_000


@dataclass(frozen=True)
class Silent(Method):
    """Tells and lets work, in the order of the letters in `does`; m: a mean of what clients remember."""

    does: str = "twm"
    steps: int = 0  # gradients that a client takes when it is told, and as many when it works
    says: str = ""  # a field that a client wrongly returns
    whole: bool = True  # who works: everybody, or the cohort
    compressible = ("sum",)
    private = ("sum",)

    def setup(self, server, clients):
        server.sum = None

    def round(self, server, cohort):
        for letter in self.does:
            if letter == "t":
                cohort.tell(self.told, model=server.model, own=Each({k: k for k in cohort}))
            elif letter == "w":
                (cohort.everybody if self.whole else cohort).work(self.worked)
            else:
                server.sum = cohort.mean(self.summed).sum
                server.model = server.model + 0.01

    @client
    def told(self, client, model, own):
        assert own == client.id
        self.step(client, "told")
        client.state["model"] = model.clone()
        return {self.says: 1.0} if self.says else None

    @client
    def worked(self, client):
        self.step(client, "worked")
        client.state["draw"] = int(torch.randint(10**6, (), generator=client.rng("draw")))
        return {self.says: 1.0} if self.says else None

    @client
    def summed(self, client):
        return {"sum": torch.tensor([float(client.state.get(name, 0)) for name in ("told", "worked")])}

    def step(self, client, name):
        client.state[name] = client.state.get(name, 0) + 1
        if self.steps:
            client.descend(client.initial, lr=0.1, steps=self.steps, batch=5)


def ran(method=None, engine="serial", sizes=SIZES, **settings):
    made = build(engine, 2 if engine == "pool" else 0) if isinstance(engine, str) else engine
    return Lab(method or Silent()).experiment(Toy(sizes), made, **{"rounds": 3} | settings)


def remembered(made, name):
    return {k: state[name] for k, state in sorted(made.engine.states.items()) if name in state}


def booked(made, **like):
    kept = (line for line in made.record.ledger if all(line[name] == value for name, value in like.items()))
    return sum(line["bytes"] * len(line["clients"]) for line in kept)


@pytest.mark.parametrize("engine", ["serial", "loopback", "pool", "vectorized"])
def test_a_message_goes_down_and_nothing_comes_up(engine):
    made = ran(Silent("t", steps=2), engine)
    assert remembered(made, "told") == dict.fromkeys(range(5), 3)
    down = sum(len(encoding.encode({"model": made.server.model, "own": k})) for k in range(5))
    assert booked(made, verb="tell", direction="down") == 3 * down
    assert booked(made, kind="train", direction="up") == 0
    rows = made.record.metrics
    assert [row["up_bytes"] for row in rows] == [0] * 3 and [row["replies"] for row in rows] == [0] * 3
    assert [row["gradient_steps"] for row in rows] == [5 * 2] * 3
    assert rows[0]["train_loss"] > 0
    assert privacy_statement(made.record.manifest)[0] == "told: nothing leaves the clients."


@pytest.mark.parametrize("engine", ["serial", "loopback", "pool", "vectorized"])
def test_everybody_works_unasked_and_no_byte_goes_anywhere(engine):
    made = ran(Silent("w", steps=3), engine, cohort=2)
    assert remembered(made, "worked") == dict.fromkeys(range(5), 3)
    assert booked(made, kind="train") == 0
    assert [row["gradient_steps"] for row in made.record.metrics] == [5 * 3] * 3
    assert privacy_statement(made.record.manifest)[0] == "worked: nothing leaves the clients."
    only = ran(Silent("w", whole=False), engine, cohort=2)
    drawn = [only.world.choose(round) for round in (1, 2, 3)]
    assert remembered(only, "worked") == {k: n for k in range(5) if (n := sum(k in cohort for cohort in drawn))}


def test_every_engine_and_every_order_leave_the_same():
    plain = trace(ran(Silent("twm", steps=2)))
    for engine in ("loopback", "pool", Backwards()):
        assert difference(plain, trace(ran(Silent("twm", steps=2), engine))) is None
    twice = ran(Silent("ww"))
    assert remembered(twice, "draw") != remembered(ran(Silent("w")), "draw"), "the second work of a round draws anew"


def test_a_part_of_the_clients_knows_everybody():
    made = Lab(Silent("m")).begun(Toy(SIZES))
    assert list(made.everybody.where([1, 3]).everybody) == list(range(5))


@pytest.mark.parametrize(("verb", "letter"), [("tell", "t"), ("work", "w")])
@pytest.mark.parametrize("engine", ["serial", "pool"])
def test_a_reply_is_an_error_that_names_its_fields(verb, letter, engine):
    with pytest.raises(RunError, match=rf"returns score, and nothing comes back by cohort\.{verb}; .*cohort\.call"):
        ran(Silent(letter, says="score"), engine)


@pytest.mark.parametrize("settings", [{"lost": 0.5}, {"faults": "lost:0.3+nan:0.3+duplicate:0.3"}], ids=str)
@pytest.mark.parametrize("engine", ["serial", "pool"])
def test_there_is_no_reply_to_be_lost(settings, engine):
    made = ran(Silent("twm"), engine, **settings)
    assert remembered(made, "told") == remembered(made, "worked") == dict.fromkeys(range(5), 3)
    faults = [row.get("fault/duplicate", 0) + row["replies"] for row in made.record.metrics]
    assert all(number <= 5 for number in faults), "only the mean has replies that may suffer"


def test_who_is_silent_does_not_hear_it_and_works_all_the_same():
    made = ran(Silent("tw"), dropout=0.5, rounds=4)
    heard = {k: sum(not made.world.silent(round, 0, k) for round in range(1, 5)) for k in range(5)}
    assert remembered(made, "told") == {k: n for k, n in heard.items() if n} and sum(heard.values()) < 20
    assert remembered(made, "worked") == dict.fromkeys(range(5), 4)
    row = made.record.metrics[0]
    assert row["down_bytes"] == sum(len(encoding.encode({"model": made.server.model, "own": k})) for k in range(5))


def test_a_round_that_is_taken_back_takes_back_what_was_told():
    made = ran(Silent("tm"), lost=1.0)
    assert not remembered(made, "told") and all("note" in row for row in made.record.metrics)


SLOW = {"step_seconds": 1.0, "latency": 0.5, "bandwidth": "0.01", "speed": "uniform:0.3,2"}


def speeds(**settings):
    world = World(len(SIZES), **settings)
    return [world.profile(k)["speed"] for k in range(len(SIZES))]


@pytest.mark.parametrize(("deadline", "lost"), [(None, 0.0), (4.0, 0.0), (None, 1.0)])
def test_the_clock_stands_where_the_slowest_is_done_or_at_the_deadline(deadline, lost):
    made = ran(Silent("tm", steps=2), rounds=1, deadline=deadline, lost=lost, **SLOW)
    sent = max(len(encoding.encode({"model": made.server.model, "own": k})) for k in range(5))
    end = 0.5 + sent / (0.01 * MBIT) + 2 / min(speeds(**SLOW))
    summed = 1.0 + (len(encoding.encode({})) + len(encoding.encode({"sum": torch.zeros(2)}))) / (0.01 * MBIT)
    assert made.record.metrics[0]["virtual_seconds"] == pytest.approx(min(end, deadline or end) + summed)
    assert deadline is None or end > deadline, "the slowest is not done by then"
    assert lost or remembered(made, "told") == dict.fromkeys(range(5), 1), "and ends its work all the same"
    assert not deadline or made.record.metrics[0]["late"] == 0

    alone = ran(Silent("wm", steps=2), rounds=1, deadline=deadline, **SLOW)
    end = 2 / min(speeds(**SLOW))
    assert alone.record.metrics[0]["virtual_seconds"] == pytest.approx(min(end, deadline or end) + summed)


def test_the_first_replies_are_of_those_that_reply():
    made = ran(Silent("tm"), cohort=3, overselect=1.7, **SLOW)
    told = sum(remembered(made, "told").values())
    assert told == sum(row["cohort"] for row in made.record.metrics) == 5 * 3
    assert [row["surplus"] for row in made.record.metrics] == [2] * 3


def test_who_goes_off_while_it_is_told_has_not_done_it():
    made = ran(Silent("tw", steps=2), rounds=12, availability="markov:0.6,cycle=4,period=2", **SLOW)
    rows = made.record.metrics
    asked, away = (sum(row[name] for row in rows) for name in ("cohort", "absent"))
    broken = sum(row["broken"] for row in rows)
    assert 0 < sum(remembered(made, "told").values()) == asked - away - broken and broken > 0
    worked = sum(row["cohort"] > 0 for row in rows)  # in a round in which nobody is there the server does nothing
    assert remembered(made, "worked") == dict.fromkeys(range(5), worked), "nobody has to be reached for that"


def test_names_stand_for_what_is_held_and_nothing_is_put_beside_it():
    @dataclass(frozen=True)
    class Held(Method):
        def round(self, server, cohort):
            server.model = server.model + 0.0
            if server.round == 1:
                cohort.tell(self.hear, model=server.model)  # nobody holds it, nor will anybody be known to
            cohort.mean(self.take, model=server.model)  # whole, then by name
            cohort.tell(self.hear, model=server.model)  # by name, and it is still held

        @client
        def hear(self, client, model):
            pass

        @client
        def take(self, client, model):
            return {"n": 1.0}

    made = Lab(Held()).experiment(Toy((3, 4)), rounds=3, cache=True)
    whole, short = (encoding.sizes({"model": value})["model"] for value in (made.server.model, bytes(16)))

    def of(verb, round):
        return booked(made, verb=verb, field="model", round=round)

    assert [of("tell", round) for round in (1, 2, 3)] == [2 * (whole + short), 2 * short, 2 * short]
    assert [of("mean", round) for round in (1, 2, 3)] == [2 * whole, 2 * short, 2 * short]


@pytest.mark.parametrize("setting", [{"secure": "bonawitz"}, {"dp": "client:noise=1.0,epsilon=50"}], ids=str)
def test_what_protects_replies_does_not_mind(setting):
    pytest.importorskip("cryptography" if "secure" in setting else "dp_accounting")
    made = ran(Silent("twm", steps=1), **setting)
    assert remembered(made, "told") == remembered(made, "worked") == dict.fromkeys(range(5), 3)
    assert "no guarantee" not in "".join(made.record.manifest.get("dp", []))


def test_gradients_of_told_and_of_unasked_work_are_paid_for():
    pytest.importorskip("opacus")
    pytest.importorskip("dp_accounting")
    level = "sample:noise=1.0,clip=1.0"

    @dataclass(frozen=True)
    class Paying(Silent):
        batch: int = 5

    spent = [
        ran(Paying(does, steps=2), dp=level).record.metrics[-1]["dp/epsilon"]
        for does in ("m", "tm", "wm", "twm", "ttm")
    ]
    assert spent[0] == 0.0 < spent[1] == spent[2] < spent[3] == spent[4]
    made = ran(Paying("wm", steps=2), dp=f"{level},epsilon={1.01 * spent[1]}", rounds=8)
    assert len(made.record.metrics) == 3, "the budget is that of three rounds"
    made = ran(Paying("wwwwwm", steps=2), dp=f"{level},epsilon={1.01 * spent[1]}", rounds=8)
    assert "the privacy budget" in made.record.metrics[-1]["note"], "a client that has nothing left says so"
    assert made.record.metrics[-1]["up_bytes"] > 0 or made.server.sum is None


@pytest.mark.parametrize(
    ("does", "settings"),
    [
        ("t", {"lost": 0.5}),
        ("tw", {"faults": "lost:0.5"}),
        ("w", {"dropout": 0.5}),
        ("w", {"deadline": 2.0}),
        ("t", {"cohort": 2, "overselect": 2.0}),
        ("t", {"dp": "client:noise=1.0"}),
        ("t", {"compress": "topk:0.1"}),
    ],
    ids=str,
)
def test_settings_for_replies_are_refused_where_none_are_planned(does, settings, tmp_path):
    told, worked = "cohort.tell(self.told, model=server.model)", "cohort.work(self.worked)"
    text = "\n        ".join({"t": told, "w": worked}[letter] for letter in does)
    path = tmp_path / "only.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom fedloom import Method, client\n\n@dataclass(frozen=True)\n"
        "class Only(Method):\n    private = compressible = ('x',)\n\n"
        f"    def round(self, server, cohort):\n        {text}\n"
        "\n    @client\n    def told(self, client, model):\n        pass\n\n    @client\n"
        "    def worked(self, client):\n        pass\n"
    )
    with pytest.raises(UsageError, match=f"{list(settings)[-1]}=.* acts on (replies|messages), and there are none"):
        Lab(build_method(str(path))).begun(Toy(SIZES), **settings)


def test_the_plan_knows_both():
    verbs = {(call.verb, call.function) for call in Silent().plan}
    assert {("tell", "told"), ("work", "worked"), ("mean", "summed")} <= verbs


def test_nobody_to_tell_is_no_failure():
    made = ran(Silent("t"), dropout=1.0, latency=0.5)
    assert not remembered(made, "told") and not any("note" in row for row in made.record.metrics)
    assert made.record.metrics[-1]["virtual_seconds"] == 0, "nobody is waited for"
    with pytest.raises(NobodyReplied):
        made.everybody.where([]).mean(made.method.summed)
