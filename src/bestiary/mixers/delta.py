"""What mixers by the delta rule share: their q, k, v and beta, their state, and Mamba-2's decay."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import state
from bestiary.mixers.base import Mixer, keep_real
from bestiary.mixers.parts import (
    Linear,
    RMSNorm,
    ShortConvolution,
    check_heads,
    default_heads,
    dt_bias_init,
    no_weight_decay,
    unit,
    xavier_init,
)


@state.register
class DeltaState(NamedTuple):
    """The last inputs of the convolutions, and an associative memory a head."""

    history: Float[Tensor, "batch taps_minus_1 channels"]
    memory: Float[Tensor, "batch heads key_dim value_dim"]


class DeltaMixer(Mixer):
    """q, k and v behind short convolutions, beta, norm and output, a memory a head; a mixer adds gates and `mix`.

    Args:
        n_heads: heads of queries and keys; None for the usual number.
        n_value_heads: heads of values, a multiple of n_heads, each with a memory of its own; None for as many.
        d_key, d_value: widths of keys and values, over all their heads.
        conv_kernel: taps of the convolutions on q, k and v.
        negative: whether beta reaches 2.
        n_steps: keys and values, each with its beta, that a step writes.
        norm_eps: epsilon of the output's norm.
    """

    gated = True
    """Whether the memory decays before it is written."""

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None,
        d_key: int,
        d_value: int,
        conv_kernel: int,
        negative: bool,
        n_steps: int = 1,
        n_value_heads: int | None = None,
        norm_eps: float = 1e-5,
    ):
        super().__init__(d_model)
        self.n_heads = default_heads(d_model) if n_heads is None else n_heads
        self.n_value_heads = self.n_heads if n_value_heads is None else n_value_heads
        check_heads(self.n_heads, key_width=d_key, value_width=d_value, n_value_heads=self.n_value_heads)
        check_heads(self.n_value_heads, value_width=d_value)
        self.d_key, self.d_value, self.negative, self.n_steps = d_key, d_value, negative, n_steps
        self.widths = [d_key, n_steps * d_key, n_steps * d_value]
        self.qkv = Linear(d_model, sum(self.widths), bias=False)
        self.conv = ShortConvolution(sum(self.widths), conv_kernel, activation="silu")
        self.beta = Linear(d_model, n_steps * self.n_value_heads, bias=False)
        self.norm = RMSNorm(d_value // self.n_value_heads, eps=norm_eps)
        self.out = Linear(d_value, d_model, bias=False)

    def reset_parameters(self) -> None:
        for part in self.qkv.weight.split([self.d_key] * (1 + self.n_steps) + [self.d_value] * self.n_steps):
            nn.init.xavier_uniform_(part, gain=2**-2.5)  # each of q, k, v as a map of its own
        for module in self.children():
            if isinstance(module, nn.Linear) and module is not self.qkv:
                xavier_init(module)
        self.conv.reset_parameters()
        self.norm.reset_parameters()

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> DeltaState:
        place: dict[str, Any] = {"device": self.own_device(device), "dtype": self.own_dtype(dtype)}
        key_dim, value_dim = self.d_key // self.n_heads, self.d_value // self.n_value_heads
        shape = (batch_size, self.n_value_heads, key_dim, value_dim)
        return DeltaState(self.conv.initial_state(batch_size, **place), torch.zeros(shape, **place))

    def mixing_flops(self, context: int) -> float:
        return self.conv.flops() + (self.gated + 8 * self.n_steps) * self.d_key * self.d_value // self.n_heads

    def heads(
        self, x: Float[Tensor, "batch time d_model"], state: DeltaState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[
        Float[Tensor, "batch time heads key_dim"],
        Float[Tensor, "batch writes heads key_dim"],
        Float[Tensor, "batch writes heads value_dim"],
        Float[Tensor, "batch writes heads"],
        Float[Tensor, "batch taps_minus_1 channels"],
    ]:
        """q, k, v and beta, there being n_steps writes in each step of time, and the convolution's new history.

        q, k, v = silu(conv(W x)), q and k scaled to unit length; beta = sigmoid(W_beta x), twice that if negative.
        """
        qkv, history = self.conv(self.qkv(x), state.history, lengths)
        q, k, v = qkv.split(self.widths, dim=-1)
        beta = torch.sigmoid(self.beta(x)) * (2 if self.negative else 1)
        beta = keep_real(beta, lengths)  # padding replaces nothing
        q = q.unflatten(-1, (self.n_heads, -1))
        k = k.unflatten(-1, (self.n_steps, self.n_heads, -1)).flatten(1, 2)
        v, beta = (z.unflatten(-1, (self.n_steps, self.n_value_heads, -1)).flatten(1, 2) for z in (v, beta))
        q, k = (unit(z.to(state.memory.dtype)) for z in (q, k))
        q, k = (z.repeat_interleave(self.n_value_heads // self.n_heads, dim=2) for z in (q, k))
        return q, k, v, beta[..., 0], history


class ScalarDecay(nn.Module):
    """A log-decay a head and step, made of the input as Mamba-2 makes it: `softplus_decay` of a linear map."""

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.logits = Linear(d_model, n_heads, bias=False)
        self.A_log, self.dt_bias = (nn.Parameter(torch.empty(n_heads)) for _ in range(2))
        no_weight_decay(self.A_log, self.dt_bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        xavier_init(self.logits)
        self.A_log.uniform_(0, 16).clamp_(min=1e-4).log_()
        dt_bias_init(self.dt_bias)

    def forward(self, x: Float[Tensor, "batch time d_model"], dtype: torch.dtype) -> Float[Tensor, "batch time heads"]:
        return softplus_decay(self.logits(x).to(dtype), self.A_log, self.dt_bias)


def softplus_decay(
    logits: Float[Tensor, "batch time ..."], A_log: Float[Tensor, "..."], dt_bias: Float[Tensor, "..."]
) -> Float[Tensor, "batch time ..."]:
    """Mamba-2's log-decay, -exp(A_log) softplus(logits + dt_bias), in the dtype of the logits."""
    return -A_log.to(logits.dtype).exp() * F.softplus(logits + dt_bias.to(logits.dtype))
