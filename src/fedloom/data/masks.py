"""Masks: images whose pixels are numbers of classes, as arrays or files, and folders of images and their masks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from fedloom.data.owners import FILE, FOLDER, SPLIT, with_owner
from fedloom.data.source import listed
from fedloom.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES_IN, MASKS_IN = "images", "masks"  # folders
IGNORED = 255  # the value of pixels that are of no class, where masks have more than two values
EXPECTED = "a mask has the number of a class in each pixel, 0 to 254 (255: ignored)"


def mask_array(data: str, name: str, column: pa.ChunkedArray, size: tuple[int, int] | tuple[()]) -> np.ndarray:
    """A column of masks, arrays or image files, as uint8 [N, H, W].

    `size` is a width and a height to which all are resized, each pixel taking the value of the nearest. Raises
    UsageError for what are no masks.
    """
    import pyarrow as pa

    kind = column.type
    if isinstance(kind, pa.FixedShapeTensorType):
        pixels = _plane(column.combine_chunks().to_numpy_ndarray())
    elif pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        pixels = _decoded(data, name, column, size)
    else:
        pixels = None
    if pixels is None:
        rows = f"rows of shape {list(kind.shape)}" if isinstance(kind, pa.FixedShapeTensorType) else str(kind)
        raise UsageError(
            f"the label {name!r} of {data} is {rows}; masks are arrays [H, W] of whole numbers, or image files: "
            "name the column that has them (label=NAME), or take problem=classification for one class a row"
        )
    with np.errstate(invalid="ignore"):
        whole = pixels.astype(np.int64)
    if (whole != pixels).any():
        raise UsageError(f"the masks {name!r} of {data} hold fractions or gaps; {EXPECTED}")
    if whole.min() < 0 or whole.max() > IGNORED:
        raise UsageError(
            f"the masks {name!r} of {data} hold values from {whole.min()} to {whole.max()}; {EXPECTED}: set the pixels "
            f"that are of no class to {IGNORED}"
        )
    pixels = whole.astype(np.uint8)
    if size and pixels.shape[1:] != (size[1], size[0]):
        near = functional.interpolate(torch.from_numpy(pixels)[:, None].float(), size[::-1], mode="nearest-exact")
        pixels = near[:, 0].to(torch.uint8).numpy()
    return pixels


def _plane(pixels: np.ndarray) -> np.ndarray | None:
    """Arrays [N, H, W] of what may have an axis of one channel; None of others."""
    if pixels.ndim == 4 and 1 in (pixels.shape[1], pixels.shape[3]):
        pixels = pixels[:, 0] if pixels.shape[1] == 1 else pixels[..., 0]
    return pixels if pixels.ndim == 3 else None


def _decoded(data: str, name: str, column: pa.ChunkedArray, size: tuple[int, int] | tuple[()]) -> np.ndarray:
    """Image files as [N, H, W]: of palettes the numbers, of colours those whose channels are all alike."""
    from PIL import Image

    found = []
    for row, blob in enumerate(column.to_pylist()):
        held, path = (blob["bytes"], blob["path"]) if isinstance(blob, dict) else (blob, None)
        if held is None and not path:
            raise UsageError(f"column {name!r} of {data} has no mask in row {row}; drop that row")
        try:
            with Image.open(str(path) if held is None else io.BytesIO(held)) as image:
                made = image.resize(size, Image.Resampling.NEAREST) if size else image
                pixels = np.asarray(made)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            what = f"{len(held)} bytes" if held is not None else str(path)
            raise UsageError(f"column {name!r} of {data}, row {row}: {what} cannot be read as an image") from None
        if pixels.ndim == 3:
            colours = pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., :1]
            if (colours != colours[..., :1]).any():
                raise UsageError(
                    f"column {name!r} of {data}, row {row}: the mask has colours; {EXPECTED}: write it in 8-bit grey"
                )
            pixels = colours[..., 0]
        found.append(pixels)
    sizes = {one.shape for one in found}
    if len(sizes) > 1:
        (h, w), (v, u) = min(sizes), max(sizes)
        raise UsageError(
            f"column {name!r} of {data} has masks of {len(sizes)} sizes ({w}x{h} to {u}x{v} pixels); resize all and "
            "their images to one, as by resize=64 or resize=64x48"
        )
    return np.stack(found)


def mask_folder(data: str, path: Path, endings: tuple[str, ...], client: str | None) -> dict[str, pa.Table] | None:
    """The tables of a folder with images in `images/` and masks of the same names in `masks/`, by split.

    `train` and `test` stand above these folders or below them, or nowhere. None where no folder is called `masks`.
    """
    found: dict[str, dict[tuple[str, ...], Path]] = {IMAGES_IN: {}, MASKS_IN: {}}
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        kind = next((part for part in parts[:-1] if part.lower() in found), None)
        if kind is None or file.suffix.lower() not in endings:
            continue
        key = (*(part for part in parts[:-1] if part != kind), file.stem)
        if key in found[kind.lower()]:
            raise UsageError(f"{file} and {found[kind.lower()][key]} have one name; keep one of them")
        found[kind.lower()][key] = file
    pictures, masks = found[IMAGES_IN], found[MASKS_IN]
    if not masks:
        return None
    if lacking := sorted({*pictures} ^ {*masks}):
        one, other = ("image", "mask") if lacking[0] in pictures else ("mask", "image")
        raise UsageError(
            f"{data} has {len(lacking)} files without a partner, such as the {one} {'/'.join(lacking[0])}: each {one} "
            f"in {IMAGES_IN if one == 'image' else MASKS_IN}/ needs a {other} of the same name in the other folder"
        )
    splits: dict[str, list[tuple[str, ...]]] = {}
    for key in pictures:
        split = next((match[1].lower() for part in key[:-1] if (match := SPLIT.fullmatch(part))), "train")
        splits.setdefault(split, []).append(key)
    if "train" not in splits:
        raise UsageError(f"the folder {data} has no training split, only {listed(splits)}; name one train")
    return {
        split: _with_client(data, _pairs([(pictures[key], masks[key]) for key in splits[split]]), splits[split], client)
        for split in ("train", "test")
        if split in splits
    }


def _pairs(pairs: list[tuple[Path, Path]]) -> pa.Table:
    import pyarrow as pa

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

    def column(files: list[Path]) -> Any:
        return pa.array([{"bytes": None, "path": str(file)} for file in files], type=kind)

    return pa.table({"image": column([image for image, _ in pairs]), "mask": column([mask for _, mask in pairs])})


def _with_client(data: str, table: pa.Table, keys: list[tuple[str, ...]], client: str | None) -> pa.Table:
    """The table with a column of the folders below `images`, where the partition asks for it."""
    if client == FILE:
        raise UsageError(f"partition=column:{FILE} would make a client of each image of {data}; take column:{FOLDER}")
    if client != FOLDER:
        return table
    names = [next((part for part in key[:-1] if not SPLIT.fullmatch(part)), "") for key in keys]
    if "" in names:
        raise UsageError(
            f"an image of {data} lies in no client's folder, and partition=column:{FOLDER} goes by these; expected "
            f"{IMAGES_IN}/CLIENT/1.png and {MASKS_IN}/CLIENT/1.png"
        )
    return with_owner(table, client, names, all(name.isdecimal() for name in names))
