"""xLSTM's sLSTM (Beck et al. 2024, arXiv:2405.04517): an LSTM with exponential gates and a normaliser.

u = silu(conv(x))                                     causal, depthwise, 4 taps; feeds i and f
i, f = W u_t + R h_{t-1} + b each,   z = tanh(W x_t + R h_{t-1} + b),   o = sigmoid(W x_t + R h_{t-1} + b)
c_t = f' c_{t-1} + e^{i} z,  n_t = f' n_{t-1} + e^{i}        f' = sigmoid(f), or e^{f}
h_t = o c_t / n_t;   y_t = GroupNorm(h_t)

W and R are block-diagonal, a block a head. c_t and n_t are kept in units of e^{m_t}, m_t = max(log f' + m_{t-1}, i), on
which h_t does not depend. Gates depend on h_{t-1}: there is no parallel form.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bestiary import ops, state
from bestiary.errors import UsageError
from bestiary.mixers import register
from bestiary.mixers.base import Mixer
from bestiary.mixers.parts import ForgetGate, HeadNorm, HeadwiseLinear, ShortConvolution, check_heads, no_weight_decay
from bestiary.ops.mlstm import SMALLEST


@state.register
class SLSTMState(NamedTuple):
    """The last inputs of the convolution; hidden state; cell and normaliser, in units of e^max."""

    history: Float[Tensor, "batch taps_minus_1 d_model"]
    h: Float[Tensor, "batch heads head_dim"]
    c: Float[Tensor, "batch heads head_dim"]
    n: Float[Tensor, "batch heads head_dim"]
    max: Float[Tensor, "batch heads head_dim"]


@register("slstm")
class SLSTM(Mixer):
    """A non-linear cell whose exponential gates let it revise what it stored; heads mix their own channels only.

    Args:
        d_model: width of input, output and state.
        n_heads: heads; must divide d_model.
        conv_kernel: taps of the convolution before the input and forget gates; 0 for none.
        forget: "sigmoid" or "exponential", the forget gate; both begin alike.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        conv_kernel: int = 4,
        forget: str = "sigmoid",
        layer_index: int = 0,
        n_layers: int = 1,
    ):
        super().__init__(d_model)
        check_heads(n_heads, d_model=d_model)
        if conv_kernel < 0:
            raise UsageError(f"conv_kernel must be at least 0, not {conv_kernel}")
        self.n_heads, self.head_dim, self.forget = n_heads, d_model // n_heads, ForgetGate(forget)
        self.depth = layer_index / max(1, n_layers - 1)  # 0 in the first layer, 1 in the last
        self.conv = ShortConvolution(d_model, conv_kernel, bias=True, activation="silu") if conv_kernel else None
        self.input_forget, self.cell_output = (
            HeadwiseLinear(d_model, n_heads, d_model=d_model, outputs=2) for _ in range(2)
        )
        self.recurrent = nn.Parameter(torch.empty(n_heads, 4 * self.head_dim, self.head_dim))
        self.bias = nn.Parameter(torch.empty(n_heads, 4, self.head_dim))
        self.norm = HeadNorm(n_heads, d_model)
        no_weight_decay(self.bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for part in (self.conv, self.input_forget, self.cell_output, self.norm):
            if part is not None:
                part.reset_parameters()
        nn.init.zeros_(self.recurrent)
        nn.init.zeros_(self.bias)
        share = torch.arange(self.head_dim) / max(1, self.head_dim - 1)
        self.bias[:, 1] = self.forget.bias(5 - 12 * share ** (0.3 + 1.3 * self.depth))

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> SLSTMState:
        place: dict[str, Any] = {"device": self.own_device(device), "dtype": self.own_dtype(dtype)}
        h, c, n = (torch.zeros(batch_size, self.n_heads, self.head_dim, **place) for _ in range(3))
        taps = 0 if self.conv is None else self.conv.weight.shape[1] - 1
        history = torch.zeros(batch_size, taps, self.d_model, **place)
        return SLSTMState(history, h, c, n, torch.full_like(h, SMALLEST))

    def mixing_flops(self, context: int) -> float:
        maps = self.input_forget.flops() + self.cell_output.flops() + 2 * self.recurrent.numel()
        return maps + (0 if self.conv is None else self.conv.flops()) + 8 * self.d_model

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: SLSTMState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], SLSTMState]:
        history, *cell = state
        past, history = (x, history) if self.conv is None else self.conv(x, history, lengths)
        inputs = [part.unflatten(-1, (self.n_heads, 2, -1)) for part in (self.input_forget(past), self.cell_output(x))]
        exact, outputs = state.h.dtype, [state.h[:, None][:, :0]]
        with ops.full_precision(x):
            gates, weight = torch.cat(inputs, dim=-2).to(exact) + self.bias.to(exact), self.recurrent.to(exact)
            for t, gates_t in enumerate(gates.unbind(1)):
                h, c, n, m = cell
                fed_back = torch.einsum("bhi,hoi->bho", h, weight).unflatten(-1, (4, -1))
                i, f, z, o = (gates_t + fed_back).unbind(-2)
                log_forget = self.forget.log(f)
                highest = torch.maximum(log_forget + m, i).detach()
                keep, write = (log_forget - (highest - m)).exp(), (i - highest).exp()
                c, n = keep * c + write * torch.tanh(z), keep * n + write
                new = [torch.sigmoid(o) * c / n, c, n, highest]
                outputs.append(new[0][:, None])
                if lengths is not None:
                    real = (t < lengths)[:, None, None]
                    new = [torch.where(real, after, before) for after, before in zip(new, cell)]
                cell = new
        return self.norm(torch.cat(outputs, dim=1).flatten(-2)).to(x.dtype), SLSTMState(history, *cell)
