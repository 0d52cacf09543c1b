"""A stretch of network for tests: what passes through it is counted, held up, or cut at a chosen byte."""

import contextlib
import socket
import struct
import threading
import time
from collections import Counter

UP, DOWN = "up", "down"
SMALL = 1 << 15  # bytes of a socket's buffers, so that little is on its way when the line is cut


class Stretch:
    """Connections to a port of this machine, through `port`.

    `plan(number)` says where the connection of that number is cut: (direction whose bytes count or None for both, how
    many pass, "rst" or "fin"), or None; `cuts` are those that were made, with the direction of the last byte. `frozen`
    stops all that passes, without a word to anybody; before each piece that goes up lie `delay` seconds. No more than
    `rate` bytes a second pass in a direction, and every twentieth piece is late by `lost` seconds. Nothing
    passes in connections whose numbers are in `held`.
    """

    def __init__(self, target, plan=lambda number: None):
        self.target, self.plan = target, plan
        self.passed = {UP: 0, DOWN: 0}
        self.by = Counter()  # bytes that passed, by the connection's number
        self.cuts = []
        self.delay = 0.0
        self.rate, self.lost = None, 0.0
        self.held = set()
        self.tap = lambda direction, piece: None  # sees what passes
        self.open = threading.Event()
        self.open.set()
        self.lock = threading.Lock()
        self.ends = []
        self.listening = socket.socket()
        self.listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        self.listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listening.bind(("127.0.0.1", 0))
        self.listening.listen(64)
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *about):
        self.open.set()
        self.held.clear()
        self.listening.close()
        for end in self.ends:
            _hang_up(end, "fin")

    @contextlib.contextmanager
    def frozen(self):
        self.open.clear()
        try:
            yield
        finally:
            self.open.set()

    def _accept(self):
        number = 0
        while True:
            try:
                near, _ = self.listening.accept()
            except OSError:
                return
            far = socket.socket()
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
            try:
                far.connect(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            for end in (near, far):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.ends.append(end)
            cut = self.plan(number)
            left = [cut[1]] if cut else [None]
            for direction, source, sink in ((UP, near, far), (DOWN, far, near)):
                about = number, direction, source, sink, cut, left
                threading.Thread(target=self._pump, args=about, daemon=True).start()
            number += 1

    def _pump(self, number, direction, source, sink, cut, left):
        due, pieces = 0.0, 0
        try:
            while piece := source.recv(SMALL):
                self.open.wait()
                while number in self.held:
                    time.sleep(0.02)
                if direction == UP and self.delay:
                    time.sleep(self.delay)
                if self.rate:
                    pieces += 1
                    due = max(due, time.monotonic()) + len(piece) / self.rate + (self.lost if pieces % 20 == 0 else 0)
                    time.sleep(max(0.0, due - time.monotonic()))
                with self.lock:
                    if left[0] is not None and cut[0] in (direction, None):
                        piece = piece[: left[0]]
                        left[0] -= len(piece)
                    over = left[0] == 0
                    self.passed[direction] += len(piece)
                    self.by[number] += len(piece)
                    if over and piece:
                        self.cuts.append((direction, *cut[1:]))
                    self.tap(direction, piece)
                sink.sendall(piece)
                if over:
                    _hang_up(source, cut[2])
                    _hang_up(sink, cut[2])
                    return
        except OSError:
            pass
        _hang_up(source, "fin")
        _hang_up(sink, "fin")


def _hang_up(end, how):
    with contextlib.suppress(OSError):
        if how == "rst":
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.shutdown(socket.SHUT_RD)  # who reads there holds the connection open
        else:
            end.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        end.close()
