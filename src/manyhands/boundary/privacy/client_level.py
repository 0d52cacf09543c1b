"""Privacy of clients: clipped replies, and Gaussian noise on their sum.

McMahan, Ramage, Talwar, Zhang: Learning Differentially Private Recurrent Language Models, ICLR 2018, arXiv 1710.06963;
the adaptive bound of Andrew, Thakkar, McMahan, Ramaswamy, NeurIPS 2021, arXiv 1905.03871.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from manyhands.boundary.layer import Layer, Reply
from manyhands.boundary.privacy import WEIGHT, Privacy, accountant, number, put, tensors
from manyhands.errors import UsageError
from manyhands.random import stream

if TYPE_CHECKING:
    from manyhands.boundary import Boundary
    from manyhands.cohort import Mean
    from manyhands.engines import Call
    from manyhands.method import Method
    from manyhands.node import Client
    from manyhands.spec import Spec
    from manyhands.task import Task

CLIP = "_clip"  # the bound, as it goes along with a message
WITHIN = "within"  # whether a reply was within it, as it comes back
START, RATE = 0.1, 0.2  # the adaptive bound's first value, and how fast it moves, as in its paper


@dataclass(frozen=True)
class Clipping(Layer):
    """At a client: its private fields, taken together, get at most the length of the bound."""

    private: tuple[str, ...]
    adaptive: bool

    def around(self, client: Client, call: Call, message: Mapping[str, Any], inner: Callable[[], Reply]) -> Reply:
        reply = inner()
        if call.verb != "mean" or CLIP not in message:
            return reply
        reply = {name: value for name, value in reply.items() if name != WEIGHT}
        flat = tensors(reply, self.private)
        length = math.sqrt(sum(float(t.double().square().sum()) for t in flat.values()))
        bound = float(message[CLIP])
        # A hair below, so that rounding to single precision does not lead beyond the bound.
        scale = min(1.0, bound * (1 - 1e-6) / length) if length > 0 else 1.0
        clipped = reply if scale == 1.0 else put(reply, {name: t * scale for name, t in flat.items()})
        return clipped | ({WITHIN: float(length <= bound)} if self.adaptive else {})


@dataclass(frozen=True)
class ClientLevel(Privacy):
    """Central privacy of clients. Every client counts alike, and sums are divided by the expected number of clients."""

    noise: float  # of the deviation, in units of the clipping bound
    clip: float
    adaptive: bool
    quantile: float  # of the clients' lengths that an adaptive bound aims at
    sampling: str  # poisson, fixed, or none where everybody takes part
    size: int  # the expected cohort
    population: int
    seed: int

    @staticmethod
    def made(
        spec: Spec,
        method: Method,
        task: Task,
        delta: float,
        noise: Any = 1.0,
        clip: Any = 1.0,
        epsilon: Any = None,
        quantile: float = 0.5,
    ) -> ClientLevel:
        """From the options of the setting."""
        for setting, why in CLASHES.items():
            if getattr(spec, setting):
                raise UsageError(f"dp=client:... does not go with {setting}={getattr(spec, setting)}: {why}")
        adaptive = clip == "adaptive"
        bound = START if adaptive else number("clip", clip)
        if not 0 < quantile < 1:
            raise UsageError(f"dp: quantile is {quantile}; expected a share between 0 and 1")
        budget = None if epsilon is None else number("epsilon", epsilon)
        population = task.population
        size = population if spec.cohort is None else spec.cohort
        sampling = "none" if size == population else "poisson" if spec.participation == "poisson" else "fixed"
        if spec.participation not in ("uniform", "poisson"):
            raise UsageError(f"dp accounts for participation=poisson or uniform; got {spec.participation}")
        if noise == "auto":
            if budget is None:
                raise UsageError("dp: noise=auto needs epsilon=...: the noise that spends it in all rounds")
            # Under replacement a sum's sensitivity is twice the bound.
            noise = accountant.calibrated(budget, delta, spec.rounds, sampling, size, population)
            noise *= 2 if accountant.replacing(sampling) else 1
        z = noise if noise == 0 else number("noise", noise)
        accountant.library()
        taking = {
            "poisson": f"Each client takes part with probability {size}/{population}, on its own (Poisson sampling)",
            "fixed": f"{size} of {population} clients take part, drawn without replacement",
            "none": "Every client takes part in every round, so that sampling amplifies nothing",
        }
        change = "one client replaced" if accountant.replacing(sampling) else "one client more or less"
        return ClientLevel(
            tuple(method.private),
            delta,
            budget,
            (
                f"{taking[sampling]}; neighbours differ by {change}.",
                "The server is trusted: it sees clipped replies before their sum is noised.",
                "Noise comes from the run's seed, for repetition; a deployment has to draw it from the system.",
            ),
            float(z),
            bound,
            adaptive,
            float(quantile),
            sampling,
            size,
            population,
            spec.seed,
        )

    def layers(self) -> Sequence[Layer]:
        return [Clipping(self.private, self.adaptive)]

    def bound(self, boundary: Boundary) -> float:
        """The clipping bound now."""
        return float(boundary.memory.get("privacy", {}).get("clip", self.clip))

    def begin(self, boundary: Boundary) -> dict[str, Any]:
        return {CLIP: self.bound(boundary)}

    def protects(self, call: Call, field: str) -> bool:
        return call.verb == "mean" and (super().protects(call, field) or (call.kind == "train" and field == WITHIN))

    def weight(self, call: Call, weight: str | None) -> str | None:
        if weight not in (None, WEIGHT):
            raise UsageError(f"dp at the level of clients lets all count alike; {call.function} weights by {weight!r}")
        return None

    def released(self, boundary: Boundary, call: Call, mean: Mean) -> Mean:
        from dataclasses import replace

        memory = boundary.memory.setdefault("privacy", {"leaks": []})
        bound, fields = self.bound(boundary), dict(mean.fields)
        generator = stream(self.seed, "world", "privacy", call.round, call.nth)
        noise = self.noise
        if self.adaptive:
            within = fields.pop(WITHIN) * mean.count
            count_noise = self.size / 20  # as in the paper: the counting takes little of the budget
            if self.noise > 1 / (2 * count_noise):
                noise = (self.noise**-2 - (2 * count_noise) ** -2) ** -0.5
            within += count_noise * float(torch.randn((), generator=generator, dtype=torch.float64))
            memory["clip"] = bound * math.exp(-RATE * (within / self.size - self.quantile))
        flat = {}
        for name, value in tensors(fields, self.private).items():
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
            flat[name] = ((value.double() * mean.count + noise * bound * drawn) / self.size).to(value.dtype)
        sums = {str(k): v for k, v in memory.get("sums", {}).items()}
        sums[str(call.round)] = sums.get(str(call.round), 0) + 1
        memory["sums"] = _folded(sums, call.round)
        boundary.notes |= {"dp/epsilon": self.spending(boundary), "dp/clip": bound}
        return replace(mean, fields=put(fields, flat))

    def spending(self, boundary: Boundary, more: int = 0) -> float:
        sums = boundary.memory.get("privacy", {}).get("sums", {})
        rounds: dict[int, int] = {}
        last = 1
        for key, value in sums.items():
            if key.startswith("x"):
                rounds[int(key[1:])] = rounds.get(int(key[1:]), 0) + value
            else:
                last = value
                rounds[value] = rounds.get(value, 0) + 1
        if more:
            rounds[last] = rounds.get(last, 0) + more
        noise = self.noise / (2 if accountant.replacing(self.sampling) else 1)
        return accountant.epsilon(noise, rounds, self.delta, self.sampling, self.size, self.population)


def _folded(sums: Mapping[str, int], now: int) -> dict[str, int]:
    """Rounds before this one, counted by how many sums they had (`x1: 12`), so that memory does not grow."""
    folded: dict[str, int] = {}
    for key, value in sums.items():
        if key.startswith("x"):
            folded[key] = folded.get(key, 0) + value
        elif int(key) != now:
            folded[f"x{value}"] = folded.get(f"x{value}", 0) + 1
    return folded | {str(now): sums[str(now)]}


CLASHES = {
    "aggregate": "how far one client can move a robust rule is not known, and the noise has to cover it",
    "compress": "error feedback and scaled coordinates can make a reply longer than its bound again",
}
