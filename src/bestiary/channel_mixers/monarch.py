"""A GELU MLP whose two maps are Monarch matrices (Fu et al. 2023, Monarch Mixer, arXiv:2310.12109).

y = M_2 gelu(M_1 x + b_1) + b_2          ops.monarch: two block-diagonal factors each
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import ops
from bestiary.channel_mixers import register
from bestiary.errors import UsageError
from bestiary.mixers.base import Pointwise


class MonarchLinear(nn.Module):
    """An affine map by a Monarch matrix of inner width min(d_in, d_out).

    Both factors are drawn with variance 1/fan-in of their blocks, so that the product keeps the size of a vector.
    """

    def __init__(self, d_in: int, d_out: int, blocks: int):
        super().__init__()
        inner = min(d_in, d_out)
        for name, width in (("input", d_in), ("output", d_out)):
            if blocks < 1 or width % blocks or inner % (blocks * blocks):
                raise UsageError(f"blocks={blocks} must divide the {name} width {width}, and its square {inner}")
        self.first = nn.Parameter(torch.empty(blocks, inner // blocks, d_in // blocks))
        self.second = nn.Parameter(torch.empty(blocks, d_out // blocks, inner // blocks))
        self.bias = nn.Parameter(torch.empty(d_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for factor in (self.first, self.second):
            nn.init.normal_(factor, std=factor.shape[2] ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.monarch(x, self.first, self.second) + self.bias


@register("monarch_mlp")
class MonarchMLP(Pointwise):
    """An MLP with far fewer weights at the same width.

    Args:
        d_model: width of input and output.
        d_hidden: inner width; 4 d_model by default.
        blocks: of each factor; its square must divide d_model and d_hidden.
    """

    def __init__(self, d_model: int, *, d_hidden: int | None = None, blocks: int = 4):
        super().__init__(d_model)
        self.d_hidden = 4 * d_model if d_hidden is None else d_hidden
        self.up = MonarchLinear(d_model, self.d_hidden, blocks)
        self.down = MonarchLinear(self.d_hidden, d_model, blocks)

    def reset_parameters(self) -> None:
        self.up.reset_parameters()
        self.down.reset_parameters()

    def mixing_flops(self, context: int) -> float:
        return sum(2.0 * (m.first.numel() + m.second.numel()) for m in (self.up, self.down))

    def transform(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x))).to(x.dtype)
