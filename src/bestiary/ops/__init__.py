"""The recurrences as pure functions; each file gives the equation, its definition, and a fast form."""

from bestiary.ops.attention import KVCache, attention, empty_cache, remember
from bestiary.ops.cross_entropy import cross_entropy
from bestiary.ops.delta_rule import delta_rule, dplr
from bestiary.ops.dispatch import active, full_precision, use
from bestiary.ops.fft_convolution import Filter
from bestiary.ops.irregular_ssm import irregular_diagonal_ssm, irregular_dplr_ssm
from bestiary.ops.linear import linear
from bestiary.ops.linear_attention import linear_attention
from bestiary.ops.linear_recurrence import linear_recurrence
from bestiary.ops.log_linear_attention import FenwickState, empty_fenwick, log_linear_attention
from bestiary.ops.long_convolution import (
    ConvolutionState,
    bidirectional_convolution,
    empty_past,
    long_convolution,
    past_nbytes,
)
from bestiary.ops.mimo_ssm import impulse_response, mimo_ssm
from bestiary.ops.mlstm import MLSTMState, empty_mlstm, mlstm
from bestiary.ops.monarch import block_diagonal, monarch
from bestiary.ops.norm import rms_norm
from bestiary.ops.rotary import positions, rotate, rotate_pairs, sum_angles
from bestiary.ops.selective_scan import selective_scan
from bestiary.ops.short_convolution import short_convolution
from bestiary.ops.ssm_scan import dense_ssm, diagonal_ssm, real_ssm
from bestiary.ops.wkv import WKVState, empty_wkv, wkv

__all__ = [
    "ConvolutionState",
    "FenwickState",
    "Filter",
    "KVCache",
    "MLSTMState",
    "WKVState",
    "active",
    "attention",
    "bidirectional_convolution",
    "block_diagonal",
    "cross_entropy",
    "delta_rule",
    "dense_ssm",
    "diagonal_ssm",
    "dplr",
    "empty_cache",
    "empty_fenwick",
    "empty_mlstm",
    "empty_past",
    "empty_wkv",
    "full_precision",
    "impulse_response",
    "irregular_diagonal_ssm",
    "irregular_dplr_ssm",
    "linear",
    "linear_attention",
    "linear_recurrence",
    "log_linear_attention",
    "long_convolution",
    "mimo_ssm",
    "mlstm",
    "monarch",
    "past_nbytes",
    "positions",
    "real_ssm",
    "remember",
    "rms_norm",
    "rotate",
    "rotate_pairs",
    "selective_scan",
    "short_convolution",
    "sum_angles",
    "use",
    "wkv",
]
