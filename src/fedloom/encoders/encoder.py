"""What an encoder is: a frozen function of raw inputs, one row at a time, that no training ever changes."""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from fedloom.errors import UsageError

if TYPE_CHECKING:
    from fedloom.data.text import Encode


@dataclass(frozen=True)
class Encoder(ABC):
    """A frozen encoder. Its fields are its options, as in `random:128,seed=3`.

    Examples:
        >>> import torch
        >>> from fedloom.encoders.random import Random
        >>> Random(filters=8).network((1, 28, 28))(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 32])
    """

    kind: ClassVar[str] = "image"  # of data that it reads: "image" or "text"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < (field.name != "seed"):
                raise UsageError(f"the encoder's {field.name} is {value}; expected a whole number from 1")

    @abstractmethod
    def network(self, shape: tuple[int, ...]) -> nn.Module:
        """The network from raw inputs [B, *shape] to features [B, D]: images in [0, 1], or tokens.

        No row's features hang on the rows beside it. Whatever its weights are drawn from is a stream of its own. Raises
        UsageError for a shape that it cannot read, and where a package or a file is not there.
        """

    def encode(self) -> Encode | None:
        """For texts, what makes its tokens of them."""
        return None


def digest_of(encoder: Encoder, net: nn.Module) -> str:
    """A digest of an encoder: its kind, its options and its weights."""
    whole = hashlib.blake2b(f"{type(encoder).__module__} {encoder!r}".encode(), digest_size=16)
    for name, tensor in net.state_dict().items():
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()
