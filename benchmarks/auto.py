"""Is the engine that `auto` picks the fastest? Twelve jobs, a round on every engine in turns, and what `auto` says.

    python benchmarks/auto.py              # all jobs, 5 rounds each
    python benchmarks/auto.py few-small long-cnn -n 9

`lost` is how much longer a round takes on the engine that was picked than on the fastest one (medians of rounds that
took turns).
"""

import argparse
import os
import statistics
import time

import torch
from engines import WARM, ours
from jobs import BATCH, LR, Job

from fedloom.engines import auto, heap
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.site import Site
from fedloom.world import World

VECTOR, IMAGE = (64,), (1, 28, 28)
UNEVEN = [12, 24, 48, 96, 192] * 8
JOBS = {  # name -> network, inputs, training samples of the clients, clients of a round
    "tiny": ("linear", VECTOR, (20,) * 10, 10),
    "few-small": ("mlp:64", VECTOR, (50,) * 10, 10),
    "many-small": ("mlp:64", VECTOR, (50,) * 1000, 100),
    "many-linear": ("linear", VECTOR, (20,) * 1000, 200),
    "one-step": ("mlp:64", VECTOR, (10,) * 1000, 100),
    "long-small": ("mlp:64", VECTOR, (1000,) * 20, 20),
    "uneven": ("mlp:64", VECTOR, UNEVEN, 40),
    "few-dnn": ("dnn", IMAGE, (300,) * 10, 10),
    "many-dnn": ("dnn", IMAGE, (20,) * 400, 100),
    "few-cnn": ("cnn", IMAGE, (60,) * 10, 10),
    "long-cnn": ("cnn", IMAGE, (400,) * 8, 8),
    "resnet": ("resnet8:group", (3, 32, 32), (20,) * 10, 10),
}
ENGINES = [("serial", 0), ("pool", 2), ("vectorized", 0), ("vectorized", 2)]


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ask.add_argument("jobs", nargs="*", metavar="JOB", help=f"of {list(JOBS)}; default all")
    ask.add_argument("-n", "--rounds", type=int, default=5)
    args = ask.parse_args()
    torch.set_num_threads(1)
    heap.keep()
    cores = len(os.sched_getaffinity(0))
    print(
        f"{'job':12} "
        + " ".join(f"{name + ' ' + str(hands):>13}" for name, hands in ENGINES)
        + "  picked         lost  took"
    )
    for name in args.jobs or JOBS:
        job = Job(*JOBS[name])
        site, world = Site(job, 0), World(job.population, job.cohort)
        began = time.perf_counter()
        choice = auto.choose(FedAvg(lr=LR, batch=BATCH), site, world, 0, cores)
        took = time.perf_counter() - began
        rounds = {(engine, hands): ours(job, engine, hands or 1, []) for engine, hands in ENGINES}
        times: dict[tuple[str, int], list[float]] = {key: [] for key in rounds}
        for turn in range(max(WARM.values()) + args.rounds):
            for key, its in rounds.items():
                seconds = next(its)
                if turn >= (WARM.get(key[0], 1) if args.rounds else 0):
                    times[key].append(seconds)
        for its in rounds.values():
            its.close()
        medians = {key: statistics.median(its) for key, its in times.items()}
        picked = (choice.engine, choice.workers)
        lost = medians[picked] / min(medians.values()) - 1
        shown = " ".join(f"{medians[key]:13.4f}" for key in ENGINES)
        print(f"{name:12} {shown}  {picked[0] + ' ' + str(picked[1]):13} {lost:5.2f} {took:5.1f}", flush=True)
        print(f"{'':12} {choice.why.partition('training a round: ')[2].rstrip(')')}", flush=True)


if __name__ == "__main__":
    main()
