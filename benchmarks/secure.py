"""Secure sums of a model: seconds and bytes a client, seconds of the server, and the distance from the plain mean.

    python benchmarks/secure.py
    python benchmarks/secure.py --clients 50 --parameters 1000000 --protocols bonawitz ckks

Every client is played in turn, in one thread. A tenth of the clients is lost before it masks its reply, so that the
server takes their pair masks off. Clients' seconds are all they spend in a round, the server's those of everything
else; `error` is the largest distance of a coordinate of the mean from that of doubles, `bound` the
stated one. The peak of memory is the process's so far.
"""

import argparse
import resource
import time
from collections import Counter

import torch

from fedloom.boundary import secure as secure_sums
from fedloom.boundary.secure import Passed, Secure, keyed
from fedloom.boundary.secure.client import SecureClient
from fedloom.random import stream

LOST = 10  # every so many clients, one is lost


class Watch:
    """Seconds spent inside some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def over(self, party: type, *names: str) -> None:
        for name in names:
            setattr(party, name, self._timed(getattr(party, name)))

    def _timed(self, function):
        def timed(*arguments):
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def measure(protocol: str, bits: int, clients: int, parameters: int, watch: Watch) -> str:
    """One line of the table."""
    replies = {
        client: ({"delta": torch.randn(parameters, generator=stream(0, "benchmark", client)) / 100}, float(client + 1))
        for client in range(clients)
    }
    lost = set(range(LOST // 2, clients, LOST))
    secure, transcript, watch.seconds = Secure(protocol, bits=bits, clip=1.0), list[Passed](), 0.0
    began = time.perf_counter()
    total = secure_sums.aggregate(
        replies, range(clients), {"masked": lost}, secure, weight=clients, entropy=keyed(0), transcript=transcript
    )
    seconds = time.perf_counter() - began
    there = [client for client in range(clients) if client not in lost]
    weight = sum(replies[client][1] for client in there)
    exact = sum(replies[client][0]["delta"].double() * replies[client][1] for client in there) / weight
    error = (total.mean()["delta"].double() - exact).abs().max().item()
    bound = secure.terms(b"", clients, clients).fixed.error(weight, len(there)) + 2**-24 * exact.abs().max().item()
    assert error <= bound, (error, bound)
    traffic = Counter()
    for _, direction, client, size in transcript:
        traffic[direction, client] += size
    up, down = (max(size for (way, _), size in traffic.items() if way == wanted) for wanted in ("up", "down"))
    return (
        f"{protocol:9} {secure.bits:4} {clients:8} {parameters:11,} {len(lost):5} {seconds:8.2f} "
        f"{watch.seconds / clients:9.3f} {seconds - watch.seconds:9.2f} {up / 2**20:8.2f} {down / 2**20:8.3f} "
        f"{error:9.1e} {bound:9.1e} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:9.0f}"
    )


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    ask.add_argument("--clients", type=int, nargs="+", default=[20, 100])
    ask.add_argument("--parameters", type=int, default=1_600_000)
    ask.add_argument("--bits", type=int, nargs="+", default=[32, 48, 64])
    ask.add_argument("--protocols", nargs="+", default=["bonawitz"], choices=["bonawitz", "ckks"])
    args = ask.parse_args()
    torch.set_num_threads(1)
    watch = Watch()
    watch.over(SecureClient, "__init__", "advertise", "share", "masked", "unmask")
    if "ckks" in args.protocols:
        from fedloom.boundary.secure.he import HomomorphicClient, KeyHolder

        watch.over(HomomorphicClient, "advertise", "encrypted")
        watch.over(KeyHolder, "__init__", "published", "opened")
    head = (
        "protocol  bits  clients  parameters  lost    all s  client s  server s   up MiB down MiB     error     bound"
    )
    print(f"{head}  peak MiB")
    for protocol in args.protocols:
        for bits in args.bits if protocol == "bonawitz" else [36]:
            for clients in args.clients:
                print(measure(protocol, bits, clients, args.parameters, watch), flush=True)


if __name__ == "__main__":
    main()
