"""`python -m benchmarks`: speed against peers, as JSON lines and a table."""

import platform
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import tyro

import bestiary
from benchmarks.harness import measure, write
from benchmarks.works import GROUPS
from bestiary.errors import BestiaryError, unknown
from bestiary.ops.native import load


@dataclass(frozen=True)
class Benchmarks:
    """Run works against peers, interleaved; peers that are not installed are noted (pip install '.[peers]').

    Examples:
      python -m benchmarks
      python -m benchmarks --works decode scan --rounds 9
      BESTIARY_KERNELS=avx2 python -m benchmarks        as on a processor without AVX-512
    """

    works: tuple[str, ...] = ()
    """Which: decode, prefill, train, scan, mixing; all by default."""
    rounds: int = 5
    """How often each contender runs, in turn with the others."""
    threads: int | None = None
    """Threads of every contender; by default one a core."""
    folder: Path = Path("runs/benchmarks")
    """Where results.jsonl and table.md go."""


def main() -> int:
    arguments = tyro.cli(Benchmarks, prog="python -m benchmarks", description=Benchmarks.__doc__)
    try:
        groups = arguments.works or tuple(GROUPS)
        for name in groups:
            if name not in GROUPS:
                raise unknown("work", name, GROUPS)
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        about = {
            "date": date.today().isoformat(),
            "bestiary": bestiary.__version__,
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "kernels": load()[1],
            "threads": torch.get_num_threads(),
            "rounds": arguments.rounds,
        }
        results = []
        for group in groups:
            for work in GROUPS[group]():
                results += measure(
                    work, rounds=arguments.rounds, say=lambda line: print(line, file=sys.stderr, flush=True)
                )
                path = write(results, about, arguments.folder)  # after each: an interruption loses one work
        print(path.read_text(encoding="utf-8"))
        print(f"wrote {path}")
    except BestiaryError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
