"""From logits to a token: the usual filters, as pure functions on (batch, vocab) logits."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bestiary.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the most probable token; 1 samples from the model's own distribution.
        top_k: keep the k most probable tokens.
        top_p: keep the fewest most probable tokens whose probabilities add up to p.
        min_p: keep tokens at least min_p times as probable as the most probable one.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen (Keskar et al. 2019,
            arXiv:1909.05858); 1 for none.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        rules = [
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "None or at least 1"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "positive"),
        ]
        for field, holds, allowed in rules:
            if not holds:
                raise UsageError(f"{field} must be {allowed}, not {getattr(self, field)!r}")


def penalise(
    logits: Float[Tensor, "batch vocab"], seen: Bool[Tensor, "batch vocab"], penalty: float
) -> Float[Tensor, "batch vocab"]:
    """Make tokens that were seen less likely."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def probabilities(logits: Float[Tensor, "batch vocab"], how: Sampling) -> Float[Tensor, "batch vocab"]:
    """The distribution that is sampled from: temperature first, then top-k, top-p and min-p, then renormalised."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if how.temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    kept = torch.softmax(logits / how.temperature, dim=1)
    if how.top_k is not None and how.top_k < logits.shape[1]:
        index = kept.topk(how.top_k, dim=1).indices
        kept = torch.zeros_like(kept).scatter_(1, index, kept.gather(1, index))
        kept = kept / kept.sum(1, keepdim=True)
    if how.top_p < 1:
        ordered, index = kept.sort(dim=1, descending=True, stable=True)
        before = ordered.cumsum(1) - ordered
        kept = torch.zeros_like(kept).scatter_(1, index, torch.where(before < how.top_p, ordered, 0))
        kept = kept / kept.sum(1, keepdim=True)
    if how.min_p > 0:
        kept = torch.where(kept >= how.min_p * kept.amax(1, keepdim=True), kept, 0)
    return kept / kept.sum(1, keepdim=True)


def draw(distribution: Float[Tensor, "batch vocab"], uniform: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """The token at which the cumulative distribution passes a uniform number: one a row, whatever the vocabulary."""
    cumulative = distribution.double().cumsum(1)
    token = torch.searchsorted(cumulative, uniform.double()[:, None] * cumulative[:, -1:], right=True)[:, 0]
    last = distribution.shape[1] - 1 - (distribution.flip(1) > 0).int().argmax(1)  # never past the last possible one
    return torch.minimum(token, last)
