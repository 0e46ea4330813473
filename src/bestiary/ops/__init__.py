"""The recurrences as pure functions; each file gives the equation, its definition, and a fast form."""

from bestiary.ops.attention import KVCache, attention, empty_cache
from bestiary.ops.delta_rule import delta_rule, dplr
from bestiary.ops.dispatch import active, full_precision, use
from bestiary.ops.irregular_ssm import irregular_diagonal_ssm, irregular_dplr_ssm
from bestiary.ops.linear_attention import linear_attention
from bestiary.ops.linear_recurrence import linear_recurrence
from bestiary.ops.long_convolution import ConvolutionState, empty_past, long_convolution, past_nbytes
from bestiary.ops.mimo_ssm import impulse_response, mimo_ssm
from bestiary.ops.monarch import monarch
from bestiary.ops.rotary import positions, rotate, rotate_pairs, sum_angles
from bestiary.ops.selective_scan import selective_scan
from bestiary.ops.short_convolution import short_convolution
from bestiary.ops.ssm import dense_ssm, diagonal_ssm
from bestiary.ops.wkv import WKVState, empty_wkv, wkv

__all__ = [
    "ConvolutionState",
    "KVCache",
    "WKVState",
    "active",
    "attention",
    "delta_rule",
    "dense_ssm",
    "diagonal_ssm",
    "dplr",
    "empty_cache",
    "empty_past",
    "empty_wkv",
    "full_precision",
    "impulse_response",
    "irregular_diagonal_ssm",
    "irregular_dplr_ssm",
    "linear_attention",
    "linear_recurrence",
    "long_convolution",
    "mimo_ssm",
    "monarch",
    "past_nbytes",
    "positions",
    "rotate",
    "rotate_pairs",
    "selective_scan",
    "short_convolution",
    "sum_angles",
    "use",
    "wkv",
]
