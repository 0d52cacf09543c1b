"""The virtual clock: completions of clients a second, with training stubbed out, and memory over the rounds.

    python benchmarks/clock.py
    python benchmarks/clock.py --completions 2000000

Clients do not train: they answer with a vector of ten numbers. Speeds and bandwidths are log-normal. What is measured
is all the rest: messages booked, jobs put into the queue, the clock, replies taken out. `under way`: clients that work
at a time; `k`: how many replies a server step waits for, after which these clients are asked again. `boundary` is the
boundary by itself, a server step a round; `experiment` is a whole run, with its record on disk: its rounds are of one
server step (k=1 is then FedAsync, which writes a line of metrics and four of the ledger for every completion), and in
`long rounds` of so many steps that a round has 1,000 completions. `KiB a round` is what the second half of the rounds
added to the memory in use, in another pass of 400 rounds. Seconds are the processor's, the fastest of three passes:
others may be at work on the machine.
"""

import argparse
import gc
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fedloom.calls import Call, Outcome
from fedloom.cohort import Cohort
from fedloom.engines.base import Engine
from fedloom.method import Method, client
from fedloom.node import Client, Server
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec
from fedloom.tasks.toy import Toy
from fedloom.vector import Layout, Vector

PLAN = [  # population, under way, k
    (1_000, 100, 1),
    (1_000, 100, 10),
    (10_000, 1_000, 100),
    (1_000_000, 10_000, 1_000),
]
REPLY = {"delta": Vector(torch.ones(10), Layout(("w",), ((10,),), 1), readonly=True)}
SIZES = {"envelope": 8, "delta": 80}
WORLD = {"speed": "lognormal:1.0", "bandwidth": "lognormal:1.0,median=10", "latency": 0.05}


@dataclass(frozen=True)
class Relay(Method):
    """Asks whoever has answered again."""

    under_way: int = 100
    k: int = 10
    steps: int = 1  # of the server, in a round

    def setup(self, server: Server, clients: Cohort) -> None:
        server.heard = list(range(self.under_way))

    def round(self, server: Server, cohort: Cohort) -> None:
        asked = server.heard
        for _ in range(self.steps):
            cohort.clients_by_id(asked).submit(self.local, model=server.model)
            asked = [reply.client for reply in cohort.wait(self.k)]
        server.heard = asked

    @client
    def local(self, client: Client, model: Vector) -> dict[str, Vector]:
        return {"delta": model}


class Stub(Engine):
    """No training: every client has taken ten steps."""

    def run(self, call: Call, clients: Iterable[int]) -> Iterator[Outcome]:
        for one in clients:
            yield Outcome(one, REPLY, SIZES, {"loss": 1.0}, 10) if call.kind == "train" else evaluated(one)


def evaluated(client: int) -> Outcome:
    """Nobody is measured."""
    return Outcome(client, {"test": {"n": 0}, "validation": {"n": 0}}, {"envelope": 8}, {}, 0)


class Crowd(Toy):
    """The toy problem's first client, as a population."""

    def __init__(self, population: int) -> None:
        super().__init__((8,))
        self.population = population

    def data(self, client: int, split: str):  # type: ignore[no-untyped-def]
        return super().data(0, split)

    def global_test(self):  # type: ignore[no-untyped-def]
        return super().data(0, "test")

    def to(self, device: torch.device) -> "Crowd":
        return self


def made(population: int, under_way: int, k: int, rounds: int, steps: int = 1) -> Experiment:
    method = Relay(under_way, k, steps)
    settings = {"method": method.to_spec(), "partition": "given", "rounds": rounds, "eval_every": rounds + 1}
    experiment = Experiment(Spec.of(settings | WORLD), Crowd(population), method).begin(None)
    experiment.engine = experiment.boundary.arrivals.engine = Stub()
    return experiment


def boundary_alone(population: int, under_way: int, k: int, completions: int) -> float:
    """Completions a second."""
    experiment = made(population, under_way, k, 1)
    boundary, server, method = experiment.boundary, experiment.server, experiment.method
    asked = range(under_way)
    experiment.engine.start(method, experiment.site, experiment.states)
    began = time.process_time()
    for round in range(1, completions // k + 1):
        boundary.begin("train", round)
        Cohort(asked, boundary).submit(method.local, model=server.model)
        asked = [reply.client for reply in Cohort(asked, boundary).wait(k)]
        boundary.books.ledger.close()
        boundary.books.timeline.close(round)
    return completions // k * k / (time.process_time() - began)


def whole(population: int, under_way: int, k: int, completions: int, steps: int = 1) -> float:
    """Completions a second of the rounds of a run."""
    rounds = max(3, completions // (k * steps))
    experiment = made(population, under_way, k, rounds, steps)
    moments = []

    def look(row: dict[str, object]) -> None:
        if row["round"] in (1, rounds - 1):  # without the first round, and the last's evaluation; asking is slow
            moments.append(time.process_time())

    experiment.go(look)
    return k * steps * (rounds - 2) / (moments[1] - moments[0])


def growth(population: int, under_way: int, k: int, rounds: int) -> float:
    """KiB that a round of the second half leaves in memory."""
    held = []

    def look(row: dict[str, object]) -> None:
        if row["round"] in (rounds // 2, rounds - 1):  # the last one is evaluated too
            held.append(tracemalloc.get_traced_memory()[0])

    experiment = made(population, under_way, k, rounds)
    tracemalloc.start()
    experiment.go(look)
    tracemalloc.stop()
    return (held[1] - held[0]) / 1024 / (rounds - rounds // 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=200_000)
    parser.add_argument("--out", type=Path, help="a CSV file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # as the command line does
    lines = ["population,under_way,k,boundary_per_second,experiment_per_second,long_rounds_per_second,kib_a_round"]
    print("population  under way      k   boundary/s  experiment/s  long rounds/s  KiB a round")
    for population, under_way, k in PLAN:
        completions = max(given.completions // (20 if k == 1 else 1), 4 * under_way)
        alone = max(boundary_alone(population, under_way, k, completions) for _ in range(3))
        run = max(whole(population, under_way, k, completions) for _ in range(3))
        long = max(whole(population, under_way, k, completions, max(1, 1000 // k)) for _ in range(3))
        grown = growth(population, under_way, k, 400 if under_way < 10_000 else 40)
        lines.append(f"{population},{under_way},{k},{alone:.0f},{run:.0f},{long:.0f},{grown:.2f}")
        print(
            f"{population:10,} {under_way:10,} {k:6,} {alone:12,.0f} {run:13,.0f} {long:14,.0f} {grown:12.2f}",
            flush=True,
        )
    if given.out:
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
