"""Contenders take turns, round after round, each in a process of its own: what disturbs one disturbs all.

Each round asks every contender once, in an order that turns by one from round to round, and pauses in between, so that
threads that wait in one process do not take time from the next. What is reported: the median of the rounds with the
least and the most, and for each peer the median over rounds of (its time / ours), with the range.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Run = Callable[[], object]
PAUSE = 0.05
"""Seconds before each contender."""


class Missing(Exception):
    """A contender that cannot run here; the message says why."""


@dataclass
class Contender:
    """Who does a work.

    Args:
        prepare: loads and warms up; returns what one round runs.
        target: its time (or size) over ours that is aimed at; 0 for none.
    """

    prepare: Callable[[], Run]
    target: float = 0.0


@dataclass
class Work:
    """One thing to do, and who does it.

    Args:
        name: what it is called on the command line and in files.
        title: what it is, for the table.
        contenders: by name; the first is ours, which the others are compared with.
        per: how many units one run does (tokens, say), to give a rate; 0 for none.
        unit: of these; "bytes": what a run returns is what counts, not its time.
    """

    name: str
    title: str
    contenders: dict[str, Contender]
    per: float = 0.0
    unit: str = "tok"


@dataclass
class Result:
    """What one contender took, a number a round: seconds, or bytes."""

    work: str
    title: str
    contender: str
    ours: bool
    target: float = 0.0
    values: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    note: str = ""
    per: float = 0.0
    unit: str = ""


class Child:
    """A contender in a process of its own: `python -m benchmarks.child GROUP WORK CONTENDER`."""

    def __init__(self, group: str, work: str, contender: str, environment: dict[str, str]):
        command = [sys.executable, "-m", "benchmarks.child", group, work, contender]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )
        word, _, rest = self._line().partition(" ")
        if word != "ready":
            self.close()
            raise Missing(rest or "it ended at once")

    def run(self) -> float:
        """One round."""
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)
        word, _, rest = self._line().partition(" ")
        if word != "took":
            self.close()
            raise Missing(rest or "it ended")
        return float(rest)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # libraries may say things as well
            if line.startswith("@"):
                return line[1:].strip()
        return ""


@contextmanager
def children(group: str, work: Work, environment: dict[str, str]) -> Iterator[dict[str, Callable[[], float] | Missing]]:
    """What runs each contender, or why it cannot."""
    found: dict[str, Callable[[], float] | Missing] = {}
    alive: list[Child] = []
    try:
        for name in work.contenders:
            try:
                alive.append(Child(group, work.name, name, environment))
                found[name] = alive[-1].run
            except Missing as error:
                found[name] = error
        yield found
    finally:
        for child in alive:
            child.close()


def measure(
    work: Work,
    runs: dict[str, Callable[[], float] | Missing],
    *,
    rounds: int,
    say: Callable[[str], None],
    pause: float = PAUSE,
) -> list[Result]:
    """Run a work's contenders in turn; those that cannot run are noted."""
    ours = next(iter(work.contenders))
    found = {
        name: Result(work.name, work.title, name, name == ours, contender.target, per=work.per, unit=work.unit)
        for name, contender in work.contenders.items()
    }
    ready = {name: run for name, run in runs.items() if not isinstance(run, Missing)}
    for name, run in runs.items():
        if isinstance(run, Missing):
            found[name].note = f"not run: {run}"
            say(f"{work.name}: {name} not run: {run}")
    names = list(ready)
    for i in range(rounds):
        took: dict[str, float] = {}
        for name in names[i % len(names) :] + names[: i % len(names)]:
            time.sleep(pause)
            took[name] = ready[name]()
        for name, value in took.items():
            found[name].values.append(value)
            if ours in took:
                found[name].ratio.append(value / took[ours])
        say(
            f"{work.name}: round {i + 1} of {rounds}: "
            + ", ".join(f"{n} {quantity(s, work.unit)}" for n, s in took.items())
        )
    return list(found.values())


def write(results: list[Result], about: dict[str, Any], path: Path) -> None:
    """JSON lines: first what was measured with what, then a line for each contender."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"kind": "about", **about})] + [json.dumps({"kind": "result", **asdict(r)}) for r in results]
    whole = path.with_suffix(".part")
    whole.write_text("\n".join(lines) + "\n", encoding="utf-8")
    whole.replace(path)


def read(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """What `write` wrote."""
    about, *rest = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    for line in (about, *rest):
        line.pop("kind")
    return about, [Result(**line) for line in rest]


def quantity(value: float, unit: str) -> str:
    """Seconds, or bytes, for people."""
    if unit == "bytes":
        return f"{value / 1e6:.3g} MB"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def middle(values: list[float]) -> tuple[float, float, float]:
    """Median, least and most."""
    return statistics.median(values), min(values), max(values)
