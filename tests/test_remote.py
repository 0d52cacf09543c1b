"""Clients that live elsewhere: what crosses, what is refused, and that no bit of a result depends on it."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import fedloom
from fedloom import encoding
from fedloom.calls import ASKED, ONCE, Call, Outcome
from fedloom.deploy.offer import accepted, digests, offered
from fedloom.deploy.strict import Strict
from fedloom.engines import remote, wired
from fedloom.engines.seat import InMemory, Seat
from fedloom.errors import RunError, UsageError
from fedloom.method import Method, client_function
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.scaffold import Scaffold
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.site import Site
from fedloom.tasks._apart import AtClient, AtServer, checked, registration
from fedloom.tasks.toy import Toy
from fedloom.testing import difference, trace

TOY = Toy((30, 20, 25, 35))


def spec_of(method="fedavg", **settings):
    return Spec.of({"method": method, "partition": "given", "rounds": 3} | settings)


def ran(method="fedavg", engine=None, task=TOY, **settings):
    made = Experiment(spec_of(method, **settings), task, None, engine).begin(None)
    made.go()
    return made


# -- what a server may ask for


@dataclass(frozen=True)
class Outer(Method):
    inner: Method = Scaffold()
    lr: float = 0.1

    def round(self, server, cohort):
        cohort.call(self.look)

    @fedloom.client
    def look(self, client):
        return {}


@pytest.mark.parametrize("path", ["look", "inner.local", "evaluate", "inner.predict"])
def test_client_functions_are_found_through_methods_that_are_fields(path):
    function = client_function(Outer(), path)
    assert Outer().path_of(function) in (path, None) or path == Outer().path_of(function)
    assert function.__name__ == path.rpartition(".")[2]


@pytest.mark.parametrize(
    "path",
    ["round", "__class__", "fields", "lr", "inner", "inner.round", "nested", "inner.__class__.local", "lr.real", "",
     ".", "look.__func__", "plan", "inner.inner.local", "client_functions", "__init__", "name", "setup"],
)  # fmt: skip
def test_nothing_else_is_followed(path):
    with pytest.raises(UsageError, match="has no client function"):
        client_function(Outer(), path)


def test_a_far_side_follows_nothing_else():
    call = Call("call", "round", (0,), {}, {}, "train", 1, 0)
    [request] = wired.requests(b"run", call, [0], {}, {}).values()
    answer = seat(FedAvg()).answer(request.head, lambda name: b"", {})
    assert wired.decode(bytes(answer)) == {"fault": "UsageError"}


# -- the bits


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "fedbuff", "ditto", "fedproto", "fedgen"])
def test_the_bits_are_those_of_serial(method):
    here, there = ran(method), ran(method, Strict())
    assert difference(trace(here), trace(there)) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"dropout": 0.3},
        {"lost": 0.4},
        {"cohort": 2},
        {"compress": "topk:0.2"},
        {"cache": True},
        {"aggregate": "median"},
        {"deadline": 0.2, "speed": "uniform:0.5,2"},
        {"cohort": 2, "overselect": 1.5, "speed": "uniform:0.5,2"},
    ],
    ids=str,
)
def test_settings_have_the_same_bits(settings):
    here, there = ran("scaffold", **settings), ran("scaffold", Strict(), **settings)
    assert difference(trace(here), trace(there)) is None


def test_another_optimizer_has_the_same_bits():
    here, there = ran(optimizer="adam"), ran("fedavg", Strict(), optimizer="adam")
    assert difference(trace(here), trace(there)) is None


def test_work_under_way_has_the_same_bits():
    settings = {"lost": 0.3, "speed": "uniform:0.5,2", "cohort": 3, "rounds": 6}
    here, there = ran("fedbuff", **settings), ran("fedbuff", Strict(), **settings)
    assert difference(trace(here), trace(there)) is None


ASKING = """
from dataclasses import dataclass

import torch

import fedloom


@dataclass(frozen=True)
class Asking(fedloom.Method):
    lr: float = 0.1
    needs = ("oracle",)

    def round(self, server, cohort):
        up = cohort.mean(self.local, model=server.model)
        server.model = server.model + up.delta

    @fedloom.client
    def local(self, client, model):
        client.state["asked"] = client.ask(torch.arange(min(1, client.labels_left)))
        w, _ = client.descend(model, lr=self.lr)
        return {"delta": w - model}
"""


def test_labels_that_were_paid_for_stay_where_the_reply_was_lost(tmp_path):
    file = tmp_path / "asking.py"
    file.write_text(ASKING)
    task = fedloom.testing.lab.toy_for(("oracle",))
    here = ran(str(file), task=task, lost=0.5, rounds=4)
    there = ran(str(file), Strict(), task=task, lost=0.5, rounds=4)
    states = list(there.engine.states.values())
    assert any(ASKED in state and state.get(wired.AT) != state[ASKED] for state in states), "none was lost"
    assert difference(trace(here), trace(there)) is None


def test_the_record_says_that_the_server_sees_each_reply():
    [told] = [one for one in ran("fedavg", Strict()).record.manifest["privacy"] if one["function"] == "local"]
    [here] = [one for one in ran("fedavg").record.manifest["privacy"] if one["function"] == "local"]
    assert (told["verb"], here["verb"]) == ("call", "mean")


def test_what_the_server_keeps_of_a_state_is_its_name():
    made = ran("scaffold", Strict())
    for state in made.engine.states.values():
        assert set(state) == {wired.AT} and len(state[wired.AT]) == 32
    assert all("control" in state for state in made.engine.remembered().values())


def test_a_checkpoint_has_no_state_of_a_client(tmp_path):
    made = Experiment(spec_of("scaffold"), TOY, None, Strict()).begin(tmp_path / "run")
    made.go()
    here = Experiment(spec_of("scaffold"), TOY).begin(tmp_path / "plain")
    here.go()
    file = "checkpoint/state.bin"
    vector = made.server.model.flat.nbytes
    assert (tmp_path / "run" / file).stat().st_size < (tmp_path / "plain" / file).stat().st_size - 3 * vector


# -- what each side has


def test_the_server_has_no_data_of_its_clients():
    there = AtServer(TOY, {0: registration(TOY, 0)})
    for ask in (lambda: there.data(0, "train"), lambda: there.data(1, "test"), lambda: there.pool(0)):
        with pytest.raises(UsageError, match="stay with it"):
            ask()
    assert there.info(0) == {"n": 30} and there.info(1) == {"n": 0}
    assert there.present(0) and not there.present(1)
    assert (there.rows_of(0, "train"), there.rows_of(1, "train")) == (30, 0)
    assert [one["train"] for one in there.describe()["clients"]] == [30, 0, 0, 0]
    assert there.shape == TOY.shape and len(there.global_test())


GOOD = {"info": {"n": 3, "group": "north"}, "rows": {"train": 3, "validation": 0, "test": 1}}


@pytest.mark.parametrize(
    "told",
    [None, [], {}, {"info": {"n": 3}}, {"rows": GOOD["rows"]}, GOOD | {"rows": {"train": 3}}, GOOD | {"info": [3]},
     *(GOOD | {"info": {"n": n}} for n in (-1, 2.5, True, "3", None, 1 << 60)),
     *(GOOD | {"info": {"n": 3, "speed": speed}} for speed in (math.nan, math.inf, -math.inf, None, [1])),
     *(GOOD | {"rows": GOOD["rows"] | {"test": test}} for test in (-1, 0.5, "1", None))],
    ids=str,
)  # fmt: skip
def test_what_is_no_registration_is_refused(told):
    with pytest.raises(ValueError, match="regist"):
        checked(told)


def test_a_registration_is_taken_as_it_is():
    assert checked(GOOD) == GOOD
    assert checked(wired.decode(encoding.encode(registration(TOY, 2)))) == registration(TOY, 2)


def test_a_client_has_its_own_data_alone():
    here = AtClient(TOY, 2)
    assert torch.equal(here.data(2, "train").x, TOY.data(2, "train").x)
    assert here.info(2) == TOY.info(2) and here.shape == TOY.shape and here.present(2)
    for ask in (
        lambda: here.data(1, "train"),
        lambda: here.info(0),
        lambda: here.present(0),
        lambda: here.pool(3),
        lambda: here.allowance(1),
        here.global_test,
        here.global_tests,
        here.global_validation,
        here.public,
    ):
        with pytest.raises(UsageError, match="not here"):
            ask()


@pytest.mark.parametrize("setting", ["secure=bonawitz", "channel=awgn:20", "faults=nan:0.2", "attack=sign_flip:0.3",
                                     "dp=sample:noise=1.0,clip=0.5", "dp=client:noise=1.0,clip=0.5"])  # fmt: skip
def test_what_would_promise_too_much_is_refused_before_anything(setting):
    name, _, value = setting.partition("=")
    with pytest.raises(UsageError, match=name):
        Experiment(spec_of("fedavg", **{name: value}), TOY, None, Strict())


@pytest.mark.parametrize("method", ["dfedsam", "split_learning"])
def test_methods_without_a_form_are_refused_in_a_sentence(method):
    with pytest.raises(UsageError, match="no network form yet"):
        ran(method, Strict(), fedloom.testing.lab.toy_for(fedloom.method.build(method).needs))


# -- replies that must not be taken


class Tampering(Strict):
    """One client's answers are what `change` makes of them."""

    def __init__(self, change, client=1):
        super().__init__()
        self.change, self.client = change, client

    def hear(self, patience=None):
        [(request, answer)] = super().hear(patience)
        if request.client != self.client or request.key[0] != "train":
            return [(request, answer)]
        changed = self.change(wired.decode(answer()))
        return [(request, changed if isinstance(changed, str) else lambda: changed)]


def encoded(**changes):
    return lambda told: encoding.encode(told | changes)


def reply(change):
    return lambda told: encoding.encode(told | {"reply": change(dict(told["reply"]))})


BAD = {
    "no message": lambda told: b"MHM nonsense",
    "nothing": lambda told: b"",
    "a failure": lambda told: bytes(wired.failed("ValueError")),
    "no reply": lambda told: encoding.encode({"fault": None}),
    "a list for a reply": encoded(reply=[1]),
    "negative steps": encoded(steps=-1),
    "steps that are true": encoded(steps=True),
    "logs of texts": encoded(logs={"loss": "low"}),
    "NaN": reply(lambda r: {k: v * float("nan") if hasattr(v, "layout") else v for k, v in r.items()}),
    "another type": reply(lambda r: {k: v.flat.double() if hasattr(v, "layout") else v for k, v in r.items()}),
    "a reserved field": reply(lambda r: r | {"weight": 1.0}),
    "too short": reply(lambda r: {k: v.flat[:-1] if hasattr(v, "layout") else v for k, v in r.items()}),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_a_bad_answer_is_turned_away_counted_and_leaves_no_trace(change):
    there = ran("scaffold", Tampering(change))
    assert [row["replies"] for row in there.record.metrics] == [3, 3, 3]
    assert [row["fault/refused"] for row in there.record.metrics] == [1, 1, 1]
    assert 1 not in there.engine.states
    without = ran("scaffold", Tampering(lambda told: "silent"))
    assert difference(dict(without.server.values), dict(there.server.values)) is None
    assert not any(row.get("fault/refused") for row in without.record.metrics)


def test_a_run_does_not_begin_without_an_answer_that_all_were_to_give_before():
    class InSetup(Tampering):
        def hear(self, patience=None):
            [(request, answer)] = Strict.hear(self, patience)
            return [(request, (lambda: b"nothing") if request.client == 1 else answer)]

    with pytest.raises(RunError, match=r"^compare needs an answer of each client before the first round: client 1: "):
        ran("feddisco", InSetup(None))


def test_the_first_reply_does_not_say_what_form_the_others_must_have():
    short = reply(lambda r: {k: v.flat[:-1] if hasattr(v, "layout") else v for k, v in r.items()})
    there = ran("fedavg", Tampering(short, client=0))
    assert [row["replies"] for row in there.record.metrics] == [3, 3, 3]


def test_a_client_that_fails_says_no_more_than_the_kind_of_error():
    told = wired.decode(bytes(wired.failed("ValueError")))
    assert told == {"fault": "ValueError"}

    class Failing(FedAvg):
        pass

    site = Site(AtClient(TOY, 0), 0)
    seat = Seat(0, FedAvg(), site, InMemory())
    call = Call("call", "local", (0,), {"model": torch.ones(3)}, {}, "train", 1, 0)
    [request] = wired.requests(b"run", call, [0], {}, {}).values()
    answer = wired.decode(bytes(seat.answer(request.head, lambda name: b"", {})))
    assert set(answer) == {"fault"} and answer["fault"].isidentifier()


# -- calls as bytes


def requested(call=None, states=None, clients=(0, 1), **changes):
    call = call or Call("mean", "local", (0, 1), {"model": TOY_MODEL, "lr": 0.1}, {1: {"bias": 2.0}}, "train", 1, 0)
    return wired.requests(changes.pop("run", b"run"), replace(call, **changes), clients, states or {}, {})


TOY_MODEL = Site(TOY, 0).initial


def test_the_same_question_has_the_same_id_and_another_another():
    ids = {one.id for one in requested().values()}
    assert len(ids) == 2 and ids == {one.id for one in requested().values()}
    for other in (
        requested(round=2),
        requested(nth=1),
        requested(kind="finish"),
        requested(function="predict"),
        requested(verb="call"),
        requested(pace=0.5),
        requested(run=b"another"),
        requested(states={0: {wired.AT: b"x"}, 1: {wired.AT: b"x"}}),
        requested(states={0: {ASKED: b"x"}, 1: {ASKED: b"x"}}),
        requested(shared={"model": TOY_MODEL + TOY_MODEL, "lr": 0.1}),
    ):
        assert ids.isdisjoint({one.id for one in other.values()})


def test_the_id_does_not_depend_on_what_is_in_the_last_checkpoint():
    call = Call("mean", "local", (0,), {"model": TOY_MODEL}, {}, "train", 1, 0)
    plain = wired.requests(b"run", call, [0], {}, {})
    noted = wired.requests(b"run", call, [0], {}, {0: {"round": 3, "keep": []}})
    assert plain[0].id == noted[0].id and noted[0].note["round"] == 3


def test_large_fields_are_blobs_that_all_clients_share():
    made = requested(shared={"model": torch.arange(1000.0), "lr": 0.1})
    assert made[0].blobs.keys() == made[1].blobs.keys() and len(made[0].blobs) == 1
    assert all(len(one.head) < 2000 for one in made.values())


@pytest.mark.parametrize("size", [10, 1000])
def test_a_message_arrives_as_it_was_with_its_fields_in_order(size):
    shared = {"b": torch.arange(float(size)), "a": 1, "own": 0.5}
    call = Call("call", "local", (0, 1), shared, {1: {"own": torch.ones(size), "z": "t"}}, "finish", 4, 2, pace=0.25)
    for client, request in wired.requests(b"run", call, (0, 1), {}, {}).items():
        got, message = wired.asked(wired.decode(request.head), lambda name, r=request: bytes(r.blobs[name]))
        assert encoding.same(message, call.message(client)) and list(message) == list(call.message(client))
        assert (got.kind, got.round, got.nth, got.pace, got.verb) == ("finish", 4, 2, 0.25, "call")
        assert got.function == "local" and got.clients == (client,)


def test_what_the_server_is_told_of_a_state():
    def told(state):
        return wired.reference(b"id", wired.decode(bytes(wired.answered(Outcome(0, {}, {}, {}, 0, state)))))

    assert told(None) is None
    assert told({"secret": torch.ones(3)}) == {wired.AT: b"id"}
    assert told({ONCE: {"model": [b"name", torch.ones(3)]}}) == {wired.AT: b"id", ONCE: {"model": [b"name", None]}}
    assert told({ASKED: torch.ones(2)}) == {wired.AT: b"id", ASKED: b"id"}


# -- the client's side


def seat(method=None, shelf=None):
    method = method or Scaffold()
    return Seat(0, method, Site(AtClient(TOY, 0), 0, networks=method.networks), shelf or InMemory())


def question(states=None, round=1, **more):
    zero = TOY_MODEL.zeros_like() if hasattr(TOY_MODEL, "zeros_like") else TOY_MODEL - TOY_MODEL
    call = Call("mean", "local", (0,), {"model": TOY_MODEL, "control": zero.params}, {}, "train", round, 0)
    [request] = wired.requests(b"run", replace(call, **more), [0], states or {}, {}).values()
    return request


def asked(seat, request, note=None):
    return bytes(seat.answer(request.head, lambda name: bytes(request.blobs[name]), note or {}))


def test_a_question_is_worked_once_and_answered_alike_for_ever():
    one = seat()
    first = asked(one, question())
    one.method = None  # nobody could work with it again
    assert asked(one, question()) == first


def test_a_client_begins_from_the_state_that_the_server_names():
    one = seat()
    first = question()
    asked(one, first)
    fresh = wired.decode(asked(one, question(round=2)))
    later = wired.decode(asked(one, question({0: {wired.AT: first.id}}, round=2)))
    assert difference(fresh["reply"], later["reply"]) is not None
    with pytest.raises(RunError, match="not here"):
        asked(one, question({0: {wired.AT: b"unknown"}}, round=2))


def test_what_a_checkpoint_makes_needless_is_forgotten_and_nothing_else():
    one = seat()
    old, kept, new = question(round=1), question(round=2), question(round=4)
    for request in (old, kept, new):
        asked(one, request)
    named = question({0: {wired.AT: kept.id}}, round=5)
    asked(one, named, {"round": 3, "keep": [kept.id]})
    assert set(one.shelf.kept) == {kept.id, new.id, named.id}
    assert one.shelf.answer(kept.id) is None and one.shelf.state(kept.id)
    assert one.shelf.answer(new.id)


# -- what is offered


def test_an_offer_is_made_again_at_the_other_side():
    spec = spec_of({"name": "fedprox", "mu": 0.3}, schedule="cosine", measures=("f1",), bandwidth="10/20", seed=5)
    method = fedloom.method.build("fedprox", {"mu": 0.3})
    here, made = accepted(wired.decode(encoding.encode(offered(spec, method))), {})
    assert made == method and (here.schedule, here.measures, here.seed) == ("cosine", ("f1",), 5)
    assert here.bandwidth is None  # it is none of the client's business


@pytest.mark.parametrize("setting", [{"measures": ("mine.py:score",)}, {"loss": "mine.py:loss"}, {"model": "m.py:Net"}])
def test_a_setting_that_names_a_file_is_not_offered(setting):
    with pytest.raises(UsageError, match=f"{next(iter(setting))}=.* names a file"):
        offered(spec_of(**setting), FedAvg())


FEDAVG = {"fedloom": fedloom.__version__, "settings": {"method": {"name": "fedavg"}, "seed": 1}, "texts": {}}


@pytest.mark.parametrize(
    "method",
    [{"name": "evil.py"}, {"name": "../evil"}, {"name": "/tmp/evil"}, {"name": "refed", "inner": "evil.py"},
     {"name": "refed", "inner": {"name": "evil.py"}}, {"name": "evil.py:x=1"}, {"name": "a\\evil"}],
)  # fmt: skip
def test_no_file_name_from_a_server_is_opened(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("raise SystemExit('executed')")
    with pytest.raises(UsageError, match="no file name from elsewhere is followed"):
        accepted(FEDAVG | {"settings": {"method": method}}, {})


def test_a_file_of_the_clients_own_is_taken_by_its_name_if_its_text_is_the_servers(tmp_path):
    text = Path(fedloom.methods.optimize.fedavg.__file__).read_text()
    mine, other = tmp_path / "mine.py", tmp_path / "there" / "mine.py"
    other.parent.mkdir()
    mine.write_text(text)
    other.write_text(text + "\n# changed\n")
    method = fedloom.method.build(str(mine), {"lr": 0.2})
    offer = offered(spec_of(), method)
    assert offer["settings"]["method"]["name"] == "mine"
    _, made = accepted(offer, {"mine": mine})
    assert made.lr == 0.2
    with pytest.raises(UsageError, match="another text"):
        accepted(offer, {"mine": other})
    with pytest.raises(UsageError, match="'mine', which is not here"):
        accepted(offer, {})


def test_another_version_is_told():
    with pytest.raises(UsageError, match=r"fedloom 9\.9.*this client has"):
        accepted(FEDAVG | {"fedloom": "9.9"}, {})


def test_the_text_of_a_method_is_that_of_its_bases_too():
    assert digests(FedAvg()) != digests(Scaffold())
    assert set(digests(Outer())) == {Outer.name(), "scaffold"}


def test_a_lost_process_of_clients_is_told():
    made = Experiment(spec_of(), TOY, None, Strict()).begin(None)
    made.engine.host.process.kill()
    made.engine.host.process.join()
    with pytest.raises(RunError, match="process of the clients died"):
        made.go()
    assert ran("fedavg", Strict()).record.final  # and another one is started


def test_a_form_of_its_own_is_no_network_form():
    assert remote.turned_away(3, "why").fault == "why"


def test_a_failure_is_told_as_one(caplog):
    ran("fedavg", Tampering(lambda told: bytes(wired.failed("ValueError"))))
    assert any("client 1: its function failed (ValueError)" in line for line in caplog.messages)


def test_a_small_field_of_ones_own_goes_before_a_large_one_of_all():
    call = Call("call", "local", (0, 1), {"w": torch.ones(1000), "a": 1}, {1: {"w": torch.ones(2)}}, "train", 1, 0)
    for client, request in wired.requests(b"run", call, (0, 1), {}, {}).items():
        _, message = wired.asked(wired.decode(request.head), lambda name, r=request: bytes(r.blobs[name]))
        assert encoding.same(message, call.message(client))


def test_the_state_that_a_question_begins_from_is_not_forgotten_before_it():
    one = seat()
    first = question(round=1)
    asked(one, first)
    later = question({0: {wired.AT: first.id}}, round=5)
    assert wired.decode(asked(one, later, {"round": 3, "keep": []}))["fault"] is None
