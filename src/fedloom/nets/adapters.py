"""Low-rank adapters beside frozen weights, with room for what was merged, and what can stand in their place."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedloom.errors import UsageError

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
    for _, module in adapted(net):
        if not isinstance(module, LowRank):
            module.register_buffer("update", module.weight.new_zeros(sizes(module)))
            module.register_forward_hook(_add_update)
    return net


def _add_update(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + F.linear(inputs[0], module.get_buffer("update"))


class Core(nn.Module):
    """A frozen layer with a small matrix between fixed ones: `base(x) + B R A x`, of which R [r, r] is trained.

    A [r, in] is the buffer `into.weight`, R the parameter `core.weight`, B [out, r] the buffer `out.weight`; all three
    are zero at the start.
    """

    def __init__(self, base: nn.Module, outputs: int, inputs: int, rank: int) -> None:
        super().__init__()
        self.base = base
        self.into, self.core, self.out = Fixed(rank, inputs), nn.Linear(rank, rank, bias=False), Fixed(outputs, rank)
        nn.init.zeros_(self.core.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.out(self.core(self.into(x)))
        return out


class Fixed(nn.Module):
    """A linear map whose matrix [out, in] is the buffer `weight`."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.get_buffer("weight"))


class Whole(nn.Module):
    """A frozen layer with an update of any rank: `base(x) + D x`, of which D [out, in], zero at the start, is trained.

    D is `update.weight`. The gradient by it is that by the layer's weight.
    """

    def __init__(self, base: nn.Module, outputs: int, inputs: int) -> None:
        super().__init__()
        self.base = base
        self.update = nn.Linear(inputs, outputs, bias=False)
        nn.init.zeros_(self.update.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.update(x)
        return out


def cored(net: nn.Module, rank: int) -> nn.Module:
    """A network whose adapters are each replaced by a `Core`."""
    for name, layer in adapted(net):
        if rank > min(sizes(layer)):
            raise UsageError(
                f"adapters of rank {rank} for {name}, a layer of {list(sizes(layer))}; take a smaller rank"
            )
    return replaced(net, lambda base, outputs, inputs: Core(base, outputs, inputs, rank))


def whole(net: nn.Module) -> nn.Module:
    """A network whose adapters are each replaced by a `Whole`."""
    return replaced(net, Whole)


def replaced(net: nn.Module, make: Callable[[nn.Module, int, int], nn.Module]) -> nn.Module:
    """A network with `make(base, outputs, inputs)` in the place of every adapter, `base` being its frozen layer."""
    for name, layer in adapted(net):
        parent, _, child = name.rpartition(".")
        base = layer.base if isinstance(layer, LowRank) else layer.base_layer
        setattr(net.get_submodule(parent), child, make(base, *sizes(layer)))
    return net


def adapted(net: nn.Module) -> list[tuple[str, Any]]:
    """The layers of a network that have an adapter, PEFT's or a `LowRank`, by name."""
    return [(name, one) for name, one in net.named_modules() if hasattr(one, "lora_A") and hasattr(one, "lora_B")]


def sizes(layer: Any) -> tuple[int, int]:
    """How many numbers an adapted layer puts out, and how many it takes in."""
    parts = (layer.lora_A, layer.lora_B)
    a, b = parts if isinstance(layer, LowRank) else (next(iter(part.values())) for part in parts)
    return b.weight.shape[0], a.weight.shape[1]
