"""How well a masked language model fills gaps in a text that it has not seen."""

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch

from bestiary.data.batches import in_order
from bestiary.data.special import SpecialIds
from bestiary.errors import UsageError
from bestiary.models import MaskedLanguageModel
from bestiary.models.loss import token_nats
from bestiary.training.masked import mask_tokens


@dataclass(frozen=True)
class MaskedScore:
    """Mean nats and the share of right first guesses over `tokens` hidden tokens."""

    loss: float
    accuracy: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(700.0, self.loss))

    def to_dict(self) -> dict[str, float]:
        """Numbers for logs and JSON."""
        return asdict(self) | {"perplexity": self.perplexity}


@torch.no_grad()
def masked_score(
    model: MaskedLanguageModel,
    tokens: np.ndarray,
    ids: SpecialIds,
    *,
    time: int,
    batch_size: int = 16,
    rate: float = 0.15,
    rule: str = "mask",
    seed: int = 0,
) -> MaskedScore:
    """Hide a share of a token sequence, window by window, and let the model guess; the same gaps for the same seed.

    Raises UsageError where there is nothing to guess.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    nats, right, count = 0.0, 0, 0
    try:
        for step, (window, _, mask) in enumerate(in_order(tokens, batch_size, time)):
            inputs, targets = mask_tokens(window, ids, seed=seed, step=step, rate=rate, rule=rule)
            targets = torch.where(mask, targets, -1).to(device)  # what fills up the last row is no text
            hidden = model.encoder(inputs.to(device), lengths=mask.sum(1).to(device))[targets >= 0]
            wanted, features = targets[targets >= 0], model.transform(hidden)
            nats += token_nats(features, model.decoder.weight, wanted, model.decoder.bias).double().sum().item()
            right += int((model.decoder(features).argmax(-1) == wanted).sum())
            count += len(wanted)
    finally:
        model.train(was_training)
    if not count:
        raise UsageError(f"none of {len(tokens)} tokens was hidden: give a longer text or a higher rate")
    return MaskedScore(nats / count, right / count, count)
