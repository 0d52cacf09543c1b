"""Between machines over a bad line: cut at any byte, or silent for a while, it leaves no trace in the result."""

import threading
from collections import Counter

import pytest
from cutting import DOWN, UP, Stretch
from federation import Federation, keys, spec_of
from test_deploy import left, serial
from test_remote import difference

from fedloom.random import numpy_stream

# A server that stops leaves connections that were just being made to the system.
pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

LARGE = spec_of({"name": "fedavg", "epochs": 1, "batch": 100}, rounds=4, model="mlp:512,512")
MODEL = 4 * (64 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10)  # bytes


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    pytest.importorskip("aiohttp")
    pytest.importorskip("cryptography")
    return keys(tmp_path_factory.mktemp("federation"))


def through(federation, stretch):
    federation.through = dict.fromkeys(federation.names, stretch.port)


def cuts(seed, most):
    """Where connections are cut: in the handshake, in small messages, in parts of models, in turn; `most` in all."""
    draw, lock = numpy_stream(seed, "cuts"), threading.Lock()
    places = ((1, 4_000), (3_000, 20_000), (30_000, 120_000))

    def plan(number):
        with lock:
            if number >= most:
                return None
            place = int(draw.integers(*places[number % 3]))
            return (UP, DOWN, None)[draw.integers(3)], place, ("rst", "fin")[draw.integers(2)]

    return plan


def test_a_line_that_is_cut_at_a_hundred_places_changes_no_bit(certificates, tmp_path):
    federation = Federation(tmp_path, certificates, lease=30)
    with Stretch(federation.port, cuts(7, 150)) as stretch:
        through(federation, stretch)
        made = federation.run(LARGE)
    assert difference(left(made.record), left(serial(LARGE, 3))) is None
    assert len(stretch.cuts) >= 100
    assert min(Counter(cut[0] for cut in stretch.cuts).values()) >= 20
    # Four models up, and five down, at three clients. One that began anew had some 75 kB twice in every other cut.
    again = stretch.passed[UP] + stretch.passed[DOWN] - 3 * 9 * MODEL
    assert again < len(stretch.cuts) * (1 << 14)
