"""What every network shares: a body that makes features, a head that judges them."""

from collections.abc import Sequence

from torch import Tensor, nn

from fedloom.errors import UsageError

HEADS = 4  # of attention


class Net(nn.Module):
    """A network cut in two: `head(body(x))`, so that every parameter's name starts with `body.` or `head.`."""

    def __init__(self, body: nn.Module, head: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def parts(self) -> dict[str, nn.Module]:
        """What runs one after the other."""
        return {"body": self.body, "head": self.head}

    def features(self, x: Tensor) -> Tensor:
        """What the head sees of a batch: [B, D], or maps [B, D, H, W]."""
        features: Tensor = self.body(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """The scores (logits) of a batch: [B, classes], or of each pixel, [B, classes, H, W]."""
        logits: Tensor = self.head(self.body(x))
        return logits


def widths(syntax: str, options: str, default: Sequence[int], most: int | None = None) -> list[int]:
    """The positive numbers after a name's colon ("128,64"), those left out taken from `default`."""
    parts = options.split(",") if options else []
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or (most is not None and len(parts) > most):
        raise UsageError(f"model options {options!r} do not fit; expected {syntax} with positive whole numbers")
    return [int(part) for part in parts] + list(default[len(parts) :])


def check_size(name: str, shape: tuple[int, ...], least: int, instead: str) -> None:
    """Refuse images of shape [C, H, W] with a side below `least` pixels, naming what to take `instead`."""
    _, height, width = shape
    if min(height, width) < least:
        raise UsageError(
            f"model {name!r} needs images of at least {least}x{least} pixels, got {height}x{width}; take {instead}"
        )
