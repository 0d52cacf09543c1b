"""FedCompass: groups that end together, steps by speed, who is late, and that every upload counts once."""

import json
import math
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from problems import node, ran

from fedloom.cohort import Reply
from fedloom.errors import UsageError
from fedloom.methods.asynchronous._arrival import assigned, left_by
from fedloom.methods.asynchronous.fedcompass import GENERAL, FedCompass
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.tasks.toy import Toy

ALIKE = Toy(sizes=(20,) * 4)
SPEEDS = {"speed": "classes:1x0.5,3x0.5", "step_seconds": 1.0}


def updates(made):
    """Uploads by client in the order of the ledger's rounds."""
    lines = [line for line in made.record.ledger if line["direction"] == "up" and line["field"] == "delta"]
    return Counter(client for line in lines for client in line["clients"])


def test_alike_clients_are_fedavg_from_their_second_step_on():
    method = FedCompass(fewest=5, most=5, alpha=1.0, decay=0.0, batch=0)
    made = ran(method, ALIKE, 6)  # four first steps of one client each, then all together twice
    assert [row["server/group"] for row in made.record.metrics] == [1, 1, 1, 1, 4, 4]
    assert [row["server/staleness"] for row in made.record.metrics][4:] == [1.5, 0.0]
    fedavg = ran(FedAvg(epochs=5, batch=0), ALIKE, 3)
    assert (made.server.model - fedavg.server.model).norm() > 1e-3, "while some began before others had ended"


def test_one_group_without_staleness_is_fedavg_exactly():
    task = Toy(sizes=(25,))
    made, fedavg = (
        ran(FedCompass(fewest=5, most=5, alpha=1.0, batch=0), task, 4),
        ran(FedAvg(epochs=5, batch=0), task, 4),
    )
    assert torch.equal(made.server.model.flat, fedavg.server.model.flat)


def test_a_groups_step_is_the_mean_of_what_its_members_reached():
    before, after = (ran(FedCompass(fewest=5, most=5, alpha=0.9, batch=0), Toy(sizes=(20, 60)), r) for r in (3, 4))
    start, step = before.server.model, 0
    for k, share in enumerate((0.25, 0.75)):
        w, _ = node(before.site, k).descend(start, lr=0.05, steps=5)
        step = step + share * (w - start)
    assert after.record.metrics[-1]["server/group"] == 2 and after.record.metrics[-1]["server/staleness"] == 0
    assert torch.allclose(after.server.model.flat, (start + 0.9 * step).flat, rtol=0, atol=1e-6)


def test_steps_go_with_speed_and_members_arrive_together():
    made = ran(FedCompass(fewest=5, most=15), ALIKE, 12, **SPEEDS)
    speeds = {k: made.world.profile(k)["speed"] for k in range(4)}
    events = [json.loads(line) for line in (made.record.path / "events.jsonl").read_text().splitlines()]
    groups = [row["round"] for row in made.record.metrics if row["server/group"] == 4]
    assert len(groups) >= 2
    for round in groups:
        jobs = {event["client"]: event for event in events if event["round"] == round}
        ends = [event["began"] + event["work"] for event in jobs.values()]
        assert max(ends) - min(ends) <= 1.0, "less than a step of the slow ones"
        steps = {k: event["work"] * speeds[k] for k, event in jobs.items()}
        assert round == groups[0] or steps == pytest.approx({k: 15 if speed == 3 else 5 for k, speed in speeds.items()})


def test_every_upload_is_taken_in_exactly_once():
    made = ran(FedCompass(fewest=2, most=6, latest=1.0), Toy(sizes=(10, 20, 15, 30)), 15, speed="lognormal:1.0")
    used = sum(row["server/group"] for row in made.record.metrics)
    assert used + len(made.server.held) == sum(updates(made).values())
    assert set(updates(made)) == set(range(4))


def test_a_group_goes_on_without_those_that_are_late():
    """Speeds that change are what makes somebody late; here by hand, as the plan knows only what it is told."""
    plan = {"groups": {}, "speed": {0: 1.0, 1: 2.0}, "jobs": {}, "ready": [], "founded": 0}
    steps, group = assigned(plan, 0, 0.0, 2, 10, 1.5)
    assert (steps, group) == (10, 0)
    assert plan["groups"][0] == {"due": 10.0, "latest": 15.0, "members": [0], "arrived": []}
    plan["jobs"][0] = {"steps": steps, "version": 0, "group": group}
    assert assigned(plan, 1, 0.0, 2, 10, 1.5) == (5, 0), "five steps of two seconds"
    plan["jobs"][1] = {"steps": 5, "version": 0, "group": 0}
    plan["groups"][0]["arrived"].append(0)
    assert left_by(plan, 0) is None, "client 1 still works"
    plan["groups"][0]["arrived"].append(1)
    assert left_by(plan, 1) == 0 and plan["jobs"] == {}
    assert 0 in plan["groups"], "whose uploads are still to be taken in"
    alone = {"groups": {3: {"members": [5], "arrived": []}}, "jobs": {5: {"group": 3}}}
    assert left_by(alone, 5) is None and alone["groups"] == {}, "nobody arrived in it, and nobody will"


@pytest.mark.parametrize(
    ("now", "steps", "joins"), [(0.0, 10, True), (5.0, 5, True), (9.0, 10, False), (16.0, 10, False)]
)
def test_who_cannot_do_the_fewest_steps_in_time_founds_a_group(now, steps, joins):
    plan = {"groups": {0: {"due": 10.0, "latest": 15.0, "members": [7], "arrived": []}}}
    plan |= {"speed": {1: 1.0, 7: 1.0}, "founded": 1}
    assert assigned(plan, 1, now, 2, 10, 1.5) == (steps, 0 if joins else 1)


def test_a_new_group_ends_where_the_fastest_of_another_can_join_it():
    groups = {0: {"due": 10.0, "latest": 12.0, "members": [7], "arrived": [8]}}
    plan = {"groups": groups, "speed": {1: 6.0, 7: 3.0, 8: 1.0}, "founded": 1}
    # Ten more steps of client 8 from the 12th second on end at 22 s: time for three of client 1's.
    assert assigned(plan, 1, 0.0, 2, 10, 1.5) == (3, 1)
    assert plan["groups"][1] == {"due": 18.0, "latest": 27.0, "members": [1], "arrived": []}


def plan_of(speed, founded, **groups):
    """A plan with groups by number: (due, latest, members)."""
    made = {
        int(g[1:]): dict(zip(("due", "latest", "members"), of, strict=True), arrived=[]) for g, of in groups.items()
    }
    return {"groups": made, "speed": speed, "jobs": {}, "ready": [], "founded": founded}


def test_of_the_groups_in_reach_the_one_that_leaves_the_most_steps_is_joined():
    plan = plan_of({1: 1.0, 7: 1.0}, 3, g0=(6.0, 9.0, [7]), g1=(10.0, 15.0, [8]), g2=(30.0, 45.0, [9]))
    assert assigned(plan, 1, 1.0, 2, 10, 1.5) == (9, 1), "29 steps would be more than the most"
    assert plan["groups"][1]["members"] == [8, 1] and plan["founded"] == 3


def test_a_new_group_ends_with_the_latest_of_the_others_that_can_be_met():
    speed = {1: 6.0, 7: 1.0, 8: 2.0, 9: 1.0}
    plan = plan_of(speed, 5, g0=(0.0, 12.0, [7]), g3=(1.0, 20.0, [8]), g4=(-9.0, 1.0, [9]))
    # From 2 s on: ends at 12 + 10 and at 20 + 20, hence 3 or 6 steps; the last moment of group 4 is past.
    assert assigned(plan, 1, 2.0, 2, 10, 1.5) == (6, 5)
    assert plan["groups"][5] == {"due": 2 + 36.0, "latest": 2 + 54.0, "members": [1], "arrived": []}
    assert plan["founded"] == 6
    slow = plan_of(speed | {1: 19.0}, 1, g0=(0.0, 12.0, [7]))
    assert assigned(slow, 1, 2.0, 3, 10, 1.5) == (3, 1), "one step fits, and the fewest are three"
    fast = plan_of(speed | {1: 1.0}, 1, g0=(0.0, 12.0, [7]))
    assert assigned(fast, 1, 2.0, 3, 10, 1.5) == (10, 1), "20 steps would fit, and the most are ten"


def test_who_was_never_measured_does_the_most_and_is_waited_for_without_a_moment():
    plan = plan_of({7: 1.0}, 4, g3=(9.0, 12.0, [7]))
    assert assigned(plan, 1, 2.0, 2, 10, 1.5) == (10, 4)
    assert plan["groups"][4]["due"] == plan["groups"][4]["latest"] == math.inf


def test_steps_are_rounded_down_but_not_by_what_rounding_took():
    for due, steps in ((0.3, 3), (0.29, 2), (0.39, 3)):
        assert assigned(plan_of({1: 0.1}, 1, g0=(due, 9.0, [7])), 1, 0.0, 1, 10, 1.5)[0] == steps


def test_lost_work_frees_its_group():
    made = ran(FedCompass(fewest=2, most=5), ALIKE, 12, lost=0.4)
    assert any("server/group" in row for row in made.record.metrics)
    members = [k for group in made.server.plan["groups"].values() for k in group["members"]]
    assert sorted(members) == sorted(made.server.plan["jobs"]) == sorted(made.boundary.pending.busy)


def test_bounds_that_make_no_sense_are_refused():
    with pytest.raises(UsageError, match="fewest"):
        FedCompass(fewest=9, most=3)


def test_a_late_client_that_ends_again_before_the_group_counts_twice():
    made = ran(FedCompass(), Toy(), 1)
    method, server, cohort = made.method, made.server, made.everybody
    server.plan = {"groups": {}, "speed": {}, "jobs": {}, "ready": [], "founded": 0}
    plan, held = deepcopy(server.plan), []
    late = {"due": 1.0, "latest": -1.0, "members": [0, 1], "arrived": []}
    begun = []
    object.__setattr__(method, "begin", lambda server, cohort, plan, clients: begun.extend(clients))
    for upload in range(2):
        plan["groups"] = {upload: deepcopy(late)}
        plan["jobs"][0] = {"steps": 3, "version": 0, "group": upload}
        method.arrive(server, cohort, plan, held, Reply(0, {"delta": upload}, 0, 1.0))
    assert [one["fields"]["delta"] for one in held] == [0, 1] and begun == [0, 0]
    assert {one["group"] for one in held} == {GENERAL}


def test_over_a_long_run_with_late_clients_nothing_vanishes():
    late = {"speed": "lognormal:1.0", "latency": 1.0}
    made = ran(FedCompass(fewest=2, most=20, latest=1.0, batch=0), Toy(sizes=(8, 12, 10, 9, 11, 10)), 60, **late)
    used = sum(row["server/group"] for row in made.record.metrics)
    assert used + len(made.server.held) == sum(updates(made).values())


def test_a_clock_that_stands_still_is_no_error():
    made = ran(FedCompass(fewest=2, most=5), Toy(), 8, step_seconds=0)
    assert made.server.version == 8


def test_a_groups_step_by_hand():
    """alpha_i = alpha (1 + staleness)^-a n_i / sum n, over all uploads taken in; clients' share is of all at work."""
    made = ran(FedCompass(alpha=0.8, decay=0.5), Toy(sizes=(20, 60, 40)), 1)
    server, cohort = made.server, made.everybody
    server.version = 3
    start, ones = server.model, server.model.params.zeros_like() + 1.0
    used = [
        {"client": k, "fields": {"delta": d * ones, "n": n}, "version": v, "group": 0}
        for k, d, n, v in ((0, 1.0, 20, 0), (1, -2.0, 60, 3))
    ]
    made.method.step(server, cohort, used)
    mean = (20 * 1.0 * 4**-0.5 + 60 * -2.0) / 80
    expected = start.params.flat + 0.8 * (80 / 120) * mean
    assert torch.allclose(server.model.params.flat, expected, atol=1e-6) and server.version == 4


def test_a_step_takes_in_all_that_came_late():
    seen = []

    @dataclass(frozen=True)
    class Watched(FedCompass):
        def step(self, server, cohort, used):
            seen.extend(one["group"] for one in used)
            FedCompass.step(self, server, cohort, used)

        def round(self, server, cohort):
            version = server.version
            FedCompass.round(self, server, cohort)
            if server.version > version:
                assert all(one["group"] != GENERAL for one in server.held)

    late = {"speed": "lognormal:1.0", "latency": 1.0}
    ran(Watched(fewest=2, most=20, latest=1.0, batch=0), Toy(sizes=(8, 12, 10, 9, 11, 10)), 60, **late)
    assert 20 < seen.count(GENERAL) < len(seen)


def test_the_newest_measurement_is_most_of_a_clients_speed():
    made = ran(FedCompass(memory=0.9), Toy(), 1)
    method, plan = made.method, {"groups": {}, "speed": {}, "jobs": {}, "ready": [], "founded": 0}
    object.__setattr__(method, "begin", lambda *a: None)
    for seconds in (6.0, 30.0):
        plan["groups"] = {0: {"due": 1.0, "latest": 9e9, "members": [0, 1], "arrived": []}}
        plan["jobs"][0] = {"steps": 3, "version": 0, "group": 0}
        method.arrive(made.server, made.everybody, plan, [], Reply(0, {}, 0, seconds))
    assert plan["speed"][0] == pytest.approx(0.1 * 2.0 + 0.9 * 10.0)


def test_running_statistics_go_by_the_share_of_the_samples_taken_in():
    made = ran(FedCompass(), Toy(norm=True, sizes=(20, 60, 40)), 1)
    server, before = made.server, made.server.model
    seen = before.buffers + 1.0
    fields = {"delta": before.params.zeros_like(), "statistics": seen, "n": 60}
    made.method.step(server, made.everybody, [{"client": 1, "fields": fields, "version": 0, "group": 0}])
    assert torch.allclose(server.model.buffers.flat, (0.5 * before.buffers + 0.5 * seen).flat)
