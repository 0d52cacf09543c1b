"""Worker processes: the same bits as `serial`, whatever dies or fails, and nothing left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from problems import Mortal, Streaming

from fedloom.calls import Call, ClientError
from fedloom.engines.pool import Pool
from fedloom.errors import RunError
from fedloom.method import client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.scaffold import Scaffold
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab, difference, trace

SIZES = (3, 40, 5, 17, 6, 29, 8, 9, 33, 11, 12)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("method", [Scaffold, FedAvg], ids=lambda m: m.__name__)
def test_any_number_of_workers_gives_the_bits_of_serial(method, workers):
    lab = Lab(method)
    settings = {"rounds": 3, "lost": 0.3, "dropout": 0.2, "cohort": 9}
    serial = trace(lab.experiment(Toy(SIZES), **settings))
    assert difference(serial, trace(lab.experiment(Toy(SIZES), Pool(workers), **settings))) is None


def test_large_cohorts_are_summed_in_blocks_of_several_clients():
    lab = Lab(Scaffold)
    sizes = [3 + k % 7 for k in range(150)]
    settings = {"rounds": 2, "lost": 0.1, "dropout": 0.1}
    serial = trace(lab.experiment(Toy(sizes), **settings))
    assert difference(serial, trace(lab.experiment(Toy(sizes), Pool(2), **settings))) is None


def test_started_without_fork_it_gives_the_same_bits():
    lab = Lab(Scaffold)
    assert difference(lab.serial, trace(lab.experiment(engine=Pool(1, start_method="spawn")))) is None


def test_a_killed_worker_is_replaced_and_its_clients_are_repeated(tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    killed = Lab(Mortal(marks=str(marks), times=2)).experiment(engine=Pool(2))
    assert len(list(marks.iterdir())) == 2
    assert difference(trace(Lab(FedAvg).experiment())["server"], trace(killed)["server"]) is None


def test_a_client_that_kills_every_worker_ends_the_run_in_words(tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    with pytest.raises(RunError, match=r"worker of client 2 died 3 times \(exit code -9\); if memory ran out"):
        Lab(Mortal(marks=str(marks), times=99)).experiment(engine=Pool(2))
    assert len(list(marks.iterdir())) == 3


@dataclass(frozen=True)
class Failing(FedAvg):
    @client
    def local(self, client, model):
        if client.id == 1 and client.round == 2:
            raise ZeroDivisionError("nothing to divide")
        return FedAvg.local(self, client, model)


def test_an_exception_arrives_with_its_client_round_function_and_shapes():
    with pytest.raises(ClientError) as raised:
        Lab(Failing).experiment(engine=Pool(2))
    expected = "client 1, round 2, test_pool.local: ZeroDivisionError: nothing to divide [sent: model: Vector[83]]"
    assert str(raised.value) == expected


def test_calls_may_overlap_and_be_given_up():
    lab = Lab(Streaming)
    assert difference(trace(lab.experiment()), trace(lab.experiment(engine=Pool(2)))) is None


def test_work_goes_on_where_the_message_is_larger_than_any_pipe():
    """Requests and replies of megabytes at once must not block each other."""

    class Wide(Toy):
        def network(self):
            net = super().network()
            net.head.register_buffer("ballast", torch.zeros(500_000))
            return net

    lab = Lab(Scaffold)
    task = Wide((6,) * 12)
    serial = trace(lab.experiment(task, rounds=2))
    assert difference(serial, trace(lab.experiment(task, Pool(2), rounds=2))) is None


SCRIPT = """
import os, sys, time
from dataclasses import dataclass
from fedloom.engines.pool import Pool
from fedloom.method import client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.testing import Lab

@dataclass(frozen=True)
class Slow(FedAvg):
    @client
    def local(self, client, model):
        os.write(1, f"working {os.getpid()}\\n".encode())  # in one piece
        time.sleep(60)

if __name__ == "__main__":
    Lab(Slow).experiment(engine=Pool(2))
"""


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_no_process_and_no_memory_outlive_the_parent(tmp_path, sign):
    script = tmp_path / "slow.py"
    script.write_text(textwrap.dedent(SCRIPT))
    before = memory()
    with (tmp_path / "errors").open("w") as errors:
        parent = subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
    with parent:  # closes the pipe and waits, whatever happens
        lines = [parent.stdout.readline() for _ in range(2)]
        assert all(lines), (tmp_path / "errors").read_text()
        workers = {int(line.split()[1]) for line in lines}
        assert len(workers) == 2
        parent.send_signal(sign)
    deadline = time.time() + 20
    while any(alive(worker) for worker in workers) and time.time() < deadline:
        time.sleep(0.05)
    assert not [worker for worker in workers if alive(worker)]
    assert memory() <= before


def memory() -> set[Path]:
    """What lies in memory under a name; folders there are temporary records, of whatever test runs just now."""
    return {path for path in Path("/dev/shm").iterdir() if not path.is_dir()}


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_message_lies_behind_all_that_workers_may_still_read(tmp_path):
    class Asked:
        def __init__(self, *spot):
            self.spot = spot

    pool = Pool(2)
    pool.board = os.open(tmp_path / "board", os.O_RDWR | os.O_CREAT)
    assert pool.post(b"first") == (0, 5)
    pool.orders = {1: Asked(0, 5)}
    assert pool.post(b"second") == (5, 6), "behind a call that is open"
    pool.handles = [SimpleNamespace(work=[(Asked(5, 6), None)])]
    assert pool.post(b"third") == (11, 5), "and behind one that was given up and is not answered"
    assert os.pread(pool.board, 99, 0) == b"firstsecondthird"
    pool.orders, pool.handles = {}, []
    assert pool.post(b"x") == (0, 1)
    os.close(pool.board)


def test_what_workers_sum_does_not_come_along_reply_by_reply():
    made = Lab(FedAvg).begun(Toy((9, 12, 7, 15, 8)), Pool(2))
    made.engine.start(made.method, made.site, made.states)
    try:
        call = Call("mean", "local", tuple(range(5)), {"model": made.server.model}, {}, "train", 1, 0)
        summing = made.engine.reduce(call, range(5), {3}, "n")
        outcomes = list(summing)
    finally:
        made.engine.stop()
    assert sorted(one.client for one in outcomes) == [0, 1, 2, 3, 4]
    assert all(one.reply == {} and sum(one.sizes.values()) > 300 for one in outcomes), "their sizes are booked"
    assert summing.total.count == 4 and summing.total.weight == 9 + 12 + 7 + 8, "a lost reply is in no sum"
