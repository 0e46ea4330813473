"""RWKV's channel mixing (Peng et al. 2023, arXiv:2305.13048): a squared ReLU network with a gate and a token shift.

RWKV-4, 5   mix(m) = m x_t + (1 - m) x_{t-1}
RWKV-6, 7   mix(m) = x_t + (x_{t-1} - x_t) m                     the same, with 1 - m as the parameter
            r_t = sigmoid(W_r mix(m_r)),  k_t = relu(W_k mix(m_k))^2;   y_t = r_t (W_v k_t)
RWKV-7      without r
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import state
from bestiary.channel_mixers import register
from bestiary.mixers.base import Mixer
from bestiary.mixers.parts import Linear, no_weight_decay, orthogonal_init, token_shift


@state.register
class TokenShiftState(NamedTuple):
    """The last input."""

    x: Float[Tensor, "batch d_model"]


class ShiftedMLP(Mixer):
    """Base of the four: a key and a value matrix, and one token remembered."""

    def __init__(self, d_model: int, d_hidden: int, layer_index: int, n_layers: int):
        super().__init__(d_model)
        self.d_hidden = d_hidden
        self.shallow = 1 - layer_index / n_layers
        self.key = Linear(d_model, d_hidden, bias=False)
        self.value = Linear(d_hidden, d_model, bias=False)

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> TokenShiftState:
        shape = (batch_size, self.d_model)
        return TokenShiftState(torch.zeros(shape, device=self.own_device(device), dtype=self.own_dtype(dtype)))

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: TokenShiftState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], TokenShiftState]:
        before, last = token_shift(x, state.x, lengths)
        return self.transform(x, before), TokenShiftState(last)

    def transform(
        self, x: Float[Tensor, "batch time d_model"], before: Float[Tensor, "batch time d_model"]
    ) -> Float[Tensor, "batch time d_model"]:
        """The function of each step and the one before."""
        raise NotImplementedError

    def network(self, x: Float[Tensor, "batch time d_model"]) -> Float[Tensor, "batch time d_model"]:
        return self.value(F.relu(self.key(x)).square())


@register("rwkv_channel_mix")
class RWKVChannelMix(ShiftedMLP):
    """The channel mixer that follows RWKV-4's time mixing; it remembers one token.

    Args:
        d_model: width of input and output.
        d_hidden: inner width; 4 d_model by default.
    """

    def __init__(self, d_model: int, *, d_hidden: int | None = None, layer_index: int = 0, n_layers: int = 1):
        super().__init__(d_model, 4 * d_model if d_hidden is None else d_hidden, layer_index, n_layers)
        self.mix_k, self.mix_r = (nn.Parameter(torch.empty(d_model)) for _ in range(2))
        self.receptance = Linear(d_model, d_model, bias=False)
        no_weight_decay(self.mix_k, self.mix_r)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for mix in (self.mix_k, self.mix_r):
            mix.copy_((torch.arange(self.d_model) / self.d_model) ** self.shallow)
        orthogonal_init(self.key)
        nn.init.zeros_(self.receptance.weight)
        nn.init.zeros_(self.value.weight)

    def mixing_flops(self, context: int) -> float:
        return 7 * self.d_model + 2 * self.d_hidden

    def transform(self, x: Tensor, before: Tensor) -> Tensor:
        r = torch.sigmoid(self.receptance(torch.lerp(before, x, self.mix_r.to(x.dtype))))
        return r * self.network(torch.lerp(before, x, self.mix_k.to(x.dtype)))


@register("rwkv5_channel_mix")
class RWKV5ChannelMix(RWKVChannelMix):
    """RWKV-5's: RWKV-4's, narrower, since time mixing has a gate more.

    Args:
        d_model: width of input and output.
        d_hidden: inner width; 3.5 d_model by default, rounded down to a multiple of 32.
    """

    def __init__(self, d_model: int, *, d_hidden: int | None = None, layer_index: int = 0, n_layers: int = 1):
        d_hidden = narrow(d_model) if d_hidden is None else d_hidden
        super().__init__(d_model, d_hidden=d_hidden, layer_index=layer_index, n_layers=n_layers)


@register("rwkv6_channel_mix")
class RWKV6ChannelMix(ShiftedMLP):
    """RWKV-6's: RWKV-5's with the shift written the other way round, and other initial values.

    Args:
        d_model: width of input and output.
        d_hidden: inner width; 3.5 d_model by default, rounded down to a multiple of 32.
    """

    def __init__(self, d_model: int, *, d_hidden: int | None = None, layer_index: int = 0, n_layers: int = 1):
        super().__init__(d_model, narrow(d_model) if d_hidden is None else d_hidden, layer_index, n_layers)
        self.maa_k, self.maa_r = (nn.Parameter(torch.empty(d_model)) for _ in range(2))
        self.receptance = Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for maa in (self.maa_k, self.maa_r):
            maa.copy_(1 - (torch.arange(self.d_model) / self.d_model) ** (self.shallow**3))
        nn.init.orthogonal_(self.key.weight)
        nn.init.zeros_(self.receptance.weight)
        nn.init.zeros_(self.value.weight)

    def mixing_flops(self, context: int) -> float:
        return 7 * self.d_model + 2 * self.d_hidden

    def transform(self, x: Tensor, before: Tensor) -> Tensor:
        r = torch.sigmoid(self.receptance(torch.lerp(x, before, self.maa_r.to(x.dtype))))
        return r * self.network(torch.lerp(x, before, self.maa_k.to(x.dtype)))


@register("rwkv7_channel_mix")
class RWKV7ChannelMix(ShiftedMLP):
    """RWKV-7's: no gate, and wide again.

    Args:
        d_model: width of input and output.
        d_hidden: inner width; 4 d_model by default.
    """

    def __init__(self, d_model: int, *, d_hidden: int | None = None, layer_index: int = 0, n_layers: int = 1):
        super().__init__(d_model, 4 * d_model if d_hidden is None else d_hidden, layer_index, n_layers)
        self.x_k = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.x_k.copy_(1 - (torch.arange(self.d_model) / self.d_model) ** (self.shallow**4))
        nn.init.uniform_(self.key.weight, -0.5 * self.d_model**-0.5, 0.5 * self.d_model**-0.5)
        nn.init.zeros_(self.value.weight)

    def mixing_flops(self, context: int) -> float:
        return 3 * self.d_model + 2 * self.d_hidden

    def transform(self, x: Tensor, before: Tensor) -> Tensor:
        return self.network(torch.lerp(x, before, self.x_k.to(x.dtype)))


def narrow(d_model: int) -> int:
    """RWKV-5's and 6's inner width."""
    return int(3.5 * d_model) // 32 * 32
