"""What RWKV-5, 6 and 7 share: heads that each remember a matrix, a norm a head, a first memory that may be trained."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bestiary import state
from bestiary.errors import UsageError
from bestiary.mixers.base import Mixer
from bestiary.mixers.parts import HeadNorm, Linear, check_rate, default_heads, no_weight_decay

GN_EPS = 64e-5
"""RWKV-5 divides by 8 before a norm whose epsilon is 1e-5; 6 and 7 say the same as one epsilon, 8 * 8 * 1e-5."""


@state.register
class RWKVState(NamedTuple):
    """The last input, and an associative memory a head."""

    x: Float[Tensor, "batch d_model"]
    memory: Float[Tensor, "batch heads key_dim value_dim"]


class LowRank(nn.Module):
    """W_2 f(W_1 x), without weight decay: upstream lets only the large matrices decay.

    Args:
        d_model: width of input and output.
        rank: width between the maps.
        activation: f, e.g. torch.tanh; None for none.
    """

    def __init__(self, d_model: int, rank: int, activation: Any = None):
        super().__init__()
        self.down, self.up = Linear(d_model, rank, bias=False), Linear(rank, d_model, bias=False)
        self.activation = activation
        no_weight_decay(*self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        inner = self.down(x)
        return self.up(inner if self.activation is None else self.activation(inner))


class RWKVHeads(Mixer):
    """Base of RWKV-5, 6 and 7: the projections, the norm and the state that they have in common.

    Args:
        d_model: width of input and output.
        head_size: channels a head; 64, or 32 where d_model is below 256 or no multiple of 64.
        gn_eps: epsilon of the norm a head.
        train_state: whether the memory before the first step is a parameter, `first_memory`, instead of zero.
    """

    def __init__(
        self, d_model: int, head_size: int | None, gn_eps: float, train_state: bool, layer_index: int, n_layers: int
    ):
        super().__init__(d_model)
        self.head_size = d_model // default_heads(d_model) if head_size is None else head_size
        if self.head_size < 2 or d_model % self.head_size:
            raise UsageError(f"head_size must be at least 2 and divide d_model={d_model}, not {head_size}")
        check_rate(gn_eps=gn_eps)
        self.n_heads = d_model // self.head_size
        self.layer_index, self.n_layers = layer_index, n_layers
        self.deep = layer_index / max(1, n_layers - 1)  # 0 in the first layer, 1 in the last
        self.shallow = 1 - layer_index / n_layers
        self.receptance, self.key, self.value, self.output = (Linear(d_model, d_model, bias=False) for _ in range(4))
        self.ln_x = HeadNorm(self.n_heads, d_model, eps=gn_eps, bias=True)
        shape = (self.n_heads, self.head_size, self.head_size)
        self.first_memory = nn.Parameter(torch.empty(shape)) if train_state else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.output.weight)
        self.ln_x.reset_parameters()
        nn.init.constant_(self.ln_x.weight, ((1 + self.layer_index) / self.n_layers) ** 0.7)
        if self.first_memory is not None:
            nn.init.zeros_(self.first_memory)

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> RWKVState:
        place: dict[str, Any] = {"device": self.own_device(device), "dtype": self.own_dtype(dtype)}
        last = torch.zeros(batch_size, self.d_model, **place)
        if self.first_memory is not None:
            return RWKVState(last, self.first_memory.to(**place).repeat(batch_size, 1, 1, 1))
        return RWKVState(last, torch.zeros(batch_size, self.n_heads, self.head_size, self.head_size, **place))

    def heads(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch heads head_size"]:
        return x.unflatten(-1, (self.n_heads, self.head_size))


def rise(count: int) -> Float[Tensor, " count"]:
    """0 ... 1 in equal steps, what RWKV's initialisations of channels are functions of."""
    return torch.arange(count) / max(1, count - 1)


@torch.no_grad()
def decay_init(time_decay: Tensor, deep: float) -> None:
    """RWKV-5's and 6's: from a half-life of hundreds of steps to one of two, more of the long ones in deep layers."""
    time_decay.copy_((-6 + 5 * rise(time_decay.numel()) ** (0.7 + 1.3 * deep)).view_as(time_decay))


@torch.no_grad()
def bonus_init(bonus: Tensor, deep: float) -> None:
    """RWKV-5.2's and 6's: falling over the channels in deep layers, with a small pattern of period 3."""
    zigzag = 0.1 * ((torch.arange(bonus.numel()) + 1) % 3 - 1)
    bonus.copy_((deep * (1 - rise(bonus.numel())) + zigzag).view_as(bonus))
