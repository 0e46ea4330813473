"""Position-wise networks: the GELU MLP of GPT-2, and gated ones (Shazeer 2020, arXiv:2002.05202).

gelu_mlp    y = W_2 gelu(W_1 x + b_1) + b_2
swiglu      y = W_3 (silu(W_1 x) * W_2 x)            Llama's
geglu       y = W_3 (gelu(W_1 x) * W_2 x)            Gemma's; gelu by its tanh form there, exact in Evo
bilinear    y = W_3 (W_1 x * W_2 x)                  Evo 2's after its first layer

Drawn as GPT-2's are: normal, what writes into the residual path divided by the root of how many parts do.
"""

from torch import Tensor
from torch.nn import functional as F

from bestiary.channel_mixers import register
from bestiary.mixers.base import Pointwise
from bestiary.mixers.parts import Linear, gpt_init


@register("gelu_mlp")
class GeluMLP(Pointwise):
    """Two linear maps with a GELU between them.

    Args:
        d_model: width of input and output.
        d_hidden: inner width; 4 d_model by default.
        exact: whether the GELU is the exact one; else its tanh form, which GPT-2, H3 and Hyena have.
    """

    def __init__(self, d_model: int, *, d_hidden: int | None = None, exact: bool = True, residuals: int = 1):
        super().__init__(d_model)
        self.d_hidden, self.residuals = 4 * d_model if d_hidden is None else d_hidden, residuals
        self.exact = exact
        self.up = Linear(d_model, self.d_hidden)
        self.down = Linear(self.d_hidden, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        gpt_init(self.up, self.d_model)
        gpt_init(self.down, self.d_model, residuals=self.residuals)

    def transform(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x), self.exact))


@register("swiglu")
class SwiGLU(Pointwise):
    """A gated network with SiLU.

    Args:
        d_model: width of input and output.
        d_hidden: inner width; 8/3 d_model by default, rounded up to a multiple of 32.
        bias: whether its maps have biases, zero to begin with.
    """

    def __init__(self, d_model: int, *, d_hidden: int | None = None, bias: bool = False, residuals: int = 1):
        super().__init__(d_model)
        self.d_hidden = -(-8 * d_model // 3 // 32) * 32 if d_hidden is None else d_hidden
        self.residuals = residuals
        self.gate_up = Linear(d_model, 2 * self.d_hidden, bias=bias)
        self.down = Linear(self.d_hidden, d_model, bias=bias)
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
    """The gated network with a GELU, as in Gemma, Griffin (d_hidden = 3 d_model there), Zamba and Evo.

    Args:
        d_model: width of input and output.
        d_hidden: inner width; 8/3 d_model by default, rounded up to a multiple of 32.
        exact: whether the GELU is the exact one, as in Evo; else its tanh form.
        bias: whether its maps have biases, zero to begin with, as in RecurrentGemma.
    """

    def __init__(
        self, d_model: int, *, d_hidden: int | None = None, exact: bool = False, bias: bool = False, residuals: int = 1
    ):
        super().__init__(d_model, d_hidden=d_hidden, bias=bias, residuals=residuals)
        self.exact = exact

    def activation(self, gate: Tensor) -> Tensor:
        return gelu(gate, self.exact)


@register("bilinear")
class Bilinear(SwiGLU):
    """The gated network without an activation: a product of two linear maps, as in Evo 2 after its first layer.

    Args:
        d_model: width of input and output.
        d_hidden: inner width; 8/3 d_model by default, rounded up to a multiple of 32.
        bias: whether its maps have biases, zero to begin with.
    """

    def activation(self, gate: Tensor) -> Tensor:
        return gate


def gelu(x: Tensor, exact: bool) -> Tensor:
    """x times the normal distribution's cumulative function of x, or its tanh form."""
    return F.gelu(x, approximate="none" if exact else "tanh")
