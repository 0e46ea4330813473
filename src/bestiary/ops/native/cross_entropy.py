"""The cross-entropy of logits and its gradient in their place, by the compiled kernel (csrc/cross_entropy.h)."""

import ctypes

import torch
from torch import Tensor

from bestiary.errors import UsageError
from bestiary.ops.native.library import buffer, check_shapes, kernel, pointer


class _CrossEntropy(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "vocab", "row", "gradient")] + [
        (name, ctypes.c_void_p) for name in ("logits", "targets", "weights", "nats")
    ]


torch.library.define(
    "bestiary::cross_entropy", "(Tensor(a!) logits, Tensor targets, Tensor? weights, bool gradient) -> Tensor"
)


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None, gradient: bool) -> Tensor:
    """Nats of each row of fp32 logits on the CPU; see bestiary.ops.cross_entropy."""
    return torch.ops.bestiary.cross_entropy(logits, targets, weights, gradient)


@torch.library.impl("bestiary::cross_entropy", "CPU")
def _run(logits, targets, weights, gradient):
    many, vocab = logits.shape
    check_shapes("cross_entropy", ("targets", targets, (many,)), ("weights", weights, (many,)))
    if logits.stride(-1) != 1 and logits.numel():
        raise UsageError("cross_entropy: each row of logits must lie in one piece")
    if many and (vocab < 1 or int(targets.max()) >= vocab):
        raise UsageError(f"cross_entropy: targets must be below {vocab}, got {int(targets.max())}")
    targets, weights = targets.to(torch.int64).contiguous(), None if weights is None else weights.contiguous()
    nats = buffer(many)
    given = _CrossEntropy(many, vocab, logits.stride(0), int(gradient))
    given.logits, given.targets, given.weights = pointer(logits), pointer(targets), pointer(weights)
    given.nats = pointer(nats)
    kernel("bestiary_cross_entropy")(ctypes.byref(given))
    del targets, weights
    return nats


@torch.library.register_fake("bestiary::cross_entropy")
def _(logits, targets, weights, gradient):
    return logits.new_empty(logits.shape[0])
