"""MLPs whose maps are Monarch matrices, or half of one (Fu et al. 2023, Monarch Mixer, arXiv:2310.12109).

monarch_mlp     y = M_2 gelu(M_1 x + b_1) + b_2              ops.monarch: two block-diagonal factors each
m2_mlp          g, u = halves(B_1 x);  y = B_2 (gelu(g) u) + b       ops.block_diagonal: one factor each

`m2_mlp` is what the released M2-BERT has. Its halves are taken after the blocks are joined, so that the gate g comes
from the first half of the blocks, which see the first half of x alone, and the values u from the others: two
block-diagonal maps, one for g and one for u, would be another function.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import ops
from bestiary.channel_mixers import register
from bestiary.errors import UsageError
from bestiary.mixers.base import Pointwise
from bestiary.ops import monarch_tools


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
        return float(sum(monarch_tools.flops((m.first, m.second)) for m in (self.up, self.down)))

    def transform(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x))).to(x.dtype)


class BlockDiagonalLinear(nn.Module):
    """An affine map within blocks, drawn as the diagonal blocks of a linear map whose entries are scaled up in return.

    With kaiming's uniform(+-1/sqrt(d_in)) times sqrt(blocks) that is uniform(+-1/sqrt(width of a block)).
    """

    def __init__(self, d_in: int, d_out: int, blocks: int, *, bias: bool):
        super().__init__()
        for name, width in (("input", d_in), ("output", d_out)):
            if blocks < 1 or width % blocks:
                raise UsageError(f"blocks={blocks} must divide the {name} width {width}")
        self.weight = nn.Parameter(torch.empty(blocks, d_out // blocks, d_in // blocks))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.bias.numel() ** -0.5), self.bias.numel() ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = ops.block_diagonal(x, self.weight)
        return y if self.bias is None else y + self.bias


@register("m2_mlp")
class M2MLP(Pointwise):
    """The gated MLP of M2-BERT, in block-diagonal maps.

    Args:
        d_model: width of input and output.
        d_hidden: inner width; 4 d_model by default.
        blocks: of each map; must divide d_model and d_hidden.
    """

    def __init__(self, d_model: int, *, d_hidden: int | None = None, blocks: int = 4):
        super().__init__(d_model)
        self.d_hidden = 4 * d_model if d_hidden is None else d_hidden
        self.gate_up = BlockDiagonalLinear(d_model, 2 * self.d_hidden, blocks, bias=False)
        self.down = BlockDiagonalLinear(self.d_hidden, d_model, blocks, bias=True)

    def reset_parameters(self) -> None:
        self.gate_up.reset_parameters()
        self.down.reset_parameters()

    def mixing_flops(self, context: int) -> float:
        return float(monarch_tools.flops((self.gate_up.weight, self.down.weight)))

    def transform(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate) * up).to(x.dtype)
