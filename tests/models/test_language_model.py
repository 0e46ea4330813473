import math

import pytest
import torch

import bestiary
from bestiary import LanguageModel, ModelConfig
from bestiary import state as states
from bestiary.errors import BestiaryError, UsageError
from bestiary.models.norms import make_norm

LAYOUTS = [f"{name}*2" for name in bestiary.mixers.names() if bestiary.mixers.get(name).causal] + [
    "(mamba gla attention{window=7} rwkv4)*1 hyena{channel=monarch_mlp}"
]


def model(layout: str, **options) -> LanguageModel:
    torch.manual_seed(0)
    made = LanguageModel(ModelConfig(layout, d_model=32, vocab_size=40, **options)).double().eval()
    with torch.no_grad():  # matrices that start at zero would hide what flows through them
        for parameter in made.parameters():
            if parameter.ndim >= 2 and not parameter.any():
                parameter.normal_(std=0.2)
    return made


TOKENS = torch.randint(40, (2, 23), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sequence_is_the_sum_of_its_segments_and_of_its_steps(layout: str) -> None:
    net = model(layout)
    with torch.no_grad():
        whole, _ = net(TOKENS)
        first, state = net(TOKENS[:, :9])
        second, state = net(TOKENS[:, 9:20], state)
        last = []
        for token in TOKENS[:, 20:].unbind(1):
            logits, state = net.step(token, state)
            last.append(logits)
    torch.testing.assert_close(torch.cat([first, second, torch.stack(last, 1)], 1), whole, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padded_and_packed_documents_are_what_they_are_alone(layout: str) -> None:
    net = model(layout)
    lengths, bounds = torch.tensor([23, 5]), torch.tensor([0, 7, 7, 23])
    with torch.no_grad():
        padded, state = net(TOKENS, lengths=lengths)
        alone, own = net(TOKENS[1:, :5])
        torch.testing.assert_close(padded[1:, :5], alone, rtol=1e-9, atol=1e-10)
        further = net(TOKENS[1:, 5:9], states.select(state, 1))[0]
        torch.testing.assert_close(further, net(TOKENS[1:, 5:9], own)[0], rtol=1e-9, atol=1e-10)
        packed, _ = net(TOKENS[:1], cu_seqlens=bounds)
        for start, end in ((0, 7), (7, 23)):
            torch.testing.assert_close(packed[:, start:end], net(TOKENS[:1, start:end])[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_untrained_model_knows_nothing(layout: str) -> None:
    torch.manual_seed(0)
    net = LanguageModel(ModelConfig(layout, d_model=64, vocab_size=256))
    tokens = torch.randint(256, (4, 65))
    loss, _ = net.loss(tokens[:, :-1], tokens[:, 1:])
    # logits have variance 0.02^2 768; where layers say nothing yet, a tied head adds exp(d std) for the token itself
    own = math.exp(64 * 0.02 * math.sqrt(768 / 64))
    assert math.log(256) - 0.1 < loss.item() < math.log(256 + own) + 0.02**2 * 768 / 2 + 0.1


def test_what_stands_around_and_beside_the_layers_is_what_the_configuration_says() -> None:
    options = {
        "embedding_scale": 3.0,
        "embedding_norm": True,
        "parallel_residual": True,
        "logit_cap": 2.0,
        "norm": "layer",
    }
    net = model("gla*2", **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        x = net.embedding_norm(3.0 * net.embedding(TOKENS))
        for block in net.blocks:
            x = x + block.mixer(block.norm(x))[0] + block.channel(block.channel_norm(x))[0]
        expected = 2.0 * torch.tanh(net.norm(x) @ net.head.weight.T / 2.0)
        torch.testing.assert_close(net(TOKENS)[0], expected, rtol=1e-12, atol=1e-12)
        state = net.initial_state(2)
        for t in range(TOKENS.shape[1]):
            logits, state = net.step(TOKENS[:, t], state)
            torch.testing.assert_close(logits, expected[:, t], rtol=1e-9, atol=1e-10)
    nats = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    torch.testing.assert_close(net.loss(TOKENS[:, :-1], TOKENS[:, 1:])[0], nats)
    assert not torch.allclose(
        net.loss(TOKENS[:, :-1], TOKENS[:, 1:])[0], torch.tensor(math.log(40)).double(), atol=0.02
    )


def test_an_outer_epsilon_is_added_to_the_root_and_a_row_of_zeros_has_a_gradient() -> None:
    norm = make_norm(ModelConfig("gla", 32, norm="rms_outer", norm_eps=0.1)).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 32, dtype=torch.float64)
    x[1] = 0
    x.requires_grad_()
    expected = norm.weight * x.detach() / (x.detach().square().mean(-1, keepdim=True).sqrt() + 0.1)
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    norm(x).sum().backward()
    assert x.grad.isfinite().all()
    net = model("gla*2", norm="rms_outer")
    assert {type(block.norm).__name__ for block in net.blocks} == {"OuterRMSNorm"}


def test_the_loss_is_the_mean_cross_entropy_of_what_the_mask_leaves() -> None:
    net = model("gla*1")
    tokens, targets = TOKENS[:, :-1], TOKENS[:, 1:]
    mask = torch.rand(targets.shape) < 0.5
    logits, _ = net(tokens)
    expected = torch.nn.functional.cross_entropy(logits[mask], targets[mask])
    torch.testing.assert_close(net.loss(tokens, targets, mask)[0], expected, rtol=1e-10, atol=0)


def test_the_loss_continues_from_a_state() -> None:
    net = model("mamba*1")
    whole, _ = net.loss(TOKENS[:, :-1], TOKENS[:, 1:])
    first, state = net.loss(TOKENS[:, :11], TOKENS[:, 1:12])
    second, _ = net.loss(TOKENS[:, 11:-1], TOKENS[:, 12:], state=state)
    torch.testing.assert_close((first + second) / 2, whole, rtol=1e-10, atol=0)


def test_tied_embeddings_are_one_parameter() -> None:
    tied, untied = (model("gla*1", tie_embeddings=tie).n_parameters() for tie in (True, False))
    assert untied - tied == 40 * 32


@pytest.mark.parametrize("wrong", [[[41]], [[-1]]])
def test_a_token_outside_the_vocabulary_is_named(wrong: list) -> None:
    with pytest.raises(UsageError, match=r"0\.\.39"):
        model("gla*1")(torch.tensor(wrong))


def test_the_state_of_another_model_is_refused(tmp_path) -> None:
    net, other = model("gla*1"), model("gla*2")
    _, state = net(TOKENS)
    states.save(state, tmp_path / "state", model=net)
    again = states.load(tmp_path / "state", model=net)
    torch.testing.assert_close(net(TOKENS[:, :3], again)[0], net(TOKENS[:, :3], state)[0], rtol=0, atol=0)
    with pytest.raises(BestiaryError, match="another model"):
        states.load(tmp_path / "state", model=other)
    with pytest.raises(UsageError, match="1 layers, the model 2"):
        other(TOKENS, state)


def test_a_large_model_has_a_fingerprint() -> None:
    """In fp32 the index of the last of 50280 * 768 numbers is one beyond it."""
    model = LanguageModel(ModelConfig("gru", 32, 3)).requires_grad_(False)
    model.head.weight = model.embedding.weight = torch.nn.Parameter(torch.zeros(50280, 768), requires_grad=False)
    assert len(model.fingerprint()) == 16
