"""Hyena turned into a recurrence: each filter fitted by a few poles, for a state of constant size (arXiv:2310.18780).

    h_l ~ Re sum_n R_n lambda_n^l,   l = 1 ... l_max - 1          |lambda_n| < 1

Lag 0 is kept as it is, in the skip D. So `hyena` becomes `striped_hyena{n_heads=1}`, with the projections and the short
filter moved over: a mixer like any other, to be saved, to be trained on, to stand in layouts.

No filter need be a recurrence: the fit (modal_fit.py) is lossy in general, and a bad one is refused. The alternative is
exact and costs nothing but time and memory: Hyena's own decoding. Beyond l_max, where Hyena's filter ends, the
recurrence's goes on; `Fit.tail` tells by how much.
"""

import copy
from dataclasses import dataclass, replace
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor

from bestiary.errors import UsageError, unknown
from bestiary.mixers.hyena import Hyena
from bestiary.mixers.striped_hyena import StripedHyena
from bestiary.models.language_model import LanguageModel
from bestiary.models.layout import Part, spell
from bestiary.models.modal_fit import METHODS, combine, fit_modes, norm_from

HIGHEST_ORDER = 256
"""The highest order that is tried when a fit is refused: beyond, the online convolution is cheaper."""


@dataclass(frozen=True, eq=False)
class Fit:
    """How well a recurrence stands for the filters of one layer.

    Args:
        name: of the layer.
        order: poles of each channel, conjugates counted.
        d_state: complex numbers of each channel's state, one for a pair of conjugates.
        errors: relative l2 error of each channel's taps, lags 1 ... l_max - 1, of the weights as they are stored.
        largest_pole: in modulus.
        tail: norm of the recurrence's taps from l_max on over that of the filter, in the worst channel.
    """

    name: str
    order: int
    d_state: int
    errors: Float[Tensor, " channels"]
    largest_pole: float
    tail: float

    @property
    def median(self) -> float:
        """Relative error of the median channel."""
        return self.errors.median().item()

    @property
    def worst(self) -> float:
        """Relative error of the worst channel."""
        return self.errors.max().item()

    def __str__(self) -> str:
        return (
            f"{self.name}: order {self.order} ({self.d_state} complex numbers a channel) leaves a relative error of "
            f"{self.median:.2g} in the median channel and {self.worst:.2g} in the worst; poles up to "
            f"{self.largest_pole:.6f}; beyond l_max {self.tail:.2g}"
        )


@overload
def distill(
    part: LanguageModel,
    *,
    order: int = ...,
    method: str = ...,
    tolerance: float = ...,
    force: bool = ...,
) -> tuple[LanguageModel, list[Fit]]: ...
@overload
def distill(
    part: Hyena,
    *,
    order: int = ...,
    method: str = ...,
    tolerance: float = ...,
    force: bool = ...,
) -> tuple[StripedHyena, list[Fit]]: ...
def distill(
    part: LanguageModel | Hyena,
    *,
    order: int = 64,
    method: str = "hankel",
    tolerance: float = 0.05,
    force: bool = False,
) -> tuple[LanguageModel | StripedHyena, list[Fit]]:
    """A copy of a model (or mixer) in which recurrences stand for Hyena's filters, and how well they do, a Fit a layer.

    Args:
        part: a model with `hyena` layers, or a Hyena mixer.
        order: poles of each channel, conjugates counted; at most half of l_max.
        method: "hankel", or "gradient" to descend on the squared error from there.
        tolerance: largest relative error of a channel's taps.
        force: take a worse fit, too.

    Raises:
        UsageError: there is nothing to distill, an argument is wrong, or a fit is worse than the tolerance; the message
            names the layer, its error, and an order that would do.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if not tolerance > 0:
        raise UsageError(f"tolerance must be positive, not {tolerance}")
    part = copy.deepcopy(part)
    if isinstance(part, Hyena):
        mixer, fit = _recurrent(part, "the mixer", order, method)
        found = [(part, fit)]
        distilled: LanguageModel | StripedHyena = mixer
    else:
        distilled, found = _replace_all(part, order, method)
    worst = max(found, key=lambda pair: pair[1].worst)
    if not worst[1].worst <= tolerance and not force:
        raise _refusal(*worst, tolerance)
    return distilled, [fit for _, fit in found]


def _replace_all(model: LanguageModel, order: int, method: str) -> tuple[LanguageModel, list[tuple[Hyena, Fit]]]:
    """Replace each Hyena of a model, in place; what was replaced, and the fits."""
    found: list[tuple[Hyena, Fit]] = []
    layers, parts_of = [], {}
    for number, (block, layer) in enumerate(zip(model.blocks, model.config.layers), start=1):
        if id(block) not in parts_of:  # layers that share weights share a block
            parts = list(layer.parts)
            for path, mixer in [(path, part) for path, part in block.named_modules() if isinstance(part, Hyena)]:
                recurrent, fit = _recurrent(mixer, f"layer {number}", order, method)
                found.append((mixer, fit))
                block.set_submodule(path, recurrent)
                place = 0 if path == "mixer" else int(path.rpartition(".")[2])  # of mixers side by side
                options = {"d_state": fit.d_state, "n_heads": 1, "conv_kernel": mixer.conv.weight.shape[1]}
                parts[place] = Part("striped_hyena", options)
            parts_of[id(block)] = tuple(parts)
        layers.append(replace(layer, parts=parts_of[id(block)]))
    if not found:
        raise UsageError(f"there is no hyena layer to distill: the layout is {model.config.layout!r}")
    model.config = replace(model.config, layout=spell(layers))
    return model, found


@torch.no_grad()
def _recurrent(hyena: Hyena, name: str, order: int, method: str) -> tuple[StripedHyena, Fit]:
    """The recurrence that stands for a Hyena; takes over its projections and its short filter."""
    most = (hyena.l_max - 1) // 2
    if not 1 <= order <= most:
        raise UsageError(f"order must lie in 1..{most}, half of {name}'s l_max={hyena.l_max}, not {order}")
    taps = _taps(hyena)
    if not taps.isfinite().all():
        raise UsageError(f"the filter of {name} is not finite: nothing can be fitted to it")
    poles, residues = fit_modes(taps[:, 1:], order, method=method)
    with torch.random.fork_rng(devices=[]):
        mixer = StripedHyena(
            hyena.d_model,
            d_state=poles.shape[1],
            n_heads=1,
            conv_kernel=hyena.conv.weight.shape[1],
            residuals=hyena.residuals,
        )
    mixer.in_proj, mixer.conv, mixer.out_proj = hyena.in_proj, hyena.conv, hyena.out_proj
    filter = mixer.filter.to(hyena.beta)
    lag_1 = torch.where(poles == 0, 0, residues / torch.where(poles == 0, 1, poles))  # so that lag l has lambda^l
    filter.load_modes(poles, lag_1)
    fitted = filter.taps(hyena.l_max, torch.float64).cpu()
    filter.D.copy_(hyena.beta.double().cpu() + taps[:, 0] - fitted[:, 0])
    scale = taps[:, 1:].norm(dim=1).clamp(min=1e-300)
    stored, readout = (x.cpu() for x in filter.system(torch.float64))
    fit = Fit(
        name,
        order,
        poles.shape[1],
        (fitted - taps)[:, 1:].norm(dim=1) / scale,
        stored.abs().max().item(),
        (norm_from(stored, readout, hyena.l_max) / scale).max().item(),
    )
    return mixer.train(hyena.training), fit


def _taps(hyena: Hyena) -> Float[Tensor, "channels l_max"]:
    """All taps of Hyena's filter, in float64."""
    return hyena.filter(hyena.l_max, torch.float64).detach().cpu()


def _refusal(hyena: Hyena, fit: Fit, tolerance: float) -> UsageError:
    """The error for a fit that is too bad, with the order that would do for its worst channels."""
    some = _taps(hyena)[fit.errors.argsort(descending=True)[:8], 1:]
    order, advice = fit.order, ""
    while not advice and order < min(HIGHEST_ORDER, some.shape[1] // 2):
        order = min(2 * order, HIGHEST_ORDER, some.shape[1] // 2)
        poles, residues = fit_modes(some, order)
        if ((combine(poles, residues, some.shape[1]) - some).norm(dim=1) <= tolerance * some.norm(dim=1)).all():
            advice = f"order {order} does for its worst channels"
    advice = advice or f"no order up to {order} does, so that the filter is best kept: Hyena decodes exactly as it is"
    return UsageError(f"{fit}. The tolerance is {tolerance:g}; {advice}. force=True takes the fit as it is")
