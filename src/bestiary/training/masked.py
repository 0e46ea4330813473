"""Batches for masked language models (Devlin et al. 2018, arXiv:1810.04805): pure functions of (seed, step).

A share of the tokens is chosen; the model is to say which they were. With the rule "bert", 8 of 10 chosen tokens become
the mask, 1 of 10 a random token, and 1 of 10 stays as it is; with "mask", all become the mask.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from bestiary.data.batches import Batches
from bestiary.data.special import SpecialIds
from bestiary.errors import UsageError, unknown

RULES = ("bert", "mask")
UNCHOSEN = -100


def mask_tokens(
    tokens: Int64[Tensor, "batch time"],
    ids: SpecialIds,
    *,
    seed: int,
    step: int,
    rate: float = 0.3,
    rule: str = "bert",
    keep: tuple[int, ...] = (),
) -> tuple[Int64[Tensor, "batch time"], Int64[Tensor, "batch time"]]:
    """(inputs, targets): tokens with some hidden, and the hidden ones, -100 elsewhere.

    Args:
        seed, step: which random numbers are drawn; the same for the same two.
        rate: share of the tokens that are chosen.
        rule: what becomes of them: "bert" or "mask".
        keep: ids that are never chosen, beside the special ones.
    """
    if not 0 < rate <= 1:
        raise UsageError(f"rate must be in (0, 1], not {rate}")
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    key = np.array([seed % (1 << 64), step], np.uint64)
    uniform = np.random.Generator(np.random.Philox(key=key)).random((3, *tokens.shape))
    choice, fate, which = torch.from_numpy(uniform)
    special = torch.tensor([ids.mask, ids.first, ids.separator, *keep])
    chosen = (choice < rate) & ~torch.isin(tokens, special)
    random = (which * ids.plain).long().clamp(max=ids.plain - 1)
    hidden = torch.full_like(tokens, ids.mask)
    if rule == "bert":
        hidden = torch.where(fate < 0.8, hidden, torch.where(fate < 0.9, random, tokens))
    return torch.where(chosen, hidden, tokens), torch.where(chosen, tokens, UNCHOSEN)


@dataclass(frozen=True)
class MaskedBatches:
    """Random windows of a corpus with some tokens hidden; see `mask_tokens`.

    Args:
        windows: where the tokens come from.
        ids: the special ids; see bestiary.data.special.
        rate: share of the tokens that are chosen; BERT's is 0.15, M2-BERT's 0.3.
        rule: what becomes of them: "bert" or "mask".
        keep: ids that are never chosen, beside the special ones.
    """

    windows: Batches
    ids: SpecialIds
    rate: float = 0.3
    rule: str = "bert"
    keep: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        mask_tokens(torch.zeros(1, 0, dtype=torch.int64), self.ids, seed=0, step=0, rate=self.rate, rule=self.rule)

    def global_batch(self, step: int) -> tuple[Int64[Tensor, "batch time"], Int64[Tensor, "batch time"]]:
        """(inputs, targets) of a step: targets are -100 where nothing is asked."""
        tokens, _ = self.windows.global_batch(step)
        seed = self.windows.seed
        return mask_tokens(tokens, self.ids, seed=seed, step=step, rate=self.rate, rule=self.rule, keep=self.keep)
