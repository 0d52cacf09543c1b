"""A cluster of two nodes on this machine: joined by its address, and still there when a node of it is lost."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedloom import run
from fedloom.engines import build
from fedloom.engines.ray import Ray
from fedloom.method import client
from fedloom.methods.optimize.scaffold import Scaffold
from fedloom.tasks.toy import Toy
from fedloom.testing import Lab, difference, trace

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "fedloom[ray]"')
SIZES = (12, 20, 8, 14, 9, 16, 11, 10)


@pytest.fixture
def cluster(monkeypatch):
    from ray.cluster_utils import Cluster

    assert not ray.is_initialized()
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.other = made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_cluster_is_joined_by_its_address_and_left_as_it_was(cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    made = run(Scaffold(), Toy(SIZES), engine="ray", rounds=2, report=False)
    alone = run(Scaffold(), Toy(SIZES), rounds=2, report=False)
    assert [row["train_loss"] for row in made.metrics] == [row["train_loss"] for row in alone.metrics]
    assert not ray.is_initialized()
    ray.init(cluster.address, logging_level="CRITICAL", log_to_driver=False)
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    deadline = time.time() + 20
    while ray.available_resources().get("CPU") != 2 and time.time() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 2


@dataclass(frozen=True)
class Seen(Scaffold):
    """Every client leaves a mark, with the node that it works on, and takes its time."""

    marks: str = ""

    @client
    def local(self, client, **message):
        import ray as here

        node = here.get_runtime_context().get_node_id()
        (Path(self.marks) / f"{node} {client.round} {client.id}").touch()
        time.sleep(0.2)
        return Scaffold.local(self, client, **message)


def test_a_node_that_is_lost_in_mid_round_changes_no_bit(cluster, tmp_path):
    def lose():
        while not list(tmp_path.glob(f"{cluster.other.node_id} 2 *")):
            time.sleep(0.02)
        cluster.remove_node(cluster.other, allow_graceful=False)

    threading.Thread(target=lose, daemon=True).start()
    lost = Lab(Seen(marks=str(tmp_path))).experiment(Toy(SIZES), Ray(2, address=cluster.address))
    assert len([mark for mark in tmp_path.iterdir() if mark.name.split()[1] == "3"]) == len(SIZES)
    assert not list(tmp_path.glob(f"{cluster.other.node_id} 3 *"))
    alone = Lab(Scaffold).experiment(Toy(SIZES), build("serial"))
    assert difference(trace(alone)["server"], trace(lost)["server"]) is None
    assert difference(trace(alone)["states"], trace(lost)["states"]) is None
