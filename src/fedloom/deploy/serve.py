"""A server between machines: one run, from its first client to its model, taken up where it stopped."""

from __future__ import annotations

import json
import logging
import queue
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedloom.deploy.config import ServerConfig, address
from fedloom.deploy.hub import Hub
from fedloom.deploy.journal import AGAIN, Journal
from fedloom.deploy.listening import Listening
from fedloom.deploy.network import Network, Patience
from fedloom.deploy.offer import network_of, offered
from fedloom.deploy.own import described
from fedloom.deploy.tls import server_context
from fedloom.engines.remote import check, has_form
from fedloom.errors import RunError, UsageError
from fedloom.method import build
from fedloom.runs.experiment import Experiment
from fedloom.runs.fitted import Fitted
from fedloom.runs.record import Run
from fedloom.runs.spec import Spec
from fedloom.runs.writing import disk, write_aside
from fedloom.site import Site
from fedloom.tasks._described import at_server

log = logging.getLogger("fedloom.server")

FILE = "deploy.json"  # in a run's folder: its name, what was asked, and what clients registered
LINGER = 10.0  # seconds in which clients are to hear that the run is over


class Serving:
    """A server that listens, for the run in the folder `out`: a new one, or one that was begun there.

    `close` ends it; `gather` waits for the clients, `experiment` is what then runs.
    """

    def __init__(self, spec: Spec, config: ServerConfig, out: Path) -> None:
        self.out, self.kept = out, _kept(out)
        asked = spec.text("")
        if self.kept and self.kept["asked"] != asked:
            before = Spec.parsed(self.kept["asked"], f"the spec in {out / FILE}")
            why = "; ".join(spec.differences(before, frozenset())) or "its text"
            raise UsageError(f"{out} is a run with other settings ({why}); restore them, or give another --out")
        if self.kept and self.kept["names"] != list(config.clients):
            raise UsageError(
                f"{out} was begun with the clients {', '.join(self.kept['names'])}, and the server's settings list "
                f"{', '.join(config.clients)}; restore them: a client's number is its place in this list"
            )
        if spec.clients not in (None, len(config.clients)):
            raise UsageError(
                f"clients={spec.clients}, and the server's settings list {len(config.clients)}; leave clients out of "
                "the spec, or list as many"
            )
        self.asked, self.spec = asked, replace(spec, clients=len(config.clients))
        settings = dict(spec.method)
        method = build(settings.pop("name"), settings)
        has_form(method)
        check(self.spec)
        if config.rounds.start and (setup := next((call for call in method.plan if call.kind == "setup"), None)):
            raise UsageError(
                f"rounds.start={config.rounds.start}: {method.name()} asks all clients for {setup.function} before the "
                "first round; leave start out"
            )
        self.task = at_server(self.spec)
        Fitted(self.spec, self.task).stages()  # what does not fit is told before anybody is waited for
        self.name = bytes.fromhex(self.kept["run"]) if self.kept else secrets.token_bytes(8)
        rules = self.rules = config.rounds
        self.hub = Hub(config.clients, rules.lease)
        for name, told in (self.kept["registered"] if self.kept else {}).items():
            self.hub.members[name].registered = told
        context = server_context(config.folder / config.certificates, log.warning)
        offer = {"run": self.name, "offer": offered(self.spec, method, described(self.task))}
        at = address(config.listen, "listen")
        self.listening = Listening(self.hub, context, at, offer, config.reply_bytes)
        self.engine: Network | None = None
        self.patience = Patience(rules.deadline, rules.quorum, rules.enough, rules.patience)

    @property
    def missing(self) -> list[str]:
        """The clients that have not registered yet."""
        return [one.name for one in self.hub.by_number if one.registered is None]

    def gather(self, watch: Callable[[list[str]], object]) -> None:
        """Waits until so many clients have registered as the run begins with; `watch` hears who is missing.

        Raises RunError where one declines, or where no other has come for as long as the settings have patience.
        """
        late = len(self.hub.members) - (self.rules.start or len(self.hub.members))
        known, since = -1, 0.0
        while len(missing := self.missing) > late:
            watch(missing)
            if known != len(missing):
                known, since = len(missing), time.monotonic()
            if time.monotonic() >= since + self.rules.patience:
                raise RunError(
                    f"{', '.join(missing)} did not come within {self.rules.patience:g} seconds (rounds.patience); "
                    "start them, then this server again"
                )
            if declined := [one for one in self.hub.by_number if one.declined]:
                told = "; ".join(f"{one.name}: {one.declined}" for one in declined)
                raise RunError(f"not all clients take part: {told}")
            try:
                self.hub.arrived.get(timeout=min(1.0, self.rules.patience))
            except queue.Empty:
                continue

    def experiment(self) -> Experiment:
        """The run with its record, once all clients have registered."""
        record = Run(self.out) if self.kept else None
        self.engine = engine = Network(self.hub, self.name, self.patience)
        made = Experiment(self.spec, self.task, None, engine)
        _alike(made.site, self.hub)
        if record is not None:
            made = made.take_up(record)
        else:
            made = made.begin(self.out, {FILE: self._about()})
        engine.fates = Journal(self.out, made.done)
        self.hub.open_inbox(self.out / "inbox")
        self.hub.expect()
        engine.newcomer = self._keep
        return made

    def _about(self) -> str:
        """What a restart must know of the run, and of the clients that have come."""
        about = {
            "run": self.name.hex(),
            "asked": self.asked,
            "names": list(self.hub.members),
            "registered": {one.name: one.registered for one in self.hub.by_number if one.registered},
        }
        return json.dumps(about, indent=1)

    def _keep(self) -> None:
        """Writes it down again, when another client has come."""
        text = self._about().encode()
        with disk(self.out, again=AGAIN):
            write_aside(self.out / FILE, lambda file: file.write(text), durable=True)

    def close(self, finished: bool) -> None:
        """Tells the clients, if the run is finished, and listens no more."""
        if finished and self.engine:
            self.hub.finish(LINGER, self.engine.notes)
        self.listening.stop()


def _alike(site: Site, hub: Hub) -> None:
    """Raises RunError where a client's network is another one than the server's, or begins from other weights."""
    here = network_of(site)
    for one in hub.by_number:
        if (told := one.registered) is None:
            continue
        if told.get("layout") != here["layout"]:
            raise RunError(
                f"the network of client {one.name} is another one than the server's: its data have another shape or "
                "other classes; make them alike, or name the network (model=...)"
            )
        if told.get("initial") != here["initial"]:
            log.warning("client %s draws other initial weights than the server: another torch or processor", one.name)


def _kept(out: Path) -> dict[str, Any]:
    """What a run's folder tells of a server that was there before; nothing of one that is not there."""
    path = out / FILE
    if not path.exists():
        Run.require_absent(out)
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error}); restore it, or give another --out") from error
    return found
