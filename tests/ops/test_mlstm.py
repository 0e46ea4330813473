"""xLSTM's matrix memory: the chunked form is the stabilised recurrence, which is the paper's, for any exponents."""

import pytest
import torch
from ops.forms import KINDS, LENGTHS, check_forms, gates, normal

from bestiary import ops
from bestiary.ops.mlstm import MLSTMState, running_max

B, H, K, V = 2, 3, 8, 6


def case(time: int, size: float, kind: str) -> list[torch.Tensor]:
    """Input gates of about `size`, and log-forget gates; products q k are positive, so that no quotient explodes."""
    torch.manual_seed(time)
    q, k = (normal(B, time, H, K).abs() + 0.1 for _ in range(2))
    return [q, k, normal(B, time, H, V), size * normal(B, time, H), gates(kind, B, time, H)]


def past(size: float) -> MLSTMState:
    return ops.mlstm(*case(4, size, "weak"))[1]


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_chunked_is_recurrent_with_every_gate(size: float, kind: str, time: int) -> None:
    inputs, before, ahead = case(time, size, kind), past(size), case(3, size, kind)

    def op(q, k, v, i, f, memory):
        h, state = ops.mlstm(q, k, v, i, f, state=MLSTMState(memory, before.max.to(memory.dtype)))
        # the state is in units of its own: what it does to later steps is what counts
        return h, ops.mlstm(*(x.to(q.dtype) for x in ahead), state=state)[0]

    check_forms(op, [*inputs, before.memory], joint=True)


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("size", [1.0, 60.0])
@pytest.mark.parametrize("growing", [False, True])
def test_it_is_the_papers_equation_without_a_stabiliser(growing: bool, size: float, form: str) -> None:
    torch.manual_seed(0)
    q, k, v, i = normal(1, 40, 1, K), normal(1, 40, 1, K), normal(1, 40, 1, V), size * normal(1, 40, 1)
    f = normal(1, 40, 1) if growing else gates("mixed", 1, 40, 1)  # an exponential forget gate may exceed 1
    with ops.use(form):
        h, _ = ops.mlstm(q, k, v, i, f)
    C, n = torch.zeros(V, K, dtype=torch.float64), torch.zeros(K, dtype=torch.float64)
    for t in range(40):
        key, write, keep = k[0, t, 0] / K**0.5, i[0, t, 0].exp(), f[0, t, 0].exp()
        C, n = keep * C + write * torch.outer(v[0, t, 0], key), keep * n + write * key
        expected = C @ q[0, t, 0] / (n @ q[0, t, 0]).abs().clamp(min=1)
        torch.testing.assert_close(h[0, t, 0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_common_exponents_cancel_where_the_normaliser_exceeds_one(form: str) -> None:
    q, k, v, i, f = case(70, 3.0, "mixed")
    with ops.use(form):
        h, _ = ops.mlstm(q, k, v, i + 100, f)
        huge, state = ops.mlstm(q, k, v, i + 1e5, f)
        _, tiny = ops.mlstm(q, k, v, i - 1e5, f)
    torch.testing.assert_close(huge, h, rtol=0, atol=1e-9)
    assert state.memory.isfinite().all() and torch.allclose(state.memory, tiny.memory, atol=1e-9)


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_a_strong_write_takes_over(form: str) -> None:
    q, k, v, i, f = (x.float() for x in case(40, 1.0, "weak"))
    i[:, 30] = 300.0
    with ops.use(form):
        h, _ = ops.mlstm(q, k, v, i, f)
    torch.testing.assert_close(h[:, 30:], v[:, 30:31].expand(-1, 10, -1, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_nothing_to_read_is_zero(form: str) -> None:
    q, k, v, i, f = case(5, 1.0, "weak")
    with ops.use(form):
        h, _ = ops.mlstm(0 * q, k, v, i + 1e4, f)  # e^-m is zero as well
    assert torch.equal(h, torch.zeros_like(v))


@pytest.mark.parametrize("form", ["reference", "torch"])
def test_padding_leaves_the_state_alone(form: str) -> None:
    inputs, before = case(30, 10.0, "mixed"), past(10.0)
    with ops.use(form):
        _, state = ops.mlstm(*inputs, state=before, lengths=torch.tensor([0, 11]))
        _, alone = ops.mlstm(*(x[1:, :11] for x in inputs), state=MLSTMState(*(x[1:] for x in before)))
        _, still_empty = ops.mlstm(*inputs, lengths=torch.tensor([0, 11]))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(state, before))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(still_empty, ops.empty_mlstm(1, H, K, V, dtype=torch.float64)))
    for a, b in zip(state, alone):
        torch.testing.assert_close(a[1:], b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("time", LENGTHS)
def test_the_running_maximum_follows_its_recurrence(time: int) -> None:
    torch.manual_seed(time)
    decay, value, m = gates("mixed", B, time, H), 10 * normal(B, time, H), normal(B, H)
    found = running_max(decay, value, m)
    for t in range(time):
        m = torch.maximum(decay[:, t] + m, value[:, t])
        torch.testing.assert_close(found[:, t + 1], m, rtol=0, atol=1e-11)


def test_a_long_sequence_with_uneven_gates_stays_exact_in_fp32() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 3000, 1, K).abs() for _ in range(2))
    inputs = [q, k, torch.randn(1, 3000, 1, V), 30 * torch.randn(1, 3000, 1), gates("mixed", 1, 3000, 1).float()]
    h, _ = ops.mlstm(*inputs)
    expected, _ = ops.mlstm(*(x.double() for x in inputs))
    torch.testing.assert_close(h.double(), expected, rtol=0, atol=1e-5)
