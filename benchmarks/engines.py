"""What the engines cost beside a bare PyTorch loop that does the same steps, job by job.

    python benchmarks/engines.py                 # jobs S, A, B, C and L, 5 rounds each
    python benchmarks/engines.py B C -n 9
    python benchmarks/engines.py B --peers       # and the peers of benchmarks/peers.md that are installed

`serial` and `vectorized` are compared with the loop on one core, `pool` with the loop in two processes that exchange
nothing but sums; where convolutions make it faster, the loop's weights lie channels last. `/ pool 1` compares with a
pool of one worker instead: the inverse of the ratio is what the second worker gains. Ours and the other take turns,
round by round; quoted are medians, and the median, least and greatest of the ratios pair by pair. `outside` is the
share of the workers' time that is not spent in `descend`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jobs import BATCH, LR, BothCores, Job, bare_round, jobs

from fedloom import engines
from fedloom.boundary import Boundary
from fedloom.cohort import Cohort
from fedloom.engines import heap
from fedloom.method import client
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.node import Server
from fedloom.runs.states import States
from fedloom.site import Site
from fedloom.world import World

PLAN = {  # job -> engines: name, workers, what it is compared with
    "A": [("pool", 2, "both"), ("pool", 2, "pool 1")],
    "B": [("serial", 1, "one"), ("vectorized", 1, "one"), ("vectorized", 2, "one")],
    "C": [("serial", 1, "one"), ("pool", 2, "both")],
    "L": [("serial", 1, "one"), ("pool", 2, "both")],
    "S": [("serial", 1, "one"), ("pool", 2, "both"), ("pool", 2, "pool 1")],
}
WARM = {"vectorized": 6}  # rounds until all is warm: 25 steps of one form are traced; 1 elsewhere
PEERS = {"pfl-research": ("pfl", "pfl_job.py"), "flower": ("flwr", "flower_job.py")}


@dataclass(frozen=True)
class Timed(FedAvg):
    """FedAvg whose clients log how long they trained."""

    @client
    def local(self, client, model):
        began = time.perf_counter()
        w, _ = client.descend(model, lr=self.lr, epochs=self.epochs, batch=self.batch)
        client.log(training=time.perf_counter() - began)
        return {"delta": w - model, "n": client.n}


def ours(job: Job, engine: str, workers: int, outside: list[float]) -> Iterator[float]:
    """Seconds of rounds of `fedavg` on an engine, one after another, without evaluation and files."""
    method = Timed(lr=LR, batch=BATCH)
    site = Site(job, 0)
    world = World(job.population, job.cohort)
    carrier = engines.build(engine, workers)
    boundary = Boundary(method, site, world, carrier)
    server, everybody = Server(site, job.population), Cohort(range(job.population), boundary)
    carrier.start(method, site, States())
    try:
        for round in range(1, 10**6):
            boundary.begin("train", round)
            server.begin("train", round)
            began = time.perf_counter()
            method.round(server, everybody.where(world.choose(round)))
            boundary.books.ledger.close()
            seconds = time.perf_counter() - began
            training = sum(number for _, number in boundary.books.logs["training"])
            outside.append(1 - training / seconds / workers)
            yield seconds
    finally:
        carrier.stop()


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ask.add_argument("jobs", nargs="*", metavar="JOB", help=f"of {list(PLAN)}; default S A B C L")
    ask.add_argument("-n", "--rounds", type=int, default=5)
    ask.add_argument("--peers", action="store_true", default=os.environ.get("PEERS") == "1")
    args = ask.parse_args()
    torch.set_num_threads(1)
    heap.keep()  # in the bare loop's processes too
    print(f"{'job':4} {'engine':16} {'bare s':>9} {'ours s':>9} {'ratio':>7}  {'(least, greatest)':18} outside")
    for name, job in jobs(args.jobs or ["S", "A", "B", "C", "L"]).items():
        for engine, workers, beside in PLAN[name]:
            net = job.network().to(memory_format=torch.channels_last)
            both = BothCores(net, job) if beside == "both" else None
            single = ours(job, engine, 1, []) if beside == "pool 1" else None
            bare: Callable[[], float] = partial(bare_round, net, job)
            if both:
                bare = both.round
            elif single:
                bare = partial(next, single)
            outside: list[float] = []
            rounds = ours(job, engine, workers, outside)
            for _ in range(WARM.get(engine, 1)):
                bare(), next(rounds)
            pairs = [(bare(), next(rounds)) for _ in range(args.rounds)]
            if both:
                both.stop()
            if single:
                single.close()
            rounds.close()
            label = f"{engine} {workers}{' / pool 1' if single else ''}"
            show(name, label, pairs, None if engine == "vectorized" else statistics.median(outside[-args.rounds :]))
        if args.peers:
            peers(name)


def show(job: str, engine: str, pairs: list[tuple[float, float]], outside: float | None) -> None:
    """One line of the table."""
    bare, mine = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    spread = f"({ratios[0]:.3f}, {ratios[-1]:.3f})"
    share = "" if outside is None else f"{outside:.3f}"
    print(
        f"{job:4} {engine:16} {bare:9.4f} {mine:9.4f} {statistics.median(ratios):7.3f}  {spread:18} {share}", flush=True
    )


def peers(job: str) -> None:
    """Runs the peers that are installed, each in a process of its own; PEER_PYTHON may name another environment's."""
    python = os.environ.get("PEER_PYTHON", sys.executable)
    for peer, (package, script) in PEERS.items():
        found = subprocess.run([python, "-c", f"import {package}"], capture_output=True, check=False).returncode == 0
        if not found:
            print(f"{job:4} {peer}: not installed")
            continue
        command = [python, str(Path(__file__).parent / "peers" / script), job]
        out = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            told = json.loads(out.stdout.strip().splitlines()[-1])
            print(f"{job:4} {peer:16} {'':9} {told['seconds']:9.4f}")
        except (ValueError, IndexError):
            print(f"{job:4} {peer}: failed: {out.stderr.strip().splitlines()[-1:]}")


if __name__ == "__main__":
    main()
