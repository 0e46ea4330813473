"""Kimi Delta Attention (Kimi Team 2025, arXiv:2510.26692): the delta rule with a decay of each key channel.

q_t, k_t, v_t = silu(conv(W x))_t                     short convolutions; q, k scaled to unit length; split over heads
beta_t = sigmoid(W_beta x_t)                          how far what the key recalls is replaced
g_t = -exp(A_log) softplus(W_2 W_1 x_t + dt_bias)     log-decay of each key channel, low rank; A_log is a head's
S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T        the recurrence: ops.delta_rule
y_t = W_o (RMSNorm(S_t^T q_t / sqrt(K)) * sigmoid(W_4 W_3 x_t))
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bestiary import ops
from bestiary.mixers import register
from bestiary.mixers.base import keep_real
from bestiary.mixers.delta import DeltaMixer, DeltaState, softplus_decay
from bestiary.mixers.parts import Linear, check_rate, dt_bias_init, gpt_init, no_weight_decay


@register("kda")
class KDA(DeltaMixer):
    """Gated DeltaNet with a finer gate; three of it to one attention make Kimi Linear.

    Args:
        d_model: width of input and output.
        n_heads: heads; by default one for each 64 channels of d_model (32 at small widths).
        expand_k, expand_v: key and value width over d_model.
        rank: of the maps to the decay and to the output gate; by default the value width of a head.
        conv_kernel: taps of the convolutions on q, k and v.
        negative: let beta reach 2, so that the transition's eigenvalues reach -1 (arXiv:2411.12537).
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        rank: int | None = None,
        conv_kernel: int = 4,
        negative: bool = False,
    ):
        widths = {"d_key": round(expand_k * d_model), "d_value": round(expand_v * d_model)}
        super().__init__(d_model, n_heads=n_heads, **widths, conv_kernel=conv_kernel, negative=negative)
        self.rank = self.d_value // self.n_heads if rank is None else rank
        check_rate(rank=self.rank)
        self.decay_down = Linear(d_model, self.rank, bias=False)
        self.decay_up = Linear(self.rank, self.d_key, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.n_heads, 1))
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads, self.d_key // self.n_heads))
        self.gate_down = Linear(d_model, self.rank, bias=False)
        self.gate_up = Linear(self.rank, self.d_value, bias=False)
        no_weight_decay(self.A_log, self.dt_bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in self.children():
            if isinstance(module, nn.Linear):
                gpt_init(module, self.d_model)
        self.conv.reset_parameters()
        self.norm.reset_parameters()
        dt_bias_init(self.dt_bias)
        self.A_log.uniform_(1, 16).log_()

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: DeltaState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], DeltaState]:
        q, k, v, beta, history = self.heads(x, state, lengths)
        logits = self.decay_up(self.decay_down(x)).unflatten(-1, (self.n_heads, -1))
        log_decay = keep_real(softplus_decay(logits.to(state.memory.dtype), self.A_log, self.dt_bias), lengths)
        o, memory = ops.delta_rule(q, k, v, beta, log_decay, state=state.memory)
        gate = torch.sigmoid(self.gate_up(self.gate_down(x)))
        return self.out(self.norm(o).flatten(-2) * gate), DeltaState(history, memory)
