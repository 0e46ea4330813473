import pytest
import torch

from bestiary.errors import UsageError
from bestiary.studies.mqar import Recall

TASK = Recall(pairs=4, length=32, vocab_size=64)


def test_every_query_repeats_a_key_whose_value_is_wanted_there() -> None:
    tokens, positions, values = TASK.batch(200, seed=3)
    for row, where, answers in zip(tokens.tolist(), positions.tolist(), values.tolist()):
        pairs = dict(zip(row[0:8:2], row[1:8:2]))
        assert len(pairs) == len(set(pairs.values())) == 4
        assert [pairs[row[position]] for position in where] == answers
        assert all(position >= 8 and position % 2 == 0 for position in where) and len(set(where)) == 4


def test_keys_and_values_come_from_their_halves_and_filler_is_never_a_key() -> None:
    tokens, positions, values = TASK.batch(200, seed=3)
    keys = torch.cat([tokens[:, 0:8:2], tokens.gather(1, positions)], 1)
    assert keys.min() >= 1 and keys.max() < 32 and values.min() >= 32 and values.max() < 64
    rest = torch.ones_like(tokens, dtype=torch.bool).scatter(1, positions, False)
    rest[:, 0:8:2] = False
    assert tokens[rest].min() >= 32


def test_near_slots_are_asked_more_often() -> None:
    _, positions, _ = Recall(pairs=1, length=32, vocab_size=64).batch(20_000, seed=0)
    counts = torch.bincount((positions[:, 0] - 2) // 2, minlength=15).double()
    weights = torch.arange(1, 16, dtype=torch.float64) ** -0.99
    torch.testing.assert_close(counts / counts.sum(), weights / weights.sum(), atol=0.015, rtol=0)  # 4 standard errors


def test_a_batch_is_a_function_of_its_seed() -> None:
    assert all(torch.equal(a, b) for a, b in zip(TASK.batch(5, 1), TASK.batch(5, 1)))
    assert not torch.equal(TASK.batch(5, 1)[0], TASK.batch(5, 2)[0])


@pytest.mark.parametrize("wrong", [{"pairs": 9, "length": 32}, {"length": 33}, {"vocab_size": 16}, {"pairs": 0}])
def test_a_task_that_does_not_fit_is_refused(wrong: dict) -> None:
    with pytest.raises(UsageError):
        Recall(**wrong)
