"""Aggregation rules on 100 replies of 1.6 million numbers: seconds, times the plain mean, and peak memory.

    python benchmarks/aggregate.py
    python benchmarks/aggregate.py --clients 20 --numbers 582026 --rules median krum:f=4

Each rule runs in a process of its own, once on a small stack to warm up and once on the whole one. `replies` is what
the stack itself takes, `more` what the rule takes at its peak on top of it. One reply in five is far off.
"""

import argparse
import csv
import multiprocessing
import resource
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from fedloom.aggregators import Context, build
from fedloom.random import stream

RULES = [
    "mean", "norm_bound", "median", "trimmed_mean:0.2", "krum:f=0.2", "multi_krum:f=0.2", "bulyan:f=0.2",
    "geometric_median", "centred_clip", "fltrust", "bucketing:2+median", "nnm+trimmed_mean:0.2",
    "gas:p=1000,f=0.2+median", "gas:p=1000+multi_krum:f=0.2",
]  # fmt: skip


def replies(clients: int, numbers: int) -> torch.Tensor:
    """Rows [clients, numbers] around one direction, a fifth of them far off."""
    stack = torch.randn(clients, numbers, generator=stream(0, "benchmark", "replies"))
    stack += torch.randn(numbers, generator=stream(0, "benchmark", "direction"))
    stack[: clients // 5] *= -3
    return stack


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(pipe: Connection, text: str, clients: int, numbers: int, threads: int) -> None:
    torch.set_num_threads(threads)
    rule = build(text)

    def run(stack: torch.Tensor) -> None:
        generator = stream(0, "benchmark", "rule")
        rule(stack, Context(torch.ones(len(stack)), stack[-1].clone(), {}, generator))

    run(replies(clients, 10_000))
    stack = replies(clients, numbers)
    before = peak_mib()
    began = time.perf_counter()
    run(stack)
    pipe.send((time.perf_counter() - began, peak_mib() - before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--numbers", type=int, default=1_663_370, help="the parameters of McMahan et al.'s CNN")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rules", nargs="+", default=RULES)
    parser.add_argument("--csv", type=Path, help="keep the table there")
    asked = parser.parse_args()
    table = []
    print(f"{asked.clients} replies of {asked.numbers:,} numbers, {asked.clients * asked.numbers * 4 / 2**20:.0f} MiB")
    print(f"{'rule':32}{'seconds':>9}{'x mean':>8}{'more MiB':>10}")
    for text in dict.fromkeys(["mean", *asked.rules]):
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=measured, args=(theirs, text, asked.clients, asked.numbers, asked.threads)
        )
        process.start()
        theirs.close()
        seconds, more = ours.recv()
        process.join()
        table.append((text, seconds, seconds / (table[0][1] if table else seconds), more))
        print(f"{text:32}{seconds:9.2f}{table[-1][2]:8.1f}{more:10.0f}", flush=True)
    if asked.csv:
        with asked.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["rule", "clients", "numbers", "seconds", "times_mean", "more_mib"])
            writer.writerows(
                [text, asked.clients, asked.numbers, f"{s:.3f}", f"{ratio:.2f}", f"{more:.0f}"]
                for text, s, ratio, more in table
            )


if __name__ == "__main__":
    main()
