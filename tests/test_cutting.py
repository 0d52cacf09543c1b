"""Between machines over a bad line: cut at any byte, or silent for a while, it leaves no trace in the result."""

import threading
from collections import Counter

import pytest
from cutting import DOWN, UP, Stretch
from federation import Federation, spec_of
from test_deploy import left, serial
from test_remote import difference

from fedloom.deploy import journal
from fedloom.random import numpy_stream

# A server that stops leaves connections that were just being made to the system.
pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

LARGE = spec_of({"name": "fedavg", "epochs": 1, "batch": 100}, rounds=4, model="mlp:512,512")
MODEL = 4 * (64 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10)  # bytes


def through(federation, stretch):
    federation.through = dict.fromkeys(federation.names, stretch.port)


def cuts(seed, most):
    """Where connections are cut: in the handshake, in small messages, in parts of models, in turn; `most` in all."""
    draw, lock = numpy_stream(seed, "cuts"), threading.Lock()
    kinds = (
        ((UP, DOWN), 1, 2_500),
        ((None,), 2_500, 20_000),
        ((UP, None, None), 30_000, 100_000),
    )

    def plan(number):
        with lock:
            if number >= most:
                return None
            directions, least, largest = kinds[number % 3]
            direction = directions[draw.integers(len(directions))]
            return direction, int(draw.integers(least, largest)), ("rst", "fin")[draw.integers(2)]

    return plan


def test_a_line_that_is_cut_at_a_hundred_places_changes_no_bit(certificates, tmp_path):
    federation = Federation(tmp_path, certificates, lease=30)
    with Stretch(federation.port, cuts(7, 180)) as stretch:
        through(federation, stretch)
        made = federation.run(LARGE)
    assert difference(left(made.record), left(serial(LARGE, 3))) is None
    assert len(stretch.cuts) >= 100
    assert min(Counter(cut[0] for cut in stretch.cuts).values()) >= 20
    # Four models up, and five down, at three clients. One that began anew had some 60 kB twice in every other cut.
    again = stretch.passed[UP] + stretch.passed[DOWN] - 3 * 9 * MODEL
    assert again < len(stretch.cuts) * (1 << 14)


def test_a_line_that_is_silent_for_less_than_the_lease_leaves_no_trace(certificates, tmp_path):
    federation = Federation(tmp_path, certificates, lease=20)
    with Stretch(federation.port) as stretch:
        through(federation, stretch)

        def hold(*about):
            stretch.open.clear()
            threading.Timer(1.5, stretch.open.set).start()

        federation.start()
        try:
            made = federation.serve(LARGE, on_round=hold)
        finally:
            stretch.open.set()
            federation.stop()
    assert difference(left(made.record), left(serial(LARGE, 3))) is None
    lines = journal.read(made.record.path)
    assert all(line["heard"] == [0, 1, 2] for line in lines if "heard" in line)
