"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), the half-split layout of GPT-NeoX and Llama.

(x_i, x_{i+d/2}) <- rotation by position * base^(-2i/d) of that pair         i < d/2
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bestiary.errors import UsageError
from bestiary.ops import dispatch
from bestiary.ops.native import traced


def rotate(
    x: Float[Tensor, "batch time heads head_dim"],
    position: Int[Tensor, "batch time"],
    *,
    base: float = 10000.0,
    dims: int | None = None,
    stretch: float = 1.0,
) -> Float[Tensor, "batch time heads head_dim"]:
    """Turn pairs of channels by angles that grow with the position, so that q.k depends on their distance alone.

    Args:
        base: the slowest pair turns once in about 2 pi base steps.
        dims: turn the first `dims` channels of each head only (even); None for all.
        stretch: what positions are divided by (position interpolation, arXiv:2306.15595).
    """
    dims = x.shape[-1] if dims is None else dims
    if dims % 2 or not 0 <= dims <= x.shape[-1]:
        raise UsageError(f"dims must be even and at most the head dimension {x.shape[-1]}, not {dims}")
    if traced.active():
        return torch.ops.bestiary.turn(x, position, base, dims, stretch)
    exact = _exact(x)
    speed = base ** -(torch.arange(0, dims, 2, dtype=exact, device=x.device) / max(dims, 1))
    angle = position[..., None, None].to(exact) / stretch * speed
    dtype = dispatch.wide(x.dtype)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    first, second, rest = x.to(dtype).split([dims // 2, dims // 2, x.shape[-1] - dims], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)


def positions(start: Int[Tensor, " batch"], time: int) -> Int[Tensor, "batch time"]:
    """The positions of the next `time` steps of rows that have seen `start` steps each."""
    first = start[:, None]
    return first if time == 1 else first + torch.arange(time, device=start.device)


def sum_angles(
    start: Float[Tensor, "batch *angles"], turns: Float[Tensor, "batch time *angles"]
) -> Float[Tensor, "batch time *angles"]:
    """Angles that add up, modulo 2 pi: start + turns_1 + ... + turns_t, in the dtype of `start`."""
    if traced.active():
        return torch.ops.bestiary.sum_angles(start, turns)
    total = (turns.to(_exact(turns)) % (2 * math.pi)).cumsum(1)
    return ((start[:, None] + total) % (2 * math.pi)).to(start.dtype)


def rotate_pairs(
    x: Float[Tensor, "batch time heads head_dim"], angle: Float[Tensor, "batch time heads angles"]
) -> Float[Tensor, "batch time heads head_dim"]:
    """Turn neighbouring channels (0, 1), (2, 3), ... by an angle each; channels after those stay as they are."""
    pairs, rest = x.split([2 * angle.shape[-1], x.shape[-1] - 2 * angle.shape[-1]], dim=-1)
    first, second = pairs.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
    return torch.cat([turned, rest], dim=-1)


def _exact(x: Tensor) -> torch.dtype:
    """The dtype of angles before they are reduced: in fp32 one of a million radians would be off by 0.06."""
    return torch.float32 if x.device.type == "mps" else torch.float64
