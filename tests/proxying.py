"""A proxy for tests, which opens tunnels (CONNECT) or says that it does not."""

import base64
import contextlib
import socket
import threading


class Connecting:
    """Listens at `port`; `known` is NAME:PASSWORD, without which it answers 407; `answer` stands in for a tunnel.

    With `to` all tunnels lead to that port of this machine. `asked` are the heads of the requests that came, and
    `opened` where tunnels were to go.
    """

    def __init__(self, known=None, answer=None, to=None):
        self.known, self.answer, self.to = known, answer, to
        self.asked, self.opened = [], []
        self.ends = []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *about):
        self.listening.close()
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self):
        while True:
            try:
                near, _ = self.listening.accept()
            except OSError:
                return
            self.ends.append(near)
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near):
        head = b""
        while b"\r\n\r\n" not in head:
            if not (more := near.recv(4096)):
                return
            head += more
        self.asked.append(head)
        wanted = self.known and f"Proxy-Authorization: Basic {base64.b64encode(self.known.encode()).decode()}\r\n"
        if wanted and wanted.encode() not in head:
            self._told(near, b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n")
            return
        if self.answer is not None:
            self._told(near, self.answer)
            return
        verb, to, _ = head.split(b"\r\n")[0].decode().split()
        assert verb == "CONNECT"
        host, _, port = to.rpartition(":")
        try:
            far = socket.create_connection(("127.0.0.1" if host == "localhost" else host, self.to or int(port)))
        except OSError:
            self._told(near, b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
            return
        self.ends.append(far)
        self.opened.append(to)
        near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        threading.Thread(target=_pump, args=(near, far), daemon=True).start()
        _pump(far, near)

    @staticmethod
    def _told(near, answer):
        near.sendall(answer)
        near.close()


def _pump(source, sink):
    with contextlib.suppress(OSError):
        while piece := source.recv(1 << 16):
            sink.sendall(piece)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)
