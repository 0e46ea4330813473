"""The seven recurrences as pure functions; each file gives the equation, its definition, and a fast form."""

from bestiary.ops.attention import KVCache, attention, empty_cache
from bestiary.ops.delta_rule import delta_rule, dplr
from bestiary.ops.dispatch import active, use
from bestiary.ops.linear_attention import linear_attention
from bestiary.ops.rotary import positions, rotate
from bestiary.ops.selective_scan import selective_scan
from bestiary.ops.short_convolution import short_convolution

__all__ = [
    "KVCache",
    "active",
    "attention",
    "delta_rule",
    "dplr",
    "empty_cache",
    "linear_attention",
    "positions",
    "rotate",
    "selective_scan",
    "short_convolution",
    "use",
]
