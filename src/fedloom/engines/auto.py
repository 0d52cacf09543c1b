"""Chooses an engine from what a training step costs here and how much work a round is."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fedloom.descent import Descent
from fedloom.engines.gather import Gather, Parked
from fedloom.engines.vectorized import at_once
from fedloom.method import Method
from fedloom.node import Client
from fedloom.optimizers import SGD
from fedloom.site import Site
from fedloom.world import World

STEPS = 4  # timed, after as many that warm up
TOGETHER = 16  # clients in the trial of batched training on a processor; an accelerator's pays by its size
SAMPLED = 100  # clients whose sizes stand for all
WORTHWHILE = 0.02  # seconds of a round below which worker processes do not pay
CLEARLY = 2.0  # how much faster batches of clients must be: they change the last bits of a result


@dataclass(frozen=True)
class Choice:
    """An engine, its number of workers (0: it has none), and the reason in words."""

    engine: str
    workers: int
    why: str


def choose(method: Method, site: Site, world: World, workers: int, cores: int) -> Choice:
    """The engine that should be fastest; `workers` (0: as many as cores) bounds the processes.

    `serial` and `pool` give the same bits, so which of them is chosen changes no result. `vectorized` is chosen only
    where it is clearly faster.
    """
    if site.task.demands:
        return Choice(
            "serial", 0, "serial: in such a problem no client trains the network alone, so no step can be timed"
        )
    batch, epochs = method.of_training("batch") or 32, method.of_training("epochs") or 1
    asked = range(0, world.population, max(1, world.population // SAMPLED))
    sizes = {client: len(site.task.data(client, "train")) for client in asked}
    steps = sum(epochs * -(-n // batch) for n in sizes.values()) / len(sizes)
    cohort = world.cohort or world.population
    largest = max(sizes, key=lambda client: sizes[client])
    alone = _seconds(site, largest, batch, 1)
    assert alone is not None
    many = min(cohort, TOGETHER if site.device.type == "cpu" else at_once(site))
    together = _seconds(site, largest, batch, many) if cohort > 1 else None
    hands = min(workers or cores, cohort)
    seconds = {"serial": cohort * steps * alone}
    if hands > 1 and site.device.type == "cpu" and seconds["serial"] > WORTHWHILE:
        seconds["pool"] = seconds["serial"] / hands
    best = min(seconds, key=lambda name: seconds[name])
    if together is not None:
        seconds["vectorized"] = cohort * steps * together
        if seconds["vectorized"] * CLEARLY < seconds[best]:
            best = "vectorized"
    shown = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
    return Choice(
        best,
        hands if best == "pool" else workers if best == "vectorized" else 0,
        f"{best}: a step takes {1000 * alone:.2g} ms alone on {site.device}, and a round has about {cohort} x "
        f"{steps:.0f} of them (training a round: {shown})",
    )


def _seconds(site: Site, client: int, batch: int, together: int) -> float | None:
    """Seconds of one client's step when so many train together; None if this network or loss has no batched form."""
    gather = Gather(site)
    if together > 1 and not gather.fits(site.bench):
        return None

    def trial() -> list[Parked]:
        nodes = [Client(site, client, {}, "auto") for _ in range(together)]
        job = Descent(site.initial, 0.0, None, STEPS, batch, site.task.loss, None, SGD(), 0.0, None, None, None)
        return [Parked(node, job) for node in nodes]

    def run() -> None:
        if together == 1:
            trial()[0].alone()
        elif not gather.batched(trial()):
            raise NotImplementedError

    try:
        run()
        _wait_for_device(site)
        began = time.perf_counter()
        run()
        _wait_for_device(site)
    except NotImplementedError:
        return None
    return (time.perf_counter() - began) / (STEPS * together)


def _wait_for_device(site: Site) -> None:
    """Returns once an accelerator, which works behind the program's back, has done what it was asked."""
    site.initial.flat[:1].cpu()
