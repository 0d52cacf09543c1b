"""What a client holds costs its hash: `cache`.

A value of a message down (a whole field, longer than `SMALL` bytes) that is among the last `HELD` different values that
its client was sent travels as its name: 16 bytes, BLAKE2b of the encoded value. The ledger counts the name in place of
the value, in bytes of the message format. What was used least recently goes first, at the client and in the server's
list of what it holds alike.

The server counts on nothing that it does not know. A client holds the message of a call once its reply has arrived;
while it has not replied, and for good if it stays silent or its reply is lost, the server takes it to hold nothing.
By `tell`, to which nobody replies, names stand for what is held, and nothing is put beside it.
Evaluation has no cache and leaves no trace in this one. What peers send one another and what clients send up is always
counted in full: it is new nearly every time.

Everything is in the memory of the books, and so in checkpoints: at most `HELD` names a client.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedloom import encoding
from fedloom.boundary.stage import Groups, Stage
from fedloom.calls import SILENT
from fedloom.cohort import INBOX

if TYPE_CHECKING:
    from fedloom.boundary.books import Books
    from fedloom.calls import Call

HELD = 8  # values that a client keeps
NAME = 16  # bytes of a value's name
SMALL = 64  # bytes


@dataclass(frozen=True)
class Cache(Stage):
    """The server's list of what every client holds."""

    setting = "cache"
    kinds = frozenset({"setup", "train", "finish"})

    def held(self, books: Books) -> dict[int, bytes]:
        """Client -> the names of what it holds, the least recently used first."""
        return _kept(books, "held")

    def sent(self, books: Books) -> dict[str, Any]:
        """Call -> [names sent to all alike; client -> [what it held, names sent to it alone]; whether submitted]."""
        return _kept(books, "sent")

    def begin(self, books: Books) -> None:
        """Who has not replied by now will not, but for submitted work."""
        sent = self.sent(books)
        for key in [key for key, (_, _, submitted) in sent.items() if not submitted]:
            del sent[key]

    def message_sizes(self, books: Books, call: Call, inner: Callable[[], Groups]) -> Groups:
        """The clients of a call in groups that are sent equally many bytes, and the bytes by field."""
        held = self.held(books)
        weighed: dict[tuple[str, int], tuple[int, int, bytes]] = {}  # one value may be many clients' own
        shared = [(field, weigh(field, value)) for field, value in call.shared.items()]
        envelope = encoding.sizes(call.shared)["envelope"]
        alike: dict[tuple[tuple[str, int], ...], list[int]] = defaultdict(list)
        waiting: dict[int, list[bytes]] = {}
        for client in call.clients:
            own = []
            for field, value in call.own.get(client, {}).items():
                if field != INBOX or call.verb != "exchange":
                    if (field, id(value)) not in weighed:
                        weighed[field, id(value)] = weigh(field, value)
                    own.append((field, weighed[field, id(value)]))
            before = held.get(client, b"") if call.verb in SILENT else held.pop(client, b"")
            there = set(names_in(before))
            sizes = {field: short if name in there else whole for field, (whole, short, name) in shared + own}
            alike[tuple(sizes.items())].append(client)
            waiting[client] = [before, b"".join(name for _, (_, _, name) in own)]
        names = b"".join(name for _, (_, _, name) in shared)
        if call.verb not in SILENT:
            self.sent(books)[key_of(call)] = [names, waiting, call.verb == "submit"]
        for fields, clients in alike.items():
            yield clients, dict(fields) | {"envelope": envelope}

    def call_ended(self, books: Books, call: Call, client: int, arrived: bool) -> None:
        """If its reply arrived, a client holds the call's message."""
        sent, held = self.sent(books), self.held(books)
        names, waiting, submitted = sent.get(key_of(call), (b"", {}, False))
        if client not in waiting:
            return
        before, own = waiting.pop(client)
        if arrived and client not in held:  # it is there only if it was asked once more meanwhile
            fresh = list(dict.fromkeys(names_in(names + own)))
            older = [name for name in names_in(before) if name not in fresh]
            held[client] = b"".join((older + fresh)[-HELD:])
        if submitted and not waiting:
            del sent[key_of(call)]


def _kept(books: Books, name: str) -> Any:
    return books.memory.setdefault("cache", {}).setdefault(name, {})


def weigh(field: str, value: Any) -> tuple[int, int, bytes]:
    """The bytes of a field with its value, and with the value's name, and the name; none (b"") of a small value."""
    whole = encoding.sizes({field: value})[field]
    if whole <= SMALL:
        return whole, whole, b""
    name = name_of(value)
    return whole, encoding.sizes({field: name})[field], name


def name_of(value: Any) -> bytes:
    """A value's name: a message has one encoding, so that a hash of its bytes names it."""
    return hashlib.blake2b(encoding.encode({"value": value}), digest_size=NAME).digest()


def names_in(joined: bytes) -> list[bytes]:
    """Names that lie one after another."""
    return [joined[at : at + NAME] for at in range(0, len(joined), NAME)]


def key_of(call: Call) -> str:
    """A call's name among all calls of a run."""
    return f"{call.kind} {call.round} {call.nth}"
