"""DeltaProduct (Siems et al. 2025, arXiv:2502.10297): several corrections of the memory in each step.

q_t, k_{t,j}, v_{t,j} = silu(conv(W x))_t             j = 1 ... n_steps; q, k scaled to unit length; split over heads
beta_{t,j} = 2 sigmoid(W_beta x_t)
S_{t,0} = exp(g_t) S_{t-1}                            g_t = 0; gated: -exp(A_log) softplus(W_a x_t + dt_bias)
S_{t,j} = (I - beta_{t,j} k_{t,j} k_{t,j}^T) S_{t,j-1} + beta_{t,j} k_{t,j} v_{t,j}^T,   S_t = S_{t,n_steps}
y_t = W_o (RMSNorm(S_t^T q_t / sqrt(K)) * silu(W_g x_t))

The state's transition is a product of n_steps generalised Householder matrices: with beta = 2 each reflects, and two of
them rotate, which a single one cannot. It is ops.delta_rule on a time n_steps as fine.
"""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from bestiary import ops
from bestiary.errors import UsageError
from bestiary.mixers import register
from bestiary.mixers.base import keep_real
from bestiary.mixers.delta import DeltaMixer, DeltaState, ScalarDecay
from bestiary.mixers.parts import Linear


@register("delta_product")
class DeltaProduct(DeltaMixer):
    """A delta rule that can permute and rotate what it remembers; with one step, (Gated) DeltaNet with an output gate.

    Args:
        d_model: width of input and output.
        n_steps: corrections in each step.
        gated: let the memory decay once a step (Gated DeltaProduct).
        n_heads: heads; by default one for each 64 channels of d_model (32 at small widths).
        expand_k, expand_v: key and value width over d_model.
        conv_kernel: taps of the convolutions on q, k and v.
        negative: let beta reach 2, so that the transition's eigenvalues reach -1 (arXiv:2411.12537).
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_steps: int = 2,
        gated: bool = False,
        n_heads: int | None = None,
        expand_k: float = 0.75,
        expand_v: float = 1.5,
        conv_kernel: int = 4,
        negative: bool = True,
    ):
        if n_steps < 1:
            raise UsageError(f"n_steps must be at least 1, not {n_steps}")
        widths = {"d_key": round(expand_k * d_model), "d_value": round(expand_v * d_model)}
        super().__init__(
            d_model, n_heads=n_heads, **widths, conv_kernel=conv_kernel, negative=negative, n_steps=n_steps
        )
        self.gated = gated
        self.decay = ScalarDecay(d_model, self.n_heads) if gated else None
        self.gate = Linear(d_model, self.d_value, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.decay is not None:
            self.decay.reset_parameters()

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: DeltaState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], DeltaState]:
        q, k, v, beta, history = self.heads(x, state, lengths)
        log_decay, others = None, self.n_steps - 1
        if self.decay is not None:  # decay before the first write of a step
            log_decay = self.decay(x, state.memory.dtype)
            log_decay = F.pad(keep_real(log_decay, lengths)[:, :, None], (0, 0, 0, others)).flatten(1, 2)
        q = F.pad(q[:, :, None], (0, 0, 0, 0, others, 0)).flatten(1, 2)  # read after the last
        o, memory = ops.delta_rule(q, k, v, beta, log_decay, state=state.memory)
        o = o[:, others :: self.n_steps]
        return self.out(self.norm(o, self.gate(x).unflatten(-1, o.shape[-2:])).flatten(-2)), DeltaState(history, memory)
