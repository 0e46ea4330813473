"""Contenders take turns, round after round, each in a process of its own: what disturbs one disturbs all.

Each round asks every contender once, for a fifth of a second at least (benchmarks/child.py), in an order that turns by
one from round to round, and pauses in between, so that threads that wait in one process do not take time from the next.
What is reported: the median of the rounds with the least and the most, and for each peer the median over rounds of
(its time / ours), with the range.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

Run = Callable[[], object]
PAUSE = 0.05
"""Seconds before each contender."""


class Missing(Exception):
    """A contender that cannot run here; the message says why."""


class Runs(Protocol):
    """Who can be asked for a round."""

    computes_with: str

    def run(self) -> float:
        """Seconds, or bytes."""
        ...


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
        most_rounds: how many rounds are enough where one takes long; None for as many as are asked for.
    """

    name: str
    title: str
    contenders: dict[str, Contender]
    per: float = 0.0
    unit: str = "tok"
    most_rounds: int | None = None


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
    source: str = ""
    """Of which sources of ours this is a result, when, and on how many threads."""
    computes_with: str = ""


class Child:
    """A contender in a process of its own: `python -m benchmarks.child GROUP WORK CONTENDER`, or another such module.

    `wait` until it is ready; then `run` it.
    """

    def __init__(self, arguments: list[str], environment: dict[str, str], module: str = "benchmarks.child"):
        command = [sys.executable, "-m", module, *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self.computes_with = ""

    def wait(self) -> "Child":
        """Until it has loaded, and has run once."""
        word, _, self.computes_with = self._line().partition(" ")
        if word != "ready":
            self.close()
            raise Missing(self.computes_with or "it ended at once")
        return self

    def run(self) -> float:
        """One round."""
        return float(self.ask())

    def ask(self) -> str:
        """One round, and all that is said of it."""
        assert self.process.stdin is not None
        try:
            print("go", file=self.process.stdin, flush=True)
            word, _, rest = self._line().partition(" ")
        except BrokenPipeError:
            word, rest = "", ""
        if word != "took":
            self.close()
            raise Missing(rest or f"it ended, with {self.process.returncode}")
        return rest

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
def children(group: str, work: Work, environment: dict[str, str]) -> Iterator[dict[str, Child | Missing]]:
    """A process for each contender, or why there is none. They get ready one after the other: each has all threads."""
    found: dict[str, Child | Missing] = {}
    try:
        for name in work.contenders:
            found[name] = child = Child([group, work.name, name], environment)
            try:
                child.wait()
            except Missing as error:
                found[name] = error
        yield found
    finally:
        for child in found.values():
            if isinstance(child, Child):
                child.close()


def measure(
    work: Work,
    runs: Mapping[str, Runs | Missing],
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
    ready: dict[str, Runs] = {}

    def drop(name: str, why: Missing) -> None:
        ready.pop(name, None)
        found[name].note, found[name].values, found[name].ratio = f"not run: {why}", [], []
        say(f"{work.name}: {name} not run: {why}")

    for name, run in runs.items():
        if isinstance(run, Missing):
            drop(name, run)
        else:
            ready[name], found[name].computes_with = run, run.computes_with
    rounds = rounds if work.most_rounds is None else min(rounds, work.most_rounds)
    for i in range(rounds):
        took: dict[str, float] = {}
        names = list(ready)
        turn = i % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            time.sleep(pause)
            try:
                took[name] = ready[name].run()
            except Missing as error:  # one that dies, for want of memory say, is noted, and the others go on
                drop(name, error)
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
