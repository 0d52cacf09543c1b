"""What a run between machines costs beside the work: an empty wave, clients that wait, and memory at the server.

    python benchmarks/network.py                 # 10 clients, 200 waves; 1,000 idle clients for 20 seconds
    python benchmarks/network.py --idle 0        # the waves alone
    python benchmarks/network.py --waves 0 --idle 0 --wide 7000      # memory, with a model of 200 MB

Waves: a server and as many client processes as asked, on this machine, over TLS 1.3 with certificates both ways; a
method whose clients do nothing, so that a round is one message to everybody and one answer from each. Quoted is the
median of a round's seconds, the first ten left out, and what the same method takes with `engine=loopback`, in which
every message is encoded and decoded as well, but nothing travels. Idle: so many connections, each with a certificate
and a question for work that waits; quoted is the processor time of the server's process, as a share of one core.
Memory: one round of fedavg with a model of `wide` x `wide` numbers, with two clients and with four, each in a process
of its own; quoted are the peaks of the server's memory and of a client's, beside those of a process that has loaded the
same libraries, in multiples of the model. Needs the extra `net`.
"""

import argparse
import asyncio
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import aiohttp

from fedloom import encoding
from fedloom.deploy import certs
from fedloom.deploy.agent import Agent, silent
from fedloom.deploy.config import ClientConfig, ServerConfig
from fedloom.deploy.hub import Hub
from fedloom.deploy.listening import Listening
from fedloom.deploy.serve import Serving
from fedloom.deploy.tls import client_context, server_context
from fedloom.runs.experiment import Experiment
from fedloom.runs.spec import Spec

METHOD = '''
from dataclasses import dataclass

import fedloom


@dataclass(frozen=True)
class Wave(fedloom.Method):
    """A round in which everybody is asked, and has nothing to do."""

    def round(self, server, cohort):
        cohort.call(self.nothing)

    @fedloom.client
    def nothing(self, client):
        return {}
'''
PORT = 18443
WARM = 10


def serve_client(config: Path) -> None:
    Agent(ClientConfig.read(config), silent).run()


def waves(folder: Path, clients: int, rounds: int) -> None:
    names = [f"c{number}" for number in range(clients)]
    certs.laptop(folder / "certs", names, ())
    (folder / "wave.py").write_text(METHOD)
    listed = ", ".join(f'"{name}"' for name in names)
    (folder / "server.toml").write_text(f'listen = "127.0.0.1:{PORT}"\nclients = [{listed}]\n')
    for name in names:
        (folder / f"{name}.toml").write_text(
            f'server = "localhost:{PORT}"\ncertificates = "certs/{name}"\nstate = "state-{name}"\n'
            '[data]\nshare = true\n[methods]\nwave = "wave.py"\n'
        )
    settings = {"method": str(folder / "wave.py"), "data": "digits", "partition": "iid", "eval_every": rounds}
    spec = Spec.of(settings | {"rounds": rounds})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedloom.deploy.agent"])
    processes = [context.Process(target=serve_client, args=(folder / f"{name}.toml",)) for name in names]
    for process in processes:
        process.start()
    serving = Serving(spec, ServerConfig.read(folder / "server.toml"), folder / "run")
    serving.gather(lambda missing: None)
    made = serving.experiment()
    made.go()
    serving.close(True)
    for process in processes:
        process.join()
    here = Experiment(Spec.of(settings | {"rounds": rounds, "clients": clients, "engine": "loopback"})).begin(None)
    here.go()
    for what, run in (("between processes", made.record), ("engine=loopback", here.record)):
        took = sorted(row["seconds"] * 1e3 for row in run.metrics[WARM:])
        print(
            f"empty wave to {clients} clients, {what}: {statistics.median(took):.2f} ms "
            f"(9 of 10 below {took[len(took) * 9 // 10]:.2f})"
        )


async def wait_for_work(folder: Path, names: list[str], seconds: float) -> None:
    contexts = {name: client_context(folder / "idle" / name) for name in names[:1]}
    shared = contexts[names[0]]

    async def one(number: int) -> None:
        async with aiohttp.ClientSession(
            f"https://localhost:{PORT + 1}", connector=aiohttp.TCPConnector(ssl=shared, limit=1)
        ) as http:
            while True:
                # All have one certificate, and so one seat: what is measured is connections that wait.
                async with http.post("/v1/work?wait=25", headers={"X-Session": "0" * 32}) as answer:
                    await answer.read()

    async with aiohttp.ClientSession(
        f"https://localhost:{PORT + 1}", connector=aiohttp.TCPConnector(ssl=shared)
    ) as http:
        body = encoding.encode({"fedloom": "", "session": "0" * 32})
        async with http.post("/v1/hello", data=body) as answer:
            assert answer.status == 200, await answer.text()
    tasks = [asyncio.create_task(one(number)) for number in range(int(os.environ["FEDLOOM_IDLE"]))]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()


def idle_clients(folder: Path, seconds: float) -> None:
    asyncio.run(wait_for_work(folder, ["one"], seconds))


def idle(folder: Path, clients: int, seconds: float) -> None:
    certs.laptop(folder / "idle", ["one"], ())
    hub = Hub(["one"], 60.0)
    hub.open_inbox(folder / "inbox")
    listening = Listening(hub, server_context(folder / "idle" / "server"), ("127.0.0.1", PORT + 1), {}, 1 << 20)
    os.environ["FEDLOOM_IDLE"] = str(clients)
    settle = 10.0 + clients / 100
    process = multiprocessing.get_context("spawn").Process(target=idle_clients, args=(folder, seconds + settle + 5))
    process.start()
    time.sleep(settle)
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    time.sleep(seconds)
    after, took = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - began
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{clients} idle clients: {used / took:.1%} of one core over {took:.0f} s")
    process.join()
    listening.stop()


def peak() -> float:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def large_client(config: Path, told: object) -> None:
    before = peak()
    serve_client(config)
    told.put(("client", peak() - before))  # type: ignore[attr-defined]


def large_server(folder: Path, spec: Spec, told: object) -> None:
    before = peak()
    serving = Serving(spec, ServerConfig.read(folder / "server.toml"), folder / "run")
    serving.gather(lambda missing: None)
    serving.experiment().go()
    serving.close(True)
    told.put(("server", peak() - before))  # type: ignore[attr-defined]


def memory(folder: Path, wide: int) -> None:
    context = multiprocessing.get_context("spawn")
    size = 4 * (wide * wide + wide * 64 + wide * 12)
    for clients in (2, 4):
        at = folder / f"large{clients}"
        names = [f"c{number}" for number in range(clients)]
        certs.laptop(at / "certs", names, ())
        listed = ", ".join(f'"{name}"' for name in names)
        (at / "server.toml").write_text(f'listen = "127.0.0.1:{PORT + clients}"\nclients = [{listed}]\n')
        settings = {"method": {"name": "fedavg", "batch": 500, "epochs": 1}, "partition": "iid", "rounds": 1}
        spec = Spec.of(settings | {"data": "digits", "model": f"mlp:{wide},{wide}"})
        told: multiprocessing.Queue[tuple[str, float]] = context.Queue()
        processes = [context.Process(target=large_server, args=(at, spec, told))]
        for name in names:
            (at / f"{name}.toml").write_text(
                f'server = "localhost:{PORT + clients}"\ncertificates = "certs/{name}"\nstate = "state-{name}"\n'
                "[data]\nshare = true\n"
            )
            processes.append(context.Process(target=large_client, args=(at / f"{name}.toml", told)))
        for process in processes:
            process.start()
        found = [told.get() for _ in processes]
        for process in processes:
            process.join()
        most = {what: max(number for name, number in found if name == what) / size for what in ("server", "client")}
        print(
            f"a model of {size / 1e6:.0f} MB, {clients} clients: the server's peak is {most['server']:.1f} times the "
            f"model, a client's {most['client']:.1f} times"
        )


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ask.add_argument("--clients", type=int, default=10)
    ask.add_argument("--waves", type=int, default=200)
    ask.add_argument("--idle", type=int, default=1000)
    ask.add_argument("--seconds", type=float, default=20)
    ask.add_argument("--wide", type=int, default=0)
    asked = ask.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if asked.waves:
            waves(Path(name), asked.clients, asked.waves)
        if asked.wide:
            memory(Path(name), asked.wide)
        if asked.idle:
            idle(Path(name), asked.idle, asked.seconds)


if __name__ == "__main__":
    main()
