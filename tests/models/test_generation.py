import pytest
import torch

from bestiary import LanguageModel, ModelConfig
from bestiary import state as states
from bestiary.errors import UsageError
from bestiary.models import generation

LAYOUT = "mamba attention{window=5} attention hyena{l_max=16} gated_delta_net rwkv4"
PROMPTS = [[1], [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [5, 5, 5], list(range(30))]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    net = LanguageModel(ModelConfig(LAYOUT, d_model=32, vocab_size=40)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim >= 2:
                parameter.add_(0.2 * torch.randn_like(parameter))  # so that tokens differ and do not repeat
    return net


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    ],
    ids=["greedy", "sampled", "filtered"],
)
def test_batched_is_alone_token_for_token(model, how: dict) -> None:
    together = model.generate(PROMPTS, max_new_tokens=20, seed=7, **how)
    for i, prompt in enumerate(PROMPTS):
        assert together[i] == model.generate([prompt], max_new_tokens=20, seed=7 + i, **how)[0]


def test_greedy_generation_takes_the_best_token_of_a_full_forward(model) -> None:
    tokens = torch.tensor([PROMPTS[1]])
    for _ in range(12):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens)[0][:, -1:].argmax(-1)], 1)
    assert model.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=12).tolist() == tokens.tolist()


def test_prefill_by_segments_changes_nothing(model) -> None:
    whole, _ = generation.prefill(model, PROMPTS)
    parts, _ = generation.prefill(model, PROMPTS, segment=4)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_a_seed_gives_the_same_tokens_and_another_one_others(model) -> None:
    first, again, other = (
        model.generate([[1, 2]], max_new_tokens=30, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_each_row_ends_at_its_own_eos(model) -> None:
    free = model.generate(PROMPTS, max_new_tokens=15, temperature=1.0, seed=3)
    eos = free[0][len(PROMPTS[0]) + 4]
    rows = model.generate(PROMPTS, max_new_tokens=15, temperature=1.0, seed=3, eos=eos)
    for row, other, prompt in zip(rows, free, PROMPTS):
        added = other[len(prompt) :]
        assert row == prompt + (added[: added.index(eos) + 1] if eos in added else added)
    steps = list(model.stream(PROMPTS, max_new_tokens=15, temperature=1.0, seed=3, eos=list(range(40))))
    assert len(steps) == 1  # all rows have ended


def test_a_conversation_continues_on_its_state(model) -> None:
    prompt, further = PROMPTS[1], [7, 8]
    with torch.no_grad():
        _, state = model(torch.tensor([prompt]))
    kept = states.fork(state)
    expected = model.generate([prompt + further], max_new_tokens=8)[0][len(prompt) :]
    assert model.generate([further], max_new_tokens=8, state=state)[0] == expected
    for a, b in zip(states.tensors(state), states.tensors(kept)):
        assert torch.equal(a, b)  # the given state is not written into


def test_tensor_prompts_are_padded_rows(model) -> None:
    tokens = torch.tensor([[1, 0, 0], [5, 5, 5]])
    rows = model.generate(tokens, lengths=torch.tensor([1, 3]), max_new_tokens=4)
    assert rows[0, :5].tolist() == model.generate([[1]], max_new_tokens=4)[0]
    assert rows[1].tolist() == model.generate([[5, 5, 5]], max_new_tokens=4)[0]


def test_the_penalty_prevents_repetition(model) -> None:
    row = model.generate([[3]], max_new_tokens=30, repetition_penalty=1e6)[0]
    assert len(set(row)) == len(row)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "empty"),
        ([], {}, "empty"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens"),
        ([[1]], {"seed": [1, 2]}, "seeds"),
        ([[99]], {}, r"0\.\.39"),
    ],
)
def test_bad_input_is_one_clear_line(model, prompts, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.generate(prompts, **options)
