"""`python -m benchmarks`: speed against peers, as JSON lines and a page."""

import os
import platform
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import tyro

import bestiary
from benchmarks.harness import Work, children, measure, read, write
from benchmarks.page import page
from benchmarks.works import GROUPS
from bestiary.errors import BestiaryError, unknown
from bestiary.ops.native import load

NARROW = {
    "BESTIARY_KERNELS": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}

PEERS = ("transformers", "mambapy", "xllamacpp", "rwkv")


@dataclass(frozen=True)
class Benchmarks:
    """Run works against peers, interleaved; peers that are not installed are noted (pip install '.[peers]').

    Examples:
      python -m benchmarks
      python -m benchmarks --works decode scan-grad --rounds 9
      python -m benchmarks --forbid-avx512              as on a processor without it
    """

    works: tuple[str, ...] = ()
    """Which groups, or single works of them by name; all by default."""
    rounds: int = 5
    """How often each contender runs, in turn with the others."""
    threads: int | None = None
    """Threads of every contender; by default one a core."""
    forbid_avx512: bool = False
    """Tell all that can be told not to use AVX-512."""
    folder: Path = Path("runs/benchmarks")
    """Where the results and the page go."""


def main() -> int:
    arguments = tyro.cli(Benchmarks, prog="python -m benchmarks", description=Benchmarks.__doc__)
    try:
        chosen = _chosen(arguments.works)
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        threads = str(torch.get_num_threads())
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        environment |= NARROW if arguments.forbid_avx512 else {}
        about = {
            "bestiary": bestiary.__version__,
            "torch": torch.__version__,
            "peers": _versions(PEERS),
            "processor": _processor(),
            "kernels": "AVX-512 forbidden, by " + _spelled(NARROW) if arguments.forbid_avx512 else load()[1],
        }
        wide, narrow = arguments.folder / "results.jsonl", arguments.folder / "avx2.jsonl"
        path = narrow if arguments.forbid_avx512 else wide
        source = f"{_source()}, {date.today().isoformat()}, {threads} threads"
        done = {result.work: [] for result in read(path)[1]} if path.exists() else {}
        for result in read(path)[1] if path.exists() else ():
            done[result.work].append(result)  # works that are not run now stay as they are
        for group, work in chosen:
            with children(group, work, environment) as runs:
                found = measure(work, runs, rounds=arguments.rounds, say=lambda line: print(line, file=sys.stderr))
            done[work.name] = [replace(result, source=source) for result in found]
            order = [work.name for _, work in _chosen(())]
            results = [result for name in sorted(done, key=order.index) for result in done[name]]
            write(results, about, path)  # after each: an interruption loses one work
        print(page(*(file for file in (wide, narrow) if file.exists())))
        print(f"wrote {path}")
    except BestiaryError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return 0


def _chosen(names: tuple[str, ...]) -> list[tuple[str, Work]]:
    """Works with the groups that they are of; names are of either."""
    works = [(group, work) for group, make in GROUPS.items() for work in make()]
    known = {*GROUPS, *(work.name for _, work in works)}
    for name in names:
        if name not in known:
            raise unknown("work", name, known)
    return [(group, work) for group, work in works if not names or group in names or work.name in names]


def _source() -> str:
    """The commit of these sources, with a + where they were changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return bestiary.__version__
    return commit.stdout.strip() + "+" * bool(changed.stdout.strip())


def _spelled(variables: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in variables.items())


def _versions(packages: tuple[str, ...]) -> str:
    """Those that are installed, with their versions."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if os.environ.get("BENCHMARK_LLAMA"):
        found.append("llama.cpp by BENCHMARK_LLAMA")
    return ", ".join(found) or "none installed"


def _processor() -> str:
    """The processor's own name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
