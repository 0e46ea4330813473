"""One contender of one work, in this process: `python -m benchmarks.child GROUP WORK CONTENDER`, for the harness.

It says "@ready" and what it computes with when it has run once, and for each line that it reads "@took" and the
seconds of a further run: the mean of as many as fill a fifth of a second, since caches and threads are cold at first.
"""

import sys
import time

import torch

from benchmarks import llama
from benchmarks.harness import Missing
from benchmarks.works import GROUPS

LEAST = 0.2
"""Seconds of one round; what takes longer runs once."""


def main() -> None:
    group, name, contender = sys.argv[1:]
    work = next(work for work in GROUPS[group]() if work.name == name)
    try:
        run = work.contenders[contender].prepare()
        run()  # once unmeasured: caches, lazy set-up
    except (Missing, ImportError) as error:
        print("@missing", str(error).splitlines()[0], flush=True)
        return
    print("@ready", llama.computes_with() or torch.backends.cpu.get_cpu_capability(), flush=True)
    for _ in sys.stdin:
        start, runs, took, result = time.perf_counter(), 0, 0.0, None
        while took < LEAST:
            result = run()
            runs, took = runs + 1, time.perf_counter() - start
            if work.unit == "bytes":
                break
        print("@took", float(result) if work.unit == "bytes" else took / runs, flush=True)


if __name__ == "__main__":
    main()
