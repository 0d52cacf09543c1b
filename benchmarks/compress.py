"""Compression: seconds and bytes of 1.6 million numbers, and FedAvg on digits, for every family.

    python benchmarks/compress.py
    python benchmarks/compress.py --rounds 100 --texts topk:0.01 qsgd:4+zstd

`times` is how many times fewer bytes go up than without compression, envelopes included. `pack` and `unpack` are
seconds for one reply of 1.6 million numbers from a normal distribution, at the client and at the server, on one thread.
"""

import argparse
import csv
import time
from pathlib import Path

import torch

import fedloom
from fedloom import encoding
from fedloom.boundary.compress import Compress
from fedloom.calls import Call
from fedloom.methods.optimize.fedavg import FedAvg
from fedloom.node import Client
from fedloom.random import stream
from fedloom.site import Site
from fedloom.tasks.toy import Toy
from fedloom.vector import Layout, Vector

TEXTS = [
    "topk:0.01", "topk:0.01,ef=false", "topk:0.01+qsgd:4", "randk:0.1", "randk:0.1,ef=false", "qsgd:4", "qsgd:2",
    "qsgd:4+zstd", "uniform:8", "uniform:4", "uniform:1", "sign", "fp16", "bf16", "lowrank:4", "lowrank:2+fp16", "zstd",
]  # fmt: skip
LAYOUT = Layout(("a", "b", "bias"), ((1000, 1024), (563, 1024), (1563,)), 3)
CALL = Call("mean", "local", (0,), {}, {}, "train", 1, 0)


def costs(text: str | None) -> tuple[float, float, int]:
    """Seconds to pack and to unpack one large reply, and its bytes."""
    reply = {"delta": Vector(torch.randn(LAYOUT.size, generator=stream(0, "benchmark", "delta")), LAYOUT)}
    if text is None:
        return 0.0, 0.0, sum(encoding.sizes(reply).values())
    layer, client = Compress.of(text, FedAvg()), Client(Site(Toy(), 0), 0, {}, "train", 1, 0)
    began = time.perf_counter()
    sent = layer.around(client, CALL, {}, lambda: reply)
    packed = time.perf_counter()
    layer.arrive(CALL, 0, sent)
    return packed - began, time.perf_counter() - packed, sum(encoding.sizes(sent).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--texts", nargs="*", default=TEXTS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compress.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for text in [None, *args.texts]:
        pack, unpack, size = costs(text)
        made = fedloom.run("fedavg", "digits", compress=text, rounds=args.rounds, eval_every=args.rounds, report=False)
        up = sum(row["up_bytes"] for row in made.metrics)
        rows.append({
            "compress": text or "none",
            "large_reply_bytes": size,
            "pack_seconds": round(pack, 3),
            "unpack_seconds": round(unpack, 3),
            "digits_up_bytes": up,
            "digits_times": round(rows[0]["digits_up_bytes"] / up, 1) if rows else 1.0,
            "digits_accuracy": round(made.final["global_test_accuracy"], 4),
        })  # fmt: skip
        print(*rows[-1].values(), sep="\t", flush=True)
    args.out.parent.mkdir(exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
