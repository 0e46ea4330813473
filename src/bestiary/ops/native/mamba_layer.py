"""One step of a whole Mamba layer, norm and residual path included, in one call (csrc/mamba_layer.h)."""

import ctypes
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bestiary.ops.native.library import check_shapes, kernel, pointer
from bestiary.ops.native.matvec import PackedMatrix

_SIZES = ("width", "channels", "states", "rank", "taps")
_ADDRESSES = ("norm", "in_proj", "x_proj", "dt_proj", "out_proj", "conv", "conv_bias", "A", "D")


class _Layer(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int64) for name in _SIZES]
        + [("norm_eps", ctypes.c_float)]
        + [(name, ctypes.c_void_p) for name in _ADDRESSES]
    )


class Parts(NamedTuple):
    """What a layer is made of: packed matrices, the rest in fp32. Of the matrices, dt_proj alone has a bias."""

    in_proj: PackedMatrix
    x_proj: PackedMatrix
    dt_proj: PackedMatrix
    out_proj: PackedMatrix
    norm: Float[Tensor, " d_model"]
    conv: Float[Tensor, "channels taps"]
    conv_bias: Float[Tensor, " channels"]
    A: Float[Tensor, "channels d_state"]
    D: Float[Tensor, " channels"]


class MambaLayer:
    """A layer that can take a step: x + out_proj(scan(conv(in_proj(norm(x)))))."""

    def __init__(self, parts: Parts, norm_eps: float):
        address = ctypes.c_void_p
        self.call, self.parts = kernel("bestiary_mamba_layer"), parts
        self.call.argtypes = [address, ctypes.c_int64, *[address] * 6]
        channels, states = parts.A.shape
        self.shape, self.width, self.taps = (states, channels), parts.in_proj.shape[1], parts.conv.shape[1]
        self.kept = [parts.norm, parts.conv.t(), parts.conv_bias, parts.A.t(), parts.D]
        self.kept = [tensor.detach().to(torch.float32).contiguous() for tensor in self.kept]
        norm, conv, bias, A, D = (tensor.data_ptr() for tensor in self.kept)
        matrices = (ctypes.addressof(m.fields) for m in (parts.in_proj, parts.x_proj, parts.dt_proj, parts.out_proj))
        rank = parts.dt_proj.shape[1]
        sizes = (self.width, channels, states, rank, self.taps)
        self.fields = _Layer(*sizes, norm_eps, norm, *matrices, conv, bias, A, D)
        self.address = ctypes.byref(self.fields)

    def step(
        self,
        x: Float[Tensor, "batch d_model"],
        history: Float[Tensor, "batch taps_minus_1 channels"],
        h: Float[Tensor, "batch channels d_state"],
    ) -> tuple[
        Float[Tensor, "batch d_model"],
        Float[Tensor, "batch taps_minus_1 channels"],
        Float[Tensor, "batch channels d_state"],
    ]:
        """(output, history, h) after one step of every row, in fp32. h lies channel by channel inside: a view."""
        states, channels = self.shape
        named = (("x", x, (len(x), self.width)), ("history", history, (len(x), self.taps - 1, channels)))
        check_shapes("a Mamba layer", *named, ("h", h, (len(x), channels, states)))
        x, history, turned = x.contiguous(), history.contiguous(), h.transpose(1, 2).contiguous()
        y, kept, new = torch.empty_like(x), torch.empty_like(history), torch.empty_like(turned)
        given = (pointer(x), pointer(history), pointer(turned))
        self.call(self.address, len(x), *given, y.data_ptr(), kept.data_ptr(), new.data_ptr())
        return y, kept, new.transpose(1, 2)
