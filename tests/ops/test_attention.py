"""Attention: the fused form is the softmax, with windows, grouped heads, and caches at different positions."""

import pytest
import torch
from ops.forms import normal

from bestiary import UsageError, ops, state

B, H, G, K, V = 2, 4, 2, 8, 6


def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """Softmax over a masked (time, time) matrix."""
    time = q.shape[1]
    k, v = (x.repeat_interleave(H // G, dim=2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * K**-0.5
    back = torch.arange(time)[:, None] - torch.arange(time)
    hidden = (back < 0) if window is None else (back < 0) | (back >= window)
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("window", [None, 1, 2, 7, 64, 300])
@pytest.mark.parametrize("cuts", [(), (1,), (0, 3), (1, 2, 150), (130,)])
def test_segments_attend_as_the_whole_does(form: str, window: int | None, cuts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    time = 200
    q, k, v = normal(B, time, H, K), normal(B, time, G, K), normal(B, time, G, V)
    cache, parts = None, []
    with ops.use(form):
        for a, b in zip((0, *cuts), (*cuts, time)):
            o, cache = ops.attention(q[:, a:b], k[:, a:b], v[:, a:b], window=window, state=cache)
            parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 1), whole(q, k, v, window), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("in_place", [False, True])
def test_rows_at_different_positions(window: int | None, in_place: bool) -> None:
    torch.manual_seed(0)
    q, k, v = normal(B, 30, H, K), normal(B, 30, G, K), normal(B, 30, G, V)
    expected, seen, cache = whole(q, k, v, window), torch.zeros(B, dtype=torch.int64), None
    for lengths in ([3, 0], [0, 2], [1, 1], [4, 7], [9, 0]):
        rows = [torch.arange(s, s + max(lengths)).clamp(max=29) for s in seen.tolist()]
        parts = (torch.stack([x[i, rows[i]] for i in range(B)]) for x in (q, k, v))
        with torch.no_grad():
            if in_place:
                with state.in_place():
                    o, cache = ops.attention(*parts, window=window, state=cache, lengths=torch.tensor(lengths))
            else:
                o, cache = ops.attention(*parts, window=window, state=cache, lengths=torch.tensor(lengths))
        for i, n in enumerate(lengths):
            torch.testing.assert_close(o[i, :n], expected[i, seen[i] : seen[i] + n], rtol=0, atol=1e-12)
        seen += torch.tensor(lengths)
        assert torch.equal(cache.position, seen)


def test_a_window_keeps_a_cache_of_its_size() -> None:
    _, cache = ops.attention(normal(1, 90, H, K), normal(1, 90, G, K), normal(1, 90, G, V), window=8)
    assert cache.keys.shape == (1, 7, G, K)


@pytest.mark.parametrize("dims", [None, 4])
def test_rotation_tells_distances_and_keeps_lengths(dims: int | None) -> None:
    torch.manual_seed(0)
    q, k = normal(1, 1, 1, K), normal(1, 1, 1, K)

    def product(i: int, j: int) -> torch.Tensor:
        a, b = (ops.rotate(x, torch.tensor([[p]]), dims=dims) for x, p in ((q, i), (k, j)))
        torch.testing.assert_close(a.norm(), q.norm(), rtol=0, atol=1e-12)
        return (a * b).sum()

    torch.testing.assert_close(product(3, 1), product(1_000_003, 1_000_001), rtol=0, atol=1e-9)
    assert abs(product(3, 1) - product(3, 2)) > 1e-3


def test_wrong_heads_and_windows_are_named() -> None:
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UsageError, match="multiple"):
        ops.attention(x, x[:, :, :2], x[:, :, :2])
    with pytest.raises(UsageError, match="window"):
        ops.attention(x, x, x, window=0)
    with pytest.raises(UsageError, match="dims"):
        ops.rotate(x, torch.zeros(1, 2, dtype=torch.int64), dims=3)


@pytest.mark.parametrize("window", [None, 4])
def test_remembering_alone_leaves_the_cache_that_attention_leaves(window: int | None) -> None:
    q, k, v = (normal(2, 7, 2, 8) for _ in range(3))
    lengths = torch.tensor([3, 7])
    _, expected = ops.attention(q, k, v, window=window, lengths=lengths)
    start = ops.empty_cache(2, 2, 8, 8, window=window, dtype=k.dtype)
    found = ops.remember(start, k, v, window, lengths)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
