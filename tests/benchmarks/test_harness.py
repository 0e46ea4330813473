"""Contenders take turns; ratios are taken within a round; who cannot run is noted."""

import json

import pytest

from benchmarks.harness import Missing, Work, measure, write


def test_contenders_take_turns_in_an_order_that_turns_and_one_that_is_missing_is_noted(tmp_path) -> None:
    ran: list[str] = []

    def contender(name: str):
        return lambda: lambda: ran.append(name)

    def missing():
        raise Missing("there is none")

    work = Work("walk", "a walk", "a", {"a": contender("a"), "b": contender("b"), "c": missing}, per=3)
    results = {result.contender: result for result in measure(work, rounds=3, say=lambda line: None)}
    assert ran == ["a", "b", *"ab", *"ba", *"ab"]  # once unmeasured each, then three rounds
    assert [len(results[name].seconds) for name in "abc"] == [3, 3, 0]
    assert results["a"].ratio == [1, 1, 1]
    assert results["b"].ratio == pytest.approx([b / a for a, b in zip(results["a"].seconds, results["b"].seconds)])
    path = write(list(results.values()), {"date": "today"}, tmp_path)
    assert "| a walk | c | not run: there is none |" in path.read_text()
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["about", "result", "result", "result"]
