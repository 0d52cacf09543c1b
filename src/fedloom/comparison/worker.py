"""A process that carries out jobs: a line of standard input each; what becomes of them are lines of its output."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any

from fedloom.comparison.job import Job, JobRunner

SHOWN = ("round", "train_loss", "validation_", "chosen_by")  # what the others hear of a round begins so


def main() -> None:
    """Serves until its standard input ends, which it does with the parent, however that goes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what methods and libraries print goes to the log
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def listen() -> None:
        for line in sys.stdin:
            jobs.put(line)
        os._exit(0)

    def tell(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    def row(numbers: Mapping[str, Any]) -> None:
        tell(row={name: value for name, value in numbers.items() if name.startswith(SHOWN)})

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent decides
    signal.signal(signal.SIGTERM, stop)
    threading.Thread(target=listen, daemon=True).start()
    runner = JobRunner()
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            failure = runner.run(Job.of(jobs.get()), row)
            tell(done=True, failure=failure and dataclasses.asdict(failure))
    os._exit(0)  # the listening thread would be waited for


if __name__ == "__main__":
    main()
