"""Keyed random streams: the only place where randomness comes from.

A stream is named by (seed, party, purpose, ...). Two streams with different names are independent, and a stream does
not depend on what was drawn elsewhere: the number of workers, the order of arrival, logging, and evaluating more or
less often change no bit of a result.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

Key = int | str


def seed_of(seed: int, *key: Key) -> int:
    """A 63-bit seed for the stream called `key` of the experiment `seed`."""
    name = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *key))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def stream(seed: int, *key: Key) -> torch.Generator:
    """The CPU generator of a keyed stream."""
    return torch.Generator().manual_seed(seed_of(seed, *key))


def numpy_stream(seed: int, *key: Key) -> np.random.Generator:
    """The same stream's name, as a numpy generator."""
    return np.random.Generator(np.random.PCG64(seed_of(seed, *key)))


@contextmanager
def seeded(seed: int, *key: Key) -> Iterator[None]:
    """Torch's global generators (what `nn.Dropout` and initialisers draw from) are this stream inside the block."""
    number = seed_of(seed, *key)
    # `torch.manual_seed` looks for every kind of device at each call, which costs more than a small client's training.
    before = drawn_so_far()
    for generator, _ in before:
        generator.manual_seed(number)
    try:
        yield
    finally:
        go_on(before)


def drawn_so_far() -> list[tuple[torch.Generator, torch.Tensor]]:
    """Torch's global generators, and where each of them stands."""
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():
        generators += torch.cuda.default_generators
    return [(generator, generator.get_state()) for generator in generators]


def go_on(states: list[tuple[torch.Generator, torch.Tensor]]) -> None:
    """Lets torch's global generators go on from where they stood."""
    for generator, state in states:
        generator.set_state(state)
