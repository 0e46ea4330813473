"""A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538; Switch, Fedus et al. 2021, arXiv:2101.03961).

    p = softmax(W_r x)                          the router, in fp32 at least
    y = sum_{i in top k} w_i swiglu_i(x)        w: p of the chosen experts, scaled to sum to 1

No expert has a limit and no token is dropped, so what a token gets does not depend on its neighbours (and decoding is
the forward pass). In training, n sum_i f_i P_i (f: share of choices, P: mean of p; 1 where even) is added to the loss.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bestiary import ops
from bestiary.channel_mixers import register
from bestiary.errors import UsageError
from bestiary.mixers.base import Pointwise, keep_real, real_steps
from bestiary.mixers.context import Context
from bestiary.mixers.parts import Linear, gpt_init

LOAD, CAPACITY = "expert_load", "expert_capacity"


@register("moe")
class MixtureOfExperts(Pointwise):
    """Many SwiGLU networks, of which each token takes few.

    What the experts had to do is told in `context.measures`: "expert_load", the share of all choices that each got, and
    "expert_capacity", the capacity factor that a limit per expert would have needed (n_experts times the highest share;
    1 where even). A training run logs the latter.

    Args:
        d_model: width of input and output.
        n_experts: number of experts.
        top_k: experts that a token takes.
        d_hidden: inner width of an expert; by default swiglu's over top_k, so that a token costs the same.
        shared: further experts that every token takes.
        shared_gate: whether what these say is scaled by a number a token, sigmoid(w x) (Qwen's).
        balance: weight of the balance term in the training loss; 0 for none.
    """

    unpacked = ("router",)

    def __init__(
        self,
        d_model: int,
        *,
        n_experts: int = 8,
        top_k: int = 2,
        d_hidden: int | None = None,
        shared: int = 0,
        shared_gate: bool = False,
        balance: float = 0.01,
        residuals: int = 1,
    ):
        super().__init__(d_model)
        if shared_gate and not shared:
            raise UsageError("shared_gate is for shared experts, of which there are none: set shared as well")
        if not 1 <= top_k <= n_experts or shared < 0 or balance < 0:
            raise UsageError(
                f"top_k={top_k} must lie in 1..n_experts={n_experts}; shared={shared} and balance={balance} not below 0"
            )
        self.d_hidden = max(32, -(-8 * d_model // 3 // top_k // 32) * 32) if d_hidden is None else d_hidden
        if self.d_hidden < 1:
            raise UsageError(f"d_hidden must be at least 1, not {d_hidden}")
        self.n_experts, self.top_k, self.shared, self.balance, self.residuals = (
            n_experts,
            top_k,
            shared,
            balance,
            residuals,
        )
        self.router = Linear(d_model, n_experts, bias=False)
        self.shared_gate = Linear(d_model, 1, bias=False) if shared_gate else None
        self.gate_up = nn.Parameter(torch.empty(n_experts + shared, 2 * self.d_hidden, d_model))
        self.down = nn.Parameter(torch.empty(n_experts + shared, d_model, self.d_hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.router, self.shared_gate):
            if linear is not None:
                gpt_init(linear, self.d_model)
        std = 0.02 * (768 / self.d_model) ** 0.5
        nn.init.normal_(self.gate_up, std=std)
        nn.init.normal_(self.down, std=std / self.residuals**0.5)

    def mixing_flops(self, context: int) -> float:
        return 6.0 * (self.top_k + self.shared) * self.d_model * self.d_hidden

    def forward(
        self,
        x: Tensor,
        state: object = None,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context: Context | None = None,
    ) -> tuple[Tensor, object]:
        y, state = super().forward(x, state, lengths=lengths, cu_seqlens=cu_seqlens)
        if context is not None:
            real = keep_real(x, lengths)[real_steps(lengths, x.shape[1])] if lengths is not None else x.flatten(0, -2)
            self._report(real, context)
        return y, state

    def route(
        self, x: Float[Tensor, "tokens d_model"]
    ) -> tuple[Float[Tensor, "tokens n_experts"], Float[Tensor, "tokens top_k"], Int[Tensor, "tokens top_k"]]:
        """(probabilities, weights of the chosen experts, which they are)."""
        with ops.full_precision(x):  # a choice must not hang on the last bits
            exact = torch.promote_types(x.dtype, torch.float32)
            probabilities = F.linear(x.to(exact), self.router.weight.to(exact)).softmax(-1)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        return probabilities, weights / weights.sum(-1, keepdim=True), chosen

    def transform(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        flat = x.flatten(0, -2)
        _, weights, chosen = self.route(flat)
        y = torch.zeros_like(flat)
        for i in range(self.n_experts):
            token, place = (chosen == i).nonzero(as_tuple=True)
            if len(token):
                part = self._expert(i, flat[token]) * weights[token, place, None].to(flat.dtype)
                y = y.index_add(0, token, part.to(y.dtype))
        scale = 1.0 if self.shared_gate is None else torch.sigmoid(self.shared_gate(flat))
        for i in range(self.n_experts, self.n_experts + self.shared):
            y = y + scale * self._expert(i, flat)
        return y.reshape(x.shape)

    def _expert(self, i: int, x: Tensor) -> Tensor:
        gate, up = ops.linear(x, self.gate_up[i]).chunk(2, dim=-1)
        return ops.linear(F.silu(gate) * up, self.down[i])

    def _report(self, x: Float[Tensor, "tokens d_model"], context: Context) -> None:
        """Tell the load; in training, ask for balance."""
        if not len(x):
            return
        probabilities, _, chosen = self.route(x)
        load = torch.bincount(chosen.flatten(), minlength=self.n_experts) / chosen.numel()
        context.measures.setdefault(LOAD, []).append(load)
        context.measures.setdefault(CAPACITY, []).append(self.n_experts * load.max())
        if self.training and self.balance:
            even = self.n_experts * (load.to(probabilities.dtype) * probabilities.mean(0)).sum()
            context.losses.append(self.balance * even)
