"""RWKV's channel mixing (Peng et al. 2023, arXiv:2305.13048): a squared ReLU network with a gate and a token shift.

mix(m) = m x_t + (1 - m) x_{t-1}
r_t = sigmoid(W_r mix(mix_r)),  k_t = relu(W_k mix(mix_k))^2;   y_t = r_t (W_v k_t)
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import state
from bestiary.channel_mixers import register
from bestiary.mixers.base import Mixer
from bestiary.mixers.parts import no_weight_decay, orthogonal_init, token_shift


@state.register
class TokenShiftState(NamedTuple):
    """The last input."""

    x: Float[Tensor, "batch d_model"]


@register("rwkv_channel_mix")
class RWKVChannelMix(Mixer):
    """The channel mixer that follows RWKV-4's time mixing; it remembers one token.

    Args:
        d_model: width of input and output.
        d_hidden: inner width; 4 d_model by default.
    """

    def __init__(self, d_model: int, *, d_hidden: int | None = None, layer_index: int = 0, n_layers: int = 1):
        super().__init__(d_model)
        self.d_hidden = 4 * d_model if d_hidden is None else d_hidden
        self.depth = layer_index / n_layers
        self.mix_k, self.mix_r = (nn.Parameter(torch.empty(d_model)) for _ in range(2))
        self.key = nn.Linear(d_model, self.d_hidden, bias=False)
        self.receptance = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(self.d_hidden, d_model, bias=False)
        no_weight_decay(self.mix_k, self.mix_r)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        mix = (torch.arange(self.d_model) / self.d_model) ** (1 - self.depth)
        self.mix_k.copy_(mix)
        self.mix_r.copy_(mix)
        orthogonal_init(self.key)
        nn.init.zeros_(self.receptance.weight)
        nn.init.zeros_(self.value.weight)

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> TokenShiftState:
        shape = (batch_size, self.d_model)
        return TokenShiftState(torch.zeros(shape, device=self.own_device(device), dtype=self.own_dtype(dtype)))

    def mixing_flops(self, context: int) -> float:
        return 7 * self.d_model + 2 * self.d_hidden

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: TokenShiftState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], TokenShiftState]:
        before, last = token_shift(x, state.x, lengths)
        r = torch.sigmoid(self.receptance(torch.lerp(before, x, self.mix_r.to(x.dtype))))
        k = F.relu(self.key(torch.lerp(before, x, self.mix_k.to(x.dtype)))).square()
        return r * self.value(k), TokenShiftState(last)
