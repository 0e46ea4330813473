"""Decoding in one native call a token: a model's own step, traced and lowered to instructions (csrc/program.h)."""

from bestiary.decoding import memories, pointwise  # they register themselves
from bestiary.decoding.decoder import Decoder

__all__ = ["Decoder", "memories", "pointwise"]
