"""What methods with overlapping work share, by hand."""

from types import SimpleNamespace

import pytest
import torch
from problems import ran

from fedloom.cohort import Cohort, Replies, Reply
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.ops.overlap import (
    apply_update,
    discount_by_staleness,
    idle_up_to_cohort,
    seconds_a_step,
    staleness_weight,
    update_message,
)
from fedloom.random import stream
from fedloom.tasks.toy import Toy


def cohort_of(clients, working, population=20):
    return Cohort(clients, SimpleNamespace(busy=set(working), population=population))


@pytest.mark.parametrize(
    ("clients", "working", "many"),
    [
        ([4, 7, 11, 15], [], 4),
        ([4, 7, 11, 15], [7], 3),
        ([4, 7, 11, 15], [1, 2, 7], 1),  # two of an earlier cohort work too
        ([4, 7, 11, 15], [1, 2, 3, 5], 0),
        ([4, 7, 11, 15], [1, 2, 3, 5, 6, 8], 0),  # an earlier cohort was larger
    ],
)
def test_with_those_at_work_there_are_no_more_than_the_cohort_has(clients, working, many):
    found = idle_up_to_cohort(cohort_of(clients, working), stream(0, "test"))
    assert len(found) == many and set(found) <= set(clients) - set(working)


def test_of_too_many_idle_clients_each_is_as_likely():
    cohort, generator = cohort_of([4, 7, 11, 15], [1, 2, 3]), stream(0, "test")
    drawn = [tuple(idle_up_to_cohort(cohort, generator)) for _ in range(2000)]
    for client in cohort:
        assert abs(drawn.count((client,)) - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5


def test_old_work_counts_by_the_power_of_its_staleness():
    assert staleness_weight(0, 0.5) == 1.0 and staleness_weight(7, 0.0) == 1.0
    assert staleness_weight(3, 0.5) == pytest.approx(0.5) and staleness_weight(1, 2.0) == pytest.approx(0.25)


def test_a_step_takes_its_share_of_the_seconds_and_never_none():
    assert seconds_a_step(Reply(0, {}, seconds=6.0), 3) == 2.0
    assert seconds_a_step(Reply(0, {}, seconds=6.0), 0) == 6.0
    assert seconds_a_step(Reply(0, {}, seconds=0.0), 3) == 1e-9


def test_only_the_delta_of_a_discounted_reply_changes():
    one, two = torch.tensor([1.0, -2.0]), torch.tensor([8.0, 4.0])
    replies = Replies(
        [Reply(1, {"delta": one, "statistics": two, "n": 3}, 0, 0.5), Reply(4, {"delta": two, "n": 5}, 3, 2.5)],
        [1, 2, 4],
        {2: "gone"},
    )
    found = discount_by_staleness(replies, 0.5)
    assert torch.equal(found[0].delta, one) and torch.equal(found[1].delta, two / 2)
    assert torch.equal(found[0].statistics, two) and [reply.n for reply in found] == [3, 5]
    assert [(reply.client, reply.staleness, reply.seconds) for reply in found] == [(1, 0, 0.5), (4, 3, 2.5)]
    assert found.asked == (1, 2, 4) and found.missing == (2,) and found.failures == {2: "gone"}
    assert torch.allclose(found.mean("delta").delta, (one + two / 2) / 2), "divided by their number, not their weights"


def test_statistics_travel_as_they_are_and_go_by_the_share():
    model = ran(FedAvg(), Toy(norm=True), rounds=1).server.model
    w = model + 1.0
    said = update_message(w, model)
    assert torch.allclose(said["delta"].flat, torch.ones(len(model.params)), atol=1e-6)
    assert torch.equal(said["statistics"].flat, w.buffers.flat)
    after = apply_update(model, Reply(0, said), 0.5, 0.25)
    assert torch.allclose(after.params.flat, model.params.flat + 0.5, atol=1e-6)
    assert torch.allclose(after.buffers.flat, model.buffers.flat + 0.25, atol=1e-6)


def test_without_statistics_nothing_is_said_of_them():
    model = ran(FedAvg(), Toy(), rounds=1).server.model
    said = update_message(model + 1.0, model)
    assert said.keys() == {"delta"}
    assert torch.allclose(apply_update(model, Reply(0, said), -2.0, 1.0).flat, model.flat - 2.0, atol=1e-6)
