"""Narrow copies of networks that run their layers in a chain."""

from __future__ import annotations

from torch import nn

from fedloom.errors import UsageError


def narrower(net: nn.Module, share: float) -> nn.Module:
    """A network whose layers have a share of the channels, rounded down, with fresh weights and the same names.

    All of the data come in and all classes go out. It may have Linear, Conv2d and BatchNorm layers, each of which takes
    in what the one before it puts out; UsageError for others.
    """
    layers = [(name, module) for name, module in net.named_modules() if list(module.parameters(recurse=False))]
    before = now = 0  # channels of the layer before, in the wide network and in the narrow one
    for place, (name, layer) in enumerate(layers):
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.num_features == before:
            made: nn.Module = type(layer)(now)
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            inputs, outputs = layer.weight.shape[1], layer.weight.shape[0]
            if before and (inputs % before or (isinstance(layer, nn.Conv2d) and inputs != before)):
                raise UsageError(f"{name} takes in {inputs} channels, and {before} come: no chain of layers")
            narrow = inputs // before * now if before else inputs  # a channel is a block once it is flat
            before, now = outputs, outputs if place == len(layers) - 1 else max(1, int(outputs * share))
            bias = layer.bias is not None
            if isinstance(layer, nn.Linear):
                made = nn.Linear(narrow, now, bias)
            elif layer.groups != 1 or isinstance(layer.padding, str):
                raise UsageError(f"{name} has groups of channels, or padding by a word; narrow networks have neither")
            else:
                size, stride, padding, dilation = layer.kernel_size, layer.stride, layer.padding, layer.dilation
                made = nn.Conv2d(narrow, now, size, stride, padding, dilation, bias=bias)  # type: ignore[arg-type]
        else:
            raise UsageError(
                f"{name}, a {type(layer).__name__}, cannot be narrowed; take linear layers or convolutions"
            )
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, made)
    return net
