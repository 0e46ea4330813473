"""RWKV-4 "Dove", its time mixing (Peng et al. 2023, arXiv:2305.13048).

mix(m) = m x_t + (1 - m) x_{t-1}                     token shift, m a channel's own
r_t = sigmoid(W_r mix(mix_r)),  k_t = W_k mix(mix_k),  v_t = W_v mix(mix_v)
wkv_t = (sum_{j<t} e^{(t-1-j) w + k_j} v_j + e^{u + k_t} v_t) / (the same without v)         ops.wkv
y_t = W_o (r_t wkv_t),   w = -exp(time_decay), u = time_first
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bestiary import ops, state
from bestiary.mixers import register
from bestiary.mixers.base import Mixer
from bestiary.mixers.parts import Linear, no_weight_decay, orthogonal_init, token_shift


@state.register
class RWKV4State(NamedTuple):
    """The last input, and the sums of the WKV operator."""

    x: Float[Tensor, "batch d_model"]
    wkv: ops.WKVState


@register("rwkv4")
class RWKV4(Mixer):
    """A linear RNN whose state is five numbers a channel, with its channel mixer's.

    Args:
        d_model: width of input and output.
    """

    channel_mixer = "rwkv_channel_mix"

    def __init__(self, d_model: int, *, layer_index: int = 0, n_layers: int = 1):
        super().__init__(d_model)
        self.layer_index, self.n_layers = layer_index, n_layers
        self.mix_k, self.mix_v, self.mix_r = (nn.Parameter(torch.empty(d_model)) for _ in range(3))
        self.time_decay, self.time_first = (nn.Parameter(torch.empty(d_model)) for _ in range(2))
        self.key, self.value, self.receptance, self.output = (Linear(d_model, d_model, bias=False) for _ in range(4))
        no_weight_decay(self.mix_k, self.mix_v, self.mix_r, self.time_decay, self.time_first)
        self.time_decay._lr_scale = 2.0  # type: ignore[attr-defined]
        self.time_first._lr_scale = 3.0  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        deep = self.layer_index / max(1, self.n_layers - 1)  # 0 in the first layer, 1 in the last
        shallow = 1 - self.layer_index / self.n_layers
        channel = torch.arange(self.d_model)
        share = channel / self.d_model
        self.mix_k.copy_(share**shallow)
        self.mix_v.copy_(share**shallow + 0.3 * deep)
        self.mix_r.copy_(share ** (0.5 * shallow))
        self.time_decay.copy_(-5 + 8 * (channel / (self.d_model - 1)) ** (0.7 + 1.3 * deep))
        self.time_first.copy_(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        orthogonal_init(self.value)
        for linear in (self.key, self.receptance, self.output):
            nn.init.zeros_(linear.weight)

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> RWKV4State:
        place: dict[str, Any] = {"device": self.own_device(device), "dtype": self.own_dtype(dtype)}
        last = torch.zeros(batch_size, self.d_model, **place)
        return RWKV4State(last, ops.empty_wkv(batch_size, self.d_model, **place))

    def mixing_flops(self, context: int) -> float:
        return 12 * self.d_model

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: RWKV4State, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], RWKV4State]:
        before, last = token_shift(x, state.x, lengths)
        k, v, r = (
            linear(torch.lerp(before, x, mix.to(x.dtype)))
            for linear, mix in ((self.key, self.mix_k), (self.value, self.mix_v), (self.receptance, self.mix_r))
        )
        w = -self.time_decay.to(state.wkv.num.dtype).exp()
        y, sums = ops.wkv(k, v, w, self.time_first, state=state.wkv, lengths=lengths)
        return self.output(torch.sigmoid(r) * y), RWKV4State(last, sums)
