"""What crosses the server's sockets: HTTP, TLS and all, as the system is handed it."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary


@dataclass
class Crossed:
    """Bytes that came from the other end, and went to it."""

    up: int = 0
    down: int = 0


class Socket(socket.socket):
    """A socket that counts; `crossed` has the bytes of this one, or of all those of one peer."""

    crossed: Crossed

    def recv(self, *about: Any) -> bytes:
        found = super().recv(*about)
        self.crossed.up += len(found)
        return found

    def recv_into(self, *about: Any) -> int:
        size = super().recv_into(*about)
        self.crossed.up += size
        return size

    def send(self, *about: Any) -> int:
        size = super().send(*about)
        self.crossed.down += size
        return size

    def sendmsg(self, buffers: Iterable[Any], *about: Any) -> int:
        size = super().sendmsg(buffers, *about)
        self.crossed.down += size
        return size


class Listener(socket.socket):
    """A socket that listens, and whose connections count."""

    def __init__(self, *about: Any, **more: Any) -> None:
        super().__init__(*about, **more)
        self.connections: WeakValueDictionary[Any, Socket] = WeakValueDictionary()  # by the address of the other end

    @staticmethod
    def of(listening: socket.socket) -> Listener:
        """The same socket; the one that was given is closed."""
        return Listener(listening.family, listening.type, listening.proto, listening.detach())

    def accept(self) -> tuple[socket.socket, Any]:
        plain, address = super().accept()
        made = Socket(plain.family, plain.type, plain.proto, plain.detach())
        made.crossed = Crossed()
        self.connections[address] = made
        return made, address

    def belongs(self, address: Any, crossed: Crossed) -> None:
        """The connection with this address is one of a peer: what has crossed it, and will, is the peer's."""
        made = self.connections.get(address)
        if made is not None and made.crossed is not crossed:
            crossed.up += made.crossed.up
            crossed.down += made.crossed.down
            made.crossed = crossed
