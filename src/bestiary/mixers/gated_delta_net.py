"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464): the delta rule with Mamba-2's decay.

q_t, k_t, v_t = silu(conv(W x))_t                     short convolutions; q, k scaled to unit length; split over heads
beta_t = sigmoid(W_beta x_t)                          how far what the key recalls is replaced
g_t = -exp(A_log) softplus(W_a x_t + dt_bias)         log-decay, one number a head
S_t = (I - beta_t k_t k_t^T) exp(g_t) S_{t-1} + beta_t k_t v_t^T        the recurrence: ops.delta_rule
y_t = W_o (RMSNorm(S_t^T q_t / sqrt(K)) * silu(W_g x_t))
"""

from jaxtyping import Float, Int
from torch import Tensor

from bestiary import ops
from bestiary.mixers import register
from bestiary.mixers.base import keep_real
from bestiary.mixers.delta import DeltaMixer, DeltaState, ScalarDecay
from bestiary.mixers.parts import Linear


@register("gated_delta_net")
class GatedDeltaNet(DeltaMixer):
    """The delta rule that can also forget at once; the recurrent half of many hybrids.

    Args:
        d_model: width of input and output.
        n_heads: heads; by default one for each 64 channels of d_model (32 at small widths).
        n_value_heads: heads of values, a multiple of n_heads sharing q and k; by default as many (Qwen3-Next: twice).
        expand_k, expand_v: key and value width over d_model.
        conv_kernel: taps of the convolutions on q, k and v.
        negative: let beta reach 2, so that the state's eigenvalues reach -1 (arXiv:2411.12537).
        norm_eps: epsilon of the output's norm.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        n_value_heads: int | None = None,
        expand_k: float = 0.75,
        expand_v: float = 1.5,
        conv_kernel: int = 4,
        negative: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__(
            d_model,
            n_heads=n_heads,
            n_value_heads=n_value_heads,
            d_key=round(expand_k * d_model),
            d_value=round(expand_v * d_model),
            conv_kernel=conv_kernel,
            negative=negative,
            norm_eps=norm_eps,
        )
        self.decay = ScalarDecay(d_model, self.n_value_heads)
        self.gate = Linear(d_model, self.d_value, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.decay.reset_parameters()

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: DeltaState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], DeltaState]:
        q, k, v, beta, history = self.heads(x, state, lengths)
        log_decay = keep_real(self.decay(x, state.memory.dtype), lengths)
        o, memory = ops.delta_rule(q, k, v, beta, log_decay, state=state.memory)
        return self.out(self.norm(o, self.gate(x).unflatten(-1, o.shape[-2:])).flatten(-2)), DeltaState(history, memory)
