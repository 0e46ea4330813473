"""A filter as a sum of decaying oscillations: poles and residues by the Hankel matrix, refined by descent.

    h_l ~ Re sum_n R_n lambda_n^l,   l = 0, 1, ...                 |lambda_n| < 1

A filter of n poles has a Hankel matrix H_ij = h_{i+j} of rank n (Ho and Kalman 1966; Kung 1978). Keeping the n
largest of its eigenvalues is balanced truncation; in the basis of their eigenvectors, the shifted matrix h_{1+i+j} has
the poles as eigenvalues. Residues are the least-squares fit to all taps. Levenberg-Marquardt steps on the squared error
can follow. All in float64 on the CPU; the eigenvectors come from a few products with the matrix, by FFT.
"""

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn import functional as F

from bestiary.ops.fft_convolution import convolve
from bestiary.ops.ssm import powers

METHODS = ("hankel", "gradient")
SMALLEST_POLE = 0.01
"""In modulus; what is shorter-lived than that, a single tap, is fitted by such a pole."""
SWEEPS = 3
"""Products with the Hankel matrix that find its leading eigenvectors."""
REFINEMENTS = 40
"""Steps of the descent."""


def fit_modes(
    taps: Float[Tensor, "channels lags"], order: int, *, method: str = "hankel"
) -> tuple[Complex[Tensor, "channels d_state"], Complex[Tensor, "channels d_state"]]:
    """Poles and residues with taps_l ~ Re sum_n R_n lambda_n^l, l = 0 ... lags - 1; each channel by itself.

    Of conjugate pairs one pole is kept, its residue doubled; d_state is what the channel with most needs, others have
    poles and residues of 0 in the rest.

    Args:
        taps: float64.
        order: poles, conjugates counted; at most half the lags.
        method: "hankel" or "gradient".
    """
    lags = taps.shape[1]
    radius = 1 - min(1e-4, 0.1 / lags)
    poles, residues = [], []
    for h in taps.split(max(1, 2**22 // (lags * order))):
        p = _upper_half(_hankel_poles(h, order), radius)
        r = _residues(p, h)
        if method == "gradient":
            p, r = _descend(p, r, h, radius)
        poles.append(p)
        residues.append(r)
    most = max(p.shape[1] for p in poles)
    found = [torch.cat([F.pad(x, (0, most - x.shape[1])) for x in parts]) for parts in (poles, residues)]
    return found[0], found[1]


def _hankel_poles(h: Float[Tensor, "channels lags"], order: int) -> Complex[Tensor, "channels order"]:
    """Eigenvalues of the shift in the basis of the Hankel matrix's `order` leading eigenvectors."""
    size = h.shape[1] // 2
    block = min(size, 2 * order + 16)  # wider than the order, so that the leading ones converge quickly

    def product(x: Float[Tensor, "channels size block"], shift: int) -> Float[Tensor, "channels size block"]:
        """The matrix h_{shift+i+j} times x, by FFT."""
        reversed_ = F.pad(x.flip(1), (0, 0, 0, size - 1)).permute(2, 1, 0)
        return convolve(reversed_, h[:, shift : shift + 2 * size - 1], size - 1).permute(2, 1, 0)

    basis = torch.randn(size, block, dtype=h.dtype, generator=torch.Generator().manual_seed(0)).expand(len(h), -1, -1)
    for _ in range(SWEEPS):
        basis = torch.linalg.qr(product(basis, 0)).Q
    small = basis.mT @ product(basis, 0)
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    leading = values.abs().argsort(dim=1, descending=True)[:, :order]
    values = values.gather(1, leading)
    basis = basis @ vectors.gather(2, leading[:, None].expand(-1, block, -1))
    weight = values.abs()
    real = weight > 1e-13 * weight.amax(1, keepdim=True)  # the rest is rounding: the filter has fewer poles
    root = torch.where(real, torch.where(real, weight, 1).rsqrt(), 0)
    shifted = root[:, :, None] * (basis.mT @ product(basis, 1)) * (values.sign() * root)[:, None]
    return torch.linalg.eigvals(shifted)


def _upper_half(poles: Complex[Tensor, "channels order"], radius: float) -> Complex[Tensor, "channels d_state"]:
    """One of each pair of conjugates and all real poles, moved inside the circle; 0 where a channel has fewer."""
    size = poles.abs()
    kept = (poles.imag >= 0) & (size > 1e-9)
    poles = torch.where(kept, poles / size.clamp(min=1e-9) * size.clamp(SMALLEST_POLE, radius), 0)
    first = kept.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return poles.gather(1, first[:, : max(1, int(kept.sum(1).max()))])


def _basis(poles: Complex[Tensor, "channels d_state"], lags: int) -> Complex[Tensor, "channels lags d_state"]:
    """Powers of the poles; nothing where there is none."""
    return torch.where((poles == 0)[:, None], 0, powers(poles, lags).mT)


def combine(poles: Tensor, residues: Tensor, lags: int) -> Float[Tensor, "channels lags"]:
    """The first taps of the filters with these poles and residues."""
    return (_basis(poles, lags) @ residues[..., None])[..., 0].real


def _residues(
    poles: Complex[Tensor, "channels d_state"], h: Float[Tensor, "channels lags"]
) -> Complex[Tensor, "channels d_state"]:
    """The least-squares residues, the smallest where several are as good."""
    basis = _basis(poles, h.shape[1])
    columns = torch.cat([basis.real, -basis.imag], dim=-1)
    found = torch.linalg.lstsq(columns, h[..., None], rcond=1e-13, driver="gelsd").solution[..., 0]
    return torch.complex(*found.chunk(2, dim=-1))


def _descend(
    poles: Complex[Tensor, "channels d_state"],
    residues: Complex[Tensor, "channels d_state"],
    h: Float[Tensor, "channels lags"],
    radius: float,
) -> tuple[Complex[Tensor, "channels d_state"], Complex[Tensor, "channels d_state"]]:
    """Levenberg-Marquardt steps on log-poles and residues; a channel takes those that make its error smaller."""
    lags = h.shape[1]
    lag = torch.arange(lags, dtype=h.dtype)[:, None]
    best = (combine(poles, residues, lags) - h).norm(dim=1)
    damping = torch.full_like(best, 1e-3)
    for _ in range(REFINEMENTS):
        basis = _basis(poles, lags)
        slope = lag * residues[:, None] * basis  # with respect to the log-pole
        columns = torch.cat([slope.real, -slope.imag, basis.real, -basis.imag], dim=-1)
        normal = columns.mT @ columns
        diagonal = normal.diagonal(dim1=1, dim2=2)
        ridge = damping[:, None] * diagonal + 1e-12 * diagonal.amax(1, keepdim=True).clamp(min=1e-200)
        downhill = columns.mT @ (h - combine(poles, residues, lags))[..., None]
        step = torch.linalg.solve(normal + torch.diag_embed(ridge), downhill)[..., 0]
        a, b, real, imag = step.chunk(4, dim=-1)
        size = (poles.abs().clamp(min=1e-300).log() + a).clamp(math.log(SMALLEST_POLE), math.log(radius)).exp()
        moved = torch.where(poles == 0, 0, torch.polar(size, poles.angle() + b))
        changed = residues + torch.complex(real, imag)
        error = (combine(moved, changed, lags) - h).norm(dim=1)
        better = error < best
        poles, residues = (torch.where(better[:, None], *pair) for pair in ((moved, poles), (changed, residues)))
        best = torch.where(better, error, best)
        damping = torch.where(better, damping / 3, damping * 4).clamp(1e-12, 1e6)
    return poles, residues


def norm_from(
    poles: Complex[Tensor, "channels d_state"], residues: Complex[Tensor, "channels d_state"], lag: int
) -> Float[Tensor, " channels"]:
    """The norm of all taps Re sum_n R_n lambda_n^l with l >= lag, as geometric series."""
    reached = residues * torch.exp(lag * poles.log())
    total = torch.zeros(len(poles), dtype=residues.real.dtype)
    for other, pole in ((reached, poles), (reached.conj(), poles.conj())):
        pairs = reached[:, :, None] * other[:, None] / (1 - poles[:, :, None] * pole[:, None])
        total = total + pairs.sum((1, 2)).real / 2
    return total.clamp(min=0).sqrt()
