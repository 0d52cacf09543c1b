"""Keyed streams: a name is a stream, and nothing else has a say in it."""

import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch

from fedloom.random import numpy_stream, seed_of, seeded, stream

NAMES = [
    (),
    (1,),
    ("1",),
    (1, 2),
    (2, 1),
    (12,),
    (1, "2"),
    ("a", "b"),
    ("ab",),
    ("astr:b",),
    ("a", 1),
    ("world", "cohort", 3),
    (True,),
]


def test_streams_with_other_names_are_other_streams():
    drawn = {(seed, name): stream(seed, *name).initial_seed() for seed in (0, 1, 2) for name in NAMES}
    assert len(set(drawn.values())) == len(drawn)
    numbers = [numpy_stream(0, *name).random(4) for name in NAMES]
    assert all(not np.array_equal(one, other) for one, other in combinations(numbers, 2))


def test_many_streams_do_not_collide_and_use_all_63_bits():
    seeds = np.array([seed_of(0, "client", k) for k in range(200_000)])
    assert seeds.dtype == np.int64 and seeds.min() >= 0 and len(np.unique(seeds)) == len(seeds)
    shares = [((seeds >> bit) & 1).mean() for bit in range(63)]
    assert all(abs(share - 0.5) < 5 * 0.5 / len(seeds) ** 0.5 for share in shares)


def test_a_stream_is_the_same_in_every_process_whatever_was_drawn_before():
    torch.rand(7)
    here = f"{seed_of(3, 'client', 5)} {stream(3, 'client', 5).initial_seed()} {numpy_stream(3, 'a').random()!r}"
    code = (
        "from fedloom.random import *\n"
        "print(seed_of(3, 'client', 5), stream(3, 'client', 5).initial_seed(), repr(numpy_stream(3, 'a').random()))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == here
    )


def test_a_stream_leaves_the_global_generator_alone():
    before = torch.default_generator.get_state()
    torch.rand(3, generator=stream(0, "a"))
    assert torch.equal(torch.default_generator.get_state(), before)


def test_inside_a_seeded_block_the_global_generator_is_the_stream_and_afterwards_as_before():
    before = torch.default_generator.get_state()
    with seeded(4, "x", 1):
        inside = torch.rand(5)
        with seeded(4, "y"):
            torch.rand(2)
        after_the_inner = torch.rand(5)
    assert torch.equal(torch.default_generator.get_state(), before)
    plain = stream(4, "x", 1)
    assert torch.equal(inside, torch.rand(5, generator=plain))
    assert torch.equal(after_the_inner, torch.rand(5, generator=plain))
    with pytest.raises(ZeroDivisionError), seeded(4, "x", 1):
        raise ZeroDivisionError
    assert torch.equal(torch.default_generator.get_state(), before)
