"""Chooses an engine by what rounds of a stand-in take on each, here and now."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from fedloom import engines
from fedloom.calls import Call
from fedloom.engines.base import Engine
from fedloom.engines.gather import Gather
from fedloom.engines.perform import weigh_reply
from fedloom.engines.pool import start_method
from fedloom.engines.traced import AFTER
from fedloom.errors import RunError
from fedloom.mean import Tree
from fedloom.message import Value
from fedloom.method import Method, client
from fedloom.node import Client
from fedloom.site import Site
from fedloom.vector import Vector
from fedloom.world import World

BUDGET = 0.4  # seconds of one client after another that a trial should last
STEPS = 4  # of the client whose step is timed alone
REPEATS = 5  # of a trial that is within the budget; their median counts
WARMING = 3.0  # seconds that a batch of clients may take until its steps are traced
HOPELESS = 2.0  # how much slower than another engine an engine must be before its steps are traced to be left at that
FEWEST = 16  # clients of a trial, where a round has as many, however long they take
WORTHWHILE = 0.005  # seconds of a round below which worker processes do not pay
CLEARLY = 1.15  # how much faster batches of clients must be: they change the last bits of a result


@dataclass(frozen=True)
class Choice:
    """An engine, its number of workers (0: it has none), and the reason in words."""

    engine: str
    workers: int
    why: str


@dataclass(frozen=True)
class StandIn(Method):
    """What clients do in most methods: a descent, whose difference is sent; as much of it as a trial asks for."""

    batch: int = 32
    epochs: int = 1

    @client
    def local(self, client: Client, model: Vector, share: float) -> dict[str, Value]:
        steps = max(1, round(share * client.count(self.batch, self.epochs)))
        w, _ = client.descend(model, lr=0.0, steps=steps, batch=self.batch)
        return {"delta": w - model, "n": client.n}


@dataclass
class Trials:
    """Rounds of the stand-in by clients that stand for those of a round."""

    method: StandIn
    site: Site
    threads: int
    steps: Mapping[int, int]  # that each of them takes in a round
    share: float = 1.0  # of a client's steps that a trial lasts
    nth: int = field(default=0, init=False)

    @classmethod
    def of(cls, method: Method, site: Site, world: World, threads: int) -> Trials:
        """Of whole rounds, by as many clients as a round has; those without data sit out."""
        cohort = world.cohort or world.population
        spread = (place * world.population // cohort for place in range(cohort))
        standin = StandIn(method.of_training("batch") or 32, method.of_training("epochs") or 1)
        sizes = ((client, len(site.task.data(client, "train"))) for client in spread)
        return cls(standin, site, threads, {k: standin.epochs * -(-n // standin.batch) for k, n in sizes if n})

    @property
    def clients(self) -> tuple[int, ...]:
        """Who they are, in the order of a round."""
        return tuple(self.steps)

    @property
    def total(self) -> int:
        """How many steps all of them take in a round."""
        return sum(self.steps.values())

    def within(self, budget: float, step: float) -> Trials:
        """So many of the clients, and such a share of their steps, that steps of so many seconds fit the budget."""
        many = int(budget / step)
        if self.total <= many:
            return self
        fewer = min(len(self.clients), max(FEWEST, many))
        some = self.among(self.clients[place * len(self.clients) // fewer] for place in range(fewer))
        return replace(some, share=min(1.0, many / some.total))

    def among(self, clients: Iterable[int]) -> Trials:
        """The same by some of the clients."""
        return replace(self, steps={client: self.steps[client] for client in clients})

    def step(self) -> float:
        """Seconds of one step alone."""
        largest = max(self.steps, key=lambda client: self.steps[client])
        alone = replace(self.among([largest]), share=min(1.0, STEPS / self.steps[largest]))
        engine = alone.start("serial")
        alone.round(engine, alone.share)
        seconds, steps = alone.median(engine, alone.share)
        return seconds / steps

    def seconds(self, name: str, workers: int = 0, rival: float = math.inf) -> float:
        """What a whole round of these clients should take on an engine, where another one takes as long as `rival`."""
        engine = self.start(name, workers)
        try:
            self.round(engine, self.share)
            if name == "vectorized":
                # One worker may have done all of the first, so that another one is cold in the second.
                seconds, steps = min(self.round(engine, self.share) for _ in range(2))
                if seconds / steps * self.total > HOPELESS * rival:
                    return seconds / steps * self.total
                self.warm_up(engine)
            seconds, steps = self.median(engine, self.share)
            if steps >= self.total:
                return seconds
            shorter, fewer = self.median(engine, self.share / 2)
            a_step = max(0.0, seconds - shorter) / (steps - fewer) if steps > fewer else seconds / steps
            return seconds + a_step * (self.total - steps)
        finally:
            engine.stop()

    def start(self, name: str, workers: int = 0) -> Engine:
        """An engine at the site, before its first call."""
        engine = engines.build(name, workers, self.threads)
        engine.start(self.method, self.site, {})
        return engine

    def warm_up(self, engine: Engine) -> None:
        """Trials until the steps of a batch of clients are traced, or they last too long."""
        most, began = max(self.steps.values()), time.perf_counter()
        taken = 0.0
        while taken <= AFTER and time.perf_counter() - began < WARMING:
            self.round(engine, self.share)
            taken += max(1.0, self.share * most)

    def median(self, engine: Engine, share: float) -> tuple[float, int]:
        """The median seconds of a trial, made several times if it is short, and its steps."""
        times = [self.round(engine, share)]
        while len(times) < REPEATS and sum(seconds for seconds, _ in times) < BUDGET:
            times.append(self.round(engine, share))
        return sorted(times)[len(times) // 2]

    def round(self, engine: Engine, share: float) -> tuple[float, int]:
        """Seconds of a share of a round, and the steps in it."""
        self.nth += 1
        msg: dict[str, Value] = {"model": self.site.initial, "share": share}
        call = Call("mean", "local", self.clients, msg, {}, "auto", 1, self.nth)
        began = time.perf_counter()
        summing = engine.reduce(call, call.clients, (), "n")
        tree, steps = Tree(), 0
        for outcome in summing or engine.run(call, call.clients):
            steps += outcome.steps
            if summing is None:
                tree.push(weigh_reply(self.site, call, outcome, "n"))
        tree.total()
        self.site.initial.flat[:1].cpu()  # once an accelerator, which works behind the program's back, is through
        return time.perf_counter() - began, steps


def choose(method: Method, site: Site, world: World, workers: int, cores: int, threads: int = 1) -> Choice:
    """The engine that should be fastest; `workers` (0: as many as cores) bounds the processes.

    `serial` and `pool` give the same bits, so which of them is chosen changes no result. `vectorized` is chosen only
    where it is clearly faster.
    """
    if site.task.demands:
        return Choice(
            "serial", 0, "serial: in such a problem no client trains the network alone, so no step can be timed"
        )
    whole = Trials.of(method, site, world, threads)
    try:
        step = whole.step()
        some = whole.within(BUDGET, step)
        seconds = _measured(some, site, min(workers or cores, len(whole.clients)))
    except RunError as error:
        return Choice("serial", 0, f"serial: the trial of a step failed ({error})")
    best = min((engine for engine in seconds if engine[0] != "vectorized"), key=lambda engine: seconds[engine])
    together = min(seconds, key=lambda engine: seconds[engine])
    if seconds[together] * CLEARLY < seconds[best]:
        best = together
    longer = whole.total / some.total
    shown = ", ".join(
        f"{name}{f' with {hands} workers' * bool(hands)} {longer * value:.3g} s"
        for (name, hands), value in seconds.items()
    )
    return Choice(
        *best,
        f"{best[0]}: a step takes {1000 * step:.2g} ms alone on {site.device}, and a round has about "
        f"{len(whole.clients)} x {whole.total / len(whole.clients):.0f} of them (training a round: {shown})",
    )


def _measured(trials: Trials, site: Site, hands: int) -> dict[tuple[str, int], float]:
    """By engine and number of workers, the seconds of a round."""
    seconds = {("serial", 0): trials.seconds("serial")}
    forked, parallel = False, hands > 1 and site.device.type == "cpu" and seconds["serial", 0] > WORTHWHILE
    if parallel:
        # Where processes are not forked it takes seconds to start them.
        forked = start_method(site.device, trials.threads) == "fork"
        seconds["pool", hands] = trials.seconds("pool", hands) if forked else seconds["serial", 0] / hands
    # A guard on the gradients takes those of one client after the other.
    if len(trials.clients) > 1 and Gather(site).fits(site.bench) and not any(layer.guards for layer in site.layers):
        seconds["vectorized", 0] = trials.seconds("vectorized", rival=min(seconds.values()))
        if forked:
            seconds["vectorized", hands] = trials.seconds("vectorized", hands, min(seconds.values()))
    return seconds
