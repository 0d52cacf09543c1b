"""Low-rank adapters beside frozen weights, with room for what was merged."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCALE = 2.0  # s = alpha / r, the same for every rank: alpha is twice the rank


class LowRank(nn.Module):
    """A frozen Linear with a low-rank part: `base(x) + s B A x + D x`.

    A is `lora_A.weight` [r, in], B `lora_B.weight` [out, r] (zero at the start), as PEFT names them. Where it is
    `merging`, D is the buffer `update` [out, in], the sum of what earlier adapters added; else there is no D.
    """

    def __init__(self, base: nn.Linear, rank: int, merging: bool = True) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.merging = merging
        if merging:
            self.register_buffer("update", torch.zeros_like(base.weight))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + SCALE * self.lora_B(self.lora_A(x))
        return out + F.linear(x, self.get_buffer("update")) if self.merging else out


def make_room(net: nn.Module) -> nn.Module:
    """Gives every LoRA layer of a network that PEFT made the buffer `update` [out, in], which its output takes in."""
    modules: list[Any] = list(net.modules())
    for module in modules:
        if hasattr(module, "lora_A") and hasattr(module, "lora_B") and not isinstance(module, LowRank):
            a, b = (next(iter(part.values())).weight for part in (module.lora_A, module.lora_B))
            module.register_buffer("update", a.new_zeros(b.shape[0], a.shape[1]))
            module.register_forward_hook(_add_update)
    return net


def _add_update(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + F.linear(inputs[0], module.get_buffer("update"))
