"""One round of the server: who is asked, what counts, and what is left of a round to which nobody replied."""

from dataclasses import dataclass

import pytest
import torch
from problems import ran

from fedloom.cohort import Cohort
from fedloom.method import Method, client
from fedloom.tasks.toy import Toy

SIZES = (8, 9, 10, 11)


@dataclass(frozen=True)
class Count(Method):
    """Counts its rounds at the server before it asks anybody, and takes a step there."""

    chosen: int = 0  # clients that the method itself chooses; 0: the world does

    def setup(self, server, clients):
        server.rounds = 0

    def select(self, server, clients):
        return Cohort(clients[: self.chosen], clients.boundary) if self.chosen else None

    def round(self, server, cohort):
        server.rounds = server.rounds + 1
        gradient = server.grad(server.model.clone(), next(server.batches()))
        up = cohort.mean(self.local, model=server.model)
        server.model = server.model - 0.01 * gradient + up.delta

    @client
    def local(self, client, model):
        w, _ = client.descend(model, lr=0.1, steps=2, batch=4)
        return {"delta": w - model}


class Leaving(Toy):
    """Client 1 has nothing to do after the first round."""

    def present(self, client):
        return client != 1 or self.now == 0

    now = 0


def test_of_a_round_to_which_nobody_replied_the_server_keeps_nothing():
    made = ran(Count(), Toy(SIZES), 3, lost=1.0)
    assert made.server.rounds == 0 and torch.equal(made.server.model.flat, made.site.initial.flat)
    assert all("the server kept its values" in row["note"] for row in made.record.metrics)


def test_gradients_of_the_server_are_steps_of_the_round():
    (row,) = ran(Count(), Toy(SIZES), 1).record.metrics
    assert row["gradient_steps"] == 2 * len(SIZES) + 1


@pytest.mark.parametrize("speed", ["constant", "lognormal:1.0"])
def test_whom_a_method_chooses_the_server_waits_for(speed):
    made = ran(Count(chosen=4), Toy(SIZES), 2, cohort=2, overselect=2.0, speed=speed)
    assert [row["replies"] for row in made.record.metrics] == [4, 4]
    plain = ran(Count(), Toy(SIZES), 2, cohort=2, overselect=2.0, speed=speed)
    assert [(row["cohort"], row["replies"]) for row in plain.record.metrics] == [(4, 2)] * 2


def test_a_method_chooses_among_those_that_can_be_reached():
    made = ran(Count(chosen=2), Toy((8,) * 8), 12, availability="bernoulli:0.4")
    asked = [(row["cohort"], row["replies"]) for row in made.record.metrics if row["cohort"]]
    assert len(asked) > 8 and all(cohort == replies for cohort, replies in asked) and (2, 2) in asked


def test_who_has_nothing_to_do_is_not_asked():
    task = Leaving(SIZES)
    made = ran(Count(), task, 1)
    assert made.record.metrics[0]["cohort"] == 4
    task.now = 1
    assert ran(Count(), task, 1).record.metrics[0]["cohort"] == 3
