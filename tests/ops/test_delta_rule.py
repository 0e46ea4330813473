"""The delta rule and its general form: chunked is recurrent, for every decay, with beta up to 2."""

import pytest
import torch
from ops.forms import KINDS, LENGTHS, check_forms, gates, normal
from torch.nn import functional as F

from bestiary import UsageError, ops

B, H, K, V = 2, 3, 8, 6
SHAPES = {"per head": (H,), "per step": (B, -1, H), "per channel": (B, -1, H, K)}


def case(time: int) -> list[torch.Tensor]:
    torch.manual_seed(time)
    keys = F.normalize(normal(B, time, H, K), dim=-1)
    return [normal(B, time, H, K), keys, normal(B, time, H, V), 2 * torch.rand(B, time, H, dtype=torch.float64)]


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_chunked_is_recurrent_with_every_decay(shape: tuple[int, ...], kind: str, time: int) -> None:
    inputs = [*case(time), gates(kind, *(time if n == -1 else n for n in shape)), normal(B, H, K, V)]
    check_forms(lambda q, k, v, b, g, s: ops.delta_rule(q, k, v, b, g, state=s), inputs)


@pytest.mark.parametrize("time", LENGTHS)
def test_chunked_is_recurrent_without_decay(time: int) -> None:
    check_forms(lambda q, k, v, b, s: ops.delta_rule(q, k, v, b, state=s), [*case(time), normal(B, H, K, V)])


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_chunked_is_recurrent_in_the_general_form(kind: str, time: int) -> None:
    r, keys, v, beta = case(time)
    inputs = [r, gates(kind, B, time, H, K), normal(B, time, H, K), v, -keys, keys * beta[..., None] / 2]
    check_forms(lambda *x: ops.dplr(*x[:6], state=x[6]), [*inputs, normal(B, H, K, V)])


def test_the_recurrence_is_the_equation() -> None:
    q, k, v, beta = (x[:1, :, :1] for x in case(5))
    g, S = gates("weak", 1, 5, 1, K), normal(K, V)
    o, state = ops.delta_rule(q, k, v, beta, g, scale=1.0, state=S[None, None])
    for t in range(5):
        key, b = k[0, t, 0], beta[0, t, 0]
        S = (torch.eye(K, dtype=S.dtype) - b * torch.outer(key, key)) @ torch.diag(g[0, t, 0].exp()) @ S
        S = S + b * torch.outer(key, v[0, t, 0])
        torch.testing.assert_close(o[0, t, 0], S.T @ q[0, t, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(state[0, 0], S, rtol=0, atol=1e-12)


def test_beta_one_replaces_what_the_key_recalls() -> None:
    _, k, v, _ = case(1)
    o, _ = ops.delta_rule(k, k, v, torch.ones(B, 1, H, dtype=torch.float64), scale=1.0, state=normal(B, H, K, V))
    torch.testing.assert_close(o, v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("time", [1, 70])
def test_the_delta_rule_is_a_case_of_the_general_form(time: int) -> None:
    q, k, v, beta = case(time)
    g, s = gates("mixed", B, time, H, K), normal(B, H, K, V)
    o, last = ops.delta_rule(q, k, v, beta, g, scale=1.0, state=s)
    b = beta[..., None]
    general, general_last = ops.dplr(q, g, b * k, v, k * g.exp(), -b * k, state=s)
    torch.testing.assert_close(general, o, rtol=0, atol=1e-11)
    torch.testing.assert_close(general_last, last, rtol=0, atol=1e-11)


def test_a_wrong_decay_is_named() -> None:
    q, k, v, beta = case(4)
    with pytest.raises(UsageError, match="log_decay"):
        ops.delta_rule(q, k, v, beta, torch.zeros(B, 4, 1))
