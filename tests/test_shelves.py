"""What lies on the disks between machines: parcels, the outbox of a client, the journal of a server."""

import errno
import json
import os
from pathlib import Path

import pytest

from fedloom.deploy.hub import IN_MEMORY, Hub
from fedloom.deploy.journal import FILE, Journal, read
from fedloom.deploy.outbox import Outbox
from fedloom.deploy.parcels import PIECE, Parcels, _boot
from fedloom.encoding import Pieces
from fedloom.engines.seat import Forgotten, InMemory
from fedloom.engines.wired import name_of
from fedloom.errors import CodecError, RunError
from fedloom.random import numpy_stream

A, B, C = (bytes([k]) * 32 for k in range(3))


@pytest.fixture
def parcels(tmp_path):
    return Parcels(tmp_path / "parcels", "try again")


# -- parcels


def test_a_part_grows_at_its_end_alone_and_is_the_whole_when_its_digest_fits(parcels):
    parcels.add(A, 0, b"one ")
    with pytest.raises(CodecError, match="a piece at 3, where 4 bytes have come"):
        parcels.add(A, 3, b"two")
    with pytest.raises(CodecError, match="a piece at 5"):
        parcels.add(A, 5, b"two")
    parcels.add(A, 4, b"two")
    assert (parcels.come(A), A in parcels, [*parcels.names()]) == (7, False, [])
    parcels.close(A, name_of(b"one two"))
    assert (parcels.come(A), A in parcels, [*parcels.names()]) == (0, True, [A])
    assert bytes(parcels.read(A)) == b"one two"
    assert parcels.size(A) == 7


def test_a_part_of_another_digest_is_dropped(parcels):
    parcels.add(A, 0, b"one")
    with pytest.raises(CodecError, match="another digest"):
        parcels.close(A, name_of(b"two"))
    assert (parcels.come(A), A in parcels) == (0, False)


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 3 * PIECE + 7])
def test_a_whole_of_any_size_is_what_was_put(size, parcels):
    data = os.urandom(size)
    parcels.put(A, data)
    parcels.add(B, 0, data)
    parcels.close(B, name_of(data), durable=True)
    assert bytes(parcels.read(A)) == bytes(parcels.read(B)) == data
    assert {path.stat().st_mode & 0o777 for path in parcels.folder.iterdir()} == {0o600}


def test_what_is_dropped_is_gone_with_its_part(parcels):
    parcels.put(A, b"whole")
    parcels.add(A, 0, b"part")
    parcels.drop(A)
    parcels.drop(A)
    assert [*parcels.folder.iterdir()] == []


@pytest.fixture
def boots(monkeypatch):
    """Starts the machine again."""
    starts = ["first"]
    monkeypatch.setattr("fedloom.deploy.parcels._boot", lambda: starts[-1])
    return lambda: starts.append("another")


def test_wholes_that_a_loss_of_power_may_have_left_in_part_are_dropped(parcels, boots):
    parcels.drop_doubtful()
    parcels.put(A, b"whole")
    parcels.add(B, 0, b"part")  # its digest tells whether it is one
    parcels.drop_doubtful()
    assert [*parcels.names()] == [A]
    boots()
    parcels.drop_doubtful()
    assert ([*parcels.names()], parcels.come(B)) == ([], 4)
    parcels.put(C, b"another")
    parcels.drop_doubtful()
    assert [*parcels.names()] == [C]


def test_where_the_system_does_not_tell_its_starts_every_one_is_another(monkeypatch):
    monkeypatch.setattr("fedloom.deploy.parcels.BOOT", Path("/nowhere"))
    assert _boot() != _boot()
    monkeypatch.undo()
    assert _boot() == _boot()


def test_states_outlive_a_loss_of_power_and_answers_are_made_again(tmp_path, boots):
    outbox = Outbox(tmp_path)
    outbox.put(A, 1, Pieces({"x": 1}), Pieces({"s": 1}))
    boots()
    again = Outbox(tmp_path)
    assert again.answer(A) is None
    assert bytes(again.state(A)) == b"".join(Pieces({"s": 1}))


def test_a_server_takes_no_answers_from_before_a_loss_of_power(tmp_path, boots):
    hub = Hub(["a"], 1.0)
    hub.open_inbox(tmp_path)
    hub.take(A, b"x" * (IN_MEMORY + 1))
    assert hub.has(A)
    again = Hub(["a"], 1.0)
    again.open_inbox(tmp_path)
    assert again.has(A)
    boots()
    again = Hub(["a"], 1.0)
    again.open_inbox(tmp_path)
    assert not again.has(A)


def test_a_full_disk_leaves_no_half(parcels, full_disk):
    with full_disk(f"{A.hex()}.made"), pytest.raises(RunError, match="is full; free some space, then: try again"):
        parcels.put(A, b"whole")
    assert [*parcels.folder.iterdir()] == []
    with full_disk(f"{B.hex()}.part"), pytest.raises(RunError, match="is full"):
        parcels.add(B, 0, b"some")
    parcels.add(B, parcels.come(B), b"some")
    parcels.add(B, parcels.come(B), b"more")
    parcels.close(B, name_of(b"somemore"))


def test_a_disk_that_fills_in_the_middle_leaves_no_half(parcels, monkeypatch):
    written, left = os.write, [3]

    def writes(end, data):
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = written(end, bytes(data)[: left[0]])
        left[0] -= taken
        return taken

    monkeypatch.setattr(os, "write", writes)
    with pytest.raises(RunError, match="is full"):
        parcels.put(A, b"whole")
    monkeypatch.undo()
    assert [*parcels.folder.iterdir()] == []


def test_a_part_that_a_disk_takes_in_pieces_is_whole(parcels, monkeypatch):
    written = os.write
    monkeypatch.setattr(os, "write", lambda end, data: written(end, bytes(data)[:5]))
    data = bytes(range(200))
    parcels.add(A, 0, data)
    assert parcels.come(A) == len(data)
    monkeypatch.undo()
    assert parcels.part(A).read_bytes() == data


# -- the outbox


def test_the_outbox_forgets_what_a_shelf_in_memory_forgets(tmp_path):
    draw = numpy_stream(5, "shelves")
    there, here = Outbox(tmp_path), InMemory()
    ids = [bytes([k]) * 32 for k in range(40)]
    given = []
    for step in range(300):
        what = draw.integers(4)
        if what == 0 and len(given) < len(ids):
            id = ids[len(given)]
            state = os.urandom(8) if draw.random() < 0.6 else None
            for shelf in (there, here):
                shelf.put(id, step // 10, id[:3] * 5, state)
            given.append(id)
        elif what == 1:
            keep = [id for id in given if draw.random() < 0.3]
            round = int(draw.integers(step // 10 + 1)) - 1
            for shelf in (there, here):
                shelf.forget(round, keep)
        elif what == 2:
            there = Outbox(tmp_path)  # killed, and started again
        for id in ids:
            assert seen(there, id) == seen(here, id)
    assert len(given) == len(ids)


def seen(shelf, id):
    found = shelf.answer(id)
    try:
        return found and bytes(found), bytes(shelf.state(id))
    except Forgotten:
        return found and bytes(found), None


def test_an_outbox_forgets_what_a_torn_line_of_its_index_is_followed_by(tmp_path):
    Outbox(tmp_path).put(A, 1, b"answer", b"state")
    index = tmp_path / "index.jsonl"
    index.write_text(index.read_text() + '\n{"id": "0101')
    Outbox(tmp_path).put(B, 1, b"answer", b"state")
    again = Outbox(tmp_path)
    assert again.rounds == {A: 1, B: 1}
    again.forget(1, [])
    assert [*(tmp_path / "answers").iterdir()] == [*(tmp_path / "states").iterdir()] == []
    assert Outbox(tmp_path).rounds == {}


def test_what_a_kill_left_half_is_not_read(tmp_path):
    Outbox(tmp_path).put(A, 1, b"answer", b"state")
    for name in (f"{B.hex()}.made", f"{C.hex()}.part"):
        (tmp_path / "answers" / name).write_bytes(b"ha")
        (tmp_path / "states" / name).write_bytes(b"ha")
    again = Outbox(tmp_path)
    assert [path.name for path in (tmp_path / "answers").iterdir()] == [A.hex()]
    assert [path.name for path in (tmp_path / "states").iterdir()] == [A.hex()]
    assert again.answer(B) is None


def test_an_answer_is_never_there_without_its_state(tmp_path, full_disk):
    outbox = Outbox(tmp_path)
    with full_disk(f"{A.hex()}.made"), pytest.raises(RunError, match=r"full; free .* start fedloom client as before"):
        outbox.put(A, 1, b"answer", b"state")
    assert seen(outbox, A) == (None, None)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(outbox.states, "put", lambda *about, **more: 1 / 0)
        outbox.put(A, 1, b"answer", b"state")
    assert seen(outbox, A) == (None, None)
    outbox.put(A, 1, b"answer", b"state")
    assert seen(Outbox(tmp_path), A) == (b"answer", b"state")


# -- the journal


def key(round, kind="train"):
    return kind, round, 0


def journal(folder, after=0):
    return Journal(folder, after)


def test_fates_that_a_restart_finds_hold_and_the_next_are_open(tmp_path):
    first = journal(tmp_path)
    assert (first.settled, first.heard(key(1)), first.landed()) == (False, None, None)
    first.note_heard(key(1), [0, 2])
    first.note_landed(key(2), 1, False)
    again = journal(tmp_path)
    assert (again.settled, again.heard(key(1))) == (True, [0, 2])
    again.note_heard(key(1), [0, 2])
    assert (again.settled, again.landed()) == (True, (key(2), 1, False))
    again.note_landed(key(2), 1, False)
    assert (again.settled, again.heard(key(3)), again.landed()) == (False, None, None)
    again.note_heard(key(3), [1])
    assert read(tmp_path) == [
        {"at": ["train", 1, 0], "heard": [0, 2]},
        {"at": ["train", 2, 0], "landed": 1, "counts": False},
        {"at": ["train", 3, 0], "heard": [1]},
    ]


def test_a_restart_goes_on_behind_the_checkpoint_it_has(tmp_path):
    first = journal(tmp_path)
    for round in (1, 2, 3):
        first.note_heard(key(round), [round])
        first.note_saved(round)
    first.note_heard(key(4), [4])
    assert [journal(tmp_path, after).heard(key(after + 1)) for after in (0, 1, 2, 3)] == [[1], [2], [3], [4]]
    again = journal(tmp_path, 1)  # a kill between the mark and the checkpoint of round 2
    again.note_heard(key(2), [2])
    again.note_saved(2)
    assert journal(tmp_path, 2).heard(key(3)) == [3]
    assert [line["lines"] for line in read(tmp_path) if "saved" in line] == [1, 2, 3, 2]


def test_a_torn_last_line_has_not_happened(tmp_path):
    journal(tmp_path).note_heard(key(1), [0])
    whole = (tmp_path / FILE).read_bytes()
    for torn in range(len(whole)):
        (tmp_path / FILE).write_bytes(whole + whole[:torn])
        again = journal(tmp_path)
        again.note_heard(key(1), [0])
        assert not again.settled
        again.note_heard(key(2), [1])
        assert [line["heard"] for line in read(tmp_path)] == [[0], [1]]


@pytest.mark.parametrize("asked", [key(2), key(1, "evaluate"), ("train", 1, 1)])
def test_the_journal_of_another_run_is_refused(asked, tmp_path):
    journal(tmp_path).note_heard(key(1), [0])
    with pytest.raises(RunError, match="it is the journal of another run, or of another version of it"):
        journal(tmp_path).heard(asked)
    with pytest.raises(RunError, match="the run asks for landed"):
        journal(tmp_path).landed()


def test_a_checkpoint_without_its_mark_is_refused(tmp_path):
    journal(tmp_path).note_heard(key(1), [0])
    with pytest.raises(RunError, match="has no line of the checkpoint of round 1; restore it"):
        journal(tmp_path, 1)


def test_a_line_on_a_full_disk_is_no_line(tmp_path, full_disk):
    first = journal(tmp_path)
    first.note_heard(key(1), [0])
    with full_disk(FILE), pytest.raises(RunError, match="free some space, then: start fedloom server as before"):
        first.note_heard(key(2), [0])
    again = journal(tmp_path)
    assert again.heard(key(1)) == [0]
    again.note_heard(key(1), [0])
    assert again.heard(key(2)) is None


def test_a_line_that_a_disk_takes_in_pieces_is_whole(tmp_path, monkeypatch):
    written = os.write
    monkeypatch.setattr(os, "write", lambda end, data: written(end, bytes(data)[:5]))
    journal(tmp_path).note_heard(key(1), [0])
    monkeypatch.undo()
    assert [json.loads(line)["heard"] for line in (tmp_path / FILE).read_text().splitlines()] == [[0]]
