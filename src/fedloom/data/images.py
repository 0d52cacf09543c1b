"""Columns of images, encoded or as arrays, to tensors."""

import io
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from fedloom.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

DEEP = {"I", "I;16", "I;16L", "I;16B", "I;16N"}  # Pillow's modes of 16-bit grey
GREY, COLOUR = {"1", "L", "LA"}, {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}  # Pillow's modes


def images(
    data: str, name: str, *columns: "pa.ChunkedArray", size: tuple[int, int] | tuple[()] = ()
) -> list[torch.Tensor]:
    """The images of every split's column, float32 `[N, C, H, W]`: 8-bit pixels divided by 255, others as they are.

    Files of 16 bits are divided by 65,535. `size` is a width and a height to which all are resized.
    """
    import pyarrow as pa

    if isinstance(columns[0].type, pa.FixedShapeTensorType):
        pixels = [column.combine_chunks().to_numpy_ndarray() for column in columns]
    else:
        pixels = _decoded(data, name, columns, size)
    found = [_channels_first(data, name, split) for split in pixels]
    return [_resized(split, size) if size and split.shape[2:] != (size[1], size[0]) else split for split in found]


def _resized(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    width, height = size
    return functional.interpolate(x, (height, width), mode="bilinear", antialias=True)


def unrolled(table: "pa.Table", size: tuple[int, int]) -> "pa.Table":
    """A table in which rows of width * height numbers are images of that size, where it has no others."""
    import pyarrow as pa

    width, height = size
    kinds = {field.name: field.type for field in table.schema}
    rows = {name: kind for name, kind in kinds.items() if isinstance(kind, pa.FixedShapeTensorType)}
    if any(len(kind.shape) > 1 for kind in rows.values()) or any(pa.types.is_struct(kind) for kind in kinds.values()):
        return table
    for name, kind in rows.items():
        if kind.shape[0] == width * height:
            values = table.column(name).combine_chunks().to_numpy_ndarray().reshape(-1, height, width)
            made = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))
            table = table.set_column(table.column_names.index(name), name, made)
    return table


def eight_bit(column: "pa.ChunkedArray") -> bool:
    """Whether the pixels of images are 8-bit ones: files, and arrays of uint8."""
    import pyarrow as pa

    arrays = isinstance(column.type, pa.FixedShapeTensorType)
    return not arrays or bool(pa.types.is_uint8(column.type.value_type))


def _channels_first(data: str, name: str, pixels: np.ndarray) -> torch.Tensor:
    """Images `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]` as float32 `[N, C, H, W]`."""
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.ndim == 4 and pixels.shape[3] in (1, 3, 4) and pixels.shape[1] not in (1, 3, 4):
        pixels = pixels.transpose(0, 3, 1, 2)
    elif pixels.ndim != 4:
        raise UsageError(
            f"{name!r} of {data} has rows of shape {list(pixels.shape[1:])}; expected [H, W], [H, W, C], "
            "[C, H, W] or [D]"
        )
    x = np.array(pixels, dtype=np.float32, order="C")
    bad = int((~np.isfinite(x)).any(axis=(1, 2, 3)).sum())
    if bad:
        raise UsageError(f"{name!r} of {data} has {bad} images with NaN or infinite pixels; drop or repair them")
    if pixels.dtype == np.uint8:
        x /= 255
    return torch.from_numpy(x)


def _decoded(
    data: str, name: str, columns: "Sequence[pa.ChunkedArray]", size: tuple[int, int] | tuple[()]
) -> list[np.ndarray]:
    """Image files as `[N, H, W]` when all of them are grey, else `[N, H, W, 3]`.

    They are uint8, or float32 in [0, 1] where one of them is of 16 bits.
    """
    from PIL import Image

    def decode(item: tuple[int, Any]) -> np.ndarray:
        row, blob = item
        held, path = (blob["bytes"], blob["path"]) if isinstance(blob, dict) else (blob, None)
        if held is None and not path:
            raise UsageError(f"column {name!r} of {data} has no image in row {row}; drop that row")
        try:
            with Image.open(str(path) if held is None else io.BytesIO(held)) as image:
                if image.mode in DEEP:
                    return _deep(image, size)
                mode = "L" if image.mode in GREY else "RGB"
                if image.mode not in GREY | COLOUR:
                    raise UsageError(
                        f"column {name!r} of {data} has an image of Pillow mode {image.mode!r} in row {row}; "
                        "expected 8-bit grey or colour, or 16-bit grey: convert it"
                    )
                made = image if image.mode == mode else image.convert(mode)
                return np.asarray(made.resize(size, Image.Resampling.BILINEAR) if size else made)
        except (OSError, SyntaxError, ValueError, struct.error, MemoryError, Image.DecompressionBombError) as error:
            if isinstance(error, UsageError):
                raise
            what = f"{len(held)} bytes" if held is not None else str(path)
            raise UsageError(
                f"column {name!r} of {data}, row {row}: {what} cannot be read as an image; "
                "expected PNG, JPEG or another format that Pillow reads"
            ) from None

    decoded: list[list[np.ndarray]] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for column in columns:
            # In pieces, as a thread's hand-over costs more than a small image.
            rows = list(enumerate(column.to_pylist()))
            pieces = [rows[start : start + 512] for start in range(0, len(rows), 512)]
            decoded.append([*chain(*pool.map(lambda piece: [decode(row) for row in piece], pieces))])
    sizes = {image.shape[:2] for split in decoded for image in split}
    if len(sizes) > 1:
        (h, w), (v, u) = min(sizes), max(sizes)
        raise UsageError(
            f"column {name!r} of {data} has images of {len(sizes)} sizes ({w}x{h} to {u}x{v} pixels); resize all to "
            "one, as by resize=64 or resize=64x48"
        )
    if len({image.dtype for split in decoded for image in split}) > 1:
        decoded = [[i if i.dtype == np.float32 else i.astype(np.float32) / 255 for i in split] for split in decoded]
    if any(image.ndim == 3 for split in decoded for image in split):
        shape = (*sizes.pop(), 3)
        decoded = [[np.broadcast_to(i if i.ndim == 3 else i[..., None], shape) for i in split] for split in decoded]
    return [np.stack(split) for split in decoded]


def _deep(image: Any, size: tuple[int, int] | tuple[()]) -> np.ndarray:
    """An image of 16-bit grey as float32 `[H, W]` in [0, 1]."""
    whole, most = np.asarray(image).astype(np.int64), np.iinfo(np.uint16).max
    if whole.min() < 0 or whole.max() > most:
        raise UsageError(
            f"an image has grey values from {whole.min()} to {whole.max()}; expected 8 or 16 bits: convert it"
        )
    pixels = (whole / most).astype(np.float32)
    return _resized(torch.from_numpy(pixels)[None, None], size)[0, 0].numpy() if size else pixels
