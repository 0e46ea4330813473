"""Cross-entropy of rows of logits, and its gradient in their place: they are large, and one set of them is enough.

nats_i = log(sum_j exp(x_ij)) - x_i[target_i];     d nats_i / d x_ij = exp(x_ij) / sum_k exp(x_ik) - [j = target_i]
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bestiary.errors import UsageError
from bestiary.ops import dispatch
from bestiary.ops.native.cross_entropy import cross_entropy as kernel

dispatch.has_kernel("cross_entropy")


@torch.no_grad()
def cross_entropy(
    logits: Float[Tensor, "rows vocab"],
    targets: Int[Tensor, " rows"],
    weights: Float[Tensor, " rows"] | None = None,
    *,
    gradient: bool = False,
) -> Float[Tensor, " rows"]:
    """Nats of each row, in the logits' dtype; 0 where the target is below 0.

    Args:
        weights: of the rows, in the gradient; None for ones.
        gradient: whether the logits become the gradient of the weighted sum of the nats, in their own memory.
    """
    if gradient and _overlap(logits):
        raise UsageError(
            "cross_entropy: rows of logits that share memory cannot become their gradient: clone them first"
        )
    if dispatch.compiled("cross_entropy", logits, weights, why_not=_why_not(logits)):
        return kernel(logits, targets, weights, gradient)
    return dispatch.choose("cross_entropy", time=logits.shape[0])(logits, targets, weights, gradient)


def _overlap(logits: Tensor) -> bool:
    """Whether two numbers have one place: rows that were expanded, or that begin before the one before has ended."""
    if torch.compiler.is_compiling() or not logits.numel():
        return False
    reach = 0
    for stride, size in sorted(zip(logits.stride(), logits.shape)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _why_not(logits: Tensor) -> str | None:
    return None if logits.stride(-1) == 1 or logits.numel() == 0 else "each row of logits must lie in one piece"


@dispatch.form("cross_entropy", "reference")
def definition(logits: Tensor, targets: Tensor, weights: Tensor | None, gradient: bool) -> Tensor:
    """The equations."""
    real, chosen = targets >= 0, targets.clamp(min=0)[:, None]
    shares = logits.softmax(1)
    nats = torch.where(real, logits.logsumexp(1) - logits.gather(1, chosen)[:, 0], 0)
    if gradient:
        slope = shares.scatter_add(1, chosen, -torch.ones_like(shares[:, :1]))
        weights = torch.ones_like(nats) if weights is None else weights
        logits.copy_(torch.where(real[:, None], slope * weights[:, None], 0))
    return nats


@dispatch.form("cross_entropy", "torch")
def in_place(logits: Tensor, targets: Tensor, weights: Tensor | None, gradient: bool) -> Tensor:
    """With one pass over the logits for each step, but none of them twice in memory."""
    normaliser, chosen = logits.logsumexp(1), targets.clamp(min=0)[:, None]
    nats = torch.where(targets >= 0, normaliser - logits.gather(1, chosen)[:, 0], 0)
    if gradient:
        logits.sub_(normaliser[:, None]).exp_().scatter_add_(1, chosen, -torch.ones_like(logits[:, :1]))
        weights = (targets >= 0).to(logits.dtype) if weights is None else torch.where(targets >= 0, weights, 0)
        logits.mul_(weights[:, None])
    return nats
