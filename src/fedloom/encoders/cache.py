"""Features kept in a folder of this user's, by a digest of what they are of: a second run does not encode again.

The folder is `$FEDLOOM_CACHE/features`; without that variable `fedloom/features` in `$XDG_CACHE_HOME`, or in
`~/.cache`. With `FEDLOOM_CACHE=` (nothing) features are not kept. It may be emptied at any time.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def folder() -> Path | None:
    """Where features are kept; None: nowhere."""
    own = os.environ.get("FEDLOOM_CACHE")
    if own is not None:
        return Path(own).expanduser() / "features" if own else None
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedloom" / "features"


def octets(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def digest(*parts: bytes | memoryview | str) -> str:
    """A digest of several parts, each with its end."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        own = part.encode() if isinstance(part, str) else part
        whole.update(hashlib.blake2b(own, digest_size=32).digest())
    return whole.hexdigest()


def kept(path: Path) -> Tensor | None:
    """The features in a file; None where it is not there, and, with a warning, where it is not whole."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            features: Tensor = file.get_tensor("features")
            told = (file.metadata() or {}).get("digest")
    except (SafetensorError, OSError) as error:
        told, features = str(error), torch.empty(0)
    if told == digest(path.stem, octets(features)):
        return features
    warnings.warn(f"the features kept in {path} are damaged and not used; they are made anew", stacklevel=2)
    return None


def keep(path: Path, features: Tensor) -> None:
    """Puts features into a file that is there whole or not at all; a warning where it cannot be written."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # of this process: others may write the same
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # the features of somebody's data are theirs
        try:
            save_file({"features": features}, aside, {"digest": digest(path.stem, octets(features))})
            aside.chmod(0o600)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"cannot keep features in {path.parent}: {error}; the next run makes them anew, unless FEDLOOM_CACHE names "
            "a folder that can be written",
            stacklevel=2,
        )
