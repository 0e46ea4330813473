"""Ops as compiled kernels for the CPU (the sources are in csrc/), registered as operators of torch.

Each computes what its definition in bestiary.ops says, in fp32; where the kernels cannot be used, nothing here is.
"""

from bestiary.ops.native.library import load, refuses

__all__ = ["load", "refuses"]
