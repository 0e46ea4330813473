"""A packed model's native step is the model's step: results, states, any rows, whoever else runs it."""

import threading

import pytest
import torch
from decoding.kit import close, make
from ops.native.kit import needed

from bestiary import LanguageModel, ModelConfig, mixers, state
from bestiary.ops.native.matvec import rounds_inputs
from bestiary.state import nbytes

pytestmark = needed
CAUSAL = [name for name in mixers.names() if mixers.get(name).causal]
AS_THEY_ARE = {"hyena", "m2_gpt"}
"""Mixers whose step is not lowered; each of the others must be, or a change has lost its speed."""


def follow(model: LanguageModel, fast: LanguageModel, rows: int, *, before: int = 5, steps: int = 4) -> None:
    """Both read a prompt, then step; logits and states must stay the same, and the states must fit both models."""
    tokens = torch.randint(50, (rows, before + steps))
    with torch.no_grad():
        _, theirs = model(tokens[:, :before])
        ours = theirs
        for token in tokens[:, before:].unbind(1):
            kept = state.fork(ours)
            found, after = fast.step(token, ours)
            for a, b in zip(state.tensors(ours), state.tensors(kept)):
                assert torch.equal(a, b), "a step wrote into the state it was given"
            expected, theirs = model.step(token, theirs)
            assert close(found, expected)
            ours = after
        for a, b in zip(state.tensors(ours), state.tensors(theirs), strict=True):
            assert a.dtype == b.dtype and close(a, b)
        assert close(model(tokens, ours)[0], model(tokens, theirs)[0])


@pytest.mark.parametrize("name", CAUSAL)
def test_every_mixer_steps_the_same(name: str) -> None:
    for width, rows in ((160, 1), (64, 3)):
        model = make(f"{name}*2", width)
        fast = model.packed("fp32")
        follow(model, fast, rows)
    assert fast.decoder is not None
    lowered = [why is None for why in fast.decoder.report(3)]
    assert lowered == [name not in AS_THEY_ARE] * 2 + [True], fast.decoder.report(3)


@pytest.mark.parametrize(
    "layout",
    [
        "attention{n_kv_heads=1, qk_norm=true, gate=true}",
        "attention{window=3}",
        "attention{window=1}",
        "attention{rotary=false, qkv_bias=true, out_bias=true}",
        "attention{rotary_dims=16, rotary_stretch=4.0}",
        "mla{q_rank=24, n_heads=1, rope_dim=0}",
        "mamba{conv_kernel=1}",
        "mamba{norm_dt_bc=weighted}",
        "mamba2{n_groups=2, d_state=16}",
        "gated_delta_net{n_value_heads=4, n_heads=2, negative=true}",
        "delta_product{n_steps=3, gated=true}",
        "log_linear_attention{n_levels=2, d_state=16}",
        "mamba3{n_groups=2, rope_fraction=1.0, decay=softplus}",
        "rwkv5{version=5.1}",
        "gla mamba attention rwkv7 hyena rwkv7{channel=geglu} attention{window=4} mamba2",
        "mamba+attention{channel=moe}",
    ],
)
def test_options_and_hybrids_step_the_same(layout: str) -> None:
    for options in ({}, {"norm": "layer", "tie_embeddings": False, "logit_cap": 5.0}):
        model = make(layout, **options)
        for rows in (1, 2):
            follow(model, model.packed("fp32"), rows)


def test_a_layer_that_is_not_lowered_runs_as_it_is_between_two_programs() -> None:
    fast = make("rwkv7 hyena rwkv7 gla").packed("int8")
    assert fast.decoder is not None
    why = fast.decoder.report()
    assert why[1] is not None and [why[0], *why[2:]] == [None] * 4


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8", "int4"])
def test_the_native_step_is_the_packed_models_own(form: str) -> None:
    fast = make("mamba attention rwkv7 gated_delta_net based mla delta_product mamba3 log_linear_attention").packed(
        form
    )
    tokens = torch.randint(50, (2, 9))
    with torch.no_grad():
        _, ours = fast(tokens[:, :5])
        theirs = ours
        for token in tokens[:, 5:].unbind(1):
            found, ours = fast.step(token, ours)
            decoder, fast.decoder = fast.decoder, None
            expected, theirs = fast.step(token, theirs)
            fast.decoder = decoder
            assert close(found, expected)


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8", "int4"])
def test_many_rows_are_multiplied_as_the_packed_model_does(form: str) -> None:
    fast = make("mamba gla").packed(form)
    decoder, exact = fast.decoder, form != "bf16" or not rounds_inputs()
    assert decoder is not None
    for rows in (16, 19, 32):
        with torch.no_grad():
            token, before = torch.randint(50, (rows,)), fast(torch.randint(50, (rows, 5)))[1]
            found, _ = fast.step(token, before)
            fast.decoder = None
            expected, _ = fast.step(token, before)
            fast.decoder = decoder
        assert decoder.report(rows) == [None] * 3
        assert close(found, expected) if exact else (found - expected).abs().max() < 2**-6 * expected.abs().max()


def test_rows_of_different_lengths_keep_their_own_positions() -> None:
    model = make("attention mamba attention{window=4} mla log_linear_attention")
    fast, lengths = model.packed("fp32"), [1, 7, 3]
    prompts = [torch.randint(50, (1, n)) for n in lengths]
    token = torch.randint(50, (3,))
    with torch.no_grad():
        alone = [model(prompt)[1] for prompt in prompts]
        expected = torch.cat([model.step(token[i : i + 1], s)[0] for i, s in enumerate(alone)])
        found, after = fast.step(token, state.stack(alone))
        assert close(found, expected)
        second = torch.cat(
            [model.step(token[i : i + 1], model.step(token[i : i + 1], s)[1])[0] for i, s in enumerate(alone)]
        )
        assert close(fast.step(token, after)[0], second)


def test_states_that_were_given_away_are_written_over_and_caches_have_room() -> None:
    model = make("attention mamba gla rwkv4 mla log_linear_attention{n_levels=5} mamba3")
    fast, tokens = model.packed("fp32"), torch.randint(50, (1, 200))
    with torch.no_grad():
        expected = model(tokens)[0][:, 4:].transpose(0, 1)
        _, remembered = fast(tokens[:, :4])
        sizes = set()
        for i, token in enumerate(tokens[:, 4:].unbind(1)):
            with state.in_place():
                found, remembered = fast.step(token, remembered)
            assert close(found, expected[i])
            sizes.add(nbytes(remembered))
        assert len(sizes) <= 4  # a cache grows by doubling, not at every step
        assert close(fast(tokens[:, :3], remembered)[0], model(torch.cat([tokens, tokens[:, :3]], 1))[0][:, -3:])


def test_a_state_that_is_given_away_again_and_again_is_followed_wherever_it_is() -> None:
    """Steps that write over their state, others in between that do not, another session's, and a fork's."""
    model = make("mamba rwkv7 gated_delta_net hgrn rwkv7")
    fast, tokens = model.packed("fp32"), torch.randint(50, (12, 2))
    with torch.no_grad():
        expected, theirs = [], model.initial_state(2)
        for token in tokens:
            logits, theirs = model.step(token, theirs)
            expected.append(logits)
        ours, other = model.initial_state(2), model.initial_state(2)
        for i, token in enumerate(tokens):
            if i % 4 == 3:  # a step that leaves the given state alone, taken twice
                assert close(fast.step(token, ours)[0], expected[i])
                found, ours = fast.step(token, ours)
            else:
                with state.in_place():
                    found, ours = fast.step(token, ours)
            assert close(found, expected[i])
            if i % 5 == 4:
                with state.in_place():
                    _, other = fast.step(token, other)
            if i == 6:
                ours = state.fork(ours)


def test_generation_is_the_models_own() -> None:
    model = make("mamba attention hgrn")
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    assert model.packed("fp32").generate(prompts, max_new_tokens=12) == model.generate(prompts, max_new_tokens=12)


def test_one_thread_and_two_give_the_same_bits() -> None:
    layout = "mamba attention rwkv7 gla{channel=gelu_mlp} mla delta_product log_linear_attention"
    model = LanguageModel(ModelConfig(layout, 256, 500)).eval()
    fast, tokens, results = model.packed("int8"), torch.randint(500, (2, 6)), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.no_grad():
                remembered = model.initial_state(2)
                for token in tokens.unbind(1):
                    logits, remembered = fast.step(token, remembered)
            results.append([logits, *state.tensors(remembered)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_sessions_in_several_threads_do_not_disturb_each_other() -> None:
    fast = make("mamba*2 gla").packed("fp32")
    starts = torch.randint(50, (4,)).tolist()
    expected = [fast.generate([[start]], max_new_tokens=30) for start in starts]
    found: list[object] = [None] * 4

    def session(i: int) -> None:
        found[i] = fast.generate([[starts[i]]], max_new_tokens=30)

    threads = [threading.Thread(target=session, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_numbers_of_another_kind_take_the_models_own_way() -> None:
    model = make("gla")
    fast, token = model.packed("fp32"), torch.tensor([3, 4])
    wide = state.map_tensors(lambda x: x.double(), model.initial_state(2))
    with torch.no_grad():
        found, after = fast.step(token, wide)
        assert state.tensors(after)[0].dtype == torch.float64
        assert close(found, model.step(token, model.initial_state(2))[0])


def test_nan_in_a_state_is_seen() -> None:
    fast = make("mamba gla attention rwkv4").packed("fp32")
    with torch.no_grad():
        _, remembered = fast(torch.randint(50, (2, 4)))
        for tensor in state.tensors(remembered):
            if tensor.is_floating_point():
                spoilt = state.fork(remembered)
                for a, b in zip(state.tensors(remembered), state.tensors(spoilt)):
                    if a is tensor:
                        b[1] = float("nan")
                logits, _ = fast.step(torch.tensor([1, 2]), spoilt)
                assert logits[0].isfinite().all() and logits[1].isnan().any()
