"""States that are written over, refused, or came from elsewhere: each is what the model's own step makes of it."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoding.kit import close, make
from ops.native.kit import needed
from torch import Tensor

from bestiary import mixers, state
from bestiary.decoding.piece import Sample
from bestiary.decoding.trace import Call
from bestiary.errors import UsageError
from bestiary.models.language_model import ModelState
from bestiary.ops.native.matvec import PackedMatrix

pytestmark = needed
CAUSAL = [name for name in mixers.names() if mixers.get(name).causal]


@pytest.mark.parametrize("name", CAUSAL)
def test_steps_that_write_over_the_state_from_the_very_beginning(name: str) -> None:
    model = make(f"{name}*2")
    fast = model.packed("fp32")
    for rows in (1, 2):
        ours, theirs = fast.initial_state(rows), model.initial_state(rows)
        for token in torch.randint(50, (4, rows)):
            with torch.no_grad():
                expected, theirs = model.step(token, theirs)
                with state.in_place():
                    found, ours = fast.step(token, ours)
            assert close(found, expected)


@pytest.mark.parametrize("name", CAUSAL)
def test_what_a_mixer_remembers_at_the_beginning_may_be_written_over(name: str) -> None:
    remembered = [x for x in state.tensors(make(name).initial_state(2)) if x.is_floating_point() and x.numel()]
    assert len({x.untyped_storage().data_ptr() for x in remembered}) == len(remembered)


@pytest.mark.parametrize("layout", ["gla gla", "gla hyena gla", "gla{n_heads=2} mamba gla{n_heads=2}"])
def test_layers_whose_states_are_the_same_memory_do_not_write_into_each_other(layout: str) -> None:
    model = make(layout)
    fast, tokens = model.packed("fp32"), torch.randint(50, (6, 1))
    with torch.no_grad():
        _, theirs = model(torch.randint(50, (1, 3)))
        theirs = type(theirs)((*theirs.layers[:-1], theirs.layers[0]))
        ours = theirs
        theirs = state.fork(theirs)
        for token in tokens:
            expected, theirs = model.step(token, theirs)
            with state.in_place():
                found, ours = fast.step(token, ours)
            assert close(found, expected)


@pytest.mark.parametrize("fault", ["dtype", "gradient", "shape", "tensors"])
def test_a_state_that_is_refused_is_left_as_it_was_and_the_session_before_goes_on(fault: str) -> None:
    """Layers before the one at fault must not have taken their step, in either session."""
    wrong = {
        "dtype": lambda x: x.double() if x.is_floating_point() else x,
        "gradient": lambda x: x.clone().requires_grad_() if x.is_floating_point() else x,
        "shape": lambda x: x[..., :-1].clone(),
    }
    for layout in ("mamba*2", "mamba hyena mamba", "gla attention gla"):
        model = make(layout)
        fast, token = model.packed("fp32"), torch.tensor([3])
        with torch.no_grad(), state.in_place():
            _, ours = fast(torch.randint(50, (1, 5)))
            _, other = fast(torch.randint(50, (1, 4)))
            *layers, last = other.layers
            last = state.Empty() if fault == "tensors" else state.map_tensors(wrong[fault], last)
            _, ours = fast.step(token, ours)
            expected, _ = model.step(token, state.fork(ours))
            faulty = type(ours)((*layers, last))
            kept = state.fork(faulty)
            if fault in ("dtype", "gradient"):  # the model itself takes the step
                assert close(fast.step(token, faulty)[0], model.step(token, kept)[0])
            else:
                with pytest.raises(UsageError):
                    fast.step(token, faulty)
                assert all(map(torch.equal, state.tensors(faulty), state.tensors(kept)))
            del other, layers, last, faulty
            assert close(fast.step(token, ours)[0], expected)


@pytest.mark.parametrize("position", [-10_000_000, -1, 6, 1 << 40])
def test_positions_that_a_cache_cannot_have_are_refused(position: int) -> None:
    """A file may hold any number; the kernel takes it as an offset."""
    fast, token = make("attention").packed("fp32"), torch.tensor([1, 2])
    with torch.no_grad():
        _, remembered = fast(torch.randint(50, (2, 5)))
        state.tensors(remembered)[2][0] = position
        with pytest.raises(UsageError, match="positions"):
            fast.step(token, remembered)
        with state.in_place(), pytest.raises(UsageError, match="positions"):
            fast.step(token, remembered)


def turned(x: Tensor) -> Tensor:
    """The same numbers, time first in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def longer(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_full((x.shape[0], 2, *x.shape[2:]), 9.0)], 1)


@pytest.mark.parametrize("keys", [longer, turned, torch.clone, lambda x: turned(longer(x))])
@pytest.mark.parametrize("values", [longer, turned, torch.clone, lambda x: turned(longer(x))])
def test_keys_and_values_may_lie_in_memory_each_in_its_own_way(
    keys: Callable[[Tensor], Tensor], values: Callable[[Tensor], Tensor]
) -> None:
    model = make("attention")
    fast = model.packed("fp32")
    with torch.no_grad():
        _, theirs = model(torch.randint(50, (2, 5)))
        cache = theirs.layers[0].mixer
        cache = cache._replace(keys=keys(cache.keys), values=values(cache.values), position=cache.position.clone())
        ours = type(theirs)((theirs.layers[0]._replace(mixer=cache),))
        for token in torch.randint(50, (4, 2)):
            expected, theirs = model.step(token, theirs)
            assert close(fast.step(token, ours)[0], expected)
            with state.in_place():
                found, ours = fast.step(token, ours)
            assert close(found, expected)


@pytest.mark.parametrize("layout", ["gla", "attention", "hyena", "attention hyena"])
def test_a_state_is_left_alone_while_gradients_are_recorded(layout: str) -> None:
    fast, token = make(layout).packed("fp32"), torch.tensor([3])
    _, remembered = fast(torch.randint(50, (1, 5)))
    with state.in_place():
        assert not state.may_write()
        for _ in range(2):
            kept = state.fork(remembered)
            _, after = fast.step(token, remembered)
            assert all(map(torch.equal, state.tensors(remembered), state.tensors(kept)))
            remembered = after


def alive(kind: type) -> list[Any]:
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is kind]


def test_a_decoder_keeps_one_state_at_most_and_none_after_generation() -> None:
    fast, before = make("mamba*2").packed("fp32"), len(alive(ModelState))
    with torch.no_grad(), state.in_place():
        for rows in (1, 2, 3):
            fast.step(torch.zeros(rows, dtype=torch.int64), fast.initial_state(rows))
    assert len(alive(ModelState)) <= before + 1
    for prompts in ([[1, 2]], [[1, 2], [3]]):
        fast.generate(prompts, max_new_tokens=3)
        assert len(alive(ModelState)) == before
    tokens = fast.stream([[1, 2]], max_new_tokens=9)
    next(tokens), next(tokens)
    del tokens
    assert len(alive(ModelState)) == before


def test_programs_for_other_numbers_of_rows_share_their_matrices_and_keep_no_sample() -> None:
    fast = make("lstm gru").packed("fp32")
    assert fast.decoder is not None and fast.decoder.report(1) == [None] * 3
    before = len(alive(PackedMatrix))
    for rows in (2, 5):
        assert fast.decoder.report(rows) == [None] * 3
    assert len(alive(PackedMatrix)) == before
    assert not alive(Call) and not alive(Sample)
