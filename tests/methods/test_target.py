"""TARGET: what is invented from the old model, and what keeps the old classes in the new one."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from problems import network, node, ran
from torch import nn
from torch.nn import functional as F

import fedloom
from fedloom import tasks
from fedloom.errors import UsageError
from fedloom.methods.continual import target as module
from fedloom.methods.continual.target import TARGET, learned, taught
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.node import Server
from fedloom.ops.inversion import Remembered, sought
from fedloom.runs.continual import continual
from fedloom.runs.spec import Spec
from fedloom.task import Batch
from fedloom.tasks.stream import SixClouds, Stream
from fedloom.tasks.toy import Toy
from fedloom.world import World

TOY = Stream(SixClouds(Toy()), 2, 2, known=False)
QUICK = {"turns": 6, "warmup": 2, "gen_batch": 16, "kd_steps": 3}


@dataclass(frozen=True)
class Alike(FedAvg):
    """FedAvg in which all clients count alike."""

    def round(self, server, cohort):
        server.model = server.model + cohort.mean(self.local, model=server.model).delta


def test_the_first_task_is_averaging_bitwise():
    one, plain = (ran(method, TOY, 2) for method in (TARGET(), Alike()))
    assert torch.equal(one.server.model.flat, plain.server.model.flat)
    assert one.server.old is None and one.server.invented is None
    later = [ran(method, TOY, 3).server.model.flat for method in (TARGET(**QUICK), Alike())]
    assert not torch.equal(*later)


@pytest.mark.parametrize("known", [True, False])
def test_without_distillation_new_classes_are_learned_among_themselves(known):
    """Which is all that averaging does where a sample's task is told, and is not where it is not."""
    task = Stream(SixClouds(Toy()), 2, 2, known=known)
    one, plain = (ran(method, task, 4) for method in (TARGET(kd=0), Alike()))
    assert torch.equal(one.server.model.flat, plain.server.model.flat) == known
    assert one.server.invented is None
    before = ran(TARGET(kd=0), task, 2).server.model["head.weight"]
    moved = (one.server.model["head.weight"] != before).any(1)
    assert torch.equal(moved, ~task.at(1).seen), "old rows of the head stand still"


def test_the_loss_by_hand():
    draw = torch.Generator().manual_seed(0)
    x, u = torch.randn(5, 4, generator=draw), torch.randn(7, 4, generator=draw)
    net = nn.Linear(4, 6)
    old, new = torch.tensor([1, 0, 1, 0, 0, 1]).bool(), torch.tensor([0, 1, 0, 0, 1, 0]).bool()
    y = torch.tensor([1, 4, 4, 1, 1])
    answers = torch.rand(7, 3, generator=draw).softmax(1)
    found = learned(net, Batch(x, y), new, old, u, answers, 3.0)
    scores, at_u = net(x).detach().double().numpy(), net(u).detach().double().numpy()
    among_new = scores[:, [1, 4]]
    ce = np.log(np.exp(among_new).sum(1)) - among_new[np.arange(5), (y == 4).long().numpy()]
    among_old = at_u[:, [0, 2, 5]] / 2
    told = among_old - np.log(np.exp(among_old).sum(1, keepdims=True))
    kd = -(answers.double().numpy() * told).sum(1)
    assert found.item() == pytest.approx(ce.mean() + 3.0 * kd.mean(), rel=1e-5)
    assert learned(net, Batch(x, y), new).item() == pytest.approx(ce.mean(), rel=1e-5)


def test_a_model_that_is_the_old_one_has_nothing_to_distill():
    net, u = nn.Linear(4, 6), torch.randn(7, 4)
    old = torch.tensor([1, 0, 1, 0, 0, 1]).bool()
    told = (net(u)[:, old] / 2).softmax(1).detach()
    batch = Batch(torch.randn(3, 4), torch.tensor([1, 4, 1]))
    learned(net, batch, ~old, old, u, told, 25.0).backward()
    assert (net.weight.grad[old].abs() < 1e-5).all() and (net.weight.grad[[1, 4]].abs() > 1e-3).any()


def begun(rounds: int = 2, **fields):
    """A server in the first round of the second task, with the model that the first has left."""
    made = ran(TARGET(**fields), TOY, rounds)
    made.server.begin("train", 3)
    return made


@pytest.mark.parametrize("beside", [1, 3])
def test_a_client_by_hand(beside):
    method = TARGET(lr=0.1, epochs=2, batch=7, kd=4.0, beside=beside)
    made = begun()
    model, old = made.server.model + 0.1 * made.site.initial, made.server.model
    invented = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    delta = method.local(node(made.site, 1, round=3), model, old, invented)["delta"]
    task, twin = TOY.at(3), node(made.site, 1, round=3)
    net, teacher = network(task, model), network(task, old).eval()
    draw, before = twin.rng("beside"), torch.tensor([1, 2, 4])
    assert torch.equal(task.old.nonzero().flatten(), before)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    seen = []
    for x, y in list(twin.batches(7, 2)):
        places = torch.randint(9, (beside * len(y),), generator=draw)
        seen += places.tolist()
        soft = (teacher(invented[places]).detach()[:, before] / 2).softmax(1)
        mask = torch.zeros(6).index_fill(0, before, float("-inf"))
        kd = -(soft * (net(invented[places])[:, before] / 2).log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        (F.cross_entropy(net(x) + mask, y) + 4.0 * kd).backward()
        optimizer.step()
    assert len({*seen}) > 3
    for name in delta:
        torch.testing.assert_close((model + delta)[name], net.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_old_model_and_inputs_are_of_the_end_of_the_last_task_and_stay():
    end, *later = (ran(TARGET(**QUICK), TOY, rounds) for rounds in (2, 3, 4))
    for made in later:
        assert torch.equal(made.server.old.flat, end.server.model.flat)
        assert made.server.kept == 1 and made.server.invented.shape == (6 * 16, 6)
    assert torch.equal(later[0].server.invented, later[1].server.invented)
    three = Stream(SixClouds(Toy()), 3, 1, known=False)
    second, third = (ran(TARGET(**QUICK), three, rounds) for rounds in (2, 3))
    assert torch.equal(third.server.old.flat, second.server.model.flat) and third.server.kept == 2


def test_a_task_whose_first_round_nobody_hears_is_invented_again(monkeypatch):
    silent = World.loses
    monkeypatch.setattr(World, "loses", lambda self, round, nth, k: round == 3 or silent(self, round, nth, k))
    lost, on = (ran(TARGET(**QUICK), TOY, rounds, lost=1e-9).server for rounds in (3, 4))
    assert lost.kept == 0 and lost.old is None and on.kept == 1
    assert torch.equal(on.old.flat, lost.model.flat)


def test_a_task_costs_its_inputs_and_one_model_once_and_no_sample_leaves():
    made = ran(TARGET(**QUICK), TOY, 4)
    down = {}
    for line in made.record.ledger:
        if line["kind"] == "train" and line["direction"] == "down":
            down.setdefault(line["field"].partition(".")[0], {})[line["round"]] = line["bytes"]
    assert set(down["invented"]) == set(down["old"]) == {3}
    assert 6 * 16 * 6 * 4 <= down["invented"][3] < 6 * 16 * 6 * 4 + 100
    assert down["old"][3] >= down["model"][3] - 20 and down["_once"][4] < 120
    up = {line["field"] for line in made.record.ledger if line["direction"] == "up" and line["kind"] == "train"}
    assert up == {"delta", "envelope"} or up == {"delta"}
    real = torch.cat([TOY.at(round).data(k, "train").x for round in (1, 3) for k in range(4)])
    assert torch.cdist(made.server.invented, real).min() > 1e-3


def shaped(**given):
    """What `turn` has sought: its loss as a function of inputs, for nets and numbers that are given."""
    found = {}

    def keep(make, meta, z, loss, steps, lr, noise_lr):
        found.update(loss=loss, z=z, rates=(steps, lr, noise_lr))
        return torch.zeros(len(z), 6), [0.0]

    made = begun()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sought", keep)
        patch.setattr(module, "weak", lambda x, draw: x)
        teacher, rival = given["teacher"], given.get("rival")
        remembered = Remembered(teacher, 0.9)
        draw = torch.Generator().manual_seed(5)
        method = TARGET(gen_batch=40, gen_steps=4, **given.get("fields", {}))
        _, found["y"] = method.turn(made.server, None, None, teacher, rival, remembered, draw)
        x = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
        found["value"] = found["loss"](x).item()
        found["x"] = x
    return found


def test_what_is_sought_by_hand():
    teacher = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6)).eval()
    teacher[0].running_mean.uniform_()
    teacher[0].running_var.uniform_(1, 2)
    rival = nn.Linear(6, 6)
    plain = shaped(teacher=teacher, fields={"bn": 2.0, "oh": 3.0})
    x, y = plain["x"], plain["y"]
    assert set(y.tolist()) == {1, 2, 4} and max(torch.bincount(y)) < 22, "drawn alike from the old classes"
    scores = teacher(x)
    gap = (x.mean(0) - teacher[0].running_mean).norm() + (x.var(0, unbiased=False) - teacher[0].running_var).norm()
    expected = 2.0 * gap + 3.0 * F.cross_entropy(scores, y)
    assert plain["value"] == pytest.approx(expected.item(), rel=1e-5)
    assert plain["rates"] == (4, 2e-3, 0.01) and plain["z"].shape == (40, 64)
    against = shaped(teacher=teacher, rival=rival, fields={"bn": 2.0, "oh": 3.0, "adv": 5.0})
    p, q = scores.softmax(1), rival(x).softmax(1)
    apart = (p * (p / q).log()).sum(1)
    agree = scores.argmax(1) == rival(x).argmax(1)
    assert 0 < agree.sum() < 40
    assert against["value"] == pytest.approx((expected - 5.0 * (apart * agree).mean()).item(), rel=1e-4)


class Shift(nn.Module):
    """A generator of one parameter vector: z + w."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))

    def forward(self, z):
        return z + self.w


@pytest.mark.parametrize("last", [1.0, 30.0])
def test_a_search_by_hand(last):
    make, z = Shift(), torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, -1.0]])
    meta = torch.optim.SGD(make.parameters(), lr=0.1)
    goal = torch.tensor([0.3, 0.3, 0.3])
    given = 1.0, 1.0, 40.0, last  # the third look is a bad one
    weights = iter(given)

    def loss(x):
        return next(weights) * (x - goal).square().mean()

    best, losses = sought(make, meta, z, loss, 4, 0.05, 0.2)
    w, own = torch.zeros(3, requires_grad=True), z.clone().requires_grad_()
    adam = torch.optim.Adam([{"params": [w]}, {"params": [own], "lr": 0.2}], 0.05, betas=(0.5, 0.999))
    seen, total = [], torch.zeros(3)
    for weight in given:
        x = own + w
        value = weight * (x - goal).square().mean()
        adam.zero_grad()
        value.backward()
        total += w.grad
        seen.append((value.item(), x.detach().clone()))
        adam.step()
    assert losses == pytest.approx([value for value, _ in seen]) and losses[2] > losses[0]
    assert losses[1] < losses[0] and (losses[3] < losses[1]) == (last == 1.0)
    torch.testing.assert_close(best, seen[3 if last == 1.0 else 1][1])
    torch.testing.assert_close(make.w.detach(), -0.1 * total)
    assert torch.equal(z[0], torch.tensor([1.0, -2.0, 0.5])), "what is given stays"


@pytest.mark.parametrize("shape", [(8, 4), (8, 4, 5), (8, 4, 3, 3)])
def test_how_far_a_batch_is_from_what_is_remembered(shape):
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](4).eval()
    norm.running_mean.uniform_()
    norm.running_var.uniform_(0.5, 2)
    net = nn.Sequential(nn.Identity(), norm)
    remembered = Remembered(net, 0.75)
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=draw, requires_grad=True) for _ in range(2))
    over = [axis for axis in range(len(shape)) if axis != 1]

    def gap(mean, var):
        return ((mean - norm.running_mean).norm() + (var - norm.running_var).norm()).item()

    stats = [(one.mean(over), one.var(over, unbiased=False)) for one in (x, y)]
    net(x)
    assert remembered.distance().item() == pytest.approx(gap(*stats[0]), rel=1e-5)
    remembered.take()
    net(y)
    mixed = [0.75 * a + 0.25 * b for a, b in zip(*stats, strict=True)]
    assert remembered.distance().item() == pytest.approx(gap(*mixed), rel=1e-5)
    remembered.distance().backward()
    assert y.grad.abs().sum() > 0 and x.grad is None
    remembered.take()
    net(x)
    smoothed = [0.75 * a + 0.25 * b for a, b in zip(mixed, stats[0], strict=True)]
    assert remembered.distance().item() == pytest.approx(gap(*smoothed), rel=1e-5)
    bare = nn.Linear(3, 3)
    alone = Remembered(bare)
    bare(torch.randn(2, 3))
    assert alone.distance() == 0.0


def test_the_student_is_taught_at_a_temperature_of_twenty():
    net, x = nn.Linear(4, 3), torch.randn(6, 4)
    scores = torch.randn(6, 3)
    p, q = (scores / 20).softmax(1), (net(x) / 20).softmax(1)
    by_hand = 400 * (p * (p / q).log()).sum(1).mean()
    assert taught(net, Batch(x, scores)).item() == pytest.approx(by_hand.item(), rel=1e-3)


def test_there_is_a_student_after_the_warmup_who_learns_from_all_that_was_kept(monkeypatch):
    rivals, lessons = [], []
    plain, descend = TARGET.turn, Server.descend

    def turn(self, server, make, meta, teacher, rival, remembered, draw):
        rivals.append(None if rival is None else torch.cat([p.flatten() for p in rival.parameters()]))
        return plain(self, server, make, meta, teacher, rival, remembered, draw)

    def noted(self, w, *args, **kwargs):
        lessons.append((len(kwargs["data"]), kwargs["steps"], w))
        return descend(self, w, *args, **kwargs)

    monkeypatch.setattr(TARGET, "turn", turn)
    monkeypatch.setattr(Server, "descend", noted)
    made = begun()
    TARGET(**QUICK).invent(made.server)
    assert [rival is None for rival in rivals] == [True, True, False, False, False, False]
    assert [n for n, _, _ in lessons] == [48, 64, 80, 96] and {steps for _, steps, _ in lessons} == {3}
    assert torch.equal(rivals[2], made.site.initial.flat) and not torch.equal(rivals[2], rivals[3])
    lessons.clear()
    TARGET(**QUICK, adv=0.0).invent(made.server)
    assert not lessons


@pytest.fixture(scope="module")
def streamed():
    settings = {"problem": "stream:5,rounds=3,known=false", "rounds": 15, "clients": 5, "partition": "iid"}
    fields = {"lr": 0.1, "epochs": 2}
    own = {"fedavg": fields, "target": fields | {"kd": 3.0}}
    return {m: fedloom.run(m, report=False, model="mlp:64", fields=f, eval_every=3, **settings) for m, f in own.items()}


def test_old_classes_are_kept_where_averaging_forgets_them(streamed):
    mine, plain = (continual(streamed[name]) for name in ("target", "fedavg"))
    assert mine["incremental_accuracy"] > plain["incremental_accuracy"] + 0.15
    assert mine["forgetting"] < 0.4 < 0.9 < plain["forgetting"]


def test_the_old_model_takes_what_was_invented_for_what_was_meant(streamed):
    rows = [row for row in streamed["target"].metrics if "server/invented_accuracy" in row]
    assert [row["round"] for row in rows] == [4, 7, 10, 13]
    chance = [1 / 2, 1 / 4, 1 / 6, 1 / 8]
    assert all(row["server/invented_accuracy"] > 0.5 + lucky / 2 for row, lucky in zip(rows, chance, strict=True))


def test_batch_normalization_is_matched():
    task = Stream(SixClouds(Toy(norm=True)), 2, 2, known=False)
    near, far = (ran(TARGET(**QUICK, bn=bn), task, 3, seed=1).server for bn in (100.0, 0.0))
    gaps = []
    for server in (near, far):
        net = server.net(server.old)
        remembered = Remembered(net)
        net(server.invented)
        gaps.append(remembered.distance().item())
    assert gaps[0] < gaps[1]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"problem": "stream:5,rounds=1,by=missions"}, "needs a problem of the kind stream:by=classes"),
        ({"problem": "stream:5,rounds=1,by=samples"}, "needs a problem of the kind stream:by=classes"),
        ({"problem": "classification"}, "needs a problem of the kind stream:by=classes"),
        ({"problem": "stream:5,rounds=1", "optimizer": "adam"}, "does not go with optimizer=adam"),
    ],
)
def test_where_it_makes_no_sense_it_is_refused(settings, told):
    with pytest.raises(UsageError, match=told):
        fedloom.run("target", rounds=5, clients=3, report=False, **settings)


def test_texts_cannot_be_invented(tmp_path):
    words = ["rain", "snow", "sun", "song", "drum", "flute", "bread", "rice", "soup", "run", "kick", "swim"]
    lines = ["text,topic", *(f"{words[k % 12]} {words[k % 11]} {words[k % 7]},{'wxyz'[k % 4]}" for k in range(90))]
    (tmp_path / "texts.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(UsageError, match="target invents inputs, which must be numbers"):
        data = {"task": str(tmp_path / "texts.csv"), "label": "topic", "clients": 2}
        fedloom.run("target", problem="stream:2,rounds=1", rounds=2, report=False, **data)


def test_few_labels_and_a_told_stream_suit_it_too():
    task = tasks.build(Spec(problem="partial:0.5+stream:5,rounds=1", rounds=5, clients=3, partition="iid"))
    made = ran(TARGET(**QUICK), task, 3)
    assert made.server.kept == 2 and torch.isfinite(made.server.model.flat).all()
