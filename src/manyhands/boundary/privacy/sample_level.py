"""Privacy of samples: DP-SGD inside the clients, with Opacus' gradients sample by sample.

Abadi et al.: Deep Learning with Differential Privacy, CCS 2016, arXiv 1607.00133.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from manyhands.boundary.layer import Layer, Reply
from manyhands.boundary.privacy import WEIGHT, Privacy, accountant, number
from manyhands.errors import UsageError
from manyhands.task import Batch, Data

if TYPE_CHECKING:
    from manyhands.boundary import Boundary
    from manyhands.descent import Loss
    from manyhands.engines import Call
    from manyhands.method import Method
    from manyhands.node import Client, Node
    from manyhands.spec import Spec
    from manyhands.task import Task


@dataclass(frozen=True)
class Guard:
    """How a client under DP-SGD draws batches and takes gradients: `Node` asks it in place of doing so itself."""

    noise: float
    clip: float

    def batches(
        self, node: Node, batch: int | None, epochs: int | None, steps: int | None, data: Data
    ) -> Iterator[Batch]:
        """Poisson samples: every sample is in a batch with probability batch / n, on its own; empty ones included."""
        n = len(data)
        size = min(batch or n, n)
        an_epoch = -(-n // size)
        count = steps if steps is not None else an_epoch * (1 if epochs is None else epochs)
        draw = node.rng("privacy batches")
        rows = data.taken(None)
        for _ in range(count):
            chosen = (
                torch.ones(n, dtype=torch.bool)
                if size == n
                else torch.rand(n, generator=draw, dtype=torch.float64) < size / n
            )
            here = rows[chosen.to(rows.device)]
            node.expected = size  # what sums are divided by
            yield Batch(data.inputs[here], data.labels[here])

    def gradient(
        self, node: Node, net: nn.Module, params: Sequence[Tensor], loss: Loss, batch: Batch
    ) -> tuple[Tensor, list[Tensor]]:
        """The batch's mean loss and its noised gradient: clipped by sample, summed, noised, over the expected size."""
        draw = node.rng("privacy noise")
        value, sums = torch.zeros(()), [torch.zeros_like(p) for p in params]
        if len(batch):
            value, each = per_sample(net, params, loss, batch)
            lengths = torch.stack([g.flatten(1).square().sum(1) for g in each]).sum(0).sqrt()
            scale = (self.clip / lengths.clamp(min=1e-12)).clamp(max=1.0)
            sums = [torch.einsum("b,b...->...", scale, g) for g in each]
        deviation = self.noise * self.clip
        noised = [s + deviation * torch.randn(s.shape, generator=draw).to(s) for s in sums]
        return value, [s / (node.expected or max(1, len(batch))) for s in noised]


def per_sample(net: nn.Module, params: Sequence[Tensor], loss: Loss, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """The mean loss of a batch, and the gradient of every sample's loss, [B, ...] a parameter."""
    from opacus.grad_sample import GradSampleModule
    from opacus.validators import ModuleValidator

    problems = ModuleValidator.validate(net)
    if problems:
        raise UsageError(f"dp at the level of samples: {problems[0]}".replace("\n", " "))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus warns of hooks that it needs itself
        hooked = GradSampleModule(net, loss_reduction="mean")
        try:
            value = loss(net, batch)
            value.backward()
            each = [getattr(p, "grad_sample", None) for p in params]  # none where the loss does not use a parameter
            found = [p.new_zeros(len(batch), *p.shape) if g is None else g for p, g in zip(params, each, strict=True)]
            return value.detach(), [g.detach() for g in found]
        finally:
            for p in net.parameters():
                p.grad = None
            hooked.to_standard_module()


@dataclass(frozen=True)
class Guarding(Layer):
    """At a client: every gradient that it takes is private."""

    guard: Guard

    def around(self, client: Client, call: Call, message: Mapping[str, Any], inner: Callable[[], Reply]) -> Reply:
        client.guard = self.guard
        return inner()


@dataclass(frozen=True)
class SampleLevel(Privacy):
    """Privacy of single samples, also from the server: what leaves a client depends on them through gradients."""

    noise: float
    clip: float
    batch: int  # the method's batch size; 0: all samples at once
    sizes: tuple[int, ...]  # training samples of every client

    @staticmethod
    def made(
        spec: Spec, method: Method, task: Task, delta: float, noise: Any = 1.0, clip: Any = 1.0, epsilon: Any = None
    ) -> SampleLevel:
        """From the options of the setting."""
        accountant.library()
        try:
            import opacus  # noqa: F401
        except ImportError:
            raise UsageError("dp=sample:... needs the extra: pip install 'manyhands[dp]'") from None
        sizes = tuple(int(task.info(k).get("n", 0)) for k in range(task.population))
        batch = getattr(method, "batch", 0)
        return SampleLevel(
            tuple(method.private),
            delta,
            None if epsilon is None else number("epsilon", epsilon),
            (
                "Batches are Poisson samples of a client's data; neighbours differ by one sample more or less.",
                "How many samples a client has is taken to be public. Epsilon is that of the client that spent most.",
                "Clients are trusted to train as told; the server need not be.",
            ),
            number("noise", noise),
            number("clip", clip),
            batch,
            sizes,
        )

    def layers(self) -> Sequence[Layer]:
        return [Guarding(Guard(self.noise, self.clip))]

    def protects(self, call: Call, field: str) -> bool:
        return super().protects(call, field) or (call.kind == "train" and field == WEIGHT)

    def saw(self, boundary: Boundary, call: Call, client: int, fields: Sequence[str], steps: int) -> None:
        super().saw(boundary, call, client, fields, steps)
        memory = boundary.memory.setdefault("privacy", {"leaks": []})
        taken = {int(k): v for k, v in memory.get("steps", {}).items()}
        taken[client] = taken.get(client, 0) + steps
        memory["steps"] = {str(k): taken[k] for k in sorted(taken)}
        memory["last"] = max(steps, 1)

    def spending(self, boundary: Boundary, more: int = 0) -> float:
        memory = boundary.memory.get("privacy", {})
        worst: dict[int, int] = {}  # most steps of clients of a size
        for client, steps in memory.get("steps", {}).items():
            n = self.sizes[int(client)]
            worst[n] = max(worst.get(n, 0), steps + more * memory["last"])
        found = [
            accountant.epsilon(self.noise, {1: steps}, self.delta, "poisson", min(self.batch or n, n), n)
            for n, steps in worst.items()
        ]
        return max(found, default=0.0)
