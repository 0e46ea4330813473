"""Position-wise networks: the GELU MLP of GPT-2 and the gated SwiGLU of Llama (Shazeer 2020, arXiv:2002.05202).

gelu_mlp    y = W_2 gelu(W_1 x + b_1) + b_2
swiglu      y = W_3 (silu(W_1 x) * W_2 x)
"""

from torch import Tensor, nn
from torch.nn import functional as F

from bestiary.channel_mixers import register
from bestiary.mixers.base import Pointwise


@register("gelu_mlp")
class GeluMLP(Pointwise):
    """Two linear maps with a GELU between them.

    Args:
        d_model: width of input and output.
        d_hidden: inner width; 4 d_model by default.
    """

    def __init__(self, d_model: int, *, d_hidden: int | None = None):
        super().__init__(d_model)
        d_hidden = 4 * d_model if d_hidden is None else d_hidden
        self.d_hidden = d_hidden
        self.up = nn.Linear(d_model, d_hidden)
        self.down = nn.Linear(d_hidden, d_model)

    def reset_parameters(self) -> None:
        self.up.reset_parameters()
        self.down.reset_parameters()

    def transform(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


@register("swiglu")
class SwiGLU(Pointwise):
    """A gated network without biases.

    Args:
        d_model: width of input and output.
        d_hidden: inner width; 8/3 d_model by default, rounded up to a multiple of 32.
    """

    def __init__(self, d_model: int, *, d_hidden: int | None = None):
        super().__init__(d_model)
        d_hidden = -(-8 * d_model // 3 // 32) * 32 if d_hidden is None else d_hidden
        self.d_hidden = d_hidden
        self.gate_up = nn.Linear(d_model, 2 * d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_model, bias=False)

    def reset_parameters(self) -> None:
        self.gate_up.reset_parameters()
        self.down.reset_parameters()

    def transform(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
