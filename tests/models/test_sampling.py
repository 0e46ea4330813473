import pytest
import torch

from bestiary.errors import UsageError
from bestiary.models.sampling import Sampling, draw, penalise, probabilities

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 3.0, 0.0]])


def test_temperature_zero_takes_the_most_probable() -> None:
    assert probabilities(LOGITS, Sampling(0)).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]


def test_temperature_one_is_the_models_own_distribution() -> None:
    torch.testing.assert_close(probabilities(LOGITS, Sampling(1)), LOGITS.softmax(1))


def test_filters_keep_what_they_say() -> None:
    full = LOGITS.softmax(1)[0]  # .644 .237 .087 .032
    assert (probabilities(LOGITS, Sampling(1, top_k=2))[0] > 0).tolist() == [True, True, False, False]
    assert (probabilities(LOGITS, Sampling(1, top_p=0.85))[0] > 0).tolist() == [True, True, False, False]
    assert (probabilities(LOGITS, Sampling(1, top_p=0.9))[0] > 0).tolist() == [True, True, True, False]
    assert (probabilities(LOGITS, Sampling(1, min_p=0.1))[0] > 0).tolist() == [True, True, True, False]
    kept = probabilities(LOGITS, Sampling(1, top_k=2))[0]
    torch.testing.assert_close(kept[:2], full[:2] / full[:2].sum())


def test_draws_follow_the_distribution() -> None:
    torch.manual_seed(0)
    distribution = probabilities(LOGITS[:1], Sampling(1)).expand(20_000, 4)
    counts = torch.bincount(draw(distribution, torch.rand(20_000)), minlength=4) / 20_000
    torch.testing.assert_close(counts, LOGITS[:1].softmax(1)[0], atol=0.015, rtol=0)  # 4 standard errors


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 1e-16, 1.0])
def test_a_draw_never_takes_an_impossible_token(uniform: float) -> None:
    distribution = torch.tensor([[0.0, 0.3, 0.7, 0.0, 0.0]])
    assert draw(distribution, torch.tensor([uniform], dtype=torch.float64)).item() in (1, 2)


def test_the_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    seen = torch.tensor([[True, False, False, True]] * 2)
    assert penalise(LOGITS, seen, 2.0)[0].tolist() == [1.0, 1.0, 0.0, -2.0]


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": -0.1}, {"repetition_penalty": 0}],
)
def test_options_out_of_range_are_named(wrong: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Sampling(**wrong)
