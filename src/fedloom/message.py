"""What may cross the network.

A message is a dict from field names to values of a closed set of types: None, bool, int (64 bit), float, str, bytes,
tensor, `Vector`, tuple, list, dict (keys str or int), and the wire types `Sparse`, `Packed` and `Seed`.
`fedloom.encoding` makes its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

import numpy as np
import torch
from torch import Tensor

from fedloom.errors import CodecError, unknown
from fedloom.random import numpy_stream
from fedloom.vector import Vector
from fedloom.wire import Array

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64",
        "float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128",
        "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
    )
    if hasattr(torch, name)  # the newest are not in every torch that we allow
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SEQUENCES = (list, tuple)
_SIMPLE = frozenset({Tensor, bool, int, float, str, bytes, type(None)})

Distribution = Literal["normal", "uniform", "sign"]


@dataclass(frozen=True, eq=False)
class Sparse:
    """Some rows of a tensor [size, ...] that is zero elsewhere (of a flat vector: some coordinates).

    On the wire the index is m numbers of as many bits as `size - 1` has, or a mask of `size` bits: whichever is
    shorter. `size` is what the sender claims: compare it with what you expect before you use it.

    Examples:
        >>> dense = torch.tensor([0.0, 5.0, 0.0, 7.0])
        >>> sent = fedloom.Sparse.of(dense, torch.tensor([1, 3]))
        >>> sent.values.tolist(), sent.dense().tolist()
        ([5.0, 7.0], [0.0, 5.0, 0.0, 7.0])
    """

    index: Tensor  # int64 [m], strictly ascending
    values: Tensor  # floating point [m, ...]
    size: int

    def __post_init__(self) -> None:
        index, values = self.index, self.values
        if index.dtype != torch.int64 or index.dim() != 1:
            raise CodecError(f"a Sparse needs an int64 index [m], got {index.dtype} {list(index.shape)}")
        if values.dim() == 0 or len(values) != len(index) or not values.is_floating_point():
            raise CodecError(
                f"a Sparse with {len(index)} indices needs float values [{len(index)}, ...], "
                f"got {values.dtype} {list(values.shape)}"
            )
        if type(self.size) is not int or not 0 <= self.size < 1 << 63:
            raise CodecError(f"the size of a Sparse is an int from 0 to 2**63 - 1, got {self.size!r}")
        if len(index) and (index[0] < 0 or index[-1] >= self.size or (index[1:] <= index[:-1]).any()):
            raise CodecError(f"the index of a Sparse ascends strictly, from 0 to less than its size {self.size}")

    @classmethod
    def of(cls, dense: Tensor, index: Tensor) -> Sparse:
        """The rows of `dense` [size, ...] at `index` (int64 [m] in any order, or a bool mask [size])."""
        index = index.nonzero().squeeze(1) if index.dtype == torch.bool else index.sort().values
        return cls(index, dense[index], len(dense))

    def dense(self) -> Tensor:
        """The whole tensor [size, ...]."""
        dense = self.values.new_zeros(self.size, *self.values.shape[1:])
        dense[self.index] = self.values
        return dense


@dataclass(frozen=True, eq=False)
class Packed:
    """Whole numbers from 0 to less than 2**bits, `bits` bits an entry on the wire; a bool mask is one bit an entry.

    Examples:
        >>> from fedloom import encoding
        >>> levels = torch.randint(0, 16, (1000,))
        >>> len(encoding.encode({"levels": fedloom.Packed(levels, bits=4)})) < 550
        True
    """

    values: Tensor  # bool or integer, any shape
    bits: int  # 1 to 32; 1 for bool

    def __post_init__(self) -> None:
        dtype = self.values.dtype
        most = 1 if dtype == torch.bool else 32
        if (
            dtype not in DTYPE_NAMES
            or dtype.is_floating_point
            or dtype.is_complex
            or self.values.layout != torch.strided
        ):
            raise CodecError(f"a Packed holds a dense bool or integer tensor, got {dtype}, {self.values.layout}")
        if type(self.bits) is not int or not 1 <= self.bits <= most:
            raise CodecError(f"the bits of a Packed of {dtype} are an int from 1 to {most}, got {self.bits!r}")
        array = array_of(self.values)
        if array.size and (array.min() < 0 or array.max() >= 1 << self.bits):
            raise CodecError(f"numbers from {array.min()} to {array.max()} do not fit a Packed of {self.bits} bits")


@dataclass(frozen=True)
class Seed:
    """A random tensor of any size, sent as the 63-bit number that it is drawn from.

    Examples:
        >>> seed = fedloom.Seed(7)
        >>> torch.equal(seed.expand(1000), seed.expand(1000))
        True
    """

    value: int

    def __post_init__(self) -> None:
        if type(self.value) is not int or not 0 <= self.value < 1 << 63:
            raise CodecError(f"a Seed is an int from 0 to 2**63 - 1, got {self.value!r}")

    def expand(self, *shape: int, distribution: Distribution = "normal", dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor [*shape], the same on every machine: standard normal, uniform in [0, 1), or a fair -1 or 1.

        Drawn in float32 whatever the dtype, and by numpy: `torch.randn` gives other bits on other processors.
        """
        generator = numpy_stream(self.value, "seed", distribution)
        match distribution:
            case "normal":
                drawn: Array = generator.standard_normal(shape, np.float32)
            case "uniform":
                drawn = generator.random(shape, np.float32)
            case "sign":
                drawn = 2 * generator.integers(0, 2, shape, np.int8) - 1
            case _:
                raise unknown("distribution", distribution, get_args(Distribution))
        return torch.from_numpy(np.asarray(drawn)).to(dtype)


Value: TypeAlias = (
    bool | int | float | str | bytes | Tensor | Vector | Sparse | Packed | Seed
    | tuple["Value", ...] | list["Value"] | dict[Any, "Value"] | None
)  # fmt: skip
V = TypeVar("V")  # a value or a message


def copy(value: V) -> V:
    """A value, or a message, that shares no memory with this one."""

    def own(leaf: Any) -> Any:
        match leaf:
            case Tensor() | Vector():
                return leaf.clone()
            case Sparse():
                return Sparse(leaf.index.clone(), leaf.values.clone(), leaf.size)
            case Packed():
                return Packed(leaf.values.clone(), leaf.bits)
        return leaf

    return _rebuilt(value, own)


def deliver(value: V) -> V:
    """What the other side gets of a value, or a message, when no bytes are made: new containers, `readonly` vectors.

    Tensors and vectors share memory with `value`: neither side may write to them.
    """
    if type(value) is dict:  # most replies are flat
        items = cast(dict[Any, Any], value).items()
        return cast(V, {key: item if type(item) in _SIMPLE else _rebuilt(item, _locked) for key, item in items})
    return _rebuilt(value, _locked)


def _locked(leaf: Any) -> Any:
    return Vector(leaf.flat, leaf.layout, readonly=True) if isinstance(leaf, Vector) and not leaf.readonly else leaf


def moved(value: V, device: torch.device) -> V:
    """A value, or a message, with its tensors on a device; what is there already is shared."""

    def there(leaf: Any) -> Any:
        match leaf:
            case Tensor():
                return leaf.to(device)
            case Vector():
                return Vector(leaf.flat.to(device), leaf.layout, leaf.readonly)
            case Sparse():
                return Sparse(leaf.index.to(device), leaf.values.to(device), leaf.size)
            case Packed():
                return Packed(leaf.values.to(device), leaf.bits)
        return leaf

    return _rebuilt(value, there)


def _rebuilt(value: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _rebuilt(item, leaf) for key, item in value.items()}
    if isinstance(value, _SEQUENCES):
        return type(value)(_rebuilt(item, leaf) for item in value)
    return leaf(value)


def octets_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's numbers in their order, uint8 `[bytes]`; shared with it where they lie in one piece."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # One number, or none, is in one piece whatever its stride; bytes are seen only of numbers at a stride of 1.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)


def array_of(tensor: Tensor) -> Array:
    """The numbers of a tensor, in memory that numpy reads."""
    array: Array = tensor.detach().cpu().numpy()
    return array


def finite(value: Any) -> bool:
    """Whether all numbers in a value are: neither NaN nor infinite."""
    if isinstance(value, Vector):
        return finite(value.flat)
    if isinstance(value, Sparse):
        return finite(value.values)
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            return finite(torch.view_as_real(value.resolve_conj()))
        if value.is_floating_point() and value.itemsize == 1:
            value = value.float()  # float8 knows no arithmetic
        # A sum is finite unless a number in it is not, or it overflows: only then look at each.
        return not value.is_floating_point() or math.isfinite(value.sum().item()) or bool(value.isfinite().all())
    if isinstance(value, float):
        return value - value == 0
    if isinstance(value, dict):
        return all(finite(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return all(finite(inner) for inner in value)
    return True
