"""Results as a Markdown page: `python -m benchmarks.page RESULTS.jsonl [AVX2.jsonl] > docs/performance-results.md`."""

import sys
from pathlib import Path

from benchmarks.harness import Result, middle, quantity, read

HEAD = (
    "| who | with | median (least to most) | rate | over ours | aim | over ours, AVX2 |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def page(main: Path, narrow: Path | None = None) -> str:
    """The page: a table for each work, with a column of the same works where AVX-512 was forbidden."""
    about, results = read(main)
    other, others = read(narrow) if narrow else ({}, [])
    ratios = {(r.work, r.contender): r for r in others}
    lines = ["# Speed against peers", "", "Made by `python -m benchmarks`; nothing here is typed by hand.", ""]
    lines += [
        "How contenders take turns is in benchmarks/harness.py. Ratios are medians of (their time / ours) over rounds,",
        "with least and most; above 1 we are faster. Weights are random: this is about speed alone. `with` names the",
        "widest code that a contender says it has for this processor; matrix products of PyTorch may use less.",
        "",
    ]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    if narrow:
        lines += [f"- the last column is another run: {other.get('kernels', '')}"]
    works = dict.fromkeys(result.work for result in results)
    for work in works:
        rows = [result for result in results if result.work == work]
        again = [result for result in others if result.work == work]
        origin = _origin(rows) + (f" Last column: {_origin(again)}" if again else "")
        lines += ["", f"## {rows[0].title}", "", origin, "", HEAD]
        lines += [_row(result, ratios.get((work, result.contender))) for result in rows]
    return "\n".join(lines) + "\n"


def _origin(results: list[Result]) -> str:
    """Of which sources results are, and how many rounds there were."""
    return f"Sources {results[0].source or 'unknown'}, {max(len(result.values) for result in results)} rounds."


def _row(result: Result, narrow: Result | None) -> str:
    again = _ratio(narrow) if narrow else ""
    if not result.values:
        return f"| {result.contender} | | {result.note} | | | {result.target or ''} | {again} |"
    value, low, high = middle(result.values)
    size = f"{quantity(value, result.unit)} ({quantity(low, result.unit)} to {quantity(high, result.unit)})"
    rate = f"{result.per / value:,.0f} {result.unit}/s" if result.per else ""
    who = f"| {result.contender} | {result.computes_with}"
    return f"{who} | {size} | {rate} | {_ratio(result)} | {result.target or ''} | {again} |"


def _ratio(result: Result) -> str:
    if result.ours:
        return "1"
    if not result.ratio:
        return "not run"
    value, low, high = middle(result.ratio)
    return f"**{value:.2f}** ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    print(page(*map(Path, sys.argv[1:])), end="")
