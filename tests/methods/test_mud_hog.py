"""MUD-HoG: histories, what each kind of client is found to do and when, and who is averaged."""

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from problems import node, ran
from sklearn.cluster import DBSCAN

from fedloom.method import client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.robust.mud_hog import NEW, MudHog, confirmed, doubted, minority, outliers, widest_gap
from fedloom.ops.kmeans import kmeans
from fedloom.random import stream
from fedloom.tasks.toy import Toy

SIZE = 83  # numbers of the toy's network


class Peers(Toy):
    """Twelve clients of the same size."""

    def __init__(self) -> None:
        super().__init__(sizes=(12,) * 12)


@dataclass(frozen=True)
class Scripted(MudHog):
    """Updates that are drawn around one direction, whatever the data; client 0 is of some other kind."""

    odd: str = "honest"

    @client
    def local(self, client, model):
        noise = torch.randn(SIZE, generator=client.rng("noise"))
        update = 1 + 0.3 * noise
        if client.id == 0:
            update = {
                "honest": update,
                "flip": -update,
                "noise": update + 30 * noise,
                "targeted": update + 5 * (torch.arange(SIZE) < 8),
            }[self.odd]
        return {"delta": 0.01 * (model.zeros_like() + 1).map(lambda ones: ones * update)}


def kind(made, k=0):
    return made.server.record.get(k, NEW)[2]


class Many(Toy):
    """Sixteen clients of the same size."""

    def __init__(self) -> None:
        super().__init__(sizes=(8,) * 16)


@dataclass(frozen=True)
class Mixed(MudHog):
    """Clients of every kind, some of which change: see `sent`."""

    @client
    def local(self, client, model):
        noise = torch.randn(SIZE, generator=client.rng("noise"))
        update = sent(client.id, client.round, noise)
        return {"delta": model.zeros_like().map(lambda zeros: zeros + update)}


def sent(k, round, noise):
    """What client k of `Mixed` sends in a round."""
    update, early = 1 + 0.3 * noise, round < 8
    flips = k in (0, 1) or (k == 2 and early) or (k == 7 and not early)
    noisy = k == 3 or (k == 4 and round % 3) or (k == 10 and early)
    if k in (5, 6):
        update = update + 6 * (torch.arange(SIZE) < 8)
    if k == 9:
        update = update * torch.linspace(-1, 4, SIZE)
    if 11 <= k <= 13:
        update = update + 4 * (torch.arange(SIZE) > SIZE - 12)  # a group of its own, and no outliers
    return 0.01 * ((-update if flips else update) + (3 * noise if noisy else 0))


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def cut_of(values):
    """The middle of the widest gap among some numbers, 0 without one."""
    values, best = sorted(values), (0.0, 0.0)
    for a, b in itertools.pairwise(values):
        best = max(best, (b - a, (a + b) / 2), key=lambda pair: pair[0])
    return best[1]


class Ledger:
    """The paper's server in numpy: what it knows of every client, and the global model."""

    def __init__(self, method, w):
        self.method, self.w = method, w
        self.sent = defaultdict(list)
        self.found, self.doubts, self.kind, self.unreliable = Counter(), Counter(), {}, set()
        self.weights = {}

    def record(self, k):
        return self.found[k], self.doubts[k], self.kind.get(k, ""), k in self.unreliable

    def step(self, round, cohort, up):
        for k in cohort:
            self.sent[k].append(up[k])
        self.weights = dict.fromkeys(cohort, 1.0)
        if round > self.method.start:
            self.judge(round, cohort)
        total = sum(self.weights.values())
        if total:
            self.w = self.w + sum(self.weights[k] / total * up[k] for k in cohort)

    def judge(self, round, cohort):
        method, kind = self.method, self.kind
        short = {k: np.mean(self.sent[k][-method.short :], axis=0) for k in cohort}
        long = {k: np.sum(self.sent[k], axis=0) for k in cohort}
        direction = np.median([short[k] for k in cohort if k not in kind], axis=0)
        flips = {k for k in cohort if cosine(short[k], direction) < 0}
        rest = [k for k in cohort if k not in flips and kind.get(k) != "sign_flip"]
        noisy = self.noisy(rest, short)
        rest = [k for k in rest if k not in noisy and kind.get(k) != "untargeted"]
        points = torch.tensor(np.stack([long[k] for k in rest]))
        parts = kmeans(points, 2, stream(0, "server", "train", round, "clusters", 0)).tolist()
        lesser = 0 if parts.count(1) > parts.count(0) else 1
        targeted = {k for k, part in zip(rest, parts, strict=True) if part == lesser}
        for k in cohort:
            name = {k in flips: "sign_flip", k in noisy: "untargeted", k in targeted: "targeted"}.get(True, "")
            self.confirm(k, name)
        rest = [k for k in cohort if k not in kind and k not in flips]
        direction = np.median([short[k] for k in rest], axis=0)
        angles = {k: cosine(short[k], direction) for k in rest}
        for k in cohort:
            if k in angles and angles[k] < cut_of(angles.values()):
                self.doubts[k] += 1
                if self.doubts[k] > method.delay:
                    self.unreliable.add(k)
            else:
                if not self.doubts[k]:
                    self.unreliable.discard(k)
                self.doubts[k] = max(self.doubts[k] - 1, 0)
            out = k in kind or k in noisy or k in targeted
            self.weights[k] = 0.0 if out else method.unreliable_weight if k in self.unreliable else 1.0

    def noisy(self, rest, short):
        rows = np.stack([short[k] for k in rest])
        apart = np.linalg.norm(rows[:, None] - rows, axis=2)
        some = np.sort(apart[apart > 0])
        eps = self.method.eps or some[(len(some) - 1) // 2] * (1 + 1e-6)
        labels = DBSCAN(eps=eps, min_samples=self.method.neighbours).fit_predict(rows)
        sizes = Counter(label for label in labels.tolist() if label >= 0)
        if not sizes:
            return set()
        largest = min(sizes, key=lambda label: (-sizes[label], label))
        centre = np.median(rows[labels == largest], axis=0)
        away = {
            k: np.linalg.norm(row - centre)
            for k, row, label in zip(rest, rows, labels, strict=True)
            if label != largest
        }
        cut = cut_of(away.values())
        return {k for k, label in zip(rest, labels, strict=True) if label == -1 and away[k] > cut}

    def confirm(self, k, name):
        delay = self.method.delay
        if name:
            self.found[k] += 1
            if self.found[k] >= (2 * delay if name == "targeted" else delay):
                self.kind[k] = name
        elif not self.found[k]:
            self.kind.pop(k, None)
        else:
            self.found[k] = 0
            if self.kind.get(k) == "untargeted":
                self.doubts[k] += 1
                if self.doubts[k] >= delay:
                    del self.kind[k]
                    self.unreliable.add(k)


@pytest.mark.parametrize("cohort", [None, 13])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"short": 1},
        {"short": 5, "start": 1},
        {"delay": 1},
        {"neighbours": 2, "unreliable_weight": 0.25},
        {"eps": 0.035},
        {"eps": 0.03, "neighbours": 3},
    ],
    ids=str,
)
def test_rounds_by_hand(fields, cohort):
    rounds, method = 14, Mixed(**fields)
    made = ran(method, Many(), rounds=rounds, cohort=cohort)
    hand = Ledger(method, made.site.initial.flat.double().numpy())
    for round in range(1, rounds + 1):
        asked = made.world.choose(round)
        up = {}
        for k in asked:
            noise = torch.randn(SIZE, generator=node(made.site, k, round).rng("noise"))
            up[k] = sent(k, round, noise).double().numpy()
        hand.step(round, asked, up)
    assert {k: tuple(record) for k, record in made.server.record.items()} == {
        k: hand.record(k) for k in made.server.record
    }
    assert made.server.flagged == [k for k, weight in hand.weights.items() if not weight]
    assert np.allclose(made.server.model.flat.numpy(), hand.w, rtol=0, atol=1e-5)


def test_the_first_rounds_are_federated_averaging_with_equal_weights():
    @dataclass(frozen=True)
    class Equal(FedAvg):
        @client
        def local(self, client, model):
            return {"delta": FedAvg.local(self, client, model)["delta"], "n": 1}

    made, plain, later = (ran(m(), Toy(), rounds=r) for m, r in ((MudHog, 3), (Equal, 3), (MudHog, 4)))
    assert torch.equal(made.server.model.flat, plain.server.model.flat)
    assert made.server.record == {} and later.server.record != {}


def test_equal_updates_make_a_long_history_of_their_sum_and_a_short_one_of_their_mean():
    @dataclass(frozen=True)
    class Constant(MudHog):
        @client
        def local(self, client, model):
            return {"delta": model.zeros_like() + 0.25 * (client.id + 1)}

    made = ran(Constant(), Toy(), rounds=5)
    for k, (long, recent) in made.server.history.items():
        update = 0.25 * (k + 1)
        assert torch.equal(long.flat, torch.full((SIZE,), 5 * update))
        assert len(recent) == 3 and all(torch.equal(v.flat, torch.full((SIZE,), update)) for v in recent)


def test_a_sign_flipper_is_found_in_the_first_round_after_the_grace_and_out_from_the_next():
    before, found, out, later = (ran(Scripted(odd="flip"), Peers(), rounds=r) for r in (3, 4, 5, 9))
    assert before.server.record == {}
    assert found.server.record[0][0] == 1 and kind(found) == ""
    assert kind(out) == kind(later) == "sign_flip"
    # Found, it is still averaged; confirmed, it is not: the mean of an honest coordinate is near 0.01.
    step = [now.server.model.flat - then.server.model.flat for then, now in ((before, found), (found, out))]
    assert kind(out, 1) == ""
    assert step[1].mean() > step[0].mean() + 0.0005


def test_a_noisy_client_is_found_untargeted_from_the_second_judgement():
    assert kind(ran(Scripted(odd="noise"), Peers(), rounds=4)) == ""
    assert kind(ran(Scripted(odd="noise"), Peers(), rounds=5)) == "untargeted"


def test_who_is_found_only_once_is_left_out_of_that_round_and_never_counts_as_malicious():
    made, method = ran(MudHog(), Peers(), rounds=3), MudHog()
    short = 1 + 0.1 * torch.randn(12, SIZE, generator=stream(0, "test"))
    erring = short.clone()
    erring[4] += 5 * torch.randn(SIZE, generator=stream(1, "test"))
    weights = [method.weigh(made.server, list(range(12)), torch.ones(12, 3), rows) for rows in (erring, short, short)]
    assert weights[0].tolist() == [float(k != 4) for k in range(12)]
    assert weights[2].tolist() == [1.0] * 12
    assert made.server.record[4][0] == 0 and kind(made, 4) == ""


def test_a_targeted_client_takes_four_rounds():
    rounds = {r: kind(ran(Scripted(odd="targeted", eps=1.0), Peers(), rounds=r)) for r in (6, 7, 8)}
    assert rounds == {6: "", 7: "targeted", 8: "targeted"}


@pytest.mark.parametrize(
    ("findings", "record"),
    [
        (["sign_flip"], (1, 0, "", False)),
        (["sign_flip"] * 2, (2, 0, "sign_flip", False)),
        (["targeted"] * 3, (3, 0, "", False)),
        (["targeted"] * 4, (4, 0, "targeted", False)),
        (["sign_flip"] * 2 + [""], (0, 0, "sign_flip", False)),
        (["sign_flip"] * 2 + ["", ""], NEW),
        (["untargeted"] * 2 + [""], (0, 1, "untargeted", False)),
        (["untargeted"] * 2 + ["", "untargeted", ""], (0, 2, "", True)),
    ],
)
def test_a_record_of_findings(findings, record):
    made = NEW
    for finding in findings:
        made = confirmed(made, finding, delay=2)
    assert made == record


def test_doubts_come_and_go():
    record = NEW
    seen = []
    for low in (True, True, True, False, False, False, False):
        record = doubted(record, low, delay=2)
        seen.append((record[1], record[3]))
    assert seen == [(1, False), (2, False), (3, True), (2, True), (1, True), (0, True), (0, False)]


def test_the_widest_gap_parts_numbers_in_two():
    assert widest_gap([5.0, 1.0, 1.5, 9.5, 5.5]) == 7.5
    assert widest_gap([1.0, 4.0]) == 2.5
    assert widest_gap([3.0]) == widest_gap([]) == widest_gap([2.0, 2.0]) == 0.0


def test_outliers_lie_outside_the_largest_cluster_and_beyond_the_gap():
    rows = torch.randn(20, 50, generator=stream(0, "test"))
    assert outliers(rows, eps=100.0, neighbours=5) == []
    rows[3] *= 10
    rows[17] += 40
    assert outliers(rows, eps=14.0, neighbours=5) == [17], "the nearer one is perhaps only unreliable"
    assert outliers(rows, eps=1e-3, neighbours=5) == [], "without a cluster nothing is normal"
    assert outliers(rows[:0], None, 5) == outliers(rows[:1], None, 5) == []


def test_the_minority_is_the_smaller_cluster():
    rows = torch.randn(10, 20, generator=stream(0, "test"))
    rows[[2, 5, 7]] += 8
    assert minority(rows, stream(1, "test")) == [2, 5, 7]
    assert minority(torch.ones(5, 3), stream(1, "test")) == minority(rows[:2], stream(1, "test")) == []


def test_unreliable_clients_may_weigh_less():
    made = ran(Scripted(), Peers(), rounds=3)
    made.server.record = {k: (0, 5, "", k == 2) for k in range(12)}
    made.server.begin("train", 4)
    rows = 1 + 0.1 * torch.randn(12, SIZE, generator=stream(0, "test"))
    rows[2] = -0.0 + rows[2] * torch.linspace(0, 3, SIZE)  # another direction, not the opposite
    plain = MudHog(unreliable_weight=1.0, eps=1e6).weigh(made.server, list(range(12)), torch.ones(12, 3), rows)
    made.server.record = {k: (0, 5, "", k == 2) for k in range(12)}
    soft = MudHog(unreliable_weight=0.25, eps=1e6).weigh(made.server, list(range(12)), torch.ones(12, 3), rows)
    assert plain.tolist() == [1.0] * 12
    assert soft.tolist() == [0.25 if k == 2 else 1.0 for k in range(12)]


def test_it_learns_where_three_of_twelve_clients_send_the_opposite():
    @dataclass(frozen=True)
    class Opposed(MudHog):
        @client
        def local(self, client, model):
            delta = MudHog.local(self, client, model)["delta"]
            return {"delta": -4 * delta if client.id < 3 else delta}

    @dataclass(frozen=True)
    class Trusting(FedAvg):
        @client
        def local(self, client, model):
            return Opposed.local(Opposed(), client, model) | {"n": 1}

    task = Toy(sizes=(30,) * 12)
    guarded, trusting = (ran(m(), task, rounds=20).record.final["global_test_accuracy"] for m in (Opposed, Trusting))
    assert guarded > 0.8 > trusting


def test_signs_are_compared_with_those_of_who_is_no_confirmed_attacker():
    # Among the honest the median is (1, 1), 84 degrees from the last one's; among all it were (0.1, 1), 126 degrees.
    honest = [(0.1, 1.0)] * 2 + [(1.0, 1.0)] * 4 + [(1.0, -0.9)]
    made = ran(MudHog(), Toy(), rounds=1)
    made.server.record = dict.fromkeys(range(7, 12), (2, 0, "sign_flip", False))
    short = torch.tensor(honest + [(-5.0, 1.0)] * 5)
    MudHog(eps=1e6).weigh(made.server, list(range(12)), torch.ones(12, 3), short)
    assert [made.server.record[k][0] for k in range(12)] == [0] * 7 + [3] * 5
