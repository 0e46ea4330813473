from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bestiary.data.batches import Batches, in_order, permuted
from bestiary.data.shards import build
from bestiary.data.tokenizer import ByteTokenizer
from bestiary.errors import UsageError

TOKENS = np.arange(1000)  # each token tells its place


@given(n=st.integers(1, 300), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
def test_each_epoch_has_a_permutation_of_the_windows(n: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(np.arange(n), n, seed, np.full(n, epoch))) == list(range(n))


def test_the_permutation_sends_each_place_everywhere_equally_often() -> None:
    n, epochs = 6, 6000
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[np.arange(n), permuted(np.arange(n), n, 0, np.full(n, epoch))] += 1
    # chi-squared with (n-1)^2 = 25 degrees of freedom exceeds 53 in one of a thousand truly random tables
    assert ((counts - epochs / n) ** 2 / (epochs / n)).sum() < 53


@given(count=st.integers(2, 400), time=st.integers(1, 50), batch_size=st.integers(1, 9), seed=st.integers(0, 100))
def test_an_epoch_sees_each_token_at_most_once_and_nearly_all(
    count: int, time: int, batch_size: int, seed: int
) -> None:
    if count < time + 1:
        return
    batches = Batches(np.arange(count), batch_size, time, seed)
    samples = batches.windows * 3  # three epochs
    rows = [batches.global_batch(step)[1] for step in range(-(-samples // batch_size))]
    for epoch in torch.cat(rows)[:samples].reshape(3, -1).tolist():
        assert len(set(epoch)) == len(epoch)
        assert count - len(epoch) <= 2 * time
        assert 1 <= min(epoch) <= max(epoch) < count


def test_targets_are_the_next_tokens() -> None:
    inputs, targets = Batches(TOKENS, 4, 10).global_batch(3)
    assert inputs.shape == targets.shape == (4, 10)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs + 1, targets)
    assert torch.equal(inputs[:, 1:] - 1, inputs[:, :-1])


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_ranks_together_see_the_global_batch_whatever_their_number(world: int) -> None:
    batches = Batches(TOKENS, 12, 10, seed=5)
    for step in (0, 7, 1000):
        parts = [batches.slice(rank, world).batch(step) for rank in range(world)]
        for part, whole in zip(zip(*parts), batches.global_batch(step)):
            assert torch.equal(torch.cat(part), whole)
            assert len({len(rows) for rows in part}) == 1


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    first, again = Batches(TOKENS, 8, 10, seed=1), Batches(TOKENS, 8, 10, seed=1)
    late = again.global_batch(99)[0]
    assert torch.equal(first.global_batch(99)[0], late)
    assert torch.equal(first.slice(0, 1).batch(99)[0], late)
    assert not torch.equal(Batches(TOKENS, 8, 10, seed=2).global_batch(99)[0], late)
    # written down once: another version, or another machine, must not change the order of a run that it resumes
    assert Batches(TOKENS, 4, 10, seed=1).starts(0).tolist() == STARTS


STARTS = [234, 314, 204, 614]


def test_epochs_differ_in_order_and_offset() -> None:
    batches = Batches(TOKENS, 1, 10)
    epochs = [
        [int(batches.starts(epoch * batches.windows + i)[0]) for i in range(batches.windows)] for epoch in range(8)
    ]
    assert len({epoch[0] % 10 for epoch in epochs}) > 3
    ordered = [[start // 10 for start in epoch] for epoch in epochs]
    assert len({tuple(order) for order in ordered}) == 8


def test_memory_mapped_shards_give_the_same_batches(tmp_path: Path) -> None:
    text = "".join(chr(32 + i * i % 90) for i in range(500))
    found = build([text], ByteTokenizer(), tmp_path / "tokens", shard_tokens=64)
    tokens = np.append(ByteTokenizer().encode(text), 0)
    for step in range(10):
        for ours, theirs in zip(Batches(found, 4, 16).batch(step), Batches(tokens, 4, 16).batch(step)):
            assert torch.equal(ours, theirs)


@given(count=st.integers(0, 60), batch_size=st.integers(1, 4), time=st.integers(1, 9))
def test_in_order_every_token_but_the_first_is_a_target_once(count: int, batch_size: int, time: int) -> None:
    seen: list[int] = []
    for inputs, targets, mask in in_order(np.arange(count), batch_size, time):
        assert inputs.shape == targets.shape == mask.shape
        assert inputs.shape[0] <= batch_size and inputs.shape[1] == time
        assert torch.equal(inputs[mask] + 1, targets[mask])
        assert mask.any(1).all()
        seen += targets[mask].tolist()
    assert seen == list(range(1, count))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"time": 1000}, "has 1000 tokens, too few for a window of 1000"),
        ({"world": 3}, "batch_size 4 is no multiple of the number of ranks, 3"),
        ({"rank": 1}, r"rank must lie in \[0, 1\), not 1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_clear_line(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Batches(**({"tokens": TOKENS, "batch_size": 4, "time": 10} | options))
    with pytest.raises(UsageError, match="step must be at least 0"):
        Batches(TOKENS, 4, 10).batch(-1)
