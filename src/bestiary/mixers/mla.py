"""Multi-head latent attention (DeepSeek-V2, 2024, arXiv:2405.04434): all heads' keys and values from one short latent.

c_t = RMSNorm(W_DKV x_t);   r_t = rotate(W_KR x_t)   all that is remembered: kv_rank + rope_dim numbers a step
k_s = [W_UK c_s, r_s],  v_s = W_UV c_s               a head's own W_UK, W_UV; r_s serves all heads
q_t = [W_UQ c'_t, rotate(W_QR c'_t)]                 c' = x, or RMSNorm(W_DQ x) with q_rank
y_t = W_o [sum_s softmax_s(q_t.k_s / sqrt(head_dim + rope_dim)) v_s]                ops.attention

Where there is a past, its keys and values are not made again: q.(W_UK c) = (W_UK^T q).c, so the heads ask the latents
themselves, as queries of one shared head, and W_UV comes last. Rotary pairs are our halves (i, i + rope_dim/2);
DeepSeek's are neighbours (2i, 2i + 1): to load such weights, reorder the rope channels of W_QR and W_KR.
"""

import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bestiary import ops, state
from bestiary.errors import UsageError
from bestiary.mixers import register
from bestiary.mixers.base import Mixer
from bestiary.mixers.parts import Linear, RMSNorm, check_heads, check_rate, default_heads, gpt_init


@state.register
class LatentCache(NamedTuple):
    """Latents and rotated keys [c, r] of the past; row b holds its steps 0 ... position[b]-1 in its first slots."""

    latents: Float[Tensor, "batch slots 1 channels"]
    position: Int[Tensor, " batch"]


@register("mla")
class MLA(Mixer):
    """Attention with the cache of a single small head and the keys and values of many.

    Args:
        d_model: width of input and output.
        n_heads: heads; by default one for each 64 channels of d_model (32 at small widths).
        head_dim: channels of a head's values, and of its keys beside the rotary ones; d_model / n_heads by default.
        rope_dim: rotary channels of the keys, an even number; half of head_dim by default.
        kv_rank: channels of the latent; 4 head_dim by default, or d_model / 2 where that is less.
        q_rank: channels of the queries' latent; None to make queries from x itself, as the small DeepSeek-V2-Lite does.
        rotary_base: base of the rotation's wavelengths.
    """

    attends = True
    cached_activations = ("latents",)

    unpacked = ("kv_up",)

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        head_dim: int | None = None,
        rope_dim: int | None = None,
        kv_rank: int | None = None,
        q_rank: int | None = None,
        rotary_base: float = 10000.0,
        residuals: int = 1,
    ):
        super().__init__(d_model)
        self.n_heads = default_heads(d_model) if n_heads is None else n_heads
        check_rate(rotary_base=rotary_base)
        if head_dim is None or self.n_heads < 1:
            check_heads(self.n_heads, d_model=d_model)
        self.head_dim = d_model // self.n_heads if head_dim is None else head_dim
        self.rope_dim = self.head_dim // 4 * 2 if rope_dim is None else rope_dim
        self.kv_rank = min(4 * self.head_dim, d_model // 2) if kv_rank is None else kv_rank
        d_query = d_model if q_rank is None else q_rank
        if min(self.head_dim, self.kv_rank, d_query) < 1 or self.rope_dim < 0 or self.rope_dim % 2:
            raise UsageError(
                f"head_dim={self.head_dim}, kv_rank={self.kv_rank} and q_rank={q_rank} must be positive, and "
                f"rope_dim={self.rope_dim} even"
            )
        self.rotary_base, self.residuals = rotary_base, residuals
        self.q_down = None if q_rank is None else Linear(d_model, q_rank, bias=False)
        self.q_norm = None if q_rank is None else RMSNorm(q_rank, eps=1e-6)
        self.q_up = Linear(d_query, self.n_heads * (self.head_dim + self.rope_dim), bias=False)
        self.kv_down = Linear(d_model, self.kv_rank + self.rope_dim, bias=False)
        self.kv_norm = RMSNorm(self.kv_rank, eps=1e-6)
        self.kv_up = Linear(self.kv_rank, 2 * self.n_heads * self.head_dim, bias=False)  # a head: W_UK, then W_UV
        self.out = Linear(self.n_heads * self.head_dim, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.q_up, self.kv_down, self.kv_up, *filter(None, [self.q_down])):
            gpt_init(linear, linear.in_features)
        gpt_init(self.out, self.out.in_features, residuals=self.residuals)
        for norm in (self.kv_norm, *filter(None, [self.q_norm])):
            norm.reset_parameters()

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> LatentCache:
        shape, device = (batch_size, 0, 1, self.kv_rank + self.rope_dim), self.own_device(device)
        latents = torch.zeros(shape, device=device, dtype=self.out.weight.dtype if dtype is None else dtype)
        return LatentCache(latents, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def state_nbytes(self, time: int) -> int:
        return time * (self.kv_rank + self.rope_dim) * 4 + 8

    def mixing_flops(self, context: int) -> float:
        seen = (context + 1) / 2  # as in training: a head's own keys and values
        return 2 * seen * self.n_heads * (2 * self.head_dim + self.rope_dim)

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: LatentCache, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], LatentCache]:
        position = ops.positions(state.position, x.shape[1])
        asked = x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x))
        q, q_rope = self.q_up(asked).unflatten(-1, (self.n_heads, -1)).split([self.head_dim, self.rope_dim], dim=-1)
        latent, k_rope = self.kv_down(x)[:, :, None].split([self.kv_rank, self.rope_dim], dim=-1)
        latent = self.kv_norm(latent)
        q_rope, k_rope = (ops.rotate(z, position, base=self.rotary_base) for z in (q_rope, k_rope))
        new = torch.cat([latent, k_rope], dim=-1)
        past = ops.KVCache(state.latents, state.latents[..., : self.kv_rank], state.position)
        scale = (self.head_dim + self.rope_dim) ** -0.5
        if state.latents.shape[1] and self.can_absorb():
            W_UK, W_UV = self.kv_up.weight.unflatten(0, (self.n_heads, -1)).chunk(2, dim=1)
            q = torch.cat([torch.einsum("bthd,hdc->bthc", q, W_UK), q_rope], dim=-1)
            o, after = ops.attention(q, new, latent, scale=scale, state=past, lengths=lengths)
            o = torch.einsum("bthc,hdc->bthd", o, W_UV)
        else:
            q, (k, v) = torch.cat([q, q_rope], dim=-1), self.expand(new)
            expanded = ops.KVCache(*self.expand(state.latents.to(new.dtype)), state.position)
            o, _ = ops.attention(q, k, v, scale=scale, state=expanded, lengths=lengths)
            after = ops.remember(past, new, latent, lengths=lengths)
        return self.out(o.flatten(-2)), LatentCache(after.keys, after.position)

    def can_absorb(self) -> bool:
        """Whether kv_up is a plain matrix that can change sides; one that an adapter wraps is called as it is."""
        plain = type(self.kv_up) in (Linear, nn.Linear)
        if not plain:
            warnings.warn("mla: kv_up is wrapped, so that every step expands all latents of the past", stacklevel=2)
        return plain

    def expand(
        self, latents: Float[Tensor, "batch slots 1 channels"]
    ) -> tuple[Float[Tensor, "batch slots heads key_dim"], Float[Tensor, "batch slots heads head_dim"]]:
        """The keys and values that the cached latents stand for."""
        c, r = latents.squeeze(2).split([self.kv_rank, self.rope_dim], dim=-1)
        k, v = self.kv_up(c).unflatten(-1, (self.n_heads, -1)).chunk(2, dim=-1)
        return torch.cat([k, r[:, :, None].expand(-1, -1, self.n_heads, -1)], dim=-1), v
