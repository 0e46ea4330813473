"""Log-linear attention: chunks of any alignment are the Fenwick tree's steps, and both are the matrix of the paper."""

import pytest
import torch
from ops.forms import KINDS, LENGTHS, check_forms, gates, normal
from torch import Tensor

from bestiary import ops
from bestiary.ops.log_linear_attention import FenwickState, bit_length

B, H, K, V = 2, 3, 8, 6


def case(time: int, kind: str, levels: int) -> list[Tensor]:
    torch.manual_seed(time)
    shape = (B, time, H)
    return [normal(*shape, K), normal(*shape, K), normal(*shape, V), gates(kind, *shape), normal(*shape, levels + 1)]


def past(levels: int) -> FenwickState:
    """Two rows at different positions."""
    return ops.log_linear_attention(*case(50, "weak", levels), lengths=torch.tensor([50, 13]))[1]


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("levels", [1, 4, 9])
def test_chunked_is_recurrent_with_rows_at_different_positions(levels: int, kind: str, time: int) -> None:
    before = past(levels)

    def op(q, k, v, g, w, memory):
        o, state = ops.log_linear_attention(q, k, v, g, w, state=FenwickState(memory, before.position))
        assert torch.equal(state.position, before.position + time)
        return o, state.memory

    check_forms(op, [*case(time, kind, levels), before.memory])


def level_in_the_tree(t: int, s: int) -> int:
    """The largest power of two that fits into the steps before t is the oldest bucket; the rest is cut alike."""
    if s == t:
        return 0
    size = 1 << (t.bit_length() - 1)
    return size.bit_length() if s < size else level_in_the_tree(t - size, s - size)


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_it_is_the_hierarchical_matrix(form: str) -> None:
    time, levels = 75, 7
    q, k, v, g, w = case(time, "weak", levels)
    with ops.use(form):
        o, _ = ops.log_linear_attention(q, k, v, g, w, scale=1.0)
    for t in range(time):
        expected = torch.zeros(B, H, V, dtype=torch.float64)
        for s in range(t + 1):
            weight = w[:, t, :, level_in_the_tree(t, s)] * g[:, s + 1 : t + 1].sum(1).exp()
            expected += (weight * (q[:, t] * k[:, s]).sum(-1))[..., None] * v[:, s]
        torch.testing.assert_close(o[:, t], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_all_weights_one_it_is_linear_attention(kind: str, form: str) -> None:
    q, k, v, g, w = case(140, kind, 4)
    with ops.use(form):
        o, state = ops.log_linear_attention(q, k, v, g, torch.ones_like(w))
        expected, memory = ops.linear_attention(q, k, v, g)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(state.memory.sum(1), memory, rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_a_level_is_occupied_where_the_position_has_a_one(form: str) -> None:
    q, k, v, g, w = case(90, "none", 7)
    with ops.use(form):
        _, state = ops.log_linear_attention(q, k, v, g, w)
    occupied = state.memory.flatten(2).any(-1)
    assert occupied[0].tolist() == [bool(90 >> level & 1) for level in range(7)]
    recent = torch.einsum("thk,thv->hkv", k[0, 88:], v[0, 88:])  # 90 = 64 + 16 + 8 + 2: the last two steps
    torch.testing.assert_close(state.memory[0, 1], recent, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_padding_leaves_the_state_alone(form: str) -> None:
    inputs, before = case(80, "mixed", 4), past(4)
    with ops.use(form):
        _, state = ops.log_linear_attention(*inputs, state=before, lengths=torch.tensor([0, 71]))
        _, alone = ops.log_linear_attention(*(x[1:, :71] for x in inputs), state=FenwickState(*(x[1:] for x in before)))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(state, before))
    assert torch.equal(state.position[1:], alone.position)
    torch.testing.assert_close(state.memory[1:], alone.memory, rtol=0, atol=1e-12)


def test_bit_length() -> None:
    assert bit_length(torch.arange(20), 4).tolist() == [min(x.bit_length(), 4) for x in range(20)]
