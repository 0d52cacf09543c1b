"""Residual networks for small images [C, H, W] (He et al., arXiv 1512.03385), with the 3x3 stem used on CIFAR.

Shortcuts that change shape are 1x1 convolutions with a norm (the paper's option B). The norm is `batch` or `group`:
group normalisation in two groups, as in the federated baselines of FedOpt and FedPA, which keeps no running statistics
and so has no buffers to average.
"""

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from fedloom.errors import UsageError
from fedloom.nets.net import Net, check_size, widths

GROUPS = 2

Norm = Callable[[int], nn.Module]


def resnet8(options: str, shape: tuple[int, ...], classes: int, vocabulary: int) -> Net:
    """Three stages of one block, 16 to 64 maps: 78,042 parameters for 3 channels and 10 classes."""
    return residual("resnet8:", options, shape, classes, stages=(16, 32, 64), blocks=1)


def resnet18(options: str, shape: tuple[int, ...], classes: int, vocabulary: int) -> Net:
    """Four stages of two blocks, 64 to 512 maps: 11,173,962 parameters for 3 channels and 10 classes."""
    return residual("resnet18:", options, shape, classes, stages=(64, 128, 256, 512), blocks=2)


def resnet(options: str, shape: tuple[int, ...], classes: int, vocabulary: int) -> Net:
    """Three stages of 16 to 64 maps with as many blocks each as asked for: `resnet:3` or `resnet:3,group`."""
    count, _, norm = options.partition(",")
    (blocks,) = widths("resnet:BLOCKS,NORM", count, default=(1,), most=1)
    return residual(f"resnet:{blocks},", norm, shape, classes, stages=(16, 32, 64), blocks=blocks)


def residual(
    asked: str, options: str, shape: tuple[int, ...], classes: int, stages: tuple[int, ...], blocks: int
) -> Net:
    """A stem, the stages (all but the first halve the sides), the mean over all pixels, and a Linear head.

    `asked` is what stands before the norm in the network's name.
    """
    norms: dict[str, Norm] = {"batch": nn.BatchNorm2d, "group": lambda maps: nn.GroupNorm(GROUPS, maps)}
    if options not in ("", *norms):
        raise UsageError(f"model {asked[:-1]!r} has no norm {options!r}; take {asked}batch or {asked}group")
    norm = norms[options or "batch"]
    if norm is nn.BatchNorm2d:
        # A single pixel left in the last stage has no variance in a batch of one, which torch refuses to train on.
        check_size(asked[:-1], shape, 2 ** (len(stages) - 1) + 1, f"{asked}group or mlp:64")
    maps = stages[0]
    body = nn.Sequential(
        OrderedDict(conv=nn.Conv2d(shape[0], maps, 3, padding=1, bias=False), norm=norm(maps), relu=nn.ReLU())
    )
    for stage, wider in enumerate(stages, start=1):
        for block in range(1, blocks + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            body.add_module(f"stage{stage}_block{block}", Block(maps, wider, stride, norm))
            maps = wider
    body.add_module("pool", nn.AdaptiveAvgPool2d(1))
    body.add_module("flatten", nn.Flatten())
    return Net(body, nn.Linear(maps, classes))


class Block(nn.Module):
    """The paper's basic block: two 3x3 convolutions beside a shortcut."""

    def __init__(self, maps: int, wider: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(maps, wider, 3, stride, padding=1, bias=False)
        self.norm1 = norm(wider)
        self.conv2 = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        self.norm2 = norm(wider)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or maps != wider:
            self.shortcut = nn.Sequential(
                OrderedDict(conv=nn.Conv2d(maps, wider, 1, stride, bias=False), norm=norm(wider))
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, maps, H, W] to [B, wider, H/stride, W/stride], sides rounded up."""
        residue = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        out: Tensor = self.relu(residue + self.shortcut(x))
        return out
