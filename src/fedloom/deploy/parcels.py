"""Bytes on their way, in files: a part that grows and is taken up where it was cut, then the whole under its name."""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from fedloom.encoding import Pieces
from fedloom.engines.wired import digest
from fedloom.errors import CodecError
from fedloom.runs.writing import disk, sync_folder, write_all

PIECE = 1 << 18  # bytes that are moved at once
BOOT = Path("/proc/sys/kernel/random/boot_id")  # of Linux


class Parcels:
    """A folder of parcels, each a file that is called as it is named, in hexadecimal digits; nobody else may read it.

    A part has the bytes that have come so far. `again` says how to go on where the disk was full.
    """

    def __init__(self, folder: Path, again: str) -> None:
        self.folder, self.again = folder, again
        with disk(folder, again=again):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, name: bytes) -> Path:
        """Where the whole lies, if it is here."""
        return self.folder / name.hex()

    def part(self, name: bytes) -> Path:
        """Where what has come lies until all has."""
        return self.folder / f"{name.hex()}.part"

    def __contains__(self, name: bytes) -> bool:
        return self.path(name).exists()

    def come(self, name: bytes) -> int:
        """How many bytes of a part have come."""
        part = self.part(name)
        return part.stat().st_size if part.exists() else 0

    def add(self, name: bytes, offset: int, piece: bytes) -> None:
        """Adds to a part at its end; raises CodecError if that is somewhere else."""
        with disk(self.folder, again=self.again):
            flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            end = os.open(self.part(name), flags, 0o600)
            try:
                if os.fstat(end).st_size != offset:
                    raise CodecError(f"a piece at {offset}, where {os.fstat(end).st_size} bytes have come")
                os.lseek(end, offset, os.SEEK_SET)
                write_all(end, piece)
            finally:
                os.close(end)

    def close(self, name: bytes, digest: bytes, durable: bool = False) -> None:
        """Makes a part the whole, if it has this digest; else drops it, and raises CodecError."""
        part = self.part(name)
        if digest_of(part) != digest:
            part.unlink()
            raise CodecError("what came has another digest than was announced; it is fetched again")
        with disk(self.folder, again=self.again):
            if durable:
                end = os.open(part, os.O_RDONLY)
                os.fsync(end)
                os.close(end)
            part.replace(self.path(name))
            if durable:
                sync_folder(self.folder)

    def put(self, name: bytes, data: bytes | Pieces, durable: bool = False) -> None:
        """A whole that is made here: it is there with all its bytes, or not at all."""
        aside = self.folder / f"{name.hex()}.made"
        with disk(self.folder, again=self.again):
            end = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o600)
            try:
                for piece in (data,) if isinstance(data, bytes) else data:
                    write_all(end, piece)
                if durable:
                    os.fsync(end)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
            finally:
                os.close(end)
            aside.replace(self.path(name))
            if durable:
                sync_folder(self.folder)

    def read(self, name: bytes) -> bytes | memoryview:
        """The bytes of a whole, large ones as they lie in the file."""
        with self.path(name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= PIECE:
                return file.read()
            return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))

    def size(self, name: bytes) -> int:
        """How many bytes a whole has."""
        return self.path(name).stat().st_size

    def drop(self, name: bytes) -> None:
        """Removes a parcel, or its part."""
        self.path(name).unlink(missing_ok=True)
        self.part(name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes parts, and what a kill left of wholes that were being made."""
        for stray in [*self.folder.glob("*.part"), *self.folder.glob("*.made")]:
            stray.unlink()

    def drop_doubtful(self) -> None:
        """Drops the wholes that are older than this start of the machine.

        Of what is not durable, a loss of power may leave less than was written, or zeros.
        """
        mark, boot = self.folder.with_suffix(".boot"), _boot()
        if not mark.exists() or mark.read_text() != boot:
            for name in [*self.names()]:
                self.path(name).unlink()
            with disk(self.folder, again=self.again):
                mark.write_text(boot)

    def names(self) -> Iterator[bytes]:
        """What is here as a whole."""
        for path in self.folder.iterdir():
            if path.suffix == "":
                yield bytes.fromhex(path.name)


def _boot() -> str:
    """What tells this start of the machine from others; where nothing does, another one each time."""
    try:
        return BOOT.read_text()
    except OSError:
        return secrets.token_hex(16)


def digest_of(path: Path) -> bytes:
    """What the bytes of a file are called."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, digest).digest()
