"""What a large model costs in memory between machines: at a client, and at the server of few clients and of many."""

import multiprocessing
import os
import resource
from pathlib import Path

import pytest
from federation import NAMES, Federation, _client, spec_of

pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

APART = multiprocessing.get_context("spawn")
ROOM = 64 << 20  # bytes beside models: buffers of the line, the heap's own
LIBRARIES = 400 << 20  # bytes of a process that has loaded everything, at most


def settings(wide):
    """A run of one round with a network of about `wide`**2 numbers."""
    return spec_of({"name": "fedavg", "epochs": 1, "batch": 100}, rounds=1, model=f"mlp:{wide},{wide}", eval_every=1)


def size_of(wide):
    """Bytes of its numbers."""
    return 4 * (wide * wide + wide * 64 + wide * 12 + 10)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available():
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024


def measured(told, name, what, *about):
    """What a function returns, with the most memory that its process has had, under a name."""
    import torch

    torch.set_num_threads(1)
    told.put((name, what(*about), peak()))


def alone(wide, clients):
    """The work of one client with nobody around: its data, its network, and the call; no line, no bytes."""
    from dataclasses import replace

    from fedloom import tasks
    from fedloom.calls import Call
    from fedloom.engines import heap
    from fedloom.engines.perform import perform
    from fedloom.method import build
    from fedloom.runs.fitted import Fitted
    from fedloom.tasks._apart import AtClient

    heap.keep()
    spec = replace(settings(wide), clients=clients)
    told = dict(spec.method)
    fitted = Fitted(spec, tasks.build(spec), build(told.pop("name"), told))
    site = fitted.site_of(AtClient(fitted.task, 0), fitted.stages())
    message = {"model": site.initial}
    call = Call("mean", "local", (0,), message, {}, "train", 1, 0)
    return perform(fitted.method, site, {}, call, 0, message).steps


def served(folder, wide):
    from federation import serve

    made = serve(folder, settings(wide))
    assert made.record.metrics[-1]["replies"] == len(made.record.manifest["network"])


def peaks(folder, keys, wide, clients):
    """The most memory that each process of a run had, by name, and of one that does a client's work alone."""
    federation = Federation(folder, keys, clients, lease=600)
    (folder / "server.toml").write_text(f"reply_bytes = {1 << 33}\n" + (folder / "server.toml").read_text())
    told = APART.Queue()
    jobs = [("server", served, folder, wide)]
    jobs += [(name, _client, federation.config_of(name), folder / f"{name}.log") for name in NAMES[:clients]]
    processes = [APART.Process(target=measured, args=(told, *job)) for job in jobs]
    found = {}
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        process = APART.Process(target=measured, args=(told, "alone", alone, wide, clients))
        process.start()
        while len(found) < clients + 2:
            name, _, most = told.get(timeout=600)
            found[name] = most
        process.join()
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return found


def shown(found, size):
    text = ", ".join(f"{name} {most / size:.2f}" for name, most in sorted(found.items()))
    print(f"\nmodel of {size / 1e6:.0f} MB; peaks in models: {text}")


def at_client(found, size):
    """A client has the message that came, and else what it has alone."""
    for name in NAMES:
        assert found.get(name, 0) <= found["alone"] + size + ROOM


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="reads /proc")
def test_a_model_of_two_gigabytes_with_as_many_clients_as_memory_carries(certificates, tmp_path_factory):
    wide = int(os.environ.get("FEDLOOM_WIDE", "22300"))
    size = size_of(wide)
    clients = max(1, min(8, int((available() - 3 * size - LIBRARIES) / (5 * size + LIBRARIES))))
    if available() < 8.5 * size:
        pytest.skip(f"a model of {size / 1e9:.1f} GB takes {8.5 * size / 1e9:.0f} GB of memory here; free some")
    found = peaks(tmp_path_factory.mktemp("large"), certificates, wide, clients)
    shown(found, size)
    at_client(found, size)


def test_the_servers_memory_grows_by_the_sums_on_the_way_up_the_tree_alone(certificates, tmp_path_factory):
    wide = 7000
    size, found = size_of(wide), {}
    for clients in (2, 4, 8):
        found[clients] = peaks(tmp_path_factory.mktemp("large"), certificates, wide, clients)
        shown(found[clients], size)
        at_client(found[clients], size)
    for few, many in ((2, 4), (4, 8)):  # each doubling adds a level: a sum of doubles, which is two models
        assert found[many]["server"] <= found[few]["server"] + 2 * size + ROOM
    assert found[8]["server"] <= 10 * size + LIBRARIES + ROOM
