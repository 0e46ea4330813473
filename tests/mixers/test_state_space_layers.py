"""S4, S4D and H3 as plain loops over their equations in complex numbers, all conjugate pairs written out."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bestiary import mixers
from bestiary.mixers.base import Mixer

D, N, TIME = 32, 8, 25


def restless(name: str, **options: int | str) -> Mixer:
    """A mixer whose parameters are larger than drawn, so that every term counts."""
    mixer = mixers.build(name, D, d_state=N, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


def pairs(half: Tensor) -> Tensor:
    """Both numbers of each conjugate pair."""
    return torch.cat([half, half.conj()], dim=-1)


def eigenvalues(part: torch.nn.Module) -> Tensor:
    return pairs(-part.log_A_real.exp() + 1j * part.A_imag)


def run(A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor, u: Tensor) -> Tensor:
    """y_t = C h_t + D u_t, h_t = A_bar h_{t-1} + B_bar u_t; A_bar (channels, N, N), u (time, channels)."""
    h, y = torch.zeros_like(B_bar), []
    for step in u:
        h = torch.einsum("cnm,cm->cn", A_bar, h) + B_bar * step[:, None]
        y.append((C * h).sum(-1))
    y = torch.stack(y)
    assert y.imag.abs().max() < 1e-9  # a real system
    return y.real + D * u


def gated(mixer: Mixer, y: Tensor) -> Tensor:
    a, b = F.linear(F.gelu(y), mixer.out.weight, mixer.out.bias).chunk(2, dim=-1)
    return a * torch.sigmoid(b)


def test_s4_is_the_bilinear_rule_of_diagonal_minus_low_rank() -> None:
    mixer, x = restless("s4"), torch.randn(TIME, D).double()
    with torch.no_grad():
        P, B, C = (pairs(torch.view_as_complex(z.detach().contiguous())) for z in (mixer.P, mixer.B, mixer.C))
        A = torch.diag_embed(eigenvalues(mixer)) - P[:, :, None] * P.conj()[:, None]
        dt, one = mixer.log_dt.exp()[:, None, None], torch.eye(N)
        inverse = torch.linalg.inv(one - dt / 2 * A)
        y = run(inverse @ (one + dt / 2 * A), (inverse @ (dt * B[..., None]))[..., 0], C, mixer.D, x)
        torch.testing.assert_close(mixer(x[None])[0][0], gated(mixer, y), rtol=0, atol=1e-11)


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_s4d_is_a_diagonal_system_a_channel(rule: str) -> None:
    mixer, x = restless("s4d", rule=rule), torch.randn(TIME, D).double()
    with torch.no_grad():
        y = run(*diagonal(mixer.ssm, rule), mixer.ssm.D, x)
        torch.testing.assert_close(mixer(x[None])[0][0], gated(mixer, y), rtol=0, atol=1e-11)


def diagonal(part: torch.nn.Module, rule: str) -> tuple[Tensor, Tensor, Tensor]:
    A, dt = eigenvalues(part), part.log_dt.exp()[:, None]
    if rule == "zoh":
        A_bar = torch.exp(dt * A)
        B_bar = (A_bar - 1) / A
    else:
        A_bar = (1 + dt * A / 2) / (1 - dt * A / 2)
        B_bar = dt / (1 - dt * A / 2)
    return torch.diag_embed(A_bar), B_bar, pairs(torch.view_as_complex(part.C.detach().contiguous()))


@pytest.mark.parametrize("head_dim", [1, 4])
def test_h3_shifts_multiplies_remembers_and_reads(head_dim: int) -> None:
    mixer, x, heads = restless("h3", head_dim=head_dim), torch.randn(TIME, D).double(), D // head_dim
    with torch.no_grad():
        q, k, v = F.linear(x, mixer.qkv.weight, mixer.qkv.bias).chunk(3, dim=-1)
        register, shifted = torch.zeros(N, D).double(), []
        for step in k:  # the register holds the newest key first
            register = torch.cat([step[None], register[:-1]])
            shifted.append((mixer.shift.T.flip(0) * register).sum(0) + mixer.shift_D * step)
        q, k, v = (z.reshape(TIME, heads, head_dim) for z in (q, torch.stack(shifted), v))
        y, system = torch.zeros(TIME, heads, head_dim).double(), diagonal(mixer.ssm, "bilinear")
        for i in range(head_dim):
            for j in range(head_dim):
                y[:, :, j] += q[:, :, i] * run(*system, mixer.ssm.D, k[:, :, i] * v[:, :, j])
        wanted = F.linear(y.flatten(1), mixer.out.weight, mixer.out.bias)
    torch.testing.assert_close(mixer(x[None])[0][0], wanted, rtol=0, atol=1e-10 * math.ceil(wanted.abs().max()))
