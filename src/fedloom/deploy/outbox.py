"""What a client keeps on its disk: answers until the server needs them no more, and states by version."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fedloom.deploy.parcels import Parcels
from fedloom.encoding import Pieces
from fedloom.engines.seat import Forgotten
from fedloom.runs.writing import disk, write_aside

AGAIN = "start fedloom client as before"  # after a full disk


class Outbox:
    """The shelf of a client (`engines.seat.Shelf`) in a folder: a kill at any moment leaves each answer whole or away.

    A state is written before its answer, so that an answer is never without the state that it speaks of.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers = Parcels(folder / "answers", AGAIN)
        self.states = Parcels(folder / "states", AGAIN)
        self.rounds: dict[bytes, int] = {}  # of answers and states, the round of their call
        for parcels in (self.answers, self.states):
            parcels.sweep()
        self.answers.drop_doubtful()  # states are durable
        for line in self._index():
            self.rounds[bytes.fromhex(line["id"])] = line["round"]

    def answer(self, id: bytes) -> bytes | memoryview | None:
        return self.answers.read(id) if id in self.answers else None

    def state(self, id: bytes) -> bytes | memoryview:
        if id not in self.states:
            raise Forgotten(f"the state {id.hex()[:12]} that the server names is not in {self.states.folder}")
        return self.states.read(id)

    def put(self, id: bytes, round: int, answer: Pieces, state: Pieces | None) -> None:
        self.rounds[id] = round
        with disk(self.folder, again=AGAIN), (self.folder / "index.jsonl").open("a") as file:
            file.write("\n" + json.dumps({"id": id.hex(), "round": round}))  # begun anew behind a torn one
        if state is not None:
            self.states.put(id, state, durable=True)
        self.answers.put(id, answer, durable=state is not None)

    def forget(self, round: int, keep: Collection[bytes]) -> None:
        gone = [id for id, when in self.rounds.items() if when <= round and id not in keep]
        for id in [id for id, when in self.rounds.items() if when <= round]:
            self.answers.drop(id)
        for id in gone:
            self.states.drop(id)
            del self.rounds[id]
        if gone:
            lines = "".join(json.dumps({"id": id.hex(), "round": when}) + "\n" for id, when in self.rounds.items())
            with disk(self.folder, again=AGAIN):
                write_aside(self.folder / "index.jsonl", lambda file: file.write(lines.encode()))

    def _index(self) -> list[dict[str, Any]]:
        """The lines of the index; a torn one, as a kill leaves it, is of an answer that was not written."""
        path = self.folder / "index.jsonl"
        found = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found
