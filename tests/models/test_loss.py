import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bestiary.models import loss as module
from bestiary.models.loss import linear_cross_entropy, token_nats


def problem(rows: int = 13, vocab: int = 11, dtype: torch.dtype = torch.float64):
    hidden = torch.randn(rows, 8, dtype=dtype, requires_grad=True)
    head = torch.randn(vocab, 8, dtype=dtype, requires_grad=True)
    return hidden, head, torch.randint(vocab, (rows,))


@pytest.mark.parametrize("chunk", [1, 33, 1 << 22])
def test_the_loss_and_its_gradients_are_those_of_cross_entropy_at_any_chunk(chunk, monkeypatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    hidden, head, targets = problem()
    targets[3] = -100
    weights = torch.rand(13, dtype=torch.float64)
    weights[5] = 0
    expected = (F.cross_entropy(hidden @ head.T, targets, reduction="none", ignore_index=-100) * weights).sum()
    expected = expected / (weights * (targets >= 0)).sum()
    found = linear_cross_entropy(hidden, head, targets, weights)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(3 * found, (hidden, head)), torch.autograd.grad(3 * expected, (hidden, head))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("chunk", [33, 1 << 22])
def test_a_bias_of_the_head_is_part_of_the_loss_its_gradients_and_the_nats(chunk, monkeypatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    hidden, head, targets = problem()
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    expected = F.cross_entropy(hidden @ head.T + bias, targets)
    found = linear_cross_entropy(hidden, head, targets, bias=bias)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    wanted = (hidden, head, bias)
    gradients = torch.autograd.grad(found, wanted)
    for a, b in zip(gradients, torch.autograd.grad(expected, wanted)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(token_nats(hidden, head, targets, bias).mean(), expected.detach())
    frozen = linear_cross_entropy(hidden.detach(), head.detach(), targets, bias=bias)
    torch.testing.assert_close(torch.autograd.grad(frozen, bias)[0], gradients[2])


@pytest.mark.parametrize("chunk", [33, 1 << 22])
def test_a_cap_of_the_logits_is_part_of_the_loss_its_gradients_and_the_nats(chunk, monkeypatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    hidden, _, targets = problem()
    head = module.Head(8, 11, cap=1.5).double()
    logits = 1.5 * torch.tanh(hidden @ head.weight.T / 1.5)
    expected, found = F.cross_entropy(logits, targets), head.loss(hidden, targets)
    torch.testing.assert_close(head(hidden), logits, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    wanted = (hidden, head.weight)
    for a, b in zip(torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(head.nats(hidden, targets).mean(), expected.detach())


def test_nats_of_each_token_are_those_of_cross_entropy() -> None:
    hidden, head, targets = problem()
    expected = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    torch.testing.assert_close(token_nats(hidden, head, targets), expected.detach(), rtol=1e-12, atol=1e-14)


def test_no_target_means_no_loss_and_no_gradient() -> None:
    hidden, head, _ = problem()
    loss = linear_cross_entropy(hidden, head, torch.full((13,), -100))
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not head.grad.any()


def test_an_impossible_logit_keeps_loss_and_gradients_finite() -> None:
    hidden, head, targets = problem(dtype=torch.float32)
    loss = linear_cross_entropy(hidden, (1e4 * head.detach()).requires_grad_(), targets)
    loss.backward()
    assert loss.isfinite() and hidden.grad.isfinite().all()


def test_the_logits_of_a_long_batch_never_exist_at_once() -> None:
    rows, vocab = 4096, 8192  # 134 MB of logits in fp32
    hidden = torch.randn(rows, 8, requires_grad=True)
    head = torch.randn(vocab, 8, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(hidden, head, torch.randint(vocab, (rows,))).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events() if event.name == "aten::mm")
    assert largest <= 4 * module.CHUNK_ELEMENTS


def test_under_autocast_the_loss_stays_close() -> None:
    hidden, head, targets = problem(dtype=torch.float32)
    expected = linear_cross_entropy(hidden, head, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_cross_entropy(hidden, head, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)


def test_without_gradients_there_is_one_product_a_chunk() -> None:
    """Parameters ask for gradients also where nobody computes any."""
    hidden, head = torch.randn(9, 6, requires_grad=True), torch.randn(20, 6, requires_grad=True)
    targets, flops = torch.randint(20, (9,)), []
    for grad in (False, True):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            linear_cross_entropy(hidden, head, targets)
        flops.append(counter.get_total_flops())
    assert flops[0] == 2 * 9 * 6 * 20 < flops[1]
