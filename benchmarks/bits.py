"""Hashes of what forty runs give, over methods, engines, boundaries and worlds: `python benchmarks/bits.py > before`.

A change that should change no behaviour is tried by the same command after it on the same machine: `diff before after`.
A hash is of the model, the metrics but the times, and the ledger; runs that draw keys (`secure`) give equal sums.
"""

import argparse
import hashlib
import json
from contextlib import suppress

import fedloom
from fedloom.testing import without_times

SMALL = {"data": "digits", "clients": 6, "rounds": 3, "threads": 1}
SAMPLED = {"clients": 12, "cohort": 5}
RUNS = {
    "fedavg": {},
    "fedavg cohort": SAMPLED,
    "fedavg breast_cancer": {"data": "breast_cancer"},
    "fedavg poisson": SAMPLED | {"participation": "poisson"},
    "fedavg loopback": {"engine": "loopback"},
    "fedavg pool": {"engine": "pool", "workers": 2},
    "fedavg vectorized": {"engine": "vectorized", "model": "mlp:32"},
    "fedavg mlp": {"model": "mlp:64,32"},
    "fedavg resnet8": {"model": "resnet8", "rounds": 1},
    "fedavg lost": SAMPLED | {"lost": 0.3},
    "fedavg deadline": SAMPLED | {"speed": "lognormal:1.0", "deadline": 30.0},
    "fedavg overselect": SAMPLED | {"overselect": 1.6, "speed": "lognormal:1.0"},
    "fedavg availability": SAMPLED | {"availability": "markov:0.5"},
    "fedavg topk": {"compress": "topk:0.05+qsgd:4"},
    "fedavg zstd": {"compress": "randk:0.1+zstd"},
    "fedavg dp client": SAMPLED | {"dp": "client:noise=1.0,clip=adaptive"},
    "fedavg dp sample": {"dp": "sample:noise=1.0,clip=1.0"},
    "fedavg dp local": {"dp": "local:epsilon=50,clip=1.0"},
    "fedavg secure": {"secure": "bonawitz"},
    "fedavg cache": SAMPLED | {"cache": True},
    "fedavg faults": {"faults": "corrupt:0.2+late:0.2"},
    "fedavg krum": SAMPLED | {"attack": "sign_flip:0.2", "aggregate": "krum:f=1"},
    "fedavg alie": {"attack": "alie:0.34,z=1.5", "aggregate": "nnm+trimmed_mean:f=2"},
    "fedavg shift": {"partition": "iid+rotation:45+flip:0.2"},
    "scaffold": SAMPLED,
    "scaffold pool": SAMPLED | {"engine": "pool", "workers": 2},
    "scaffold lost": SAMPLED | {"lost": 0.2, "cache": True},
    "feddyn": SAMPLED,
    "fedopt": {},
    "fednova": {"partition": "quantity:0.5"},
    "ditto": {},
    "fedrep": {},
    "fedbn": {"model": "resnet8", "rounds": 1},
    "fedproto": {},
    "fedgen": {},
    "dfedsam": {},
    "fedbuff": {"speed": "lognormal:1.0", "rounds": 6},
    "fedasync": {"speed": "lognormal:1.0", "rounds": 6, "availability": "markov:0.5"},
    "frl": {},
    "oort": {"clients": 12, "chosen": 4},
    "split_learning": {"problem": "vertical:0.1", "clients": 3, "data": "breast_cancer"},
    "fot": {"problem": "stream:5,rounds=1", "clients": 4, "rounds": 5},
    "target": {"problem": "stream:5,rounds=1,known=false", "clients": 4, "rounds": 5},
}


def bits(name: str, settings: dict[str, object]) -> str:
    """The hash of what a run gives, or why it does not begin."""
    try:
        run = fedloom.run(name.split()[0], **(SMALL | settings))
    except fedloom.UsageError as refused:
        return f"refused: {refused}"
    digest = hashlib.blake2b(digest_size=12)
    with suppress(fedloom.UsageError):  # of a method without a global model
        digest.update(run.model.flat.numpy().tobytes())
    for row in (*map(without_times, run.metrics), *run.ledger):
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def main() -> None:
    """A line a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="runs; all without")
    for name in parser.parse_args().names or RUNS:
        print(f"{bits(name, RUNS[name])}  {name}", flush=True)


if __name__ == "__main__":
    main()
