"""Matrices packed for products with few rows, in fp32, bf16, int8 or int4 (csrc/matvec.h)."""

import ctypes

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bestiary.errors import UsageError, unknown
from bestiary.ops.native import memory, traced
from bestiary.ops.native.library import buffer, check_shapes, load, pointer

FORMATS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
"""int8: symmetric, a scale an output; int4: symmetric, a scale in bf16 for each 32 inputs of an output."""
PANEL = 16
MANY_ROWS = 16
"""Rows from which on a product goes by blocks; a matrix in bf16 may round its inputs then."""
FEW_ROWS = 32
"""So many rows at most a step of decoding has in one program."""


class _Matrix(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("outputs", "inputs", "format")] + [
        (name, ctypes.c_void_p) for name in ("data", "scales", "bias")
    ]


def _library() -> ctypes.CDLL:
    library, why = load()
    if library is None:
        raise UsageError(f"packed weights need the compiled kernels: {why}")
    return library


def rounds_inputs() -> bool:
    """Whether this processor multiplies many rows with a matrix in bf16 by rounding them to bf16 too."""
    return bool(_library().bestiary_rounds_inputs())


class PackedMatrix:
    """A matrix (outputs, inputs) that was packed once.

    Args:
        weight: of any floating-point type, on the CPU.
        form: one of FORMATS.
        bias: added to each product; None for none.
    """

    def __init__(
        self, weight: Float[Tensor, "outputs inputs"], form: str, bias: Float[Tensor, " outputs"] | None = None
    ):
        if form not in FORMATS:
            raise unknown("format of packed weights", form, FORMATS)
        self.library, self.form, self.shape = _library(), form, tuple(weight.shape)
        check_shapes("a packed matrix", ("its bias", bias, self.shape[:1]))
        weight = weight.detach().to(torch.float32).contiguous()
        size = self.library.bestiary_pack_bytes(FORMATS[form], *self.shape)
        self.data = memory.weights(size)
        self.scales = buffer(-(-self.shape[0] // PANEL) * PANEL if form == "int8" else 0)
        self.bias = None if bias is None else bias.detach().to(torch.float32, copy=True).contiguous()
        self.fields = _Matrix(
            *self.shape, FORMATS[form], self.data.data_ptr(), pointer(self.scales), pointer(self.bias)
        )
        self._address = ctypes.byref(self.fields)
        self.library.bestiary_pack(self._address, pointer(weight), self.data.data_ptr(), pointer(self.scales))

    def rounds(self, rows: int) -> bool:
        """Whether a product with so many rows rounds these to bf16."""
        return self.form == "bf16" and rows >= MANY_ROWS and rounds_inputs()

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.data.nbytes + self.scales.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def rows(self, first: int, count: int) -> Float[Tensor, "count inputs"]:
        """The weights of some outputs as numbers again."""
        if not 0 <= first <= first + count <= self.shape[0]:
            raise UsageError(f"rows {first}..{first + count} are not among the {self.shape[0]} of this matrix")
        weight = buffer(count, self.shape[1])
        self.library.bestiary_unpack(self._address, first, count, weight.data_ptr())
        return weight

    def gather(self, which: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch inputs"]:
        """The weights of any outputs as numbers again."""
        if which.dtype not in (torch.int64, torch.int32):
            raise UsageError(f"rows are named by whole numbers, not by {which.dtype}")
        flat = which.to(torch.int64).contiguous().view(-1)
        for row in (int(flat.min()), int(flat.max())) if len(flat) else ():
            if not 0 <= row < self.shape[0]:
                raise UsageError(f"row {row} is not among the {self.shape[0]} of this matrix")
        weight = buffer(len(flat), self.shape[1])
        self.library.bestiary_gather(self._address, len(flat), pointer(flat), weight.data_ptr())
        return weight.view(*which.shape, self.shape[1])

    def multiply(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """x W^T + b, x and sums in fp32; for bf16 and 16 rows or more, x may be rounded too (`rounds_inputs`)."""
        if traced.active():
            return traced.product(x, self)
        flat = x.reshape(-1, self.shape[1]).to(torch.float32)
        flat = flat if flat.stride(-1) == 1 else flat.contiguous()
        y = buffer(len(flat), self.shape[0])
        self.library.bestiary_multiply(
            self._address, len(flat), flat.data_ptr(), flat.stride(0), y.data_ptr(), self.shape[0]
        )
        return y.reshape(*x.shape[:-1], self.shape[0])
