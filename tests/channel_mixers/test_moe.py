"""The mixture of experts: each token gets its experts' weighted sum, whoever its neighbours are."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bestiary import LanguageModel, ModelConfig, UsageError, channel_mixers
from bestiary.channel_mixers.moe import LOAD, MixtureOfExperts
from bestiary.data import Batches
from bestiary.mixers import Context
from bestiary.training import TrainConfig, train
from bestiary.training.log import read_log


def experts(**options: object) -> MixtureOfExperts:
    torch.manual_seed(1)
    return channel_mixers.build("moe", 32, n_experts=5, top_k=2, **options).double()


@pytest.mark.parametrize("shared", [0, 2])
def test_a_token_gets_the_weighted_sum_of_its_experts(shared: int) -> None:
    moe, x = experts(shared=shared), torch.randn(2, 6, 32, dtype=torch.float64)
    y, _ = moe(x)

    def expert(i: int, token: torch.Tensor) -> torch.Tensor:
        gate, up = (moe.gate_up[i] @ token).chunk(2)
        return moe.down[i] @ (F.silu(gate) * up)

    for token, out in zip(x.flatten(0, 1), y.flatten(0, 1)):
        p = (moe.router.weight @ token).softmax(0)
        best = p.argsort(descending=True)[:2].tolist()
        expected = sum(p[i] / p[best].sum() * expert(i, token) for i in best)
        expected = expected + sum(expert(i, token) for i in range(5, 5 + shared))
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_the_balance_term_is_one_where_the_load_is_even_and_more_where_it_is_not() -> None:
    def term(router: torch.Tensor) -> float:
        moe = channel_mixers.build("moe", 32, n_experts=4, top_k=1, balance=1.0).double().train()
        with torch.no_grad():
            moe.router.weight.copy_(router)
        x = torch.eye(32, dtype=torch.float64)[None, :4].repeat(1, 3, 1)  # token i is the i-th unit vector
        context = Context()
        moe(x, context=context)
        return context.losses[0].item()

    own, one = torch.zeros(4, 32), torch.zeros(4, 32)
    own[range(4), range(4)] = 30.0  # each token has an expert of its own
    one[0, :4] = 30.0  # all tokens go to the first
    assert term(own) == pytest.approx(1.0) and term(one) == pytest.approx(4.0)


def test_the_load_is_told_and_padding_has_none() -> None:
    moe, context, alone = experts(), Context(), Context()
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    x[1, 3:] = float("nan")
    moe(x, lengths=torch.tensor([7, 3]), context=context)
    moe(torch.cat([x[0], x[1, :3]])[None], context=alone)
    (load,), (expected,) = context.measures[LOAD], alone.measures[LOAD]
    torch.testing.assert_close(load, expected)
    assert load.sum() == pytest.approx(1) and len(load) == 5
    assert not context.losses or moe.training


def test_a_model_adds_the_balance_to_its_training_loss_only() -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig("gla{channel=moe, channel.balance=1.0}*2", 32))
    tokens = torch.randint(256, (2, 9))
    trained, _ = model.train().loss(tokens[:, :-1], tokens[:, 1:])
    scored, _ = model.eval().loss(tokens[:, :-1], tokens[:, 1:])
    assert 1.9 < (trained - scored).item() < 8  # 1 a layer where even, at most n_experts
    trained.backward()
    assert all(block.channel.router.weight.grad.abs().sum() > 0 for block in model.blocks)


def test_a_training_run_logs_the_capacity_that_a_limit_would_need(tmp_path) -> None:
    model = LanguageModel(ModelConfig("gla{channel=moe}*2", 32))
    tokens = np.random.default_rng(0).integers(256, size=400)
    train(model, Batches(tokens, 2, 16), TrainConfig(steps=2, log_every=1), folder=tmp_path)
    assert all(1 <= line["expert_capacity"] <= 8 for line in read_log(tmp_path))


def test_by_default_a_token_costs_what_swiglu_costs() -> None:
    moe, swiglu = channel_mixers.build("moe", 192), channel_mixers.build("swiglu", 192)
    router = 2 * moe.router.weight.numel()
    assert moe.flops_per_token(1) - router == pytest.approx(swiglu.flops_per_token(1), rel=0.15)
    assert sum(p.numel() for p in moe.parameters()) > 3 * sum(p.numel() for p in swiglu.parameters())


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": 9}, {"shared": -1}, {"balance": -0.1}, {"d_hidden": 0}])
def test_wrong_options_are_one_clear_line(options: dict) -> None:
    with pytest.raises(UsageError):
        channel_mixers.build("moe", 32, **options)
