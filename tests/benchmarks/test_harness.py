"""Contenders take turns, each in a process of its own; ratios are taken within a round; who cannot run is noted."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks.harness import Contender, Missing, Work, children, measure, read, write
from benchmarks.page import page
from benchmarks.works import GROUPS


def walk(names: str) -> Work:
    return Work("walk", "A walk", {name: Contender(lambda: lambda: None, 2.0) for name in names}, per=3)


def test_contenders_take_turns_in_an_order_that_turns_and_one_that_is_missing_is_noted(tmp_path: Path) -> None:
    ran: list[str] = []

    class Taking:
        computes_with = "fingers"

        def __init__(self, name: str, *took: float):
            self.name, self.took = name, list(took)

        def run(self) -> float:
            ran.append(self.name)
            if not self.took:
                raise Missing("it died")
            return self.took.pop()

    runs = {"a": Taking("a", *[0.5] * 3), "b": Taking("b", *[1.0] * 3), "c": Missing("there is none")}
    results = measure(walk("abc"), runs, rounds=3, say=lambda line: None, pause=0)
    found = {result.contender: result for result in results}
    assert ran == [*"ab", *"ba", *"ab"]
    assert [found[name].values for name in "abc"] == [[0.5] * 3, [1.0] * 3, []]
    assert found["a"].ratio == [1, 1, 1] and found["b"].ratio == [2, 2, 2]
    write(results, {"date": "today"}, tmp_path / "results.jsonl")
    assert read(tmp_path / "results.jsonl") == ({"date": "today"}, results)
    text = page(tmp_path / "results.jsonl", tmp_path / "results.jsonl")
    twice = "**2.00** (2.00 to 2.00)"
    assert f"| b | fingers | 1 s (1 s to 1 s) | 3 tok/s | {twice} | 2.0 | {twice} |" in text
    assert "| c | | not run: there is none |" in text
    assert {found[name].computes_with for name in "ab"} == {"fingers"}
    dying = measure(walk("ab"), {"a": Taking("a", 1.0, 1.0), "b": Taking("b", 2.0)}, rounds=2, say=print, pause=0)
    assert [result.values for result in dying] == [[1.0, 1.0], []] and dying[1].note == "not run: it died"
    few = dataclasses.replace(walk("a"), most_rounds=1)
    assert measure(few, {"a": Taking("a", 1.0, 1.0)}, rounds=2, say=print, pause=0)[0].values == [1.0]


def test_a_contender_runs_in_a_process_of_its_own() -> None:
    (work,) = GROUPS["memory"]()
    work.contenders["nobody"] = Contender(lambda: lambda: None)
    with children("memory", work, {"OMP_NUM_THREADS": "1"}) as runs:
        assert isinstance(runs.pop("nobody"), Missing)
        results = measure(work, runs, rounds=2, say=lambda line: None, pause=0)
    mamba, attention = (result.values for result in results[:2])
    assert all(result.computes_with for result in results[:2])
    assert mamba[0] == mamba[1] == 24 * 4 * 1536 * (16 + 3)
    assert attention[0] == attention[1] == 12 * (2 * 32768 * 768 * 4 + 8)


def test_every_work_says_who_is_ours_first_and_names_are_unique() -> None:
    works = [work for group in GROUPS.values() for work in group()]
    assert len({work.name for work in works}) == len(works)
    for work in works:
        first, *others = work.contenders.values()
        assert not first.target and any(other.target for other in others)


@pytest.mark.parametrize("group", list(GROUPS))
def test_making_a_group_loads_nothing(group: str) -> None:
    assert GROUPS[group]()
