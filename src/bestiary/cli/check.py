"""`bestiary check`: the laws of the contract, tried on mixers."""

import functools
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import track

from bestiary import channel_mixers, mixers
from bestiary.cli.common import parse, write_json
from bestiary.conformance.run import Verdict, check, table
from bestiary.errors import unknown
from bestiary.registry import Registry


@dataclass(frozen=True)
class Check:
    """Try every law of the contract on mixers, with random shapes, cuts, padding and gates; exits with 1 if one fails.

    Examples:
      bestiary check                          all mixers
      bestiary check mamba gla                two of them
      bestiary check mypackage.mixers:Mine    your own, before it is registered
      bestiary check gla --examples 50 --seed 7 --d-model 96
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Mixers or channel mixers by name, or your own as module:Class; none for all."""
    examples: int = 10
    """Random cases a law."""
    seed: int = 0
    """Another seed gives other cases."""
    d_model: int = 32
    """Width to build them at."""
    json: Path | None = None
    """Write the results here too."""


def main(argv: list[str]) -> int:
    arguments = parse(Check, argv, "check")
    sys.path.insert(0, "")  # the user's own modules, as `python -m` finds them
    console = Console()
    wanted = [_find(name) for name in arguments.names] or [
        (registry, name) for registry in (mixers.registry, channel_mixers.registry) for name in registry.names()
    ]
    verdicts: list[Verdict] = []
    start = time.perf_counter()
    for registry, name in track(wanted, "trying the laws", console=Console(stderr=True), transient=True):
        build = functools.partial(registry.build, name, arguments.d_model)
        verdicts += check(name, build, examples=arguments.examples, seed=arguments.seed)
    names = list(dict.fromkeys(verdict.mixer for verdict in verdicts))
    columns = max(1, (console.width - 44) // 14)
    for first in range(0, len(names), columns):
        part = names[first : first + columns]
        console.print(table([verdict for verdict in verdicts if verdict.mixer in part]))
    failed = [verdict for verdict in verdicts if not verdict.holds]
    for verdict in failed:
        console.print(f"[red]{verdict.mixer} breaks {verdict.law}:[/red] {verdict.message}", highlight=False)
    seconds = time.perf_counter() - start
    console.print(f"{len(verdicts) - len(failed)} of {len(verdicts)} laws hold, in {seconds:.0f} s")
    write_json(arguments.json, [asdict(verdict) | {"holds": verdict.holds} for verdict in verdicts])
    return 1 if failed else 0


def _find(name: str) -> tuple[Registry, str]:
    """The registry that holds a name; a user's own module:Class is registered as a sequence mixer."""
    sequence, channel = mixers.registry, channel_mixers.registry
    if ":" in name:
        return sequence, sequence.load(name)
    if name in channel.names() and name not in sequence.names():
        return channel, name
    if name not in sequence.names():
        raise unknown("mixer", name, [*sequence.names(), *channel.names()])
    return sequence, name
