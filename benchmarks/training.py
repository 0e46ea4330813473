"""What a training step consists of, as a Markdown page: `python -m benchmarks.training > docs/training-results.md`.

A model at the shape of all works, 1 x 512 tokens: the share of matrix products in its step by PyTorch's profiler, the
pages of memory that a step touches for the first time, and what the C library's settings change (two processes that
take turns). The optimiser is not in it.
"""

import resource
import statistics
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Child, Run, middle
from benchmarks.works import LAYERS, PROMPT, training_step
from bestiary.ops.native import load

LAYOUTS, PRECISIONS, ROUNDS = ("mamba", "mamba2", "gla"), ("fp32", "bf16"), 3
KEEP = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184"
"""Large blocks of memory are kept and used again."""
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_linear_pointwise", "mkldnn_linear", "convolution")
"""Operators that multiply matrices, by the last part of their names."""
HEAD = """# What a training step consists of

Made by `python -m benchmarks.training`; nothing here is typed by hand. {layers} layers of width 768, vocabulary 50280,
1 x {tokens} tokens, forward and backward; {threads} threads, kernels: {kernels}.

`not products`: the share of the time that is not matrix products, by PyTorch's profiler. `new pages`: pages of memory
that one step gets from the system. Medians of {rounds} rounds, least and most in brackets; `kept` is with
`GLIBC_TUNABLES={keep}`.

| model | precision | step | new pages | not products | step, kept | new pages, kept | time, kept / not |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def share_of_products(run: Run) -> float:
    """Of the time of one run, in this thread."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        times[event.key] = times.get(event.key, 0.0) + event.self_cpu_time_total
    products = sum(time for name, time in times.items() if name.split("::")[-1].rstrip("_") in PRODUCTS)
    return products / sum(times.values())


def child(layout: str, precision: str) -> None:
    """In a process of its own: a step whenever asked, its seconds and the pages that it touched first."""
    run = training_step(f"{layout}*{LAYERS}", PROMPT, half=precision == "bf16")
    run()
    print("@ready", share_of_products(run), flush=True)
    for _ in sys.stdin:
        pages, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        run()
        took = time.perf_counter() - start
        print("@took", took, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pages, flush=True)


def row(layout: str, precision: str) -> str:
    """A line of the table: two processes in turn, the second with KEEP."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    pair: list[Child] = []
    try:
        for extra in ({}, {"GLIBC_TUNABLES": KEEP}):  # one after the other: each has all threads
            pair.append(Child([layout, precision], threads | extra, "benchmarks.training").wait())
        shares = [1 - float(each.computes_with) for each in pair]
        asked = [[list(map(float, each.ask().split())) for each in pair] for _ in range(ROUNDS)]
    finally:
        for each in pair:
            each.close()
    (plain, pages), (kept, fewer) = ([_spread([turn[i][j] for turn in asked], j) for j in (0, 1)] for i in (0, 1))
    ratio = statistics.median(turn[1][0] / turn[0][0] for turn in asked)
    return f"| {layout} | {precision} | {plain} | {pages} | {shares[0]:.0%} | {kept} | {fewer} | {ratio:.2f} |"


def _spread(values: list[float], pages: int) -> str:
    median, low, high = (f"{v:,.0f}" if pages else f"{v:.2f} s" for v in middle(values))
    return f"{median} ({low} to {high})"


def main() -> None:
    if sys.argv[1:]:
        return child(*sys.argv[1:])
    print(
        HEAD.format(
            layers=LAYERS, tokens=PROMPT, threads=torch.get_num_threads(), kernels=load()[1], rounds=ROUNDS, keep=KEEP
        )
    )
    for layout in LAYOUTS:
        for precision in PRECISIONS:
            print(row(layout, precision), flush=True)
    return None


if __name__ == "__main__":
    main()
