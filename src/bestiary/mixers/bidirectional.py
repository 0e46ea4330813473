"""Any causal mixer made bidirectional: one reads each row forward, one reads it backward, and both are joined.

f = mixer_1(x),    b = reverse(mixer_2(reverse(x)))         reverse: each row within its own length
y = f + b                 join=sum, as in Vision Mamba (Zhu et al. 2024, arXiv:2401.09417)
y = (f + b) / 2           join=average
y = W [f; b] + c          join=concat, as in bidirectional LSTMs (Graves, Schmidhuber 2005)

With tied=true both directions have the same weights, as in Caduceus (Schiff et al. 2024, arXiv:2403.03234): half the
parameters, and reversing the sequence reverses the output.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bestiary import mixers, state
from bestiary.errors import UsageError, unknown
from bestiary.mixers import register
from bestiary.mixers.base import Mixer, NonCausal
from bestiary.mixers.context import Context
from bestiary.mixers.parts import Linear, gpt_init

JOINS = ("sum", "average", "concat")


@register("bidirectional")
class Bidirectional(NonCausal):
    """A causal mixer run both ways over whole sequences; takes that mixer's options beside its own.

    Args:
        d_model: width of input and output.
        mixer: name of the causal mixer; further options are this mixer's.
        tied: whether both directions have the same weights.
        join: how the directions come together: "sum", "average", or "concat" and a linear map.
    """

    wraps = "mixer"

    def __init__(
        self,
        d_model: int,
        *,
        mixer: str = "mamba",
        tied: bool = False,
        join: str = "sum",
        layer_index: int = 0,
        n_layers: int = 1,
        residuals: int = 1,
        **options: Any,
    ):
        super().__init__(d_model)
        if not mixers.get(str(mixer)).causal:
            raise UsageError(f"mixer={mixer} is bidirectional already: use it as it is, or give a causal one")
        if join not in JOINS:
            raise unknown("join", str(join), JOINS)
        self.join, self.residuals = join, residuals
        # what writes into the residual path is scaled by how many do: in a sum both directions do
        writers = {"sum": 2 * residuals, "average": residuals, "concat": 1}[join]
        place = {"layer_index": layer_index, "n_layers": n_layers, "residuals": writers}
        self.ahead: Mixer = mixers.build(mixer, d_model, **place, **options)
        self.back: Mixer | None = None if tied else mixers.build(mixer, d_model, **place, **options)
        self.out = Linear(2 * d_model, d_model) if join == "concat" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for direction in (self.ahead, self.back):
            if direction is not None:
                direction.reset_parameters()
        if self.out is not None:
            gpt_init(self.out, 2 * self.d_model, residuals=self.residuals)

    def mixing_flops(self, context: int) -> float:
        return 2 * self.ahead.mixing_flops(context)

    def flops_per_token(self, context: int) -> float:
        joining = 0 if self.out is None else 2 * self.out.weight.numel()
        return 2 * self.ahead.flops_per_token(context) + joining

    def mix_in_context(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: state.Empty,
        lengths: Int[Tensor, " batch"] | None,
        context: Context,
    ) -> tuple[Float[Tensor, "batch time d_model"], state.Empty]:
        f, _ = self.ahead(x, lengths=lengths, context=context)
        back = self.ahead if self.back is None else self.back
        b, _ = back(reverse(x, lengths), lengths=lengths, context=read_backward(context, lengths))
        b = reverse(b, lengths)
        if self.out is not None:
            return self.out(torch.cat([f, b], dim=-1)), state
        return (f + b if self.join == "sum" else (f + b) / 2), state


def reverse(
    x: Float[Tensor, "batch time *rest"], lengths: Int[Tensor, " batch"] | None
) -> Float[Tensor, "batch time *rest"]:
    """Each row's real steps in reverse order; padding stays where it is."""
    if lengths is None:
        return x.flip(1)
    step = torch.arange(x.shape[1], device=x.device)
    source = torch.where(step < lengths[:, None], lengths[:, None] - 1 - step, step)
    return x[torch.arange(x.shape[0], device=x.device)[:, None], source]


def read_backward(context: Context, lengths: Int[Tensor, " batch"] | None) -> Context:
    """What the parts share, as one that reads backward meets it; losses and measures stay shared."""
    embeddings, intervals, v_first = (
        None if x is None else reverse(x, lengths) for x in (context.embeddings, context.intervals, context.v_first)
    )
    if intervals is not None:  # the time before a step is, read backward, the time after it; before the last it is 1
        intervals = torch.cat([torch.ones_like(intervals[:, :1]), intervals[:, :-1]], dim=1)
    return replace(context, embeddings=embeddings, intervals=intervals, v_first=v_first)
