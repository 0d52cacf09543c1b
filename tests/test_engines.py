"""What every engine does, seen in the plainest: sums by places, what is kept and when, layers, streams and logs."""

import sys
from dataclasses import dataclass

import pytest
import torch

import fedloom
from fedloom.calls import Call, Layer
from fedloom.engines.perform import perform, weigh_reply
from fedloom.engines.serial import Serial
from fedloom.mean import Placed
from fedloom.method import Method, client
from fedloom.site import Site
from fedloom.tasks.toy import Toy

HUGE = 1e17  # whose neighbours in double precision are 16 apart: adding 1 changes nothing


@dataclass(frozen=True)
class Say(Method):
    """A client says the number that it is sent."""

    global_model = False

    def round(self, server, cohort):
        pass

    @client
    def say(self, client, x, **rest):
        client.log(x=x)
        client.log(x=x + 2.0)
        client.state["said"] = x
        return {"x": x, "drawn": torch.rand(1), "rest": sorted(rest)}

    @client
    def look(self, client):
        return {"said": client.state.get("said", -1.0)}

    @client
    def number(self, client, x):
        return {"x": x, "n": 2}


def call_of(function, *own, kind="train", **more):
    """A call of clients 0, 1, ... that are sent these numbers."""
    return Call(
        "call", function, tuple(range(len(own))), {}, {k: {"x": x} for k, x in enumerate(own)}, kind, 1, 0, **more
    )


def serial(states=None):
    engine = Serial()
    engine.start(Say(), Site(Toy((3,) * 8), 0), {} if states is None else states)
    return engine


def reduced(engine, call, clients, lost, weight=None):
    """The outcomes and the sum."""
    sums, outcomes = Placed(call.clients), []
    for outcome in engine.run(call, clients):
        if outcome.client not in lost:
            sums.add(outcome.client, weigh_reply(engine.site, call, outcome, weight))
        outcomes.append(outcome)
    return outcomes, sums.total()


def test_a_sum_runs_along_the_places_of_the_call_those_of_absent_clients_being_empty():
    # Places 0 to 4, of which 0 is absent: 1e17 + (-1e17 + 1) + 1, where -1e17 + 1 is -1e17.
    outcomes, total = reduced(serial(), call_of("number", 0.0, HUGE, -HUGE, 1.0, 1.0), [1, 2, 3, 4], set())
    assert total.mean()["x"] == (0.0 + 1.0) / 4
    assert [outcome.client for outcome in outcomes] == [1, 2, 3, 4]


def test_a_lost_reply_is_in_no_sum_but_its_client_has_worked():
    outcomes, total = reduced(serial(), call_of("number", 1.0, 10.0, 100.0), [0, 1, 2], {1}, "n")
    assert (total.count, total.weight, total.mean()["x"]) == (2, 4, 50.5) and len(outcomes) == 3


def test_what_a_client_remembers_is_kept_when_it_has_worked_or_when_a_held_reply_counts():
    states = {1: {"said": 7.0}}
    engine = serial(states)
    list(engine.run(call_of("say", 1.0, 2.0, kind="evaluate"), [0, 1]))
    held = list(engine.run(call_of("say", 1.0, 2.0, held=True), [0, 1]))
    assert states == {1: {"said": 7.0}}, "evaluation leaves no trace, and a held reply has not counted yet"
    engine.keep(0, held[0].state)
    engine.keep(1, None)
    assert states == {0: {"said": 1.0}, 1: {"said": 7.0}}
    list(engine.run(call_of("say", 3.0), [0]))
    assert states[0] == {"said": 3.0}


def test_a_state_that_did_not_change_does_not_travel():
    call = Call("call", "look", (0,), {}, {}, "train", 1, 0)
    outcome = perform(Say(), Site(Toy((3,)), 0), {"said": 5.0}, call, 0, {})
    assert outcome.reply == {"said": 5.0} and outcome.state is None


def test_work_that_was_launched_lands_in_its_order_without_workers():
    engine = serial()
    engine.launch(call_of("number", 1.0, 2.0, 3.0, held=True), [2, 0])
    engine.launch(call_of("number", 4.0, 5.0, held=True), [1])
    landed = [engine.land(0.0) for _ in range(4)]
    assert [outcome.reply["x"] for _, outcome in landed[:3]] == [3.0, 1.0, 5.0] and landed[3] is None


def test_a_log_is_the_mean_of_what_a_client_logged():
    (outcome,) = serial().run(call_of("say", 5.0), [0])
    assert outcome.logs == {"x": 6.0}


def test_torchs_global_generator_is_the_calls_own_stream():
    first, again = (next(iter(serial().run(call_of("say", 1.0), [0]))).reply["drawn"] for _ in range(2))
    other = next(iter(serial().run(Call("call", "say", (0,), {"x": 1.0}, {}, "train", 2, 0), [0]))).reply["drawn"]
    assert torch.equal(first, again) and not torch.equal(first, other)


class Times(Layer):
    """Sends a factor of each number, to which it adds a term; at the server it takes off what it added."""

    def __init__(self, factor, term):
        self.factor, self.term = factor, term

    def around(self, client, call, message, inner):
        reply = inner()
        return reply | {"x": reply["x"] * self.factor + self.term}

    def arrive(self, call, client, reply, site=None):
        return reply | {"x": (reply["x"] - self.term) / self.factor}


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_layers_are_undone_in_reverse_and_act_in_training_alone(kind):
    engine = serial()
    engine.site.layers = (Times(2.0, 1.0), Times(4.0, 10.0))
    (sent,) = engine.run(call_of("number", 5.0, kind=kind), [0])
    assert sent.reply["x"] == (4.0 * (2.0 * 5.0 + 1.0) + 10.0 if kind == "train" else 5.0), "the first is innermost"
    _, total = reduced(engine, call_of("number", 5.0, kind=kind), [0], set())
    assert total.mean()["x"] == 5.0


def test_words_for_the_layers_do_not_reach_the_client_function():
    call = Call("call", "say", (0,), {"x": 1.0, "_for_a_layer": 2, "more": 3}, {}, "train", 1, 0)
    (outcome,) = serial().run(call, [0])
    assert outcome.reply["rest"] == ["more"]


def test_the_gradient_is_at_most_ten_calls_away_from_the_users_own(monkeypatch):
    """Whoever follows a run with a debugger passes these frames; `@client` functions are called as they are."""
    gradient, ways = torch.autograd.grad, []

    def watched(*args, **options):
        frame, way = sys._getframe(1), []
        while frame.f_code is not fedloom.run.__code__:
            way.append(frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname") else frame.f_code.co_name)
            frame = frame.f_back
        ways.append(way[::-1])
        return gradient(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    fedloom.run("fedavg", Toy((5, 5)), rounds=1, engine="serial")
    assert ways and max(map(len, ways)) <= 10, ways
