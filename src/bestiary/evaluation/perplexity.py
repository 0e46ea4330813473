"""How well a model predicts a text: nats, bits per byte, perplexity.

    bits per byte = sum over tokens of -log2 p(token | before) / bytes of these tokens

comparable between tokenizers, as perplexity (e to the nats per token) is not.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from bestiary import state as states
from bestiary.data.tokenizer import Tokenizer
from bestiary.errors import UsageError
from bestiary.models import LanguageModel


@dataclass(frozen=True)
class Perplexity:
    """Sum of -log p in nats over `tokens` tokens, which stand for `bytes` bytes."""

    nats: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(700.0, self.nats / self.tokens))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    def to_dict(self) -> dict[str, float]:
        """Numbers for logs and JSON."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "nats": self.nats,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


@torch.no_grad()
def perplexity(
    model: LanguageModel,
    tokens: np.ndarray,
    tokenizer: Tokenizer,
    *,
    window: int | None = None,
    segment: int = 1024,
    batch_size: int = 16,
) -> Perplexity:
    """Score a token sequence; its first token is only context.

    Args:
        tokens: (time,) ids.
        window: cut the text into windows of so many tokens, each read from a fresh state (as in training), `batch_size`
            at a time; None to carry the state through the whole text, `segment` tokens at a time.

    Raises:
        UsageError: there are fewer than two tokens, or a size is not positive.
    """
    if len(tokens) < 2:
        raise UsageError(f"a text of {len(tokens)} tokens has nothing to predict; give at least two")
    for name, size in (("window", window), ("segment", segment), ("batch_size", batch_size)):
        if size is not None and size < 1:
            raise UsageError(f"{name} must be at least 1, not {size}")
    was_training = model.training
    model.eval()
    ids = torch.from_numpy(np.asarray(tokens, np.int64)).to(next(model.parameters()).device)
    try:
        nats = _carried(model, ids, segment) if window is None else _windows(model, ids, window, batch_size)
    finally:
        model.train(was_training)
    return Perplexity(nats, len(tokens) - 1, int(tokenizer.token_bytes()[np.asarray(tokens[1:], np.int64)].sum()))


def _carried(model: LanguageModel, ids: torch.Tensor, segment: int) -> float:
    state, nats = None, 0.0
    with states.in_place():
        for start in range(0, len(ids) - 1, segment):
            inputs, targets = ids[start : start + segment][: len(ids) - 1 - start], ids[start + 1 : start + segment + 1]
            hidden, state = model.hidden(inputs[None], state)
            nats += _sum(model, hidden, targets)
    return nats


def _windows(model: LanguageModel, ids: torch.Tensor, window: int, batch_size: int) -> float:
    nats = 0.0
    whole = (len(ids) - 1) // window
    inputs, targets = (x[: whole * window].reshape(whole, window) for x in (ids[:-1], ids[1:]))
    for start in range(0, whole, batch_size):
        hidden, _ = model.hidden(inputs[start : start + batch_size])
        nats += _sum(model, hidden, targets[start : start + batch_size])
    if whole * window < len(ids) - 1:
        hidden, _ = model.hidden(ids[None, whole * window : -1])
        nats += _sum(model, hidden, ids[whole * window + 1 :])
    return nats


def _sum(model: LanguageModel, hidden: torch.Tensor, targets: torch.Tensor) -> float:
    return model.head.nats(hidden.flatten(0, 1), targets.flatten()).double().sum().item()
