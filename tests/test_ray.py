"""Actors on a real, local Ray: the same bits as `serial`, whatever dies or fails, and nothing left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from problems import Mortal, Streaming

from fedloom.calls import ClientError
from fedloom.engines import build
from fedloom.engines.blocks import Distributed
from fedloom.engines.ray import Actor, Ray, _Handle
from fedloom.errors import RunError, UsageError
from fedloom.method import Method, client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.methods.optimize.scaffold import Scaffold
from fedloom.registry import catalogue
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab, difference, trace

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "fedloom[ray]"')

pytestmark = pytest.mark.xdist_group("ray")  # one cluster, not one a worker


class Standing(Ray):
    """Keeps its actors from run to run: to start one takes seconds."""

    idle: ClassVar[list] = []

    def start_worker(self):
        if not self.idle:
            return super().start_worker()
        actor = self.idle.pop()
        return _Handle(actor, deque([actor.__ray_call__.remote(Actor.__init__, *self.terms)]))

    def stop(self):
        self.idle += [handle.actor for handle in self.handles]
        Distributed.stop(self)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="CRITICAL", log_to_driver=False)
    yield
    Standing.idle.clear()
    ray.shutdown()


@pytest.mark.parametrize("name", [entry.name for entry in catalogue()])
def test_every_method_gives_the_bits_of_serial(name):
    lab = Lab(next(entry for entry in catalogue() if entry.name == name).load(Method))
    assert difference(lab.serial, trace(lab.experiment(engine=Standing(2)))) is None


@pytest.mark.parametrize("method", [Scaffold, FedAvg], ids=lambda m: m.__name__)
def test_large_cohorts_are_summed_where_the_replies_are(method):
    lab = Lab(method)
    sizes = [3 + k % 7 for k in range(150)]
    settings = {"rounds": 2, "lost": 0.1, "dropout": 0.1}
    serial = trace(lab.experiment(Toy(sizes), **settings))
    assert difference(serial, trace(lab.experiment(Toy(sizes), Standing(2), **settings))) is None


def test_calls_may_overlap_and_be_given_up():
    lab = Lab(Streaming)
    assert difference(lab.serial, trace(lab.experiment(engine=Standing(2)))) is None


@dataclass(frozen=True)
class Failing(FedAvg):
    @client
    def local(self, client, model):
        if client.id == 1 and client.round == 2:
            raise ZeroDivisionError("nothing to divide")
        return FedAvg.local(self, client, model)


def test_an_exception_arrives_with_its_client_round_function_and_shapes():
    with pytest.raises(ClientError) as raised:
        Lab(Failing).experiment(engine=Standing(2))
    expected = "client 1, round 2, test_ray.local: ZeroDivisionError: nothing to divide [sent: model: Vector[83]]"
    assert str(raised.value) == expected


def test_a_killed_actor_is_replaced_and_its_clients_are_repeated(tmp_path):
    killed = Lab(Mortal(marks=str(tmp_path), times=1)).experiment(engine=Standing(2))
    assert len(list(tmp_path.iterdir())) == 1
    assert difference(trace(Lab(FedAvg).experiment())["server"], trace(killed)["server"]) is None


def test_a_client_that_kills_every_actor_ends_the_run_in_words(tmp_path):
    with pytest.raises(RunError, match=r"worker of client 2 died 3 times \(The actor is dead .*\); if memory ran out"):
        Lab(Mortal(marks=str(tmp_path), times=99)).experiment(engine=Standing(2))


def test_it_leaves_a_ray_that_ran_before_and_none_of_its_actors():
    for actor in Standing.idle:
        ray.kill(actor)
    Standing.idle.clear()
    Lab(FedAvg).experiment(engine=Ray(1), rounds=1)
    assert ray.is_initialized()
    deadline = time.time() + 10
    while ray.available_resources().get("CPU") != 2 and time.time() < deadline:
        time.sleep(0.05)
    assert ray.available_resources()["CPU"] == 2


def test_without_ray_a_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r'pip install "fedloom\[ray\]"'):
        build("ray")


def test_a_cluster_that_is_not_there_is_told_at_once():
    with pytest.raises(RunError, match=r"cannot join the Ray cluster '127.0.0.1:1': .*refused"):
        Ray(1, address="127.0.0.1:1")._join()


SCRIPT = """
import os, sys, time
from dataclasses import dataclass
from pathlib import Path
from fedloom.engines.ray import Ray
from fedloom.method import client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.testing import Lab

@dataclass(frozen=True)
class Slow(FedAvg):
    marks: str = ""

    @client
    def local(self, client, model):
        (Path(self.marks) / str(os.getpid())).touch()
        time.sleep(60)

if __name__ == "__main__":
    Lab(Slow(marks=sys.argv[1])).experiment(engine=Ray(1))
"""


def test_no_process_of_its_own_ray_outlives_ctrl_c(tmp_path):
    script, marks = tmp_path / "slow.py", tmp_path / "marks"
    script.write_text(textwrap.dedent(SCRIPT))
    marks.mkdir()
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    parent = subprocess.Popen(
        [sys.executable, str(script), str(marks)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment,
    )
    deadline = time.time() + 60
    while not list(marks.iterdir()) and parent.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    actors = [int(mark.name) for mark in marks.iterdir()]
    os.killpg(parent.pid, signal.SIGINT)
    said, _ = parent.communicate(timeout=30)
    assert actors, said
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert said.count("Traceback") == 1
    deadline = time.time() + 10
    while any(Path(f"/proc/{actor}").exists() for actor in actors) and time.time() < deadline:
        time.sleep(0.05)
    assert not [actor for actor in actors if Path(f"/proc/{actor}").exists()]
