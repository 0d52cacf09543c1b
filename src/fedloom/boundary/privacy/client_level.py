"""Privacy of clients: clipped replies, and Gaussian noise on their sum.

McMahan, Ramage, Talwar, Zhang: Learning Differentially Private Recurrent Language Models, ICLR 2018, arXiv 1710.06963;
the adaptive bound of Andrew, Thakkar, McMahan, Ramaswamy, NeurIPS 2021, arXiv 1905.03871.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fedloom.boundary.privacy import accountant
from fedloom.boundary.privacy.base import PUBLIC, SEEDED, Memory, Privacy, number, put, tensors
from fedloom.boundary.privacy.clip import BOUND, WITHIN, Clipping
from fedloom.calls import Layer
from fedloom.errors import RunError, UsageError
from fedloom.mean import Sum
from fedloom.random import stream

if TYPE_CHECKING:
    from fedloom.boundary.books import Books
    from fedloom.calls import Call
    from fedloom.cohort import Mean
    from fedloom.method import Method, Planned
    from fedloom.runs.spec import Spec
    from fedloom.task import Task

START, RATE = 0.1, 0.2  # the adaptive bound's first value, and how fast it moves, as in its paper
CLASHES = {
    "aggregate": "how far one client can move a robust rule is not known, and the noise has to cover it",
    "compress": "error feedback and scaled coordinates can make a reply longer than its bound again",
}

UNFORMED = "Not covered: rounds before the first reply, which show that nobody was drawn in them."


@dataclass(frozen=True)
class ClientLevel(Privacy):
    """Central privacy of clients. Every client counts alike, and sums are divided by the expected number of clients."""

    noise: float  # of the deviation, in units of the clipping bound
    clip: float
    adaptive: bool
    quantile: float  # of the clients' lengths that an adaptive bound aims at
    sampling: str  # poisson, fixed, or none: nothing is amplified
    size: int  # the expected cohort
    population: int
    seed: int
    by_rounds: bool = False  # the noise was made for all rounds of the run

    @staticmethod
    def made(
        spec: Spec,
        method: Method,
        task: Task,
        delta: float,
        noise: Any = 1.0,
        clip: Any = 1.0,
        epsilon: Any = None,
        quantile: Any = 0.5,
    ) -> ClientLevel:
        """From the options of the setting."""
        for setting, why in CLASHES.items():
            if getattr(spec, setting):
                raise UsageError(f"dp=client:... does not go with {setting}={getattr(spec, setting)}: {why}")
        accountant.library()
        adaptive = clip == "adaptive"
        bound = START if adaptive else number("clip", clip)
        if number("quantile", quantile) >= 1:
            raise UsageError(f"dp: quantile is {quantile}; expected a share between 0 and 1")
        budget = None if epsilon is None else number("epsilon", epsilon)
        population = task.population
        size = population if spec.cohort is None else spec.cohort
        sampling, taking = sampled(spec, method, size, population)
        if planned := noise == "auto":
            if budget is None:
                raise UsageError("dp: noise=auto needs epsilon=...: the noise that spends it in all rounds")
            # Under replacement a sum's sensitivity is twice the bound.
            noise = accountant.calibrated(budget, delta, spec.rounds, sampling, size, population)
            noise *= 2 if accountant.replacing(sampling) else 1
        z = 0.0 if noise == 0 else number("noise", noise)
        change = "one client replaced" if accountant.replacing(sampling) else "one client's replies more or less"
        return ClientLevel(
            tuple(method.private),
            delta,
            budget,
            (
                f"{taking}; neighbours differ by {change}.",
                *([UNFORMED] if sampling == "poisson" else []),
                "The server is trusted: it sees clipped replies before their sum is noised.",
                PUBLIC,
                SEEDED,
            ),
            z,
            bound,
            adaptive,
            float(quantile),
            sampling,
            size,
            population,
            spec.seed,
            by_rounds=planned,
        )

    def on(self, task: Task) -> ClientLevel:
        everybody = task.population
        return replace(self, epsilon=None, sampling="none", size=everybody, population=everybody)

    def at_clients(self) -> Sequence[Layer]:
        return [Clipping(self.private, self.adaptive)]

    def bound(self, books: Books) -> float:
        """The clipping bound now."""
        return float(self.memory(books).get("clip", self.clip))

    def hidden_fields(self, books: Books, clients: Sequence[int]) -> dict[str, Any]:
        return {BOUND: self.bound(books)}

    def covers(self, call: Call | Planned) -> bool:
        return call.kind == "train" and call.verb == "mean"

    def protects(self, call: Call, field: str) -> bool:
        return super().protects(call, field) or (self.adaptive and self.covers(call) and field == WITHIN)

    def total(self, books: Books, call: Call, total: Sum | None) -> Sum | None:
        memory = self.memory(books)
        if self.sampling != "none" and not set(books.drawn).issuperset(call.clients):
            # Whoever can be asked without having been drawn is hidden by no draw.
            self.record_leak(books, f"{call.function} of clients that were not drawn")
        after = self.counted(memory, call.round)
        if self.epsilon is not None and self.spending(memory | {"sums": after}) > self.epsilon:
            memory["over"] = f"round {call.round} has more sums than those before, and {call.function} would cost more"
        self.raise_if_overdrawn(books)
        if total is None:
            # That nobody was drawn is a secret too: noise alone is released, once the form of the replies is known.
            like = memory.get("like", {}).get(call.function)
            if like is None or memory["leaks"]:
                return None
            total = Sum.of(like, 1.0)
            total.count = 0
            return total
        for path, leaf in total.leaves.items():
            if path[0] in self.private and not isinstance(leaf.weight, torch.Tensor) and leaf.weight != total.weight:
                raise RunError(
                    f"dp: only some replies to {call.function} have the private field {path[0]!r}; how many do is not "
                    "protected, so that all must have it"
                )
        return total

    def mean(self, books: Books, call: Call, mean: Mean) -> Mean:
        memory, bound, fields = self.memory(books), self.bound(books), dict(mean.fields)
        generator = stream(self.seed, "world", "privacy", call.round, call.nth)
        flat = tensors(fields, self.private)
        if self.sampling == "poisson" and call.function not in memory.get("like", {}):
            zeros: dict[str, Any] = put(
                {name: fields[name] for name in flat},
                {name: value.new_zeros(value.shape) for name, value in flat.items()},
            )
            zeros |= {WITHIN: 0.0} if self.adaptive else {}
            memory["like"] = memory.get("like", {}) | {call.function: zeros}
        noise = self.noise
        if self.adaptive:
            noise, counting = shared(self.noise, self.size)
            # One bit less one half a client: its coming or going moves the sum by no more than one half.
            within = (fields.pop(WITHIN) - 0.5) * mean.count
            within += counting * float(torch.randn((), generator=generator, dtype=torch.float64))
            memory["clip"] = bound * math.exp(-RATE * (within / self.size + 0.5 - self.quantile))
        for name, value in flat.items():
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
            flat[name] = ((value.double() * mean.count + noise * bound * drawn) / self.size).to(value.dtype)
        memory["sums"] = self.counted(memory, call.round)
        books.notes["dp/clip"] = bound
        # How many replied, and who, is as secret as what they said.
        return replace(mean, fields=put(fields, flat), count=self.size, weight=float(self.size), missing=())

    def of_sample(self, epsilon: float) -> tuple[float, float]:
        """Of a client that stays, one sample is its removal and the entry of another: two steps, unless replaced."""
        if accountant.replacing(self.sampling) or epsilon == math.inf:
            return epsilon, self.delta
        return 2 * epsilon, self.delta * (1 + math.exp(min(epsilon, 700.0)))

    @staticmethod
    def counted(memory: Memory, round: int) -> dict[str, int]:
        """How many sums the rounds have had, with one more in this round."""
        sums = memory.get("sums", {})
        return _folded(sums | {str(round): sums.get(str(round), 0) + 1}, round)

    def spending(self, memory: Memory, more: int = 0) -> float:
        rounds: dict[int, int] = {}
        last = 1
        for key, value in memory.get("sums", {}).items():
            if key.startswith("x"):
                rounds[int(key[1:])] = rounds.get(int(key[1:]), 0) + value
            else:
                last = value
                rounds[value] = rounds.get(value, 0) + 1
        if more:
            rounds[last] = rounds.get(last, 0) + more
        noise = self.noise / (2 if accountant.replacing(self.sampling) else 1)
        return accountant.epsilon(noise, rounds, self.delta, self.sampling, self.size, self.population)


def sampled(spec: Spec, method: Method, size: int, population: int) -> tuple[str, str]:
    """How clients are drawn, as far as it amplifies privacy: poisson, fixed or none; and in words."""
    from fedloom.method import Method as Base

    if size == population:
        return "none", "Every client takes part in every round, so that sampling amplifies nothing"
    reasons = {
        "the method chooses who takes part": type(method).select is not Base.select,
        f"availability={spec.availability} decides who takes part": spec.availability != "always",
        f"overselect={spec.overselect:g} favours fast clients": spec.overselect > 1,
        f"participation={spec.participation} is no uniform draw": spec.participation not in ("uniform", "poisson"),
    }
    for why, holds in reasons.items():
        if holds:
            return "none", f"Who takes part is taken to be known, since {why}: sampling amplifies nothing"
    if spec.participation == "poisson":
        return "poisson", f"Each client takes part with probability {size}/{population}, on its own (Poisson sampling)"
    return "fixed", f"{size} of {population} clients take part, drawn without replacement"


def shared(noise: float, size: int) -> tuple[float, float]:
    """The noise on the sum and on the count of clients within an adaptive bound that together cost what `noise` does.

    The count's is a twentieth of the cohort, as in the paper, where it costs at most a quarter of the budget.
    """
    counting = max(size / 20, noise)
    return (noise**-2 - (2 * counting) ** -2) ** -0.5 if noise else 0.0, counting


def _folded(sums: Mapping[str, int], now: int) -> dict[str, int]:
    """Rounds before this one, counted by how many sums they had (`x1: 12`), so that memory does not grow."""
    folded: dict[str, int] = {}
    for key, value in sums.items():
        if key.startswith("x"):
            folded[key] = folded.get(key, 0) + value
        elif int(key) != now:
            folded[f"x{value}"] = folded.get(f"x{value}", 0) + 1
    return folded | {str(now): sums[str(now)]}
