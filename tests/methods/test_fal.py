"""FAL: adversarial training around any method, and the accuracy under attack."""

import pytest
import torch
from problems import trained_together
from torch.nn import functional as F

from fedloom.errors import UsageError
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.moon import Moon
from fedloom.methods.optimize.scaffold import Scaffold
from fedloom.methods.robust.fal import FAL
from fedloom.node import Client
from fedloom.random import stream
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.task import Batch
from fedloom.tasks.toy import Toy
from fedloom.testing import difference, trace
from fedloom.vector import Vector


def ran(method, task=None, **settings):
    spec = Spec.of({"method": method.to_spec(), "partition": "given", "rounds": 3, **settings})
    made = Experiment(spec, task or Toy(), method).begin(None)
    made.go()
    return made


def left(made):
    return [trace(made)[part] for part in ("server", "states")]


def batch_of(made, k=0):
    data = made.task.data(k, "train")
    return Batch(*data.all())


@pytest.mark.parametrize("inner", [FedAvg(lr=0.1), Scaffold(lr=0.1), Moon(lr=0.1)])
@pytest.mark.parametrize("off", [{"rho": 0.0}, {"steps": 0}])
def test_without_a_ball_or_a_step_it_is_the_method_inside_bitwise(inner, off):
    assert difference(left(ran(FAL(inner, **off))), left(ran(inner))) is None
    assert difference(left(ran(FAL(inner))), left(ran(inner))) is not None


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("box", [(), (-1.0, 1.0)])
def test_examples_stay_in_the_ball_and_in_the_box(start, box):
    method, made = FAL(rho=0.3, steps=5, start=start, box=box), ran(FedAvg(), rounds=1)
    x, y = batch_of(made)
    if box:
        x = x.clamp(*box)
    client = Client(made.site, 0, {}, "train", 1, 0)
    at = method.climbed(lambda x: F.cross_entropy(client.scores(made.server.model, x), y), x, 5, client.rng("s"))
    assert (at - x).abs().max() <= 0.3 * (1 + 1e-6) and (at - x).abs().max() > 0.29
    if box:
        assert at.min() >= -1 and at.max() <= 1


def test_a_random_start_is_uniform_in_the_ball():
    x = torch.ones(2000, 3)
    off = FAL(rho=0.3).climbed(lambda x: x.sum(), x, 0, stream(0, "start")) - x
    assert off.abs().max() <= 0.3 * (1 + 1e-6) and abs(off.mean()) < 0.01
    assert off.std() == pytest.approx(0.3 / 3**0.5, rel=0.03)


def test_of_a_linear_model_one_step_of_length_rho_is_the_exact_worst_case():
    draw = stream(0, "fal")
    w, x = torch.randn(7, generator=draw), torch.randn(40, 7, generator=draw)
    y = torch.randint(0, 2, (40,), generator=draw) * 2.0 - 1
    at = FAL(rho=0.2, steps=1, step=0.2).climbed(lambda x: F.softplus(-y * (x @ w)).mean(), x, 1)
    expected = F.softplus(-y * (x @ w) + 0.2 * w.abs().sum())
    torch.testing.assert_close(F.softplus(-y * (at @ w)), expected)


def test_the_ascent_is_projected_from_where_it_is_and_not_from_where_it_began():
    # value = -|x - 0.25| has its top inside the ball: steps of 0.2 from 0 go to 0.2, 0.4, and back to 0.2.
    x = torch.zeros(1, 1)
    method = FAL(rho=0.3, step=0.2)
    at = {steps: float(method.climbed(lambda x: -(x - 0.25).abs().sum(), x, steps)) for steps in (1, 2, 3)}
    assert at == pytest.approx({1: 0.2, 2: 0.3, 3: 0.1})
    assert float(FAL(rho=0.5).climbed(lambda x: x.sum(), x, 1)) == pytest.approx(0.5), "2.5 rho, within rho"
    assert float(FAL(rho=0.5).climbed(lambda x: x.sum() * 1, x, 5)) == pytest.approx(0.5)
    far = FAL(rho=0.5).climbed(lambda x: -(x - 0.25).abs().sum(), x, 10)
    assert float(far) == pytest.approx(0.25, abs=0.13), "steps of 2.5 rho / A"


def test_one_step_of_training_takes_the_gradient_at_the_worst_case_held_constant():
    task = Toy(sizes=(12, 9, 15, 10))
    made = ran(FAL(FedAvg(lr=0.1, batch=0), rho=0.2, steps=2), task, rounds=1)
    net, total = task.network(), torch.zeros(len(made.site.initial))
    Vector(made.site.initial.flat.clone(), made.site.initial.layout)
    for k, n in enumerate(task.sizes):
        x, y = task.data(k, "train").all()
        for tensor, view in zip(net.parameters(), made.site.initial.layout.views(made.site.initial.flat), strict=False):
            tensor.data = view.clone()
        at = x.clone()
        for _ in range(2):
            at.requires_grad_(True)
            (g,) = torch.autograd.grad(F.cross_entropy(net(at), y), at)
            at = (at.detach() + 0.25 * g.sign()).clamp(x - 0.2, x + 0.2)
        grads = torch.autograd.grad(F.cross_entropy(net(at), y), list(net.parameters()))
        total += n / sum(task.sizes) * torch.cat([g.flatten() for g in grads])
    torch.testing.assert_close(made.server.model.flat, made.site.initial.flat - 0.1 * total, rtol=0, atol=1e-6)


def test_examples_are_made_anew_at_every_step_against_the_local_model():
    seen = []

    class Noting(FAL):
        def climbed(self, value, x, steps, draw=None):
            seen.append(value(x).item())
            return FAL.climbed(self, value, x, steps, draw)

    client = Client(ran(FedAvg(), rounds=1).site, 0, {}, "train", 1, 0)
    method = Noting(FedAvg(lr=0.5, batch=0, epochs=4))
    client.wrap_loss(method.robust)
    client.descend(client.initial, lr=0.5, epochs=4)
    assert len(seen) == 4 and seen[0] > seen[1] > seen[2] > seen[3]


def test_running_statistics_and_dropout_are_of_the_training_pass_alone():
    task = Toy(norm=True)
    made = ran(FedAvg(), task, rounds=1)
    client = Client(made.site, 0, {}, "train", 1, 0)
    batch = Batch(*client.data.all())
    start = Vector(client.initial.flat.clone(), client.initial.layout)
    client.wrap_loss(FAL(rho=0.1, steps=3).robust)
    client.grad(start, batch)
    name = next(name for name in start.layout.names if name.endswith("running_mean"))
    weight, bias = start["body.0.weight"], start["body.0.bias"]
    # After one pass in training mode: a tenth of the mean of that batch, which lies within rho of the clean one's.
    clean = 0.1 * F.linear(batch.x, weight, bias).mean(0)
    assert ((start[name] - clean).abs() <= 0.1 * 0.1 * weight.abs().sum(1) + 1e-6).all()
    counted = [buffer for key, buffer in made.site.bench.net.named_buffers() if key.endswith("num_batches_tracked")]
    before = [int(count) for count in counted]
    client.grad(start, batch)
    assert [int(count) for count in counted] == [count + 1 for count in before]


def test_the_loss_of_the_worst_case_is_larger_and_is_what_the_record_shows():
    robust, plain = ran(FAL(FedAvg(lr=0.1), rho=0.5)), ran(FedAvg(lr=0.1))
    assert robust.record.metrics[0]["train_loss"] > plain.record.metrics[0]["train_loss"]


@pytest.mark.parametrize("start", [False, True])
def test_it_withstands_attacks_better_than_the_method_inside(start):
    robust = ran(FAL(FedAvg(lr=0.1), rho=1.0, start=start), rounds=10).record.final
    watched = ran(Watched(), rounds=10).record.final
    assert robust["personal_test_robust_accuracy"] > watched["personal_test_robust_accuracy"] + 0.05
    assert robust["personal_test_robust_accuracy"] <= robust["personal_test_accuracy"]
    assert watched["personal_test_robust_accuracy"] < watched["personal_test_accuracy"] - 0.05


class Watched(FAL):
    """Attacked when judged, and trained plainly."""

    def __init__(self):
        super().__init__(FedAvg(lr=0.1), rho=1.0)

    def to_spec(self):
        return FAL(FedAvg(lr=0.1), rho=1.0).to_spec()

    def around(self, client, inner):
        return inner()


def test_clients_train_as_one_batch():
    with trained_together() as sizes:
        together = ran(FAL(FedAvg(lr=0.1), rho=0.2), engine="vectorized")
    assert sizes == [4, 4, 4]
    alone = ran(FAL(FedAvg(lr=0.1), rho=0.2))
    assert difference(alone.server.model, together.server.model, nearly=1e-4) is None


def test_a_box_that_is_none_and_inputs_that_are_no_numbers_are_refused():
    for box in ((0.0,), (1.0, 0.0), (0.0, 1.0, 2.0)):
        with pytest.raises(UsageError, match=r"fal\.box is"):
            FAL(box=box)
    with pytest.raises(UsageError, match="real numbers"):
        FAL().climbed(lambda x: x.sum(), torch.zeros(2, 3, dtype=torch.long), 1)
