"""Measurements go round in turn, and what is computed instead of measured says so and follows from what was."""

import math

import pytest
import torch

from bestiary import LanguageModel, ModelConfig
from bestiary.models.costs import costs as model_costs
from bestiary.models.costs import total
from bestiary.studies.speed import Reader, affordable, costs, extrapolate, interleaved, machine, spread


def test_tasks_take_turns() -> None:
    order: list[str] = []

    def task(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = interleaved({name: lambda name=name: task(name) for name in "abc"}, 3)
    assert order == list("abcabcabc")
    assert found == {"a": [1, 4, 7], "b": [2, 5, 8], "c": [3, 6, 9]}


def test_a_spread_is_median_smallest_and_largest() -> None:
    assert spread([5.0, 1.0, 9.0]) == {"median": 5, "min": 1, "max": 9, "repeats": 3}
    assert spread([4.0, 1.0, 2.0, 10.0]) == {"median": 3, "min": 1, "max": 10, "repeats": 4}
    assert spread([7.0]) == {"median": 7, "min": 7, "max": 7, "repeats": 1}


def test_where_nothing_grows_a_step_takes_what_it_took_last() -> None:
    assert extrapolate({256: 2.0, 2048: 3.0}, 32768, constant=True) == 3


def test_where_something_grows_a_line_goes_through_the_last_two() -> None:
    times = {c: 1e-3 + 2e-6 * c for c in (512, 1024, 2048)} | {256: 99.0}
    assert extrapolate(times, 32768, constant=False) == pytest.approx(1e-3 + 2e-6 * 32768, rel=1e-12)
    assert extrapolate({2048: 5.0, 256: 6.0}, 8192, constant=False) == 5  # noise: nothing gets faster with more to read
    assert extrapolate({256: 4.0}, 8192, constant=False) == 4


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, LanguageModel], list[dict], list[int]]:
    torch.manual_seed(0)
    layouts = {"attention": "attention", "window": "attention{window=8}", "linear": "linear_attention"}
    models = {name: LanguageModel(ModelConfig(layout, 32)).eval() for name, layout in layouts.items()}
    seen: list[int] = []
    found = costs(models, (16, 64), allowance=math.inf, rounds=3, decode_steps=2)
    found += costs(models, (64, 256), allowance=0.0, rounds=3, decode_steps=2, on_progress=seen.append)[len(models) :]
    return models, found, seen


def test_there_is_a_record_a_model_and_context_in_order(measured) -> None:
    models, records, seen = measured
    assert [(r["context"], r["arch"]) for r in records] == [(c, name) for c in (16, 64, 256) for name in models]
    assert seen == [64, 256]


def test_what_takes_too_long_is_computed_and_marked_so(measured) -> None:
    _, records, _ = measured
    for record in records:
        for speed in (record["prefill_tokens_per_second"], record["decode_tokens_per_second"]):
            if record["context"] <= 64:
                assert record["how"] == "measured" and speed["repeats"] == 3
                assert 0 < speed["min"] <= speed["median"] <= speed["max"]
            else:
                assert record["how"] == "computed" and set(speed) == {"median"}


def test_computed_speeds_follow_from_the_measured_ones() -> None:
    """Reading costs as many FLOPs more as the context makes it; writing stays the same unless a state still grows."""
    torch.manual_seed(0)
    models = {name: LanguageModel(ModelConfig(name, 32)).eval() for name in ("attention", "linear_attention")}
    short, long = (costs(models, (64, 256), allowance=0.0, decode_steps=2)[i::2] for i in (0, 1))
    for name, (measured, computed) in zip(models, (short, long)):
        flops = total(model_costs(models[name], (64, 256))).flops
        ratio = measured["prefill_tokens_per_second"]["median"] / computed["prefill_tokens_per_second"]["median"]
        assert ratio == pytest.approx(flops[256] / flops[64], rel=1e-9)
        assert measured["decode_tokens_per_second"]["median"] == computed["decode_tokens_per_second"]["median"]
        assert (ratio > 1.05) == (name == "attention")


def test_state_bytes_are_those_of_the_state_itself(measured) -> None:
    models, records, _ = measured
    for record in records:
        with torch.no_grad():
            _, state = models[record["arch"]].hidden(torch.zeros(1, record["context"], dtype=torch.int64))
        assert record["state_bytes"] == _bytes(state)
        if record["arch"] != "attention":
            assert record["state_bytes"] == records[-1 if record["arch"] == "linear" else -2]["state_bytes"]


def _bytes(state: object) -> int:
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    return sum(map(_bytes, state)) if isinstance(state, tuple) else 0


def test_as_many_repeats_are_made_as_there_is_time_for() -> None:
    assert [affordable(5, once, 10.0) for once in (0.1, 2.0, 2.1, 9.9, 10.1)] == [5, 5, 4, 1, 0]


def test_decoding_again_begins_where_reading_ended() -> None:
    reader = Reader(LanguageModel(ModelConfig("attention", 32)).eval(), 12, decode_steps=3)
    assert reader.prefill() > 0
    before = [tensor.clone() for tensor in _tensors(reader.state)]
    assert reader.decode() > 0 and reader.decode() > 0
    assert all(torch.equal(a, b) for a, b in zip(before, _tensors(reader.state)))


def _tensors(state: object) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    return [tensor for part in state for tensor in _tensors(part)] if isinstance(state, tuple) else []


def test_the_machine_has_a_name_cores_and_memory() -> None:
    found = machine()
    assert found["cpu"] and found["cores"] >= 1 and found["memory_gb"] >= 0 and found["threads"] == 1
