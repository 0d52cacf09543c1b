"""FedCE: what contributions are, what enters the model, and by which model clients judge the others."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from problems import Six, node, ran

from fedloom.errors import NobodyReplied
from fedloom.methods.aggregate.fedce import FedCE, quality
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.quality import ACCURACY, RMSE
from fedloom.random import numpy_stream, stream
from fedloom.tasks.toy import Toy
from fedloom.vector import Layout, Vector

LAYOUT = Layout(("w",), ((5,),), 1)


class Cohort(list):
    """Clients that were asked, of whom some answer with (delta, score)."""

    def __init__(self, asked, answers):
        super().__init__(asked)
        self.answers = answers

    def call(self, function, model, share):
        self.sent = {k: share[k] for k in self}
        return [
            SimpleNamespace(client=k, delta=Vector(torch.from_numpy(delta), LAYOUT), score=score)
            for k, (delta, score) in self.answers.items()
        ]


def server(population=4):
    made = SimpleNamespace(population=population, round=1, model=Vector(torch.zeros(5).double(), LAYOUT))
    made.contribution, made.entered, made.cosines = [1 / population] * population, {}, {}
    return made


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def floored(x):
    x = np.maximum(x / x.sum(), 1e-3)
    return x / x.sum()


@pytest.mark.parametrize("mode", ["plus", "times"])
def test_the_server_does_what_the_box_says_with_clients_that_come_and_go(mode):
    draw = numpy_stream(3, "fedce")
    heard = [(0, 1, 2, 3), (0, 2, 3), (1, 2, 3), (0, 1, 2, 3)]
    made, method = server(), FedCE(mode=mode)
    w, c, past = np.zeros(5), np.full(4, 0.25), [[] for _ in range(4)]
    entered = np.zeros(4)
    for ids in heard:
        deltas = draw.normal(size=(4, 5)) + np.array([1, 1, 0, -0.5])[:, None]
        scores = draw.uniform(0.1, 1, size=4)
        cohort = Cohort(range(4), {k: (deltas[k], scores[k]) for k in ids})
        method.round(made, cohort)
        assert list(cohort.sent.values()) == pytest.approx(entered.tolist())
        among = c[[*ids]] / c[[*ids]].sum()
        v = among @ deltas[[*ids]]
        for share, k in zip(among, ids, strict=True):
            past[k].append(cosine(deltas[k], v - share * deltas[k]))
        g = floored(np.array([1 - np.mean(past[k]) for k in ids]))
        m = floored(scores[[*ids]])
        new = floored(g + m if mode == "plus" else g * m)
        entered = np.zeros(4)
        entered[[*ids]] = new
        c[[*ids]] = new * c[[*ids]].sum()
        w = w + new @ deltas[[*ids]]
        assert made.model.flat.numpy() == pytest.approx(w, abs=1e-12)
        assert made.contribution == pytest.approx(c.tolist(), abs=1e-12)
        assert sum(made.contribution) == pytest.approx(1)


def test_the_one_that_goes_another_way_counts_most():
    same, other = np.array([1.0, 0, 0, 0, 0]), np.array([0, 1.0, 0, 0, 0])
    made = server(3)
    FedCE().round(made, Cohort(range(3), {0: (same, 1.0), 1: (same, 1.0), 2: (other, 1.0)}))
    assert made.contribution[2] > 1.5 * made.contribution[0] == pytest.approx(1.5 * made.contribution[1])


def test_the_one_on_whose_data_the_others_fail_counts_most():
    step, made = np.ones(5), server(3)
    FedCE().round(made, Cohort(range(3), {0: (step, 0.2), 1: (step, 0.2), 2: (step, 0.9)}))
    # Equal ways have cosines of 1, and shares that sum to 0 are equal.
    assert made.contribution == pytest.approx(floored(np.full(3, 1 / 3) + np.array([0.2, 0.2, 0.9]) / 1.3).tolist())


def test_no_weight_is_below_the_least_and_all_are_positive():
    step, made = np.ones(5), server(3)
    FedCE(mode="times").round(made, Cohort(range(3), {0: (step, 1.0), 1: (step, 0.0), 2: (-step, 0.0)}))
    assert min(made.contribution) > 0.9e-3
    assert sum(made.contribution) == pytest.approx(1)


def test_a_single_client_and_one_that_stands_still_have_no_direction():
    made = server(2)
    FedCE().round(made, Cohort(range(2), {0: (np.zeros(5), 1.0), 1: (np.ones(5), 1.0)}))
    assert made.contribution == [0.5, 0.5]
    made = server(1)
    FedCE().round(made, Cohort(range(1), {0: (np.ones(5), 1.0)}))
    assert (made.contribution, made.entered) == ([1.0], {0: 1.0})
    with pytest.raises(NobodyReplied, match="none of the 1 clients replied"):
        FedCE().round(made, Cohort(range(1), {}))


def test_equal_updates_and_equal_scores_are_plain_averaging():
    task = Toy(sizes=(30, 30, 30))
    task.data = lambda client, split, data=task.data: data(0, split)  # all have the rows of the first
    here = ran(FedCE(batch=0), task, rounds=3)
    there = ran(FedAvg(batch=0, lr=0.05), task, rounds=3)
    assert here.server.contribution == pytest.approx([1 / 3] * 3, abs=1e-6)
    assert torch.allclose(here.server.model.flat, there.server.model.flat, rtol=0, atol=1e-5)


def test_with_what_a_client_gave_the_model_without_it_is_the_model():
    made = ran(FedCE(), Toy(norm=True), rounds=2)
    share = made.server.entered
    kept = {k: made.engine.states[k]["model"] for k in range(4)}
    for k in range(4):
        u = (1 / (1 - share[k])) * (made.server.model - share[k] * kept[k])
        others = sum(share[j] * kept[j].flat for j in range(4) if j != k) / (1 - share[k])
        assert torch.allclose(u.flat, others, rtol=0, atol=1e-5), "running statistics, too"
        one = node(made.site, k, round=3)
        one.state.update(model=kept[k], scores=[0.25, 2])
        expected = one.evaluate(u, "validation")["accuracy"]
        reply = FedCE().local(one, made.server.model, share[k])
        assert reply["score"] == pytest.approx(1 - (0.25 + expected) / 3, abs=1e-9)
        assert one.state["scores"] == pytest.approx([0.25 + expected, 3], abs=1e-9)
        assert torch.equal(reply["delta"].flat, (one.state["model"] - made.server.model).flat)


def test_what_is_judged_is_the_model_without_the_client_and_not_the_model():
    made = ran(FedCE(), Toy(), rounds=2)
    one, w = node(made.site, 0, round=3), made.server.model
    one.state.update(model=7.0 * w, scores=[0.0, 1])  # what is left without it points the other way
    whole, without = (one.evaluate(judged, "validation")["accuracy"] for judged in (w, -1.0 * w))
    assert FedCE().local(one, w, 0.25)["score"] == pytest.approx(1 - without / 2)
    assert whole > without + 0.3


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_without_a_model_of_the_others_the_mean_stays(share):
    made = ran(FedCE(), Toy(), rounds=1)
    one = node(made.site, 1, round=2)
    one.state.update(model=made.server.model, scores=[0.6, 3])
    assert FedCE().local(one, made.server.model, share)["score"] == pytest.approx(0.8)
    assert one.state["scores"] == [0.6, 3]
    fresh = node(made.site, 2, round=2)
    assert FedCE().local(fresh, made.server.model, 0.3)["score"] == 1.0
    assert fresh.state["scores"] == [0.0, 1]


def test_without_validation_data_directions_alone_tell_clients_apart():
    made = ran(FedCE(batch=0, lr=0.1), Six(), rounds=3)
    assert all(state["scores"] == [0.0, 1] for state in made.engine.states.values())
    assert max(made.server.contribution) - min(made.server.contribution) > 0.01
    task, w, c, past = Six(), torch.zeros(2).double(), np.full(6, 1 / 6), np.zeros(6)
    for t in range(1, 4):
        deltas = np.stack([(-0.1 * task.gradient(k, w)).numpy() for k in range(6)])
        v = c @ deltas
        past += [cosine(deltas[k], v - c[k] * deltas[k]) for k in range(6)]
        c = floored(floored(1 - past / t) + 1 / 6)
        w = w + torch.from_numpy(c @ deltas)
    assert torch.allclose(made.server.model.flat, w, rtol=0, atol=1e-12)


def test_a_measure_that_is_no_share_gives_way_to_the_loss():
    measured = {"accuracy": 0.75, "rmse": 5.0, "loss": 3.0}
    assert quality(ACCURACY, measured) == 0.75
    assert quality(RMSE, measured) == quality(replace(ACCURACY, better="low"), measured) == 0.25
    assert quality(RMSE, {"loss": -2.0}) == 1.0


def test_clients_that_differ_do_not_count_alike_when_drawn():
    draw = stream(0, "fedce")
    deltas = torch.randn(3, 5, generator=draw).double().numpy()
    first, second = server(3), server(3)
    for made in (first, second):
        FedCE().round(made, Cohort(range(3), {k: (deltas[k], 1.0) for k in range(3)}))
    FedCE().round(second, Cohort(range(3), {k: (deltas[k], 1.0) for k in range(3)}))
    assert len(set(first.contribution)) == 3
    assert second.cosines[0][1] == 2
