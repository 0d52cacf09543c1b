"""When a server between machines no longer waits: a table of who is there, who has answered, and what comes of it."""

import math
import time

import pytest

from fedloom.deploy.hub import Hub
from fedloom.deploy.network import Network, Patience
from fedloom.engines.remote import Fates
from fedloom.engines.wired import Request
from fedloom.errors import RunError, TakenError

LEASE = 5.0
KEY = ("train", 1, 0)
RULE = Patience(deadline=10.0, quorum=2, enough=1.0)


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


def request(client, key=KEY, verb="call"):
    return Request(client, bytes([client]) * 32, b"", {}, {}, key, verb, "local")


def asked(tmp_path, clients=4, patience=RULE, key=KEY, verb="call", **states):
    """A network that has asked clients 0, 1, ...; of those in `states` all else than that they are there."""
    hub = Hub([f"c{k}" for k in range(clients)], LEASE)
    hub.open_inbox(tmp_path)
    for member in hub.by_number:
        hub.greet(member, "s" * 32)
    made = Network(hub, b"run", patience)
    made.flying = {}
    for k in range(clients):
        made.send(request(k, key, verb))
    return made


def answer(made, *clients):
    for k in clients:
        made.hub.take(bytes([k]) * 32, b"answer")
        made.hub.came(made.hub.by_number[k], bytes([k]) * 32)


def heard(made):
    """What comes without waiting: (clients that answered, {client: why not})."""
    good, missing = [], {}
    while found := made.hear(0.0):
        for one, what in found:
            if isinstance(what, str):
                missing[one.client] = what
            else:
                good.append(one.client)
    return good, missing


def silent(made, *clients, since=0.0):
    for k in clients:
        made.hub.by_number[k].until = since


class Settled(Fates):
    settled = True


CASES = {
    "nobody answered": (RULE, [], [], [], 9.9, {}),
    "nobody answered, deadline": (RULE, [], [], [], 10.0, {}),
    "one answered, deadline, quorum of two": (RULE, [0], [], [], 10.0, {}),
    "quorum, before the deadline": (RULE, [0, 1], [], [], 9.9, {}),
    "quorum, deadline": (RULE, [0, 1], [], [], 10.0, {2: "it is late", 3: "it is late"}),
    "deadline, one of them silent": (RULE, [0, 1], [3], [], 10.0, {2: "it is late", 3: "it is silent"}),
    "the others silent": (RULE, [0, 1], [2, 3], [], 0.0, {2: "it is silent", 3: "it is silent"}),
    "one of the others silent": (RULE, [0, 1], [3], [], 0.0, {}),
    "the others silent, below the quorum": (RULE, [0], [1, 2, 3], [], 20.0, {}),
    "all silent": (RULE, [], [0, 1, 2, 3], [], 20.0, {}),
    "no deadline": (Patience(None, 1), [0], [], [], 1e6, {}),
    "enough": (Patience(None, 1, 0.5), [0, 1], [], [], 0.0, {2: "it is late", 3: "it is late"}),
    "not enough": (Patience(None, 1, 0.51), [0, 1], [], [], 0.0, {}),
    "enough, below the quorum": (Patience(None, 3, 0.5), [0, 1], [], [], 0.0, {}),
    "three tenths of ten are three": (Patience(None, 1, 0.3), [0, 1, 2], [], [], 0.0, dict.fromkeys(range(3, 10))),
    "a quorum of more than were asked": (Patience(5.0, 9), [0, 1, 2, 3], [], [], 0.0, {}),
    "all have left": (RULE, [], [], [0, 1, 2, 3], 0.0, dict.fromkeys(range(4), "it has left")),
    "those that did not answer have left": (RULE, [0], [], [1, 2, 3], 0.0, dict.fromkeys((1, 2, 3), "it has left")),
    "one has left": (RULE, [0, 1], [], [2], 0.0, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_whom_a_call_does_not_wait_for(case, clock, tmp_path):
    rule, answered, quiet, gone, passed, expected = CASES[case]
    made = asked(tmp_path, 10 if "ten" in case else 4, rule)
    answer(made, *answered)
    good, _ = heard(made) if passed else ([], {})
    clock.now += passed
    for member in made.hub.by_number:
        member.until = clock.now + LEASE
    silent(made, *quiet)
    for k in gone:
        made.hub.leave(made.hub.by_number[k])
    more, missing = heard(made)
    assert (good + more, missing.keys()) == (answered, expected.keys())
    assert all(missing[k] == why for k, why in expected.items() if why)
    assert set(made.waiting) == {bytes([k]) * 32 for k in range(len(made.hub.by_number))} - {
        bytes([k]) * 32 for k in [*answered, *expected]
    }
    for k in expected:
        assert not made.hub.by_number[k].open, "a request that nobody waits for is not given to anybody"


def test_setup_waits_for_everybody(clock, tmp_path):
    made = asked(tmp_path, patience=Patience(1.0, 1, 0.25), key=("setup", 0, 0))
    answer(made, 0)
    clock.now += 100
    assert heard(made) == ([0], {})
    made.hub.leave(made.hub.by_number[2])
    with pytest.raises(RunError, match=r"^c2 left, and the run cannot go on without .* local \(setup, round 0\)"):
        heard(made)


def test_what_ends_a_round_ends_finish_too(clock, tmp_path):
    made = asked(tmp_path, patience=Patience(1.0, 1, 0.25), key=("finish", 0, 0))
    answer(made, 0)
    assert heard(made) == ([0], dict.fromkeys((1, 2, 3), "it is late"))


WITHOUT = {
    "setup": {"key": ("setup", 0, 0)},
    "below the quorum": {},
    "submitted work": {"verb": "submit"},
}


@pytest.mark.parametrize("case", [*WITHOUT, "settled"])
def test_a_run_that_cannot_go_on_stops_when_all_it_waits_for_were_silent_for_too_long(case, clock, tmp_path):
    made = asked(tmp_path, patience=Patience(None, 2, 1.0, 100.0), **WITHOUT.get(case, {}))
    if case == "settled":
        made.fates = Settled()
    answer(made, 0)
    assert heard(made) == ([0], {})
    clock.now += 50
    for k in (1, 2):
        made.hub.sign(made.hub.by_number[k])
        made.hub.leave(made.hub.by_number[k]) if case == "below the quorum" else None
    clock.now += LEASE + 49.9  # since the lease of the third, 99.9; of the others less
    if case != "submitted work":
        silent(made, 3, since=clock.now - 1000)
    assert heard(made) == ([], {})
    assert made._next_deadline() <= clock.now + 50.2
    clock.now += 50.2
    with pytest.raises(RunError, match=r"^c1, c2, c3 gave no sign of life for 100 seconds .*local \(\w+, round \d\)"):
        heard(made)


def test_who_is_there_is_waited_for_however_long_others_are_silent(clock, tmp_path):
    made = asked(tmp_path, patience=Patience(None, 2, 1.0, 10.0), key=("setup", 0, 0))
    for _ in range(30):
        clock.now += 4
        made.hub.sign(made.hub.by_number[1])
        assert heard(made) == ([], {})


@pytest.mark.parametrize("verb", ["call", "submit"])
def test_one_that_left_is_needed_where_its_answer_counted_before(verb, clock, tmp_path):
    made = asked(tmp_path, verb=verb)
    made.fates = Settled()
    made.hub.leave(made.hub.by_number[3])
    if verb == "submit":  # perhaps it did not
        assert heard(made) == ([], {})
    else:
        with pytest.raises(RunError, match=r"^c3 left, .* start what left again, then this server$"):
            heard(made)


def test_submitted_work_is_given_up_when_its_lease_has_run_out(clock, tmp_path):
    made = asked(tmp_path, verb="submit", patience=Patience(1.0, 2, 0.25))
    answer(made, 0)
    clock.now += 4
    assert heard(made) == ([0], {})  # no deadline concerns it
    for k in (0, 1, 2):
        made.hub.sign(made.hub.by_number[k])
    clock.now += 4
    assert heard(made) == ([], {3: "it is silent"})


def test_submitted_work_waits_where_fewer_than_the_quorum_are_there(clock, tmp_path):
    made = asked(tmp_path, verb="submit", patience=Patience(None, 2))
    clock.now += 6
    made.hub.sign(made.hub.by_number[0])
    assert heard(made) == ([], {})
    made.hub.sign(made.hub.by_number[1])
    assert heard(made) == ([], {2: "it is silent", 3: "it is silent"})


def test_what_was_settled_before_is_waited_for(clock, tmp_path):
    made = asked(tmp_path)
    made.fates = Settled()
    silent(made, 0, 1)
    clock.now += 100
    answer(made, 2, 3)
    assert heard(made) == ([2, 3], {})


def test_what_comes_late_is_dropped(clock, tmp_path):
    made = asked(tmp_path)
    answer(made, 0, 1)
    clock.now += 10
    for member in made.hub.by_number:
        made.hub.sign(member)
    assert heard(made) == ([0, 1], {2: "it is late", 3: "it is late"})
    made.hub.arrived.put(request(2))
    assert heard(made) == ([], {})
    assert made.counts == {}


def test_what_came_in_time_counts_however_late_it_is_looked_at(clock, tmp_path):
    made = asked(tmp_path, patience=Patience(10.0, 1, 0.5))
    answer(made, 0, 1, 2)
    clock.now += 100
    assert heard(made) == ([0, 1, 2], {3: "it is silent"})


@pytest.mark.parametrize(("passed", "left"), [(0.0, 10.0), (4.0, 6.0), (10.0, math.inf)])
def test_the_next_deadline_is_that_of_the_first_call(passed, left, clock, tmp_path):
    made = asked(tmp_path)
    clock.now += passed
    assert made._next_deadline() == (math.inf if left == math.inf else clock.now + left)
    made.patience = Patience(None)
    assert made._next_deadline() == math.inf


def test_what_was_answered_before_it_is_asked_has_arrived_and_what_was_not_wakes_its_client(tmp_path):
    hub = Hub(["a", "b"], LEASE)
    hub.open_inbox(tmp_path)
    hub.take(request(0).id, b"answer")
    for k in (0, 1):
        hub.send(request(k))
    assert hub.arrived.get_nowait().client == 0
    assert hub.arrived.empty()
    assert [[*member.open] for member in hub.by_number] == [[], [request(1).id]]
    assert [member.wake.is_set() for member in hub.by_number] == [False, True]


def test_a_server_that_is_started_again_waits_a_lease_for_its_clients(clock, tmp_path):
    hub = Hub(["c0", "c1", "c2", "c3"], LEASE)
    hub.open_inbox(tmp_path)
    for member in hub.by_number[:3]:
        member.registered = {"n": 1}
    hub.expect()
    assert [member.live for member in hub.by_number] == [True, True, True, False]
    made = Network(hub, b"run", Patience(None, 1))
    made.flying = {}
    for k in range(3):
        made.send(request(k))
    hub.greet(hub.by_number[0], "s" * 32)  # in a session that this process does not know
    answer(made, 0)
    assert heard(made) == ([0], {})
    clock.now += LEASE - 0.1
    assert heard(made) == ([], {})
    clock.now += 0.1
    assert heard(made) == ([], {1: "it is silent", 2: "it is silent"})


def test_another_session_waits_until_the_lease_of_the_first_has_run_out(clock):
    hub = Hub(["a"], LEASE)
    [member] = hub.by_number
    hub.greet(member, "s" * 32)
    hub.greet(member, "s" * 32)
    with pytest.raises(TakenError, match=r"the client a is connected already.* wait 5 s until"):
        hub.greet(member, "t" * 32)
    clock.now += LEASE
    hub.greet(member, "t" * 32)
    with pytest.raises(TakenError, match="is connected already"):
        hub.greet(member, "s" * 32)
    with pytest.raises(ValueError, match="a session of 31 letters"):
        hub.greet(member, "t" * 31)


def test_blobs_that_nobody_is_to_fetch_are_forgotten(tmp_path):
    hub = Hub(["a", "b"], LEASE)
    hub.open_inbox(tmp_path)
    both, one = b"x" * 32, b"y" * 32
    first = Request(0, b"0" * 32, b"", {}, {both: b"1", one: b"2"}, KEY, "call", "local")
    second = Request(1, b"1" * 32, b"", {}, {both: b"1"}, KEY, "call", "local")
    hub.send(first)
    hub.send(second)
    assert {*hub.blobs} == {both, one}
    hub.inbox.add(first.id, 0, b"some")
    hub.withdraw([first])
    assert {*hub.blobs} == {both}
    assert hub.inbox.come(first.id) == 0, "what had come of it is gone"
    hub.take(second.id, b"2")
    hub.came(hub.by_number[1], second.id)
    assert not hub.blobs
