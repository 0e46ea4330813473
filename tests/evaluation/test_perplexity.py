"""Bits per byte are what the logits say, whether the text is read whole, in segments or in windows."""

import math

import numpy as np
import pytest
import torch

from bestiary import LanguageModel, ModelConfig, UsageError
from bestiary.data import ByteTokenizer, train_bpe
from bestiary.evaluation import perplexity


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig("gla attention", 32, embedding_std=0.5)).double()


def by_logits(model: LanguageModel, tokens: np.ndarray) -> float:
    ids = torch.from_numpy(tokens)[None]
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(ids[:, :-1])[0][0], ids[0, 1:], reduction="sum").item()


@pytest.mark.parametrize("segment", [1, 7, 50, 1000])
def test_a_text_in_segments_is_the_text(model: LanguageModel, segment: int) -> None:
    tokens = np.random.default_rng(0).integers(1, 256, 101)
    found = perplexity(model, tokens, ByteTokenizer(), segment=segment)
    assert found.nats == pytest.approx(by_logits(model, tokens), abs=1e-8)
    assert found.tokens == found.bytes == 100
    assert found.bits_per_byte == pytest.approx(found.nats / 100 / math.log(2))
    assert found.perplexity == pytest.approx(math.exp(found.nats / 100))


@pytest.mark.parametrize("length", [2, 11, 21, 25, 61])
def test_windows_are_read_afresh_and_cover_every_token_once(model: LanguageModel, length: int) -> None:
    tokens = np.random.default_rng(0).integers(1, 256, length)
    expected = sum(by_logits(model, tokens[i : i + 11]) for i in range(0, length - 1, 10))
    found = perplexity(model, tokens, ByteTokenizer(), window=10, batch_size=2)
    assert found.nats == pytest.approx(expected, abs=1e-8) and found.tokens == length - 1


def test_bytes_are_those_of_the_scored_tokens() -> None:
    tokenizer = train_bpe("the cat sat on the mat, the rat sat on the cat " * 20, 300)
    tokens = tokenizer.encode("the cat sät")
    model = LanguageModel(ModelConfig("gru", 32, tokenizer.vocab_size))
    found = perplexity(model, tokens, tokenizer)
    assert found.bytes == len("the cat sät".encode()) - tokenizer.token_bytes()[tokens[0]]


def test_nothing_to_predict_is_an_error(model: LanguageModel) -> None:
    with pytest.raises(UsageError, match="at least two"):
        perplexity(model, np.array([5]), ByteTokenizer())
