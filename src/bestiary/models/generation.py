"""Continuing prompts: prefill by segments, then step by step. A row of a batch gets what it would get alone."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bestiary import state as states
from bestiary.errors import UsageError
from bestiary.models.sampling import Sampling, draw, penalise, probabilities

if TYPE_CHECKING:
    from bestiary.models.language_model import LanguageModel, ModelState

PREFILL = 1024  # tokens of a prompt at a time: bounds memory, changes nothing


def generate(
    model: "LanguageModel", tokens: Tensor | list[list[int]], *, lengths: Tensor | None = None, **options: Any
) -> Tensor | list[list[int]]:
    """Prompts and their continuations.

    Args:
        tokens: (batch, time) prompts, or a list of lists of any lengths.
        lengths: real tokens of each row, where a tensor is right-padded.
        options: as for `stream`.

    Returns:
        For a list: a list, each row its prompt and what follows, up to and including its eos. For a tensor: a tensor of
        the same kind, each row its prompt followed by its continuation, then filled with its last token.
    """
    prompts = _rows(tokens, lengths)
    eos = _eos_ids(options.get("eos"))
    rows = [list(prompt) for prompt in prompts]
    done = [False] * len(rows)
    for step in stream(model, prompts, **options):
        for i, token in enumerate(step.tolist()):
            if not done[i]:
                rows[i].append(token)
                done[i] = token in eos
    if not isinstance(tokens, Tensor):
        return rows
    longest = max(map(len, rows))
    return torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows], device=tokens.device)


def stream(
    model: "LanguageModel",
    tokens: Tensor | list[list[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    eos: int | Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    lengths: Tensor | None = None,
    state: "ModelState | None" = None,
) -> Iterator[Tensor]:
    """Yield the next token of every row, (batch,) int64, until all rows have met an eos or the limit is reached.

    A row that has met its eos repeats it. Row i draws its random numbers from the seed `seed + i` (or `seed[i]`), so it
    gets the same tokens alone with that seed.

    Args:
        max_new_tokens: most tokens per row.
        temperature, top_k, top_p, min_p, repetition_penalty: see bestiary.models.sampling.Sampling.
        eos: the token id, or ids, that end a row.
        seed: a number, or one for each row.
        state: what an earlier call remembered; the prompts continue from there. It is not written into.

    Raises:
        UsageError: an empty prompt, or an option out of its range.
    """
    how = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    prompts = _rows(tokens, lengths)
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise UsageError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one number, or one for each")
    model.check_tokens(min(map(min, prompts)), max(map(max, prompts)))
    return _forgotten(model, _continue(model, prompts, how, max_new_tokens, _eos_ids(eos), seeds, state))


def _forgotten(model: "LanguageModel", tokens: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same tokens; a packed model then lets go of the state."""
    try:
        yield from tokens
    finally:
        if model.decoder is not None:
            model.decoder.forget()


def _continue(
    model: "LanguageModel",
    prompts: list[list[int]],
    how: Sampling,
    max_new_tokens: int,
    eos: frozenset[int],
    seeds: list[int],
    state: "ModelState | None",
) -> Iterator[Tensor]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    done = torch.zeros(len(prompts), dtype=torch.bool)
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    logits, state = prefill(model, prompts, None if state is None else states.fork(state))
    token = torch.zeros(len(prompts), dtype=torch.int64)
    for step in range(max_new_tokens):
        if step:
            with torch.no_grad(), states.in_place():  # not across the yield: contexts would leak to the caller
                logits, state = model.step(token.to(logits.device), state)
        distribution = logits.detach().cpu()
        if how.repetition_penalty != 1:
            distribution = penalise(distribution, seen, how.repetition_penalty)
        uniform = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
        chosen = draw(probabilities(distribution, how), uniform) if how.temperature else distribution.argmax(1)
        token = torch.where(done, token, chosen)
        seen[torch.arange(len(prompts)), token] = True
        done |= torch.tensor([t in eos for t in token.tolist()])
        yield token.clone()
        if done.all():
            return


@torch.no_grad()
def prefill(
    model: "LanguageModel", prompts: list[list[int]], state: "ModelState | None" = None, *, segment: int = PREFILL
) -> tuple[Tensor, "ModelState"]:
    """Read prompts of any lengths, segment by segment; returns (logits after each one's last token, state)."""
    device = model.embedding.weight.device
    counts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(counts.max())
    equal = bool((counts == longest).all())
    padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    last = model.embedding.weight.new_zeros(len(prompts), model.config.d_model)
    for start in range(0, longest, segment):
        part = padded[:, start : start + segment]
        lengths = (counts - start).clamp(0, part.shape[1])
        hidden, state = model.hidden(part, state, lengths=None if equal else lengths)
        ends = (lengths - 1).clamp(min=0)
        last = torch.where((lengths > 0)[:, None], hidden[torch.arange(len(prompts), device=device), ends], last)
    assert state is not None  # a prompt has at least one token
    return model.head(last), state


def _rows(tokens: Tensor | list[list[int]], lengths: Tensor | None) -> list[list[int]]:
    """Prompts as lists, none of them empty."""
    if isinstance(tokens, Tensor) and (tokens.ndim != 2 or tokens.is_floating_point()):
        raise UsageError(f"prompts are (batch, time) integers, not {tokens.dtype} of shape {tuple(tokens.shape)}")
    rows = tokens.tolist() if isinstance(tokens, Tensor) else [list(row) for row in tokens]
    if lengths is not None:
        rows = [row[:n] for row, n in itertools.zip_longest(rows, lengths.tolist())]
    if not rows or not all(rows):
        raise UsageError("a prompt is empty: give every row at least one token (the end-of-text token will do)")
    return rows


def _eos_ids(eos: int | Sequence[int] | None) -> frozenset[int]:
    return frozenset() if eos is None else frozenset([eos]) if isinstance(eos, int) else frozenset(eos)
