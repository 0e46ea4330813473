"""Hyena: with trivial filters it is a gate, and it decodes exactly beyond the reach of its filter."""

import pytest
import torch
from torch.nn import functional as F

from bestiary import mixers, state
from bestiary.mixers.hyena import Hyena

D = 32


def hyena(l_max: int = 64) -> Hyena:
    return mixers.build("hyena", D, l_max=l_max).double()


def test_with_delta_filters_hyena_is_a_gate() -> None:
    """h = (1, 0, 0, ...) and a short filter of one tap: y = W_out ((1 + beta) x0 x1 v)."""
    mixer = hyena()
    mixer.filter.taps = lambda lags, dtype: F.pad(torch.ones(D, 1, dtype=dtype), (0, lags - 1))  # type: ignore[method-assign]
    with torch.no_grad():
        mixer.conv.weight.zero_()[:, -1] = 1
        mixer.conv.bias.zero_()
        x = torch.randn(2, 90, D, dtype=torch.float64)
        x0, x1, v = mixer.in_proj(x).chunk(3, dim=-1)
        wanted = mixer.out_proj((1 + mixer.beta) * x0 * x1 * v)
        torch.testing.assert_close(mixer(x)[0], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prompt", [0, 1, 2, 3, 40, 100])
def test_decoding_is_exact_at_every_length_and_beyond_l_max(prompt: int) -> None:
    """Online tiles, window after window, until the ring of inputs has gone round three times."""
    mixer, time = hyena(l_max=50), 230
    with torch.no_grad():
        for parameter in mixer.filter.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # a filter that says something
        x = torch.randn(2, time, D, dtype=torch.float64)
        whole, _ = mixer(x)
        first, past = mixer(x[:, :prompt])
        parts = [first]
        past = state.fork(past)
        with state.in_place():
            for t in range(prompt, time):
                y, past = mixer.step(x[:, t], past)
                parts.append(y[:, None])
    assert mixer.filter.taps(50, torch.float64)[:, 1:].abs().mean() > 0.01
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-11 * whole.abs().max().item())
    assert state.nbytes(past) == 2 * (D * (2 * 3 + 2 * 64) * 8 + 3 * 8)
