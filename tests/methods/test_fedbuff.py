"""FedBuff: what is in the buffer, how old it is and what that weighs, and that waiting for everybody is FedAvg."""

import contextlib
from dataclasses import dataclass

import pytest
import torch
from arrivals import by_hand, trained
from problems import Quadratics, node, ran

from fedloom.method import client
from fedloom.methods.asynchronous.fedbuff import FedBuff
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.ops.overlap import apply_update, discount_by_staleness, idle_up_to_cohort
from fedloom.runs.experiment import Experiment
from fedloom.runs.record import Run
from fedloom.runs.spec import Spec
from fedloom.tasks.toy import Toy

DRIFT = {"lr": 0.1, "epochs": 2}


class Three(Quadratics):
    centers = torch.tensor([[2.0, -1.0], [-1.0, 3.0], [0.5, 0.5]], dtype=torch.float64)
    curvatures = torch.cat([Quadratics.curvatures, 0.7 * torch.eye(2, dtype=torch.float64)[None]])


@pytest.mark.parametrize("buffer", [0, 4, 9])
@pytest.mark.parametrize("settings", [{}, {"lost": 0.3}, {"speed": "lognormal:1.0"}], ids=str)
def test_waiting_for_everybody_is_fedavg(buffer, settings):
    made, fedavg = (ran(m, Toy(), 3, **settings) for m in (FedBuff(buffer=buffer, **DRIFT), FedAvg(**DRIFT)))
    assert torch.equal(made.server.model.flat, fedavg.server.model.flat)
    times, others = ([row["virtual_seconds"] for row in m.record.metrics] for m in (made, fedavg))
    assert times == pytest.approx(others)


def test_waiting_for_everybody_is_fedavg_with_running_statistics_too():
    task = Toy(norm=True)
    made, fedavg = (ran(m, task, 3).server.model for m in (FedBuff(buffer=0, **DRIFT), FedAvg(**DRIFT)))
    assert torch.allclose(made.flat, fedavg.flat, rtol=0, atol=3e-6)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_model_is_that_of_a_queue_by_hand(k, decay):
    task, lr, rate = Three((2, 7, 3)[: k + 1]), 0.1, 0.8
    steps = task.sizes.tolist()
    made = ran(FedBuff(lr=lr, batch=1, buffer=k, decay=decay, server_lr=rate), task, 7)
    models, stale = [torch.zeros(2, dtype=torch.float64)], set()
    for ended in by_hand([float(n) for n in steps], 7, k):
        total = sum(steps[c] for c, _ in ended)
        step = 0
        for c, s in ended:
            old = models[len(models) - 1 - s]
            step = step + steps[c] / total * (1 + s) ** -decay * (trained(task, c, old, lr, steps[c]) - old)
            stale.add(s)
        models.append(models[-1] + rate * step)
    assert max(stale) >= 2, "somebody is overtaken"
    assert torch.allclose(made.server.model.flat, models[-1], rtol=0, atol=1e-12)


def test_alike_clients_that_are_all_waited_for_are_never_stale():
    fresh = ran(FedBuff(buffer=0), Toy(sizes=(20,) * 6), 4, latency=0.1).record.metrics
    assert [row["server/staleness"] for row in fresh] == [0.0] * 4
    stale = ran(FedBuff(buffer=2), Toy(sizes=(20,) * 6), 4, latency=0.1).record.metrics
    assert [row["server/staleness"] for row in stale] == [0.0, 1.0, 2.0, 2.0]


def test_running_statistics_go_by_the_share_of_the_buffer_among_all_at_work():
    task = Toy(norm=True, sizes=(20, 20, 20, 20))
    made = ran(FedBuff(buffer=1, lr=0.1), task, 1)
    (k,) = {k for k in range(4) if k not in made.boundary.pending.busy}
    w, _ = node(made.site, k).descend(made.site.initial, lr=0.1, epochs=1, batch=10)
    expected = 0.75 * made.site.initial.buffers + 0.25 * w.buffers
    assert torch.allclose(made.server.model.buffers.flat, expected.flat, rtol=0, atol=1e-6)


def test_running_statistics_stay_possible_however_old_the_work_is():
    task = Toy(norm=True, sizes=(10, 60, 30, 35))
    made = ran(FedBuff(buffer=1, lr=0.1), task, 25)
    variances = [made.server.model[name] for name in made.server.model if name.endswith("running_var")]
    assert variances and all((v > 0).all() for v in variances)
    assert not torch.equal(made.server.model.buffers.flat, made.site.initial.buffers.flat)


def test_a_cohort_is_how_many_work_at_a_time():
    made = ran(FedBuff(buffer=2), Toy(sizes=(20,) * 12), 6, cohort=5, speed="lognormal:1.0")
    assert made.boundary.pending.busy <= set(range(12)) and len(made.boundary.pending) == 3
    assert all(row["replies"] == 2 for row in made.record.metrics)


def test_a_round_whose_replies_are_all_lost_ages_nobodys_work():
    """Staleness is the number of global updates since (Algorithm 1), and a lost round makes none."""
    seen = []

    @dataclass(frozen=True)
    class Watched(FedBuff):
        def setup(self, server, clients):
            server.moves = 0

        def round(self, server, cohort):
            idle = idle_up_to_cohort(cohort, server.rng("idle"))
            idle.submit(self.local, model=server.model, moves=server.moves)
            replies = cohort.wait(min(self.buffer, cohort.working))
            seen.extend((reply.staleness, server.moves - reply.moves) for reply in replies)
            up = discount_by_staleness(replies, self.decay).mean(weight="n")
            server.model = apply_update(server.model, up, self.server_lr, 1.0)
            server.moves = server.moves + 1

        @client
        def local(self, client, model, moves):
            return {**FedBuff.local(self, client, model), "moves": moves}

    made = ran(Watched(buffer=1), Toy(sizes=(5, 40, 30, 35)), 40, lost=0.5, speed="lognormal:1.0")
    moved = made.server.moves
    assert moved < 35 and all(found == true for found, true in seen) and max(true for _, true in seen) > 1


def test_old_work_is_as_old_as_the_model_says_after_a_resume(tmp_path):
    fields = {"method": FedBuff(buffer=1).to_spec(), "partition": "given", "rounds": 12, "lost": 0.3}
    task = Toy(sizes=(5, 40, 30, 35))
    whole = Experiment(Spec.of(fields), task).begin(None)
    whole.go()

    def stop(row):
        if row["round"] == 5:
            raise KeyboardInterrupt

    begun = Experiment(Spec.of(fields), task).begin(tmp_path / "run")
    with contextlib.suppress(KeyboardInterrupt):
        begun.go(stop)
    again = Experiment(Run(tmp_path / "run").spec, task).take_up(Run(tmp_path / "run"))
    again.go()
    assert again.boundary.books.version == whole.boundary.books.version < 12
    assert torch.equal(again.server.model.flat, whole.server.model.flat)
