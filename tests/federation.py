"""A federation on this machine for tests: a server in this process or in one of its own, and clients in theirs."""

import contextlib
import gc
import io
import logging
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

from fedloom.deploy import certs
from fedloom.deploy.agent import Agent, silent
from fedloom.deploy.config import ClientConfig, ServerConfig
from fedloom.deploy.serve import Serving
from fedloom.runs.spec import Spec

PROCESSES = multiprocessing.get_context("forkserver")  # a fork of this process would have a copy of the hub's locks
PROCESSES.set_forkserver_preload(["fedloom.deploy.agent", "fedloom.deploy.serve"])
NAMES = ("a", "b", "c", "d", "e", "f", "g", "h")


def port():
    """One that is free."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


class Federation:
    """A folder with the settings of a server and of its clients."""

    def __init__(self, folder, keys, clients=3, data="share = true", **rounds):
        self.folder, self.names, self.port = Path(folder), NAMES[:clients], port()
        self.through = {}  # by client, the port that it dials in place of the server's
        self.data = data
        self.keys = keys
        self.processes = {}
        lines = [f"{name} = {value}" for name, value in ({"lease": 5} | rounds).items()]
        self.folder.mkdir(parents=True, exist_ok=True)
        listed = ", ".join(f'"{name}"' for name in self.names)
        (self.folder / "server.toml").write_text(
            f'listen = "127.0.0.1:{self.port}"\ncertificates = "{keys}/server"\nclients = [{listed}]\n[rounds]\n'
            + "\n".join(lines)
        )

    def data_of(self, name):
        """What stands under [data] in a client's settings."""
        return self.data

    def config_of(self, name):
        at = self.folder / f"{name}.toml"
        at.write_text(
            f'server = "localhost:{self.through.get(name, self.port)}"\ncertificates = "{self.keys}/{name}"\n'
            f'state = "state-{name}"\n[data]\n{self.data_of(name)}\n'
        )
        return at

    def start(self, *names):
        """Clients, each in a process of its own."""
        for name in names or self.names:
            process = PROCESSES.Process(target=_client, args=(self.config_of(name), self.folder / f"{name}.log"))
            process.start()
            self.processes[name] = process

    def kill(self, name):
        """SIGKILL, and nothing is left of it."""
        os.kill(self.processes[name].pid, signal.SIGKILL)
        self.processes[name].join()

    def serve(self, spec, out="run", on_round=None):
        """Carries a run out here; gives its experiment."""
        return serve(self.folder, spec, out, on_round)

    def start_server(self, spec, out="run"):
        """A server in a process of its own."""
        process = PROCESSES.Process(target=_server, args=(self.folder, spec, out))
        process.start()
        self.processes["server"] = process

    def stop(self):
        """Ends every process that is still there."""
        for process in self.processes.values():
            if process.is_alive():
                process.kill()
            process.join()

    def codes(self, patience=20):
        """How the clients ended."""
        until = time.monotonic() + patience
        for name in self.names:
            self.processes[name].join(max(0.1, until - time.monotonic()))
        return {name: self.processes[name].exitcode for name in self.names}

    def run(self, spec, out="run"):
        """A whole run with all clients, in this process; gives its experiment."""
        self.start()
        try:
            made = self.serve(spec, out)
            assert set(self.codes().values()) == {0}, {name: self.log(name) for name in self.names}
            return made
        finally:
            self.stop()

    def run_with_late(self, spec, name, round):
        """A run that begins without one client, which comes after a round; gives its experiment."""
        self.start(*(one for one in self.names if one != name))

        def late(row):
            if row["round"] == round:
                self.start(name)
            time.sleep(0.05)

        try:
            made = self.serve(spec, on_round=late)
            assert set(self.codes().values()) == {0}
            return made
        finally:
            self.stop()

    def run_through_kills(self, spec, moments):
        """A run whose server is killed at each of these moments (seconds after the one before), and started again."""
        self.start()
        self.start_server(spec)
        try:
            for moment in moments:
                time.sleep(moment)
                self.kill("server")
                self.start_server(spec)
            self.processes["server"].join(120)
            assert self.processes["server"].exitcode == 0, self.log("server")[-3000:]
            assert set(self.codes().values()) == {0}
        finally:
            self.stop()

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()


def _client(config, log):
    with _logged(log):
        Agent(ClientConfig.read(config), silent).run()


def _server(folder, spec, out):
    with _logged(folder / "server.log"):
        serve(folder, spec, out)


def serve(folder, spec, out="run", on_round=None):
    """Carries a run out in this process, as the settings in a folder say."""
    serving, finished = Serving(spec, ServerConfig.read(folder / "server.toml"), folder / out), False
    try:
        serving.gather(lambda missing: None)
        made = serving.experiment()
        with made.record.lock():
            made.go(on_round)
        finished = True
        return made
    finally:
        serving.close(finished)
        gc.collect()  # connections that were just being made are let go here, and not in the middle of something else


@contextlib.contextmanager
def _logged(path):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.basicConfig(filename=path, level=logging.INFO, force=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except BaseException:
        logging.exception("ended")
        raise


def keys(folder):
    """Certificates for everybody; gives their folder."""
    certs.laptop(Path(folder) / "certs", NAMES, ())
    return Path(folder) / "certs"


def spec_of(method="fedavg", **settings):
    return Spec.of({"method": method, "data": "digits", "rounds": 3} | settings)
