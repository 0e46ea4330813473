"""Position-wise networks: the GELU MLP of GPT-2, the gated SwiGLU of Llama and GEGLU of Gemma (arXiv:2002.05202).

gelu_mlp    y = W_2 gelu(W_1 x + b_1) + b_2
swiglu      y = W_3 (silu(W_1 x) * W_2 x)
geglu       y = W_3 (gelu(W_1 x) * W_2 x)            gelu by its tanh form, as in the published models

Drawn as GPT-2's are: normal, what writes into the residual path divided by the root of how many parts do.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from bestiary.channel_mixers import register
from bestiary.mixers.base import Pointwise
from bestiary.mixers.parts import gpt_init


@register("gelu_mlp")
class GeluMLP(Pointwise):
    """Two linear maps with a GELU between them.

    Args:
        d_model: width of input and output.
        d_hidden: inner width; 4 d_model by default.
    """

    def __init__(self, d_model: int, *, d_hidden: int | None = None, residuals: int = 1):
        super().__init__(d_model)
        self.d_hidden, self.residuals = 4 * d_model if d_hidden is None else d_hidden, residuals
        self.up = nn.Linear(d_model, self.d_hidden)
        self.down = nn.Linear(self.d_hidden, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        gpt_init(self.up, self.d_model)
        gpt_init(self.down, self.d_model, residuals=self.residuals)

    def transform(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


@register("swiglu")
class SwiGLU(Pointwise):
    """A gated network without biases.

    Args:
        d_model: width of input and output.
        d_hidden: inner width; 8/3 d_model by default, rounded up to a multiple of 32.
    """

    def __init__(self, d_model: int, *, d_hidden: int | None = None, residuals: int = 1):
        super().__init__(d_model)
        self.d_hidden = -(-8 * d_model // 3 // 32) * 32 if d_hidden is None else d_hidden
        self.residuals = residuals
        self.gate_up = nn.Linear(d_model, 2 * self.d_hidden, bias=False)
        self.down = nn.Linear(self.d_hidden, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        gpt_init(self.gate_up, self.d_model)
        gpt_init(self.down, self.d_model, residuals=self.residuals)

    def transform(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)

    def activation(self, gate: Tensor) -> Tensor:
        return F.silu(gate)


@register("geglu")
class GEGLU(SwiGLU):
    """The gated network with a GELU, as in Gemma, Griffin (d_hidden = 3 d_model there) and Zamba.

    Args:
        d_model: width of input and output.
        d_hidden: inner width; 8/3 d_model by default, rounded up to a multiple of 32.
    """

    def activation(self, gate: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh")
