"""Cross-entropy of a linear head, chunk by chunk: the logits of all positions never exist at once.

    loss = sum_i weight_i * (logsumexp(W h_i) - W[target_i] h_i) / sum_i weight_i

The backward pass needs softmax(W h) - onehot(target), which is at hand while a chunk's logits are; so each chunk's
gradients are formed at once and its logits dropped. With a soft cap c the logits are c tanh(W h / c).
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bestiary import ops
from bestiary.mixers.base import numbers_at_hand
from bestiary.mixers.parts import Linear

CHUNK_ELEMENTS = 1 << 24  # logits in memory at a time: 64 MiB in fp32; a product of few rows is a slow one


class Head(Linear):
    """The map from the last hidden vectors to logits, without a bias.

    Args:
        cap: logits stay within +-cap by cap * tanh(logits / cap); None for no cap.
    """

    def __init__(self, d_model: int, vocab_size: int, cap: float | None = None):
        super().__init__(d_model, vocab_size, bias=False)
        self.cap = cap

    def forward(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        logits = super().forward(hidden)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def loss(self, hidden: Tensor, targets: Tensor, weights: Tensor | None = None) -> Float[Tensor, ""]:
        """`linear_cross_entropy` of this head."""
        return linear_cross_entropy(hidden, self.weight, targets, weights, cap=self.cap)

    def nats(self, hidden: Tensor, targets: Tensor) -> Float[Tensor, " rows"]:
        """`token_nats` of this head."""
        return token_nats(hidden, self.weight, targets, cap=self.cap)


def linear_cross_entropy(
    hidden: Float[Tensor, "rows d_model"],
    head: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, " rows"],
    weights: Float[Tensor, " rows"] | None = None,
    bias: Float[Tensor, " vocab"] | None = None,
    cap: float | None = None,
) -> Float[Tensor, ""]:
    """Weighted mean of the cross-entropy in nats; targets below 0 count for nothing. 0 where nothing counts."""
    if numbers_at_hand(targets) and (targets < 0).any():  # rows without a target need no logits
        kept = targets >= 0
        hidden, targets, weights = hidden[kept], targets[kept], None if weights is None else weights[kept]
    counted = (targets >= 0).to(torch.promote_types(hidden.dtype, torch.float32))
    weights = counted if weights is None else weights.to(counted.dtype) * counted
    weights = weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    # within the function gradients are off, and parameters ask for them in evaluation too
    with_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, head, bias))
    return _LinearCrossEntropy.apply(hidden, head, targets, weights, bias, cap, with_gradient)


@torch.no_grad()
def token_nats(
    hidden: Float[Tensor, "rows d_model"],
    head: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, " rows"],
    bias: Float[Tensor, " vocab"] | None = None,
    cap: float | None = None,
) -> Float[Tensor, " rows"]:
    """Cross-entropy of each target in nats, without a gradient; 0 where the target is below 0."""
    parts = zip(*(x.split(_rows(head)) for x in (hidden, targets)))
    nats = [ops.cross_entropy(_logits(h, head, bias, cap), t) for h, t in parts]
    return torch.cat(nats) if nats else hidden.new_zeros(0, dtype=torch.float32)


def logit_nats(logits: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Cross-entropy of each target in nats, from logits; 0 where the target is below 0."""
    return ops.cross_entropy(logits, targets)


def _rows(head: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // head.shape[0])


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where it is on."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None, cap: float | None) -> Tensor:
    """Logits in fp32 at least."""
    dtype = _matmul_dtype(hidden)
    logits = ops.linear(hidden.to(dtype), head.to(dtype)).to(torch.promote_types(hidden.dtype, torch.float32))
    logits = logits if bias is None else logits + bias
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        bias: Tensor | None,
        cap: float | None,
        with_gradient: bool,
    ) -> Tensor:
        total = weights.new_zeros(())
        d_hidden = torch.empty_like(hidden) if with_gradient else None
        d_head = torch.empty_like(head, dtype=weights.dtype) if with_gradient else None
        d_bias = torch.zeros_like(bias, dtype=weights.dtype) if with_gradient and bias is not None else None
        dtype, size = _matmul_dtype(hidden), _rows(head)
        size = max(1, -(-len(hidden) // max(1, -(-len(hidden) // size))))  # as many chunks as must be, but even ones
        table = head.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], size):
                rows = slice(start, start + size)
                h, t, w = hidden[rows].to(dtype), targets[rows], weights[rows]
                logits = ops.linear(h, table).to(weights.dtype)
                logits = logits if bias is None else logits.add_(bias)
                logits = logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
                slope = None if cap is None or d_hidden is None else 1 - (logits / cap).square_()
                total += (ops.cross_entropy(logits, t, w, gradient=with_gradient) * w).sum()
                if d_hidden is None or d_head is None:
                    continue
                d_logits = logits if slope is None else logits.mul_(slope)
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
                d_logits = d_logits.to(dtype)
                d_hidden[rows] = d_logits @ table
                if dtype == d_head.dtype:
                    d_head.addmm_(d_logits.T, h, beta=float(start > 0))
                else:
                    d_head.copy_(d_logits.T @ h) if start == 0 else d_head.add_(d_logits.T @ h)
            if d_head is not None and len(hidden) == 0:
                d_head.zero_()
        if d_hidden is not None and d_head is not None:
            kept = () if bias is None or d_bias is None else (d_bias.to(bias.dtype),)
            ctx.save_for_backward(d_hidden, d_head.to(head.dtype), *kept)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (factor,), parts = gradients, ctx.saved_tensors
        if not numbers_at_hand(factor) or factor != 1:  # the head's gradient is large: no copy for nothing
            parts = [saved * factor.to(saved.dtype) for saved in parts]
        d_hidden, d_head, *rest = parts
        return d_hidden, d_head, None, None, rest[0] if rest else None, None, None
