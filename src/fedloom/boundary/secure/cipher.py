"""The arithmetic of CKKS in a process of its own: bytes from strangers can crash TenSEAL, and must not crash the run.

As a module it is what the parties call; as a script it is that process, which reads requests from its standard input.
Nothing that it answers is trusted beyond its length and form.
"""

from __future__ import annotations

import atexit
import contextlib
import struct
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, Any

DEGREE = 8192  # of the polynomials: 4096 numbers a ciphertext; with 120 bits of modulus far above 128-bit security
SLOTS = DEGREE // 2
MODULI = [60, 60]  # bits: one for the sum, one that the library keeps for keys
MOST_BYTES = 1 << 32  # of one part of a request or an answer


class CipherError(Exception):
    """What the other side sent is no key or ciphertext that fits, and why."""


class Worker:
    """The process; it is started when first asked for, and anew when it died."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, what: str, *parts: bytes) -> list[bytes]:
        """What an operation of `Arithmetic` makes of these bytes; raises CipherError."""
        if self.process is not None and self.process.poll() is not None:
            self.stop()
        if self.process is None:
            command = [sys.executable, "-I", __file__]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin and self.process.stdout
        try:
            send(self.process.stdin, [what.encode(), *parts])
            verdict, *answer = receive(self.process.stdout)
        except (OSError, EOFError, struct.error):
            self.stop()
            raise CipherError("bytes that crash what reads them") from None
        if verdict != b"done":
            raise CipherError(answer[0].decode(errors="replace")[:200] if answer else "bytes that make no sense")
        return answer

    def stop(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            for stream in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):  # what was not written yet has nobody to read it
                    if stream:
                        stream.close()
            self.process.wait()
            self.process = None


WORKER = Worker()
atexit.register(WORKER.stop)


def send(stream: IO[bytes], parts: Sequence[bytes]) -> None:
    """How many parts there are, and each with its length before it."""
    stream.write(struct.pack("<I", len(parts)))
    for part in parts:
        stream.write(struct.pack("<Q", len(part)))
        stream.write(part)
    stream.flush()


def receive(stream: IO[bytes]) -> list[bytes]:
    """What `send` wrote."""
    (count,) = struct.unpack("<I", _exactly(stream, 4))
    parts = []
    for _ in range(count):
        (size,) = struct.unpack("<Q", _exactly(stream, 8))
        if size > MOST_BYTES:
            raise EOFError
        parts.append(_exactly(stream, size))
    return parts


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


class Arithmetic:
    """What the process does. Each operation takes bytes and gives bytes, and keeps nothing."""

    @staticmethod
    def keys(bits: bytes) -> list[bytes]:
        """A fresh pair of keys: the secret one, and the public one."""
        import tenseal

        context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=MODULI)
        context.global_scale = 2.0 ** (59 - int(bits))
        plain = {"save_galois_keys": False, "save_relin_keys": False}
        return [
            context.serialize(save_public_key=True, save_secret_key=True, **plain),
            context.serialize(save_public_key=True, save_secret_key=False, **plain),
        ]

    @staticmethod
    def public(key: bytes) -> list[bytes]:
        """Sees that a key is a public one."""
        _public(key)
        return []

    @staticmethod
    def encrypted(key: bytes, numbers: bytes) -> list[bytes]:
        """Numbers (doubles) as ciphertexts."""
        import tenseal

        context = _public(key)
        values = memoryview(numbers).cast("d").tolist()
        return [
            tenseal.ckks_vector(context, values[at : at + SLOTS]).serialize() for at in range(0, len(values), SLOTS)
        ]

    @staticmethod
    def added(key: bytes, size: bytes, *chunks: bytes) -> list[bytes]:
        """The sum of two replies of so many numbers each, or one reply as it is, if it is one."""
        context, many = _public(key), -(-int(size) // SLOTS)
        vectors = [_vector(context, chunk, at % many, int(size)) for at, chunk in enumerate(chunks)]
        if len(vectors) > many:
            vectors = [mine + its for mine, its in zip(vectors[:many], vectors[many:], strict=True)]
        return [vector.serialize() for vector in vectors]

    @staticmethod
    def opened(key: bytes, size: bytes, *chunks: bytes) -> list[bytes]:
        """The numbers (doubles) in ciphertexts."""
        import array

        import tenseal

        context = tenseal.context_from(key)
        numbers = array.array("d")
        for at, chunk in enumerate(chunks):
            numbers.extend(_vector(context, chunk, at, int(size)).decrypt())
        return [numbers.tobytes()]


def _public(key: bytes) -> Any:
    """The context of a public key."""
    import tenseal

    context = tenseal.context_from(key)
    if context.is_private():
        raise ValueError("a key that is not a public one")
    return context


def _vector(context: Any, chunk: bytes, place: int, size: int) -> Any:
    """The ciphertext at this place of a reply of so many numbers."""
    import tenseal

    vector = tenseal.ckks_vector_from(context, chunk)
    expected = min(SLOTS, size - place * SLOTS)
    if vector.size() != expected:
        raise ValueError(f"a ciphertext of {vector.size()} numbers, expected {expected}")
    return vector


def serve() -> None:
    """Answers requests until there are no more."""
    ask, answer = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            what, *parts = receive(ask)
        except EOFError:
            return
        try:
            made = getattr(Arithmetic, what.decode())(*parts)
        except Exception as error:  # noqa: BLE001  whatever TenSEAL makes of hostile bytes is an answer
            send(answer, [b"failed", f"{type(error).__name__}: {error}".encode()])
        else:
            send(answer, [b"done", *made])


if __name__ == "__main__":
    serve()
