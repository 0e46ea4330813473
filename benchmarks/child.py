"""One contender of one work, in this process: `python -m benchmarks.child GROUP WORK CONTENDER`, for the harness.

It says "@ready" and what it computes with when it has run once, and for each line that it reads "@took" and the
seconds of a further run.
"""

import sys
import time

import torch

from benchmarks import llama
from benchmarks.harness import Missing
from benchmarks.works import GROUPS


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
        start = time.perf_counter()
        result = run()
        took = time.perf_counter() - start
        print("@took", float(result) if work.unit == "bytes" else took, flush=True)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
