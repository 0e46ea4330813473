"""What a study has finished survives a kill at any byte."""

import json
import math
from pathlib import Path

import pytest

from bestiary.studies.records import Records


def test_records_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    records = Records(tmp_path / "deep" / "study")
    assert records.all == []
    written = records.add(kind="run", arch="gla", bpb=2.5, curve=[[1, 0.1]], note="über\u2028", loss=None)
    assert written == {
        "kind": "run",
        "arch": "gla",
        "bpb": 2.5,
        "curve": [[1, 0.1]],
        "note": "über\u2028",
        "loss": None,
    }
    assert Records(tmp_path / "deep" / "study").all == records.all == [written]


def test_a_record_is_in_the_file_when_add_returns(tmp_path: Path) -> None:
    records = Records(tmp_path)
    for i in range(3):
        records.add(i=i)
        assert len(records.path.read_bytes().splitlines()) == i + 1


def test_records_are_found_by_their_values(tmp_path: Path) -> None:
    records = Records(tmp_path)
    first, second, third = (
        records.add(kind="run", arch=arch, seed=seed) for arch, seed in (("a", 0), ("b", 0), ("a", 1))
    )
    assert records.find(kind="run") == [first, second, third]
    assert records.find(arch="a") == [first, third] and records.find(arch="a", seed=1) == [third]
    assert records.find() == [first, second, third] and records.find(kind="trial") == []
    assert records.has(arch="b", seed=0) and not records.has(arch="b", seed=1) and not records.has(size=3)


@pytest.mark.parametrize("left", range(1, 24))
def test_a_last_line_that_a_kill_tore_is_cut_off(tmp_path: Path, left: int) -> None:
    records = Records(tmp_path)
    records.add(kind="a", value="x")
    whole = records.path.read_bytes()
    records.add(kind="b", value="y")
    assert len(records.path.read_bytes()) - len(whole) > left
    records.path.write_bytes(records.path.read_bytes()[: len(whole) + left])
    again = Records(tmp_path)
    assert [record["kind"] for record in again.all] == ["a"] and again.path.read_bytes() == whole
    again.add(kind="c")
    assert [record["kind"] for record in Records(tmp_path).all] == ["a", "c"]


def test_a_file_that_is_one_torn_line_is_empty(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_bytes(b'{"kind": "mod')
    assert Records(tmp_path).all == [] and (tmp_path / "results.jsonl").read_bytes() == b""


def test_numbers_that_are_not_finite_survive(tmp_path: Path) -> None:
    Records(tmp_path).add(loss=math.nan, bound=math.inf)
    (record,) = Records(tmp_path).all
    assert math.isnan(record["loss"]) and record["bound"] == math.inf


def test_a_record_that_is_no_json_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.add(kind="a")
    with pytest.raises(TypeError):
        records.add(kind="b", value=object())
    assert [json.loads(line)["kind"] for line in records.path.read_text().splitlines()] == ["a"]
    assert [record["kind"] for record in records.all] == ["a"]
