"""Gated linear attention: the chunked form is the recurrence, for every kind of decay, however strong."""

import pytest
import torch
from ops.forms import KINDS, LENGTHS, check_forms, gates, normal

from bestiary import UsageError, ops

B, H, K, V = 2, 4, 8, 6
SHAPES = {"per head": (H,), "per step": (B, -1, H), "per channel": (B, -1, H, K)}


def memory(columns: int = V) -> torch.Tensor:
    return normal(B, H, K, columns)


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_chunked_is_recurrent_with_every_decay(shape: tuple[int, ...], kind: str, time: int) -> None:
    torch.manual_seed(time)
    g = gates(kind, *(time if n == -1 else n for n in shape))
    inputs = [normal(B, time, H, K), normal(B, time, H, K), normal(B, time, H, V), g, memory()]
    check_forms(lambda q, k, v, g, s: ops.linear_attention(q, k, v, g, state=s), inputs)


@pytest.mark.parametrize("time", LENGTHS)
def test_chunked_is_recurrent_without_decay_and_with_a_normaliser(time: int) -> None:
    torch.manual_seed(time)
    q, k, v = normal(B, time, H, K), normal(B, time, H, K), normal(B, time, H, V)
    check_forms(lambda q, k, v, s: ops.linear_attention(q, k, v, state=s), [q, k, v, memory()])
    inputs = [q.abs() + 0.1, k.abs() + 0.1, v, memory(V + 1).abs()]
    check_forms(lambda q, k, v, s: ops.linear_attention(q, k, v, normalise=True, state=s), inputs)


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_chunked_is_recurrent_with_a_bonus(kind: str, time: int) -> None:
    torch.manual_seed(time)
    inputs = [normal(B, time, H, K), normal(B, time, H, K), normal(B, time, H, V), gates(kind, B, time, H, K)]
    inputs += [normal(H, K), memory()]
    check_forms(lambda q, k, v, g, u, s: ops.linear_attention(q, k, v, g, bonus=u, state=s), inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_share_keys_are_heads_with_equal_keys(kind: str) -> None:
    torch.manual_seed(0)
    q, k, v, g, s = normal(B, 70, 2, K), normal(B, 70, 2, K), normal(B, 70, H, V), gates(kind, B, 70, H), memory()
    check_forms(lambda q, k, v, g, s: ops.linear_attention(q, k, v, g, state=s), [q, k, v, g, s])
    shared, _ = ops.linear_attention(q, k, v, g, state=s)
    alone, _ = ops.linear_attention(q.repeat_interleave(2, 2), k.repeat_interleave(2, 2), v, g, state=s)
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-12)


def test_the_recurrence_is_the_equation() -> None:
    torch.manual_seed(0)
    q, k, v, g, s = (
        normal(1, 3, 1, K),
        normal(1, 3, 1, K),
        normal(1, 3, 1, V),
        gates("weak", 1, 3, 1, K),
        normal(1, 1, K, V),
    )
    o, state = ops.linear_attention(q, k, v, g, scale=1.0, state=s)
    S = s[0, 0]
    for t in range(3):
        S = torch.diag(g[0, t, 0].exp()) @ S + torch.outer(k[0, t, 0], v[0, t, 0])
        torch.testing.assert_close(o[0, t, 0], S.T @ q[0, t, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(state[0, 0], S, rtol=0, atol=1e-12)


def test_linear_attention_is_the_row_normalised_matrix_form() -> None:
    torch.manual_seed(0)
    q, k, v = (normal(1, 100, 1, K).abs(), normal(1, 100, 1, K).abs(), normal(1, 100, 1, V))
    weights = (q[0, :, 0] @ k[0, :, 0].T).tril()
    expected = weights / weights.sum(-1, keepdim=True) @ v[0, :, 0]
    o, _ = ops.linear_attention(q, k, v, normalise=True, eps=0.0)
    torch.testing.assert_close(o[0, :, 0], expected, rtol=0, atol=1e-12)


def test_long_segments_in_pieces_give_the_same() -> None:
    torch.manual_seed(0)
    q, k, v, g = normal(1, 4500, 1, 4), normal(1, 4500, 1, 4), normal(1, 4500, 1, 3), gates("mixed", 1, 4500, 1, 4)
    o, s = ops.linear_attention(q, k, v, g)
    with ops.use("reference"):
        expected, last = ops.linear_attention(q, k, v, g)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(s, last, rtol=0, atol=1e-11)


def test_wrong_shapes_are_named() -> None:
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(UsageError, match="log_decay"):
        ops.linear_attention(q, q, q, torch.zeros(3))
    with pytest.raises(UsageError, match="bonus"):
        ops.linear_attention(q, q, q, bonus=torch.zeros(2, 7))
    with pytest.raises(UsageError, match="multiple"):
        ops.linear_attention(q, q, torch.zeros(1, 4, 3, 8))
