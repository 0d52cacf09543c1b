"""Workers as actors of a Ray cluster: `pip install "fedloom[ray]"`.

Without an address a cluster of this machine's cores is started, and shut down after the run; the environment variable
RAY_ADDRESS, or `Ray(address=...)`, names one that runs already; one that this process has joined is used as it is.
There fedloom is installed on every node, and the nodes have the same kind of processor and the same PyTorch, or the
last bits of a result may differ.

The task travels once a run, and what all clients of a call get once a call, through Ray's object store, which all
actors of a node map: data are shared by them, and read-only. Messages are in our encoding.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import textwrap
from collections import deque
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedloom import encoding
from fedloom.determinism import make_reproducible
from fedloom.engines import heap
from fedloom.engines.blocks import Distributed, cores
from fedloom.engines.orders import Order, WorkerHandle
from fedloom.engines.worker import Worker
from fedloom.errors import RunError, UsageError
from fedloom.message import Value, array_of, octets_of
from fedloom.method import Method
from fedloom.site import Site
from fedloom.wire import Array

START_SECONDS = 300  # until some actor must have found its place


@dataclass(eq=False)
class _Handle(WorkerHandle):
    """An actor as the driver sees it."""

    actor: Any
    due: deque[Any]  # references to what it will say, oldest first


class Ray(Distributed[_Handle]):
    """Serves the clients of a call on actors, each with `threads` processors (and a share of a GPU with CUDA)."""

    ADVICE = "it needs fedloom, and the file of your method at the same path, on every node of the cluster"

    def __init__(self, workers: int = 0, threads: int = 1, address: str | None = None) -> None:
        super().__init__(workers, threads)
        self.address = address
        self.ray = _ray()
        self.joined = False

    def start(self, method: Method, site: Site, states: MutableMapping[int, dict[str, Value]]) -> None:
        if not self.ray.is_initialized():
            self._join()
        resources = self.ray.cluster_resources()
        self.workers = self.workers or max(1, int(resources.get("CPU", 1)) // self.threads)
        gpus = 0.0
        if site.device.type == "cuda":
            if not resources.get("GPU"):
                raise RunError("device is cuda, but this Ray cluster has no GPU; take --device cpu")
            gpus = 1 / math.ceil(self.workers / resources["GPU"])
        self.make = self.ray.remote(num_cpus=self.threads, num_gpus=gpus)(Actor)
        # A tensor pickled as an array is not copied where it arrives.
        self.ray.util.register_serializer(Tensor, serializer=_pack_tensor, deserializer=_unpack_tensor)
        try:
            task = site.task.to(torch.device("cpu"))
            own = task, site.seed, site.device.type, *site.about[3:]  # an actor sees no device but its own
            about = self.ray.put((own, method))
        finally:
            self.ray.util.deregister_serializer(Tensor)
        self.terms = (sys.path, [about], self.threads)
        super().start(method, site, states)

    def stop(self) -> None:
        if self.ray.is_initialized():
            for handle in self.handles:
                self.ray.kill(handle.actor)
        super().stop()
        if self.joined:
            self.ray.shutdown()
            self.joined = False

    def post(self, shared: bytes) -> Any:
        return self.ray.put(_parcel(shared))

    def send(self, handle: _Handle, order: Order, request: dict[str, Value]) -> None:
        # Inside a list a reference stays one: only the first request of a call fetches what it refers to.
        handle.due.append(handle.actor.answer.remote(_parcel(encoding.encode(request)), [order.spot]))

    def hear(self, patience: float | None = None) -> list[tuple[_Handle, dict[str, Any] | str]]:
        due = {handle.due[0]: handle for handle in self.handles if handle.due}
        started = any(handle.ready for handle in self.handles)
        heard, _ = self.ray.wait(list(due), timeout=patience if started else START_SECONDS)
        if not heard and started:
            return []
        if not heard:
            raise RunError(
                f"no worker found a place on the Ray cluster within {START_SECONDS} s: each needs {self.threads} of "
                f"its free processors, now {self.ray.available_resources().get('CPU', 0):g}; take fewer --threads"
            )
        handle = due[heard[0]]
        return [(handle, self._read(handle))]

    def _read(self, handle: _Handle) -> dict[str, Any] | str:
        lost = self.ray.exceptions
        try:
            said = self.ray.get(handle.due.popleft())
            return encoding.decode(said.data) if handle.ready else {}
        except (lost.RayActorError, lost.ObjectLostError, lost.NodeDiedError, lost.OutOfMemoryError) as error:
            self.ray.kill(handle.actor)  # it may be but out of reach
            return _line(error)
        except lost.RayTaskError as error:
            raise RunError(f"a worker on Ray failed: {_line(error)}") from error

    def start_worker(self) -> _Handle:
        actor = self.make.remote(*self.terms)
        return _Handle(actor, deque([actor.__ray_ready__.remote()]))

    def _join(self) -> None:
        """Joins the cluster that is named, or starts one."""
        address = self.address or os.environ.get("RAY_ADDRESS", "local")
        own: dict[str, Any] = {}
        if address == "local":
            own = {"num_cpus": (self.workers or cores()) * self.threads, "include_dashboard": False}
        stop = signal.getsignal(signal.SIGTERM)
        try:
            _knock(address)
            self.ray.init(address, logging_level=logging.CRITICAL, log_to_driver=False, **own)
        except (OSError, RuntimeError, ValueError, self.ray.exceptions.RayError) as error:
            raise RunError(f"cannot join the Ray cluster {address!r}: {_line(error)}") from error
        if callable(stop):  # Ray puts its own handler in the place of one that may have more to do
            signal.signal(signal.SIGTERM, stop)
        self.joined = True


class Actor:
    """A worker on the cluster.

    `path` is where the driver finds modules; `about` refers to what a Site is made of (task, seed, device, buffers),
    and the method.
    """

    def __init__(self, path: list[str], about: list[Any], threads: int) -> None:
        sys.path += [folder for folder in path if folder not in sys.path]
        heap.keep()
        site, method = _ray().get(about[0])
        make_reproducible(site[2], threads)
        self.worker = Worker(Site(*site), method)

    def answer(self, request: Array, spot: list[Any]) -> Array:
        """The encoded answer to an encoded request; `spot` refers to what all clients of the call get."""
        decoded = encoding.decode(request.data)
        return _parcel(encoding.encode(self.worker.answer(decoded, lambda: _ray().get(spot[0]))))


def _ray() -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when Ray is imported, and when it starts
    try:
        import ray
    except ImportError as error:
        raise UsageError('the engine ray needs Ray: pip install "fedloom[ray]"') from error
    return ray


def _knock(address: str) -> None:
    """Raises OSError if nobody listens at `host:port`: Ray itself would try for a quarter of an hour."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _parcel(octets: bytes) -> Array:
    """The bytes in a form that Ray does not copy where they arrive."""
    return np.frombuffer(octets, np.uint8)


Laid = tuple[tuple[Array, torch.dtype, torch.Size], ...]  # of a dense tensor one; of a sparse one indices and values


def _pack_tensor(tensor: Tensor) -> tuple[Laid, torch.Size]:
    parts = (tensor.indices(), tensor.values()) if tensor.is_sparse else (tensor,)
    return tuple((array_of(octets_of(part)), part.dtype, part.shape) for part in parts), tensor.shape


def _unpack_tensor(laid_out: tuple[Laid, torch.Size]) -> Tensor:
    parts, shape = laid_out
    found = [
        torch.from_numpy(array).view(dtype).reshape(its) if array.size else torch.empty(its, dtype=dtype)
        for array, dtype, its in parts
    ]
    if len(found) == 1:
        return found[0]
    indices, values = found
    return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=True)


def _line(error: BaseException) -> str:
    return textwrap.shorten((str(error).splitlines() or [type(error).__name__])[-1], 200)
