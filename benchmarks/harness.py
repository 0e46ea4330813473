"""Contenders take turns, round after round, in one process: what disturbs one disturbs all.

Each round runs every contender once, in an order that turns by one from round to round. What is reported: the median of
the rounds with the least and the most, and for each peer the median over rounds of (its time / ours), with the range.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Run = Callable[[], object]


class Missing(Exception):
    """A contender that cannot run here; the message says why."""


@dataclass
class Work:
    """One thing to do, and who does it.

    Args:
        name: what it is called on the command line.
        title: what it is, for the table.
        ours: the name of the contender that the others are compared with.
        contenders: name -> function that prepares (loads, warms caches) and returns what one round runs.
        per: how many units one run does (tokens, say), to give a rate; 0 for none.
        unit: of these.
    """

    name: str
    title: str
    ours: str
    contenders: dict[str, Callable[[], Run]]
    per: float = 0.0
    unit: str = "tok"


@dataclass
class Result:
    """What one contender took, in seconds a round."""

    work: str
    title: str
    contender: str
    ours: bool
    seconds: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    note: str = ""
    per: float = 0.0
    unit: str = ""

    def row(self) -> str:
        """A line of the Markdown table."""
        if self.note:
            return f"| {self.title} | {self.contender} | {self.note} | | |"
        low, middle, high = min(self.seconds), statistics.median(self.seconds), max(self.seconds)
        rate = f"{self.per / middle:,.0f} {self.unit}/s" if self.per else ""
        ratio = (
            "1"
            if self.ours
            else f"{statistics.median(self.ratio):.2f} ({min(self.ratio):.2f} to {max(self.ratio):.2f})"
        )
        return (
            f"| {self.title} | {self.contender} | {_time(middle)} ({_time(low)} to {_time(high)}) | {rate} | {ratio} |"
        )


HEAD = "| work | who | median (least to most) | rate | time over ours |\n| --- | --- | --- | --- | --- |"


def measure(work: Work, *, rounds: int, say: Callable[[str], None]) -> list[Result]:
    """Run a work's contenders in turn; those that cannot run are noted."""
    found = {
        name: Result(work.name, work.title, name, name == work.ours, per=work.per, unit=work.unit)
        for name in work.contenders
    }
    ready: dict[str, Run] = {}
    for name, prepare in work.contenders.items():
        try:
            run = prepare()
            run()  # once unmeasured: caches, lazy set-up
            ready[name] = run
        except (Missing, ImportError) as error:
            found[name].note = f"not run: {error}"
            say(f"{work.name}: {name} not run: {error}")
    names = list(ready)
    for i in range(rounds):
        took: dict[str, float] = {}
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            ready[name]()
            took[name] = time.perf_counter() - start
        for name, seconds in took.items():
            found[name].seconds.append(seconds)
            if work.ours in took:
                found[name].ratio.append(seconds / took[work.ours])
        say(f"{work.name}: round {i + 1} of {rounds}: " + ", ".join(f"{n} {_time(s)}" for n, s in took.items()))
    return list(found.values())


def write(results: list[Result], about: dict[str, Any], folder: Path) -> Path:
    """results.jsonl and table.md; returns the table's path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"kind": "about", **about})] + [json.dumps({"kind": "result", **asdict(r)}) for r in results]
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    facts = ", ".join(f"{key} {value}" for key, value in about.items())
    table = "\n".join([HEAD, *(result.row() for result in results)])
    path = folder / "table.md"
    path.write_text(f"{facts}\n\n{table}\n", encoding="utf-8")
    return path


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
