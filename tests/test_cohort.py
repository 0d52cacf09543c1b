"""The verbs of a cohort: who is asked what, who answers, and what it costs on the ledger."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedloom import encoding
from fedloom.cohort import Cohort, Each, Replies, Reply
from fedloom.engines import build
from fedloom.errors import NobodyReplied, RunError, UsageError
from fedloom.method import Method, client
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab

SEEN: list = []  # what the server's box of the method under test saw


@dataclass(frozen=True)
class Box(Method):
    """A method whose round is given by the test: `Lab(Box)` runs `Box.act(self, server, cohort)`."""

    global_model = False

    def setup(self, server, clients):
        server.mark = None

    def round(self, server, cohort):
        SEEN.append(type(self).act(self, server, cohort))

    @client
    def double(self, client, x):
        return {"id": client.id, "x": 2 * x, "n": client.n}

    @client
    def silent(self, client):
        return None

    @client
    def count(self, client):
        client.state["calls"] = client.state.get("calls", 0) + 1
        return {"calls": client.state["calls"], "round": client.round}

    @client
    def tell(self, client, word):
        return {"word": word + str(client.id)}

    @client
    def hear(self, client, inbox, word):
        client.state["heard"] = {sender: fields["word"] for sender, fields in inbox.items()}
        return {"private": client.id}

    def plain(self, client):
        return None


@pytest.fixture(params=["serial", "loopback"])
def ran(request, monkeypatch):
    """Runs the given boxes, one a round, and gives the experiment and what each box returned."""

    def run(*boxes, task=None, **settings):
        SEEN.clear()
        rounds = iter(boxes)
        monkeypatch.setattr(Box, "act", lambda self, server, cohort: next(rounds)(self, server, cohort), raising=False)
        settings = {"rounds": len(boxes), "eval_every": len(boxes)} | settings
        made = Lab(Box()).experiment(task or Toy((2, 3, 4, 5, 6)), build(request.param), **settings)
        return made, list(SEEN)

    return run


def bytes_of(**fields):
    return encoding.sizes(fields)


def lines(made, **like):
    return [line for line in made.record.ledger if all(line[name] == value for name, value in like.items())]


def test_call_gives_each_client_its_own_part_and_replies_in_order(ran):
    def box(self, server, cohort):
        return [
            (r.client, r.id, r.x, r.staleness) for r in cohort.call(self.double, x=Each({k: k * 10 for k in range(9)}))
        ]

    made, (seen,) = ran(box)
    assert seen == [(k, k, 20 * k, 0) for k in range(5)]
    expected = {
        ("down", "x", bytes_of(x=10)["x"], (0, 1, 2, 3, 4)),
        ("down", "envelope", bytes_of()["envelope"], (0, 1, 2, 3, 4)),
        ("up", "envelope", bytes_of()["envelope"], (0, 1, 2, 3, 4)),
        ("up", "id", bytes_of(id=1)["id"], (0, 1, 2, 3, 4)),
        ("up", "n", bytes_of(n=1)["n"], (0, 1, 2, 3, 4)),
        ("up", "x", bytes_of(x=10)["x"], (0, 1, 2, 3, 4)),
    }
    found = {(li["direction"], li["field"], li["bytes"], tuple(li["clients"])) for li in lines(made, kind="train")}
    assert found == expected
    row = made.record.metrics[-1]
    assert row["down_bytes"] == 5 * len(encoding.encode({"x": 1})) and row["peer_bytes"] == 0
    assert row["up_bytes"] == 5 * len(encoding.encode({"id": 1, "x": 2, "n": 3}))
    assert row["replies"] == row["cohort"] == 5


def test_shared_and_own_parts_are_one_message(ran):
    def box(self, server, cohort):
        return [r.word for r in cohort.call(self.tell, word=Each(dict.fromkeys(cohort, "w")))]

    made, (seen,) = ran(box)
    assert seen == [f"w{k}" for k in range(5)]
    assert made.record.metrics[-1]["down_bytes"] == 5 * len(encoding.encode({"word": "w"}))


def test_mean_weighs_by_the_field_and_leaves_it_out(ran):
    def box(self, server, cohort):
        plain = cohort.mean(self.double, x=Each({k: float(k) for k in cohort}))
        weighted = cohort.mean(self.double, weight="n", x=Each({k: float(k) for k in cohort}))
        return plain, weighted

    _, ((plain, weighted),) = ran(box)
    assert plain.x == 4.0 and plain.n == 4.0 and plain.weight == plain.count == 5
    assert weighted.x == 2 * (0 * 2 + 1 * 3 + 2 * 4 + 3 * 5 + 4 * 6) / 20 and weighted.weight == 20
    with pytest.raises(AttributeError, match="no field 'n'; it has id, x"):
        weighted.n  # noqa: B018


def test_missing_clients_are_named_and_do_no_harm(ran):
    def box(self, server, cohort):
        mean = cohort.mean(self.count)
        replies = cohort.call(self.count)
        return mean, replies, [r.client for r in cohort.stream(self.count)]

    made, seen = ran(*[box] * 8, dropout=0.3, lost=0.3)
    for round, (mean, replies, streamed) in enumerate(seen, start=1):
        for nth, (missing, heard) in enumerate([(mean.missing, None), (replies.missing, [r.client for r in replies])]):
            gone = [k for k in range(5) if made.world.silent(round, nth, k) or made.world.loses(round, nth, k)]
            assert list(missing) == gone
            assert heard is None or heard == [k for k in range(5) if k not in gone]
        assert mean.count == 5 - len(mean.missing)
        assert streamed == [
            k for k in range(5) if not made.world.silent(round, 2, k) and not made.world.loses(round, 2, k)
        ]
    calls = [(round, nth, k) for round in range(1, 9) for nth in range(3) for k in range(5)]
    worked = Counter(call[2] for call in calls if not made.world.silent(*call))
    counted = Counter(call[2] for call in calls if not made.world.silent(*call) and not made.world.loses(*call))
    kept = {k: state["calls"] for k, state in made.engine.states.items()}
    assert kept == counted, "a client whose reply was lost is as if it had not been asked"
    assert sum(row["replies"] for row in made.record.metrics) < sum(worked.values()) < 8 * 3 * 5


def test_stream_hands_over_one_reply_at_a_time(ran):
    def box(self, server, cohort):
        first = next(cohort.stream(self.count))
        return first.client

    made, seen = ran(box)
    assert seen == [0]
    assert set(made.engine.states) == {0}, "the others were not asked to work yet"


def test_nothing_returned_is_an_empty_reply(ran):
    def box(self, server, cohort):
        return [r.fields for r in cohort.call(self.silent)], cohort.mean(self.silent)

    made, ((fields, mean),) = ran(box)
    assert fields == [{}] * 5 and mean.count == 5 and mean.fields == {}
    assert made.record.metrics[-1]["up_bytes"] == 10 * len(encoding.encode({}))


def test_when_nobody_replies_the_server_keeps_its_values(ran):
    def box(self, server, cohort):
        server.mark = server.round
        return cohort.mean(self.count).calls

    made, seen = ran(box, box, lost=1.0)
    assert seen == [] and made.server.mark is None
    assert all("none of the 5 clients replied to count" in row["note"] for row in made.record.metrics)
    assert not made.engine.states, "nor does any client remember what did not count"


def test_a_round_that_is_taken_back_is_taken_back_at_the_clients_too(ran):
    def fine(self, server, cohort):
        cohort.call(self.count)

    def then_nobody(self, server, cohort):
        server.mark = len(cohort.call(self.count))
        raise NobodyReplied("nobody")

    made, _ = ran(fine, then_nobody, fine, lost=0.3)
    counted = Counter(k for round in (1, 3) for k in range(5) if not made.world.loses(round, 0, k))
    assert {k: state["calls"] for k, state in made.engine.states.items()} == counted
    assert made.server.mark is None


def test_submit_and_wait_overlap_rounds(ran):
    def start(self, server, cohort):
        assert list(cohort.idle) == [0, 1, 2, 3, 4]
        cohort.submit(self.count)
        assert len(cohort.idle) == 0
        return [(r.client, r.staleness, r.round) for r in cohort.wait(2)]

    def more(self, server, cohort):
        assert cohort.idle.clients == (0, 1)
        with pytest.raises(UsageError, match=r"clients \[2, 3, 4\] that still work; use cohort.idle"):
            cohort.submit(self.count)
        cohort.idle.submit(self.count)
        return [(r.client, r.staleness, r.round) for r in cohort.wait(k=2)]

    def rest(self, server, cohort):
        with pytest.raises(UsageError, match=r"wait\(4\) with only 3 clients at work"):
            cohort.wait(4)
        assert cohort.wait(0) == []
        return [(r.client, r.staleness, r.round) for r in cohort.wait()], cohort.wait(), tuple(cohort.idle)

    made, (one, two, (three, nothing, idle)) = ran(start, more, rest)
    assert one == [(0, 0, 1), (1, 0, 1)]
    assert two == [(2, 1, 1), (3, 1, 1)]
    assert three == [(4, 2, 1), (0, 1, 2), (1, 1, 2)]
    assert nothing == [] and idle == (0, 1, 2, 3, 4)
    travelled = [
        (li["round"], li["direction"], li["clients"]) for li in lines(made, function="count", field="envelope")
    ]
    assert travelled == [
        (1, "down", [0, 1, 2, 3, 4]),
        (1, "up", [0, 1]),
        (2, "down", [0, 1]),
        (2, "up", [2, 3]),
        (3, "up", [0, 1, 4]),
    ], "a message is booked in the round in which it travels"
    assert [row["up_bytes"] > 0 for row in made.record.metrics] == [True] * 3
    assert [row["replies"] for row in made.record.metrics] == [2, 2, 3]


def test_submitted_work_draws_what_it_would_have_drawn_at_once(ran):
    at_once = ran(lambda self, server, cohort: [r.calls for r in cohort.call(self.count)])
    overlapped = ran(lambda self, server, cohort: (cohort.submit(self.count), [r.calls for r in cohort.wait()])[1])
    assert at_once[1] == overlapped[1]


def test_lost_submitted_work_is_missing(ran):
    def box(self, server, cohort):
        cohort.submit(self.count)
        replies = cohort.wait(3)
        return len(replies), replies.missing

    assert ran(box, lost=1.0)[1] == [(0, (0, 1, 2))]
    assert ran(box, dropout=1.0)[1] == [(0, (0, 1, 2))]


def test_exchange_over_a_ring(ran):
    ring = {k: [(k + 1) % 5] for k in range(5)}

    def box(self, server, cohort):
        return cohort.exchange(self.tell, self.hear, ring, word="from ")

    made, (seen,) = ran(box)
    assert seen is None, "the script sees no message"
    assert {k: s["heard"] for k, s in made.engine.states.items()} == {
        k: {(k - 1) % 5: f"from {(k - 1) % 5}"} for k in range(5)
    }
    peer = lines(made, direction="peer")
    assert {li["field"]: li["bytes"] for li in peer} == bytes_of(word="from 0")
    assert all(li["edges"] == [[0, 1], [1, 2], [2, 3], [3, 4], [4, 0]] for li in peer)
    row = made.record.metrics[-1]
    assert row["peer_bytes"] == 5 * len(encoding.encode({"word": "from 0"}))
    assert row["up_bytes"] == 0, "the server gets nothing"
    told = len(encoding.encode({"word": "from "}))
    assert row["down_bytes"] == 2 * 5 * told, (
        "the script's words go to every client; the inbox is on the edges' account"
    )
    assert [noted["function"] for noted in made.manifest["privacy"]] == ["tell", "hear"]


def test_exchange_with_peers_that_are_absent_or_many(ran):
    star = {0: [1, 2, 2, 3, 17], 2: [0], 4: []}

    def box(self, server, cohort):
        cohort.where([0, 1, 2]).exchange(self.tell, self.hear, star, word="")

    made, _ = ran(box)
    assert {k: s["heard"] for k, s in made.engine.states.items()} == {0: {2: "2"}, 1: {0: "0"}, 2: {0: "0"}}
    assert {tuple(map(tuple, li["edges"])) for li in lines(made, direction="peer")} == {((0, 1), (0, 2), (2, 0))}


def test_a_cohort_is_a_sequence_of_ids_and_knows_what_they_registered(ran):
    def box(self, server, cohort):
        assert list(cohort) == [0, 1, 2, 3, 4] and 3 in cohort and 7 not in cohort and cohort[-1] == 4
        assert [cohort.info(k)["n"] for k in cohort] == [2, 3, 4, 5, 6]
        parts = cohort.split(3)
        assert [list(part) for part in parts] == [[0, 3], [1, 4], [2]]
        assert cohort.where(lambda k: cohort.info(k)["n"] > 3).clients == (2, 3, 4)
        assert cohort.where([4, 0, 99]).clients == (0, 4)
        return [r.client for r in parts[0].where([3]).call(self.silent)]

    assert ran(box)[1] == [[3]]


def test_ids_ascend_whatever_order_they_come_in():
    assert Cohort([3, 1, 2], boundary=None).clients == (1, 2, 3)
    assert list(Cohort(range(5, 0, -2), boundary=None)) == [1, 3, 5]
    assert Cohort(range(10**12), boundary=None).clients == range(10**12), "everybody may be many"


def test_membership_and_where_are_those_of_sets():
    cohort = Cohort([2, 5, 9], boundary=None)
    assert [k for k in range(-1, 12) if k in cohort] == [2, 5, 9] and "2" not in cohort
    assert cohort.where([9, 2, 9, 4, 2]).clients == (2, 9) and cohort.where(range(5)).clients == (2,)
    assert [len(part) for part in Cohort(range(10), boundary=None).split(4)] == [3, 3, 2, 2]


def test_all_who_work_count_whether_they_are_in_the_cohort_or_not(ran):
    def box(self, server, cohort):
        cohort.where([0, 1, 4]).submit(self.count)
        some = cohort.where([1, 2])
        return some.working, some.idle.clients, len(cohort.wait())

    assert ran(box)[1] == [(3, (2,), 3)]


def test_a_mean_of_replies_runs_along_the_places_of_those_asked_whoever_came_first():
    # By client 1e17, -1e17, 1 and 1, and nothing of client 0: 1e17 + (-1e17 + 1) + 1, where -1e17 + 1 is -1e17.
    values = {4: 1.0, 2: -1e17, 1: 1e17, 3: 1.0}
    replies = Replies([Reply(k, {"x": x, "y": 2.0 * k, "n": k}) for k, x in values.items()], [4, 2, 1, 3, 0])
    mean = replies.mean()
    assert mean.x == 1 / 4 and replies.missing == mean.missing == (0,) and mean.count == 4
    assert replies.mean("y", weight="n").fields == {"y": (2 + 8 + 18 + 32) / 10}
    with pytest.raises(NobodyReplied, match="none of the 2 clients replied"):
        Replies([], [1, 2]).mean()
    with pytest.raises(NobodyReplied):
        Replies([], []).mean()


def test_these_are_clients_by_any_ids_each_once(ran):
    def box(self, server, cohort):
        again = [
            [r.id for r in cohort.clients_by_id(ids).call(self.double, x=1)]
            for ids in ([3, 0, 3], np.array([1, 3]), torch.tensor([2]), cohort.where([4]))
        ]
        assert cohort.where([0]).clients_by_id([2, 2]).mean(self.double, weight="n", x=1).count == 1
        for ids, beyond in (([5], "5"), ([2, -1], "-1")):
            with pytest.raises(UsageError, match=rf"no clients \[{beyond}\]; ids are from 0 to 4"):
                cohort.clients_by_id(ids)
        return again

    made, (seen,) = ran(box)
    assert seen == [[0, 3], [1, 3], [2], [4]]
    assert all(type(client) is int for line in made.record.ledger for client in line["clients"])


def each_lacking(self, cohort):
    cohort.call(self.double, x=Each({0: 1, 1: 1}))


WRONG = [
    (lambda self, cohort: cohort.call(self.plain), r"call needs a function of the method marked @client, got plain"),
    (lambda self, cohort: cohort.mean(lambda client: {}), r"mean needs a function of the method"),
    (lambda self, cohort: cohort.stream(Box.double), r"stream needs a function of the method"),
    (lambda self, cohort: cohort.submit(len), r"submit needs a function of the method marked @client, got len"),
    (each_lacking, r"call\(double, x=Each\(...\)\) lacks the clients \[2, 3, 4\]"),
    (lambda self, cohort: cohort.wait(1), r"wait\(1\) with only 0 clients at work"),
    (lambda self, cohort: cohort.wait(deadline=-3.0), r"a deadline is in seconds from now, at least 0"),
]


@pytest.mark.parametrize(("action", "complaint"), WRONG)
def test_what_cannot_be_asked_is_refused(ran, action, complaint):
    with pytest.raises(UsageError, match=complaint):
        ran(lambda self, server, cohort: action(self, cohort))


FAILING = [
    (lambda self, cohort: cohort.mean(self.count, weight="n"), RunError, "the reply of client 0 has no such field"),
    (lambda self, cohort: cohort.mean(self.tell, weight="word", word=""), RunError, "sent '0'; a weight is a number"),
    (
        lambda self, cohort: cohort.mean(self.double, weight="x", x=-1),
        RunError,
        "sent -2; a weight is a number, at least 0",
    ),
    (
        lambda self, cohort: cohort.mean(self.double, weight="x", x=0),
        RunError,
        "the weights of all replies to double in round 1 are zero",
    ),
    (lambda self, cohort: cohort.where([]).mean(self.count), NobodyReplied, "none of the 0 clients"),
]


@pytest.mark.parametrize(("action", "error", "complaint"), FAILING)
def test_what_the_replies_do_not_allow_fails_the_run(ran, action, error, complaint):
    caught = []

    def box(self, server, cohort):
        with pytest.raises(error, match=complaint) as failed:
            action(self, cohort)
        caught.append(str(failed.value))

    ran(box)
    assert len(caught) == 1 and "\n" not in caught[0]


def test_a_reply_tells_what_it_has():
    reply = Reply(3, {"x": torch.ones(2)})
    assert reply.client == 3 and reply.staleness == 0 and reply.x.sum() == 2
    with pytest.raises(AttributeError, match="the reply of client 3 has no field 'y'; it has x"):
        reply.y  # noqa: B018
