"""Adam as a pure function: its moments are values of messages, which a node keeps and a checkpoint has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fedloom.vector import Vector


@dataclass(frozen=True)
class Adam:
    """Adam [Kingma, Ba 2015, arXiv 1412.6980], step for step as `torch.optim.Adam`.

    `moments` are {} before the first step, then `{"steps": int, "first": Vector, "second": Vector}`.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def step(self, w: Vector, gradient: Vector, moments: dict[str, Any]) -> tuple[Vector, dict[str, Any]]:
        """The new vector and the new moments. Running statistics in `w` stay, as their gradient is zero."""
        g = gradient.flat + self.weight_decay * w.flat if self.weight_decay else gradient.flat
        g = torch.where(torch.arange(len(g), device=g.device) < w.layout.split, g, 0.0)
        steps = moments.get("steps", 0) + 1
        one, two = self.betas
        first = torch.lerp(moments["first"].flat if moments else torch.zeros_like(g), g, 1 - one)
        second = two * (moments["second"].flat if moments else torch.zeros_like(g)) + (1 - two) * g * g
        scale = second.sqrt() / (1 - two**steps) ** 0.5 + self.eps
        moved = w.flat - self.lr / (1 - one**steps) * first / scale
        kept = {"steps": steps, "first": Vector(first, w.layout), "second": Vector(second, w.layout)}
        return Vector(moved, w.layout), kept
