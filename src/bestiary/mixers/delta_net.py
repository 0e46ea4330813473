"""DeltaNet (Schlag et al. 2021, arXiv:2102.11174; Yang et al. 2024, arXiv:2406.06484).

q_t, k_t, v_t = silu(conv(W x))_t                     short convolutions; q, k scaled to unit length; split over heads
beta_t = sigmoid(W_beta x_t)                          how far what the key recalls is replaced
S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        the recurrence: ops.delta_rule
y_t = W_o RMSNorm(S_t^T q_t / sqrt(K))
"""

from jaxtyping import Float, Int
from torch import Tensor

from bestiary import ops
from bestiary.mixers import register
from bestiary.mixers.parts import DeltaMixer, DeltaState


@register("delta_net")
class DeltaNet(DeltaMixer):
    """Linear attention that replaces what it stored under a key, in place of adding to it.

    Args:
        d_model: width of input and output.
        n_heads: heads; by default of 64 channels (32 at small widths).
        conv_kernel: taps of the convolutions on q, k and v.
        negative: let beta reach 2, so that the state's eigenvalues reach -1 (arXiv:2411.12537).
    """

    gated = False

    def __init__(self, d_model: int, *, n_heads: int | None = None, conv_kernel: int = 4, negative: bool = False):
        super().__init__(
            d_model, n_heads=n_heads, d_key=d_model, d_value=d_model, conv_kernel=conv_kernel, negative=negative
        )
        self.reset_parameters()

    def mix(
        self, x: Float[Tensor, "batch time d_model"], state: DeltaState, lengths: Int[Tensor, " batch"] | None
    ) -> tuple[Float[Tensor, "batch time d_model"], DeltaState]:
        q, k, v, beta, history = self.heads(x, state, lengths)
        o, memory = ops.delta_rule(q, k, v, beta, state=state.memory)
        return self.out(self.norm(o).flatten(-2)), DeltaState(history, memory)
