"""Files of NumPy's arrays, those with a pickled dict of arrays among them: what is pickled is read, never executed."""

from __future__ import annotations

import io
import pickle  # noqa: TID251 - a reader that calls nothing of what a pickle names
import struct
import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from fedloom.errors import UsageError

# What numpy and zipfile raise for bytes that are no arrays, or claim more than there is room for
NOT_ARRAYS = (OSError, ValueError, TypeError, EOFError, BadZipFile, zlib.error, struct.error, RuntimeError, MemoryError,
              OverflowError, SyntaxError, KeyError, IndexError, AttributeError, pickle.UnpicklingError)  # fmt: skip
MOST_BYTES = 2**33  # of a pickled member


def members(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name; of a pickled dict of arrays (PFLlib's `data`) those in it.

    Raises what `NOT_ARRAYS` names, and UsageError for what is pickled and not a dict of arrays.
    """
    found: dict[str, np.ndarray] = {}
    with np.load(file, allow_pickle=False) as archive:
        for name in archive.files:
            pickled = _pickled(archive, name)
            if pickled is not None:
                found |= _dict_of_arrays(file, name, pickled)
                continue
            member = archive[name]
            if not isinstance(member, np.ndarray):
                raise ValueError(f"{name} in it is no array")
            found[name] = member
    return found


def _pickled(archive: Any, name: str) -> bytes | None:
    """The pickle of a member that is a single object; None of any other."""
    inside = {one.removesuffix(".npy"): one for one in archive.zip.namelist()}[name.removesuffix(".npy")]
    with archive.zip.open(inside) as opened:
        if opened.read(6) != np.lib.format.MAGIC_PREFIX:
            return None
    with archive.zip.open(inside) as opened:
        version = np.lib.format.read_magic(opened)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(opened)
        return opened.read(MOST_BYTES) if dtype.hasobject and shape == () else None


def _dict_of_arrays(file: Path, name: str, pickled: bytes) -> dict[str, np.ndarray]:
    told = (
        f"{name} of {file} is pickled, which may run code when it is read: only a dict of arrays of numbers is "
        "taken, as in PFLlib's files"
    )
    try:
        whole = _Reader(io.BytesIO(pickled)).load()
        whole = whole.items[0] if isinstance(whole, _Array) and whole.shape == () and whole.items else whole
    except UsageError as error:
        raise UsageError(
            f"{told}, and there is {error} in it; save its arrays by numpy.savez(file, x=x, y=y)"
        ) from None
    if not isinstance(whole, dict) or not all(isinstance(key, str) for key in whole):
        raise UsageError(f"{told}; save its arrays by numpy.savez(file, x=x, y=y)")
    return {key: _made(value, f"{key} in {told}") for key, value in whole.items()}


def _made(value: Any, told: str) -> np.ndarray:
    if isinstance(value, _Array) and isinstance(value.raw, bytes):
        return value.made()
    if isinstance(value, list) and all(isinstance(one, int | float) for one in value):
        return np.array(value)
    raise UsageError(f"{told}; {type(value).__name__} is none")


class _Type:
    """What a pickle says of an array's type."""

    def __init__(self, name: str = "", *rest: Any) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if state[1] in ("<", ">", "|", "=") else "="


class _Array:
    """What a pickle says of an array; nothing of NumPy's runs on it before it is looked at."""

    def __init__(self, *rest: Any) -> None:
        self.shape: tuple[int, ...] = ()
        self.type: Any = None
        self.fortran = False
        self.raw: Any = None

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.type, self.fortran, self.raw = state

    @property
    def items(self) -> list[Any]:
        """The values of an array of objects."""
        return self.raw if isinstance(self.raw, list) else []

    def made(self) -> np.ndarray:
        """The array of numbers."""
        if not isinstance(self.type, _Type) or self.type.name[:1] not in "biuf" or not self.type.name[1:].isdecimal():
            raise UsageError(f"an array of {getattr(self.type, 'name', self.type)!r} is pickled; expected numbers")
        kind = np.dtype(("" if self.type.order == "|" else self.type.order) + self.type.name)
        flat = np.frombuffer(self.raw, kind).astype(kind.newbyteorder("="))
        return flat.reshape(self.shape, order="F" if self.fortran else "C")


class _Reader(pickle.Unpickler):
    """Reads pickles of arrays, numbers, lists and dicts; whatever else one names is refused and never called."""

    KNOWN = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Type,
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin-1"),
    } | {(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.KNOWN:
            raise UsageError(f"{module}.{name}")
        return self.KNOWN[module, name]
