"""What pool and ray share: how calls are cut into blocks, what workers keep, and what happens when they die."""

import os
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedloom.calls import ClientError
from fedloom.engines.pool import Pool
from fedloom.errors import RunError
from fedloom.method import client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.scaffold import Scaffold
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab, difference, trace


class Listening(Pool):
    """A pool that counts the sums that travel, with all workers there before the first call."""

    def start(self, *given):
        super().start(*given)
        while not all(handle.ready for handle in self.handles):
            self._listen()

    def hear(self, patience=None):
        heard = super().hear(patience)
        self.sums = getattr(self, "sums", 0)
        self.sums += sum(len(answer.get("nodes", ())) for _, answer in heard if isinstance(answer, dict))
        return heard


def test_sums_are_joined_in_the_workers_where_clients_remember_nothing():
    task = Toy((9,) * 64)
    one, two, scaffold = Listening(1), Listening(2), Listening(1)
    Lab(FedAvg).experiment(task, one, rounds=1)
    assert one.sums == 1
    Lab(FedAvg).experiment(task, two, rounds=1)
    assert 2 <= two.sums < 16  # two, had each worker its own half; how many more depends on who was quicker
    Lab(Scaffold).experiment(task, scaffold, rounds=2)
    assert scaffold.sums == 1 + 16  # from the second round on clients have a control


@pytest.mark.parametrize("clients", [1, 2, 5, 100, 1000])
def test_batches_of_clients_fill_all_workers_evenly(clients, monkeypatch):
    monkeypatch.setattr("fedloom.engines.blocks.at_once", lambda _: 64)
    pool = Pool(3, together=True)
    pool.handles, pool.site = [None] * 3, None
    parts = pool._parts(clients)
    assert [place for part in parts for place in part] == list(range(clients))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1 <= min(sizes)
    assert max(sizes) <= 64
    assert len(parts) % 3 == 0 or len(parts) == clients


@pytest.mark.parametrize("clients", [1, 47, 48, 95, 96, 1000, 12345])
def test_blocks_of_a_sum_are_nodes_of_its_tree_and_so_many_that_they_even_out(clients):
    pool = Pool(3)
    pool.handles = [None] * 3
    level = pool._level(clients)
    parts = pool._parts(clients, level)
    assert all(len(part) == 2**level and part.start == index * 2**level for index, part in enumerate(parts))
    if clients < 48:
        assert level == 0, "one by one"
    else:
        assert 48 <= len(parts) <= 2 * 48 + 1


def remembering(self, client, model):
    w, _ = client.descend(model, lr=self.lr, batch=self.batch)
    last = client.state.get("last", model.zeros_like())
    client.state["last"] = w - model
    return {"delta": w - model + 0.5 * last, "n": client.n}


@dataclass(frozen=True)
class Mortal(FedAvg):
    """The last clients kill their worker, once a round each, when it has taken in the replies of many others."""

    marks: str = ""

    @client
    def local(self, client, model):
        client.log(asked=1.0)
        mark = Path(self.marks) / f"{client.id} in round {client.round}"
        if client.id >= 38 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return remembering(self, client, model)


def test_sums_that_die_with_their_worker_are_made_again_and_nothing_is_counted_twice(tmp_path):
    (alive := tmp_path / "alive").mkdir()
    (dead := tmp_path / "dead").mkdir()
    task = Toy([50 - k for k in range(40)])
    for k in (38, 39):
        for round in (1, 2):
            (alive / f"{k} in round {round}").touch()
    settings = {"rounds": 2, "lost": 0.2}
    one, two = (
        trace(Lab(Mortal(marks=str(marks))).experiment(task, engine, **settings))
        for marks, engine in ((alive, None), (dead, Pool(2)))
    )
    assert len(list(dead.iterdir())) == 4
    assert difference(one, two) is None


@dataclass(frozen=True)
class Chatting(FedAvg):
    """Changes what clients remember while a stream in which they take part is under way."""

    def round(self, server, cohort):
        for reply in cohort.stream(self.local, model=server.model):
            others = cohort.where(range(reply.client % 2, 8, 2))
            up = others.mean(self.local, weight="n", model=server.model + reply.delta)
            server.model = server.model + 0.1 * up.delta

    @client
    def local(self, client, model):
        return remembering(self, client, model)


def test_clients_of_a_stream_remember_what_was_asked_of_them_meanwhile():
    lab = Lab(Chatting)
    task = Toy((9, 12, 15, 9, 12, 15, 9, 12))
    assert difference(trace(lab.experiment(task)), trace(lab.experiment(task, Pool(2)))) is None


@dataclass(frozen=True)
class Impatient(FedAvg):
    """Takes one reply of a stream, the slowest."""

    marks: str = ""

    def round(self, server, cohort):
        server.model = server.model + next(cohort.stream(self.local, model=server.model)).delta

    @client
    def local(self, client, model):
        (Path(self.marks) / f"{client.id} in round {client.round}").touch()
        if client.id == 0:
            time.sleep(0.5)
        if client.id == 2:
            raise ZeroDivisionError("a client whose reply nobody takes")
        return FedAvg.local(self, client, model)


def test_a_stream_runs_ahead_only_so_far_and_what_nobody_takes_does_no_harm(tmp_path):
    task = Toy((9,) * 30)
    (mine := tmp_path / "pool").mkdir()
    (serial := tmp_path / "serial").mkdir()
    one = trace(Lab(Impatient(marks=str(serial))).experiment(task))
    two = trace(Lab(Impatient(marks=str(mine))).experiment(task, Pool(2)))
    assert difference(one, two) is None
    begun = Counter(mark.name.partition(" in ")[2] for mark in mine.iterdir())
    assert all(1 <= count <= 4 for count in begun.values()), begun


@dataclass(frozen=True)
class Failing(FedAvg):
    """Clients 5 and 3 fail, 5 first; or none, but one sends no weight or another shape than the others."""

    how: str = "raise"

    def round(self, server, cohort):
        verb = cohort.call if self.how == "raise" else cohort.mean
        verb(self.local, **({} if self.how == "raise" else {"weight": "n"}), model=server.model)

    @client
    def local(self, client, model):
        if self.how == "raise" and client.id in (3, 5):
            time.sleep(0.2 * (client.id == 3))
            raise ZeroDivisionError("nothing to divide")
        reply = {"delta": client.data.x[0], "n": client.n}
        if client.id == 3:
            return {"delta": reply["delta"]} if self.how == "weight" else {**reply, "delta": client.data.x[0, :2]}
        return reply


@pytest.mark.parametrize(("how", "kind"), [("raise", ClientError), ("weight", RunError), ("shape", RunError)])
def test_what_fails_fails_with_the_line_of_serial(how, kind):
    lab = Lab(Failing(how=how))
    task = Toy((9,) * 8)
    with pytest.raises(RunError) as one:
        lab.experiment(task)
    with pytest.raises(RunError) as two:
        lab.experiment(task, Pool(1 if how == "shape" else 2))
    assert type(one.value) is type(two.value) is kind
    assert str(one.value) == str(two.value)


class Dropping(Pool):
    """A worker that has client 2 at hand dies as soon as it speaks, and takes along what it was about to say."""

    def hear(self, patience=None):
        heard = []
        for handle, answer in super().hear(patience):
            if isinstance(answer, dict) and any(block and 2 in block.places for _, block in handle.work):
                handle.process.kill()
                handle.process.join()
                handle.pipe.close()
                answer = "killed"
            heard.append((handle, answer))
        return heard


def test_whoever_kills_workers_is_named_not_who_was_before_it_at_the_same_worker():
    with pytest.raises(RunError, match=r"worker of client 2 died 3 times \(killed\)"):
        Lab(FedAvg).experiment(Toy((9, 9, 9, 9)), Dropping(1))
