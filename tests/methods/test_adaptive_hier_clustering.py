"""Adaptive hierarchical clustering: three stages, clusters by Ward's heights, and meta steps inside them."""

import copy

import pytest
import torch

from fedloom.errors import UsageError
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.personalize.adaptive_hier_clustering import AdaptiveHierClustering, dissolved, in_turn
from fedloom.node import Client
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.tasks.toy import Toy
from fedloom.vector import Vector

EVEN = (20, 20, 20, 20)
UNEVEN = (30, 20, 25, 35)


def begun(method, task=None, **settings):
    spec = Spec.of({"method": method.to_spec(), "partition": "given", "rounds": 5, **settings})
    return Experiment(spec, task or Toy(sizes=EVEN), method).begin(None)


def ran(method, task=None, **settings):
    made = begun(method, task, **settings)
    made.go()
    return made


def plain(**fields):
    """With steps as FedAvg has them: of 20 samples, in batches of 10, two an epoch."""
    same = {"lr": 0.1, "inner_lr": 0.1, "cluster_epochs": 1, "inner_steps": 2, "meta_batch": 0, "eps_end": 1.0}
    return AdaptiveHierClustering(**(same | fields))


def groups(made):
    """The cluster of each client; -1: none."""
    return [made.server.group.get(k, -1) for k in range(4)]


def close(one, other, atol=1e-6):
    torch.testing.assert_close(one.flat, other.flat, rtol=0, atol=atol)


@pytest.mark.parametrize("feature", ["update", "model", "distance"])
def test_one_cluster_with_whole_steps_is_fedavg(feature):
    made, fedavg = ran(plain(cut=1.0, feature=feature)), ran(FedAvg(lr=0.1))
    assert list(made.server.models) == [0] and groups(made) == [0] * 4
    close(made.server.models[0], fedavg.server.model)
    assert [row["server/clusters"] for row in made.record.metrics if "server/clusters" in row] == [1.0]


def test_stages_and_who_is_asked():
    made = ran(plain(warm=0.4), cohort=2)
    assert [row["cohort"] for row in made.record.metrics] == [2, 2, 4, 4, 4]
    asked = [(line["round"], line["function"]) for line in made.record.ledger if line["kind"] == "train"]
    assert {*asked} == {(1, "local"), (2, "local"), (3, "settle"), (4, "adapt"), (5, "adapt")}
    for rounds, warm in ((1, 0), (2, 0), (3, 1), (10, 4)):
        method = plain(warm=0.4)
        found = method.phases(begun(method, rounds=rounds).server)
        assert found == [("warm", warm), ("cluster", 1), ("meta", None)]
    assert plain(warm=0.9).phases(begun(plain(), rounds=10).server)[0] == ("warm", 8), "two rounds are left"


def test_clusters_of_one_client_train_alone():
    method = plain(cut=0.0, warm=0.2)
    made = ran(method)
    assert groups(made) == [0, 1, 2, 3]
    w = {k: ran(FedAvg(lr=0.1), rounds=1).server.model for k in range(4)}
    for round, nth in ((2, 0), (3, 0), (4, 0), (5, 0)):
        for k in range(4):
            w[k], _ = Client(made.site, k, {}, "train", round, nth).descend(w[k], lr=0.1, epochs=1, batch=10)
    for k in range(4):
        close(made.server.models[k], w[k])


def test_a_meta_step_is_eps_times_the_mean_by_samples_and_eps_falls():
    method = plain(cut=1.0, warm=0.4, eps=0.8, eps_end=0.2, inner_steps=3)
    made, models = begun(method, Toy(sizes=UNEVEN), rounds=6), []
    made.go(lambda row: models.append(made.server.models.get(0)))
    # 6 rounds: 2, 1, and 3 meta steps with 0.8, 0.6, 0.4.
    assert models[1] is None
    for round, eps in ((4, 0.8), (5, 0.6), (6, 0.4)):
        before, total = models[round - 2], 0.0
        for k, n in enumerate(UNEVEN):
            w, _ = Client(made.site, k, {}, "train", round, 0).descend(before, lr=0.1, steps=3, batch=10)
            total = total + n / sum(UNEVEN) * (w - before).flat.double()
        torch.testing.assert_close(models[round - 1].flat.double(), before.flat + eps * total, rtol=0, atol=1e-6)


def test_the_model_of_a_cluster_begins_as_the_mean_of_its_members_by_samples():
    method = plain(cut=0.7, warm=0.2, cluster_epochs=2)
    made = ran(method, Toy(sizes=UNEVEN), rounds=2)
    group, start = made.server.group, ran(FedAvg(lr=0.1), Toy(sizes=UNEVEN), rounds=1).server.model
    start = made.site.initial if made.method.phases(made.server)[0][1] == 0 else start
    reached = [Client(made.site, k, {}, "train", 1, 0).descend(start, lr=0.1, epochs=2, batch=10)[0] for k in range(4)]
    alone = begun(method, Toy(sizes=UNEVEN), rounds=2)
    first = []
    alone.go(lambda row: first.append(dict(alone.server.models)))
    for c, model in first[0].items():
        members = [k for k in range(4) if group[k] == c]
        n = sum(UNEVEN[k] for k in members)
        expected = sum(UNEVEN[k] / n * reached[k].flat.double() for k in members)
        torch.testing.assert_close(model.flat.double(), expected, rtol=0, atol=1e-6)
    assert 1 < len(first[0]) < 4, "some clients are together, and some are not"


class Pairs(Toy):
    """Clients 0 and 1 know of two classes, clients 2 and 3 call them by each other's names."""

    def __init__(self, **shape):
        super().__init__(sizes=EVEN, **shape)
        self.y = self.y.clone()
        for k in (2, 3):
            here = slice(self.spans[k], self.spans[k + 1])
            self.y[here] = 2 - self.y[here]


@pytest.mark.parametrize("feature", ["update", "model"])
def test_clients_that_learn_alike_are_together(feature):
    made = ran(plain(feature=feature, cluster_epochs=5, cut=0.7), Pairs())
    assert groups(made) == [0, 0, 2, 2]


def test_the_number_of_clusters_falls_with_the_height():
    def number(**cutting):
        return len(ran(plain(warm=0.0, **cutting), Toy(sizes=(12, 9, 15, 10, 13, 11, 8)), rounds=1).server.models)

    counts = [number(cut=share) for share in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert counts == sorted(counts, reverse=True) and counts[0] == 7 and counts[-1] == 1
    heights = [number(height=h) for h in (1e-6, 0.2, 1.0, 100.0)]
    assert heights == sorted(heights, reverse=True) and heights[0] == 7 and heights[-1] == 1


class Changing(Pairs):
    """The labels of client 0 are others from the fourth round on."""

    def at(self, round):
        if round < 4:
            return self
        later = copy.copy(self)
        later.y = self.y.clone()
        later.y[self.spans[0] : self.spans[1]] = 1
        return later


def test_what_one_cluster_has_leaves_another_bitwise_as_it_was():
    method = plain(cluster_epochs=5)
    one, other = ran(method, Pairs()), ran(method, Changing())
    assert groups(one) == groups(other) == [0, 0, 2, 2]
    assert torch.equal(one.server.models[2].flat, other.server.models[2].flat)
    assert not torch.equal(one.server.models[0].flat, other.server.models[0].flat)


def test_members_take_turns():
    assert [in_turn([3, 5, 8], 2, turn) for turn in range(4)] == [[3, 5], [8, 3], [5, 8], [3, 5]]
    assert in_turn([3, 5, 8], 0, 4) == [3, 5, 8] and in_turn([3, 5], 5, 1) in ([3, 5], [5, 3])
    made = ran(plain(cut=1.0, meta_batch=1, warm=0.0))
    asked = {line["round"]: line["clients"] for line in made.record.ledger if line["function"] == "adapt"}
    assert [list(asked[round]) for round in (2, 3, 4, 5)] == [[0], [1], [2], [3]]


def test_small_clusters_go_to_the_nearest_in_distance():
    far = [1.0, 1.1, 5.0, 4.0, 0.9]
    assert dissolved([0, 0, 2, 2, 4], far, 1) == [0, 0, 2, 2, 4]
    assert dissolved([0, 0, 2, 2, 4], far, 2) == [0, 0, 2, 2, 0]
    assert dissolved([0, 0, 2, 0, 4], [1.0, 1.1, 4.1, 4.0, 0.9], 2) == [0] * 5
    assert dissolved([0, 1, 2], [1.0, 2.0, 3.0], 2) == [0, 1, 2], "there is none to go to"


def test_running_statistics_of_clusters_stay_in_meta_steps():
    method = plain(cut=1.0, warm=0.0)
    made, models = begun(method, Toy(sizes=EVEN, norm=True)), []
    made.go(lambda row: models.append(made.server.models[0]))
    for model in models[1:]:
        assert torch.equal(model.buffers.flat, models[0].buffers.flat)
        assert not torch.equal(model.params.flat, models[0].params.flat)


def test_who_is_judged_adapts_first_and_leaves_no_trace():
    method = plain(adapt_steps=4)
    made = ran(method)
    client = Client(made.site, 2, {}, "evaluate", 5, 0)
    model = made.server.models[made.server.group[2]]
    assert torch.equal(plain(adapt_steps=0).predict(client, model).flat, model.flat)
    judged = method.predict(Client(made.site, 2, {}, "evaluate", 5, 0), model)
    w, steps = Client(made.site, 2, {}, "evaluate", 5, 0).descend(model, lr=0.1, steps=4, batch=10)
    assert torch.equal(judged.flat, w.flat) and steps == 4
    sent = method.predict_message(made.server, made.everybody)["model"]
    assert {k: torch.equal(sent[k].flat, model.flat) for k in (2,)} == {2: True}
    fixed = ran(plain(adapt_steps=0))
    assert {c: w.flat.tolist() for c, w in fixed.server.models.items()} == {
        c: w.flat.tolist() for c, w in made.server.models.items()
    }


def test_who_was_not_heard_has_no_cluster_and_is_judged_with_the_common_model():
    made = ran(plain(cut=0.0, warm=0.2), lost=0.4)
    unheard = [k for k in range(4) if groups(made)[k] < 0]
    assert unheard and len(unheard) < 4
    sent = made.method.predict_message(made.server, made.everybody)["model"]
    for k in range(4):
        model = made.server.model if k in unheard else made.server.models[made.server.group[k]]
        assert torch.equal(sent[k].flat, model.flat)
    asked = {k for line in made.record.ledger if line["function"] == "adapt" for k in line["clients"]}
    assert asked.isdisjoint(unheard)


def test_settings_that_it_cannot_bear_are_refused_before_the_first_round():
    with pytest.raises(UsageError, match="asks for each reply of settle by call"):
        begun(plain(), rounds=30, secure="bonawitz")
    with pytest.raises(UsageError, match="takes a mean a group"):
        begun(plain(), rounds=30, dp="client:noise=1,epsilon=100")
    assert isinstance(ran(plain(), rounds=1).server.models[0], Vector)
