"""The contract that every mixer obeys: a segment and a state in, a segment and a state out.

    y, state = mixer(x, state)              x: (batch, time, d_model); state None = the initial state
    y_t, state = mixer.step(x_t, state)     x_t: (batch, d_model)

Splitting a sequence anywhere changes nothing; padding never reaches a state; a document in a pack never sees its
neighbour. `Mixer` keeps what all of them share, so that a mixer writes `initial_state`, `mix` and its state's size.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bestiary import state as states
from bestiary.errors import UsageError
from bestiary.mixers.context import Context, unpack


class Mixer(nn.Module):
    """Base of sequence mixers and channel mixers."""

    name: ClassVar[str] = ""
    """The name it is registered under."""
    causal: bool = True
    """Whether outputs depend on the past alone."""
    attends: ClassVar[bool] = False
    """Whether every step looks at all of its past again, as attention does (unless an option `window` is set)."""
    channel_mixer: ClassVar[str | None] = "swiglu"
    """The channel mixer that follows by default; None where the block holds the sequence mixer alone."""

    timed: bool = False
    """Whether the time between steps counts (`context.intervals`)."""

    cached_activations: tuple[str, ...] = ()
    """Fields of the state that hold copies of activations (a KV cache) and so may stay in half precision."""

    unpacked: ClassVar[tuple[str, ...]] = ()
    """Linear maps whose weight the mixer reads itself, so that it cannot be packed for decoding."""

    def __init__(self, d_model: int):
        super().__init__()
        if d_model < 1 or d_model % 32:
            raise UsageError(f"d_model must be a positive multiple of 32, not {d_model}")
        self.d_model = d_model

    def mix(self, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        """The mixer's equation on a segment: (batch, time, d_model), state, lengths or None -> y, state.

        With `lengths`, x is zero past each row's length, and steps there must leave no trace in the state. (Projections
        with a bias and convolutions make padding non-zero again: select it away, with `keep_real`, before anything
        remembers it.)
        """
        raise NotImplementedError

    def mix_in_context(self, x: Tensor, state: Any, lengths: Tensor | None, context: Context) -> tuple[Tensor, Any]:
        """`mix` for a part that reads or writes what the call shares (see context.py): overridden in its place."""
        del context
        return self.mix(x, state, lengths)

    def initial_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The state before the first step; its dtype is fp32 at least, on the mixer's own device by default."""
        raise NotImplementedError

    def state_nbytes(self, time: int) -> int:
        """Bytes of one sequence's state after `time` steps, under fp32 inputs. By default: the initial state's."""
        del time
        return states.nbytes(self.initial_state(1, device="meta", dtype=torch.float32))

    def mixing_flops(self, context: int) -> float:
        """Forward FLOPs a token at a context of `context` tokens, beside the linear projections."""
        raise NotImplementedError

    def flops_per_token(self, context: int) -> float:
        """Forward FLOPs a token, a multiply-add being two: the projections plus `mixing_flops`."""
        linear = sum(2 * m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear) and not _is_filter(m))
        return linear + self.mixing_flops(context)

    def forward(
        self,
        x: Float[Tensor, "batch time d_model"],
        state: Any = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
        cu_seqlens: Int[Tensor, " bounds"] | None = None,
        context: Context | None = None,
    ) -> tuple[Float[Tensor, "batch time d_model"], Any]:
        """Mix a segment; returns (y, state), the state being the one to continue with.

        Args:
            state: what `initial_state`, an earlier call or `step` returned; None for the beginning of a sequence.
            lengths: real steps of each row of a right-padded batch. Padding may hold anything, NaN included; outputs
                there are zero.
            cu_seqlens: bounds (0, n_1, n_1 + n_2, ...) of documents packed into a batch of one. States in and out then
                have one row a document. Excludes `lengths`.
            context: what the parts of a model share during this call; None outside a model.
        """
        if cu_seqlens is not None:
            if lengths is not None:
                raise UsageError("give lengths (a padded batch) or cu_seqlens (packed documents), not both")
            rows, lengths = unpack(x, cu_seqlens)
            inside = None if context is None else context.unpacked(cu_seqlens)
            y, state = self.forward(rows, state, lengths=lengths, context=inside)
            if context is not None and inside is not None:
                context.v_first = inside.v_first
            return pack(y, lengths), state
        if state is None:
            state = self.initial_state(x.shape[0], device=x.device, dtype=x.dtype)
        context = Context() if context is None else context
        if lengths is None:
            return self.mix_in_context(x, state, None, context)
        check_lengths(lengths, x)
        y, state = self.mix_in_context(keep_real(x, lengths), state, lengths, context)
        return keep_real(y, lengths), state

    def step(
        self, x: Float[Tensor, "batch d_model"], state: Any, *, context: Context | None = None
    ) -> tuple[Float[Tensor, "batch d_model"], Any]:
        """Mix one step of every row; returns (y, state)."""
        y, state = self.forward(x[:, None], state, context=context)
        return y[:, 0], state

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the paper initialises them."""
        raise NotImplementedError

    def own_device(self, device: torch.device | str | None) -> torch.device | str:
        """`device`, or else that of the parameters."""
        return next(self.parameters()).device if device is None else device

    def own_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype of a recurrent state under inputs of `dtype` (the parameters' by default): fp32 at least."""
        return torch.promote_types(next(self.parameters()).dtype if dtype is None else dtype, torch.float32)


class Pointwise(Mixer):
    """A part that treats each step alone: no state, and padding and packing need no care."""

    channel_mixer = None

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> states.Empty:
        return states.Empty()

    def mix(self, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        return self.transform(x), state

    def transform(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The function of one step."""
        raise NotImplementedError

    def mixing_flops(self, context: int) -> float:
        return 0.0

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context: Context | None = None,
    ) -> tuple[Tensor, Any]:
        if lengths is not None and cu_seqlens is not None:
            raise UsageError("give lengths (a padded batch) or cu_seqlens (packed documents), not both")
        if lengths is not None:  # select before and after: NaN in padding must not reach the weights' gradients
            check_lengths(lengths, x)
            return keep_real(self.transform(keep_real(x, lengths)), lengths), states.Empty()
        return self.transform(x), states.Empty()

    def step(self, x: Tensor, state: Any, *, context: Context | None = None) -> tuple[Tensor, Any]:
        return self.transform(x), state


class NonCausal(Mixer):
    """A mixer that reads its sequence as a whole, both ways: nothing to remember, no step, no segments."""

    causal = False

    def initial_state(self, batch_size: int, *, device: Any = None, dtype: Any = None) -> states.Empty:
        return states.Empty()

    def step(self, x: Tensor, state: Any, *, context: Context | None = None) -> tuple[Tensor, Any]:
        raise UsageError(
            f"{self.name or type(self).__name__} is bidirectional and sees whole sequences: it cannot step; "
            "give forward all of the sequence, or take a causal mixer"
        )


def real_steps(lengths: Int[Tensor, " batch"], time: int) -> Bool[Tensor, "batch time"]:
    """Mask of the steps that are no padding."""
    return torch.arange(time, device=lengths.device) < lengths[:, None]


def keep_real(x: Tensor, lengths: Int[Tensor, " batch"] | None, fill: float = 0.0) -> Tensor:
    """Padding selected away (not multiplied: NaN * 0 is NaN): (batch, time, ...) with `fill` past each length."""
    if lengths is None:
        return x
    mask = real_steps(lengths, x.shape[1]).reshape(x.shape[0], x.shape[1], *[1] * (x.ndim - 2))
    return torch.where(mask, x, fill)


def numbers_at_hand(x: Tensor) -> bool:
    """Whether a check may look at the numbers of a tensor: on a GPU that would wait for them, a compiler has none."""
    return x.device.type == "cpu" and x.numel() > 0 and not torch.compiler.is_compiling()


def check_lengths(lengths: Tensor, x: Tensor) -> None:
    """One clear error for lengths that do not fit x."""
    if lengths.shape != x.shape[:1] or lengths.is_floating_point():
        raise UsageError(
            f"lengths must be {x.shape[0]} integers, one a row, not {lengths.dtype} {tuple(lengths.shape)}"
        )
    if not numbers_at_hand(lengths):
        return
    if lengths.min() < 0 or lengths.max() > x.shape[1]:
        raise UsageError(f"lengths must lie in 0..{x.shape[1]}, the padded time; got {lengths.tolist()}")


def pack(rows: Tensor, lengths: Tensor) -> Tensor:
    """The inverse of `unpack`: the real steps of all rows, one after the other, as a batch of one."""
    return rows[real_steps(lengths, rows.shape[1])][None]


def _is_filter(module: nn.Module) -> bool:
    """Whether a linear map works on filter taps, not on tokens (set `is_filter = True` on such a module)."""
    return bool(getattr(module, "is_filter", False))
