"""A proxy that a client dials through: it opens a tunnel (CONNECT), in which TLS goes on from end to end."""

from __future__ import annotations

import asyncio
import base64
import os
import re
from dataclasses import dataclass, field
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

from fedloom.errors import RunError, Unreachable, UsageError

ENVIRONMENT = "environment"  # in place of an address: it stands in https_proxy, and no_proxy says where it is left out
LONGEST = 1 << 14  # bytes of what a proxy answers at most
AWAY = -1  # in place of a status: nobody answers there
PATIENCE = 20.0  # seconds in which it is to open a tunnel


class Closed(OSError):
    """A proxy did not open a tunnel; `status` (0: no answer of HTTP; or AWAY) and `reason` say why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status} {reason}")
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Proxy:
    """Where a proxy listens, and as whom it is asked."""

    host: str
    port: int
    user: str = ""
    password: str = field(default="", repr=False)

    @staticmethod
    def of(text: str | None, host: str) -> Proxy | None:
        """The proxy on the way to a host; None: there is none. Errors do not show the text, which has a password."""
        if text == ENVIRONMENT:
            text = getproxies_environment().get("https")
            if not text:
                raise UsageError(
                    'proxy = "environment", and https_proxy is not set there; set it, or give the proxy itself, as in '
                    'proxy = "http://proxy.example.org:3128"'
                )
            if proxy_bypass_environment(host):
                return None
        if text is None:
            return None
        try:
            parts = urlsplit(text)
            found = Proxy(
                parts.hostname or "", parts.port or 0, unquote(parts.username or ""), unquote(parts.password or "")
            )
        except ValueError:
            parts, found = urlsplit(""), Proxy("", 0)
        if parts.scheme != "http" or not found.host or not found.port or parts.path not in ("", "/"):
            raise UsageError(
                'proxy is no address of a proxy; give it as "http://HOST:PORT" or "http://NAME:PASSWORD@HOST:PORT", '
                "what is no letter or digit in a password as %XX"
            )
        return found

    @property
    def place(self) -> str:
        """How it is called in sentences and addresses."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Its address with the name and the password: not to be shown."""
        known = f"{quote(self.user, '')}:{quote(self.password, '')}@" if self.user else ""
        return f"http://{known}{self.place}"

    async def tunnel(self, to: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection with `to` (host and port) through it, without TLS so far; raises Closed."""
        try:
            async with asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_connection(self.host, self.port, limit=LONGEST)
        except OSError as error:
            raise Closed(AWAY, reason_of(error)) from error
        try:
            writer.write(self._asking(to))
            async with asyncio.timeout(PATIENCE):
                answer = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            answer = b""
        said = re.match(rb"HTTP/1\.[01] (\d{3})[ \t]*([ -~]*)", answer)
        if said is None or said[1] != b"200":
            writer.close()
            raise Closed(int(said[1]), said[2].decode()) if said else Closed(0, "")
        return reader, writer

    def _asking(self, to: str) -> bytes:
        lines = [f"CONNECT {to} HTTP/1.1", f"Host: {to}"]
        if self.user:
            known = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
            lines.append(f"Proxy-Authorization: Basic {known}")
        return "\r\n".join([*lines, "", ""]).encode()

    def refused(self, status: int, reason: str, to: str) -> UsageError | RunError:
        """What an answer of the proxy other than a tunnel means."""
        mine, said = f"the proxy at {self.place}", f"{status} {reason[:80]}".strip()
        if status == 407 and self.user:
            return UsageError(f"{mine} does not accept the name and password in the client's settings; mend them")
        if status == 407:
            return UsageError(
                f'{mine} wants a name and a password; give them as proxy = "http://NAME:PASSWORD@{self.place}"'
            )
        if status == AWAY:
            return Unreachable(f"{mine} cannot be reached ({reason}); check proxy in the client's settings")
        if status == 0:
            return Unreachable(f"{mine} answered nothing that opens a tunnel; is it a proxy that knows CONNECT?")
        if status >= 500 or status in (408, 429):
            return Unreachable(f"{mine} does not reach the server at {to} ({said}); is the server running?")
        return UsageError(f"{mine} does not let this client through to {to} ({said}); have CONNECT to it allowed there")


def reason_of(error: OSError) -> str:
    """Why nobody answers, in the system's words."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or "no answer"
