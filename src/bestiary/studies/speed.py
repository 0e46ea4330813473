"""How fast models are here: each measurement goes round all of them in turn, so that noise hits all alike.

Prefill and decoding are measured as far as time allows, and computed at longer contexts: the time of reading a token
grows as its FLOPs do; that of writing one is fitted as a + b * context (no cost of these models grows faster), with
b = 0 where the state has stopped growing.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bestiary import state as states
from bestiary.models import LanguageModel
from bestiary.models.costs import costs as costs_of
from bestiary.models.costs import total

Spread = dict[str, float]


def interleaved(tasks: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run each task once a round, in turn; every task returns what it measured."""
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            found[name].append(task())
    return found


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest of some measurements."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "repeats": len(values),
    }


class Reader:
    """One model's measurements at one context: reading the context, then decoding after it."""

    def __init__(self, model: LanguageModel, context: int, *, decode_steps: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.model, self.context, self.decode_steps = model, context, decode_steps
        self.tokens = torch.randint(model.config.vocab_size, (1, context), generator=generator)
        self.state: Any = None

    @torch.no_grad()
    def prefill(self) -> float:
        """Tokens a second of reading the context, the last token's logits included."""
        start = time.perf_counter()
        hidden, self.state = self.model.hidden(self.tokens)
        self.model.head(hidden[:, -1])
        return self.context / (time.perf_counter() - start)

    @torch.no_grad()
    def decode(self) -> float:
        """Tokens a second of steps after the context (a first step, which may prepare, is not counted)."""
        state, token = states.fork(self.state), self.tokens[:, 0]
        with states.in_place():
            _, state = self.model.step(token, state)
            start = time.perf_counter()
            for _ in range(self.decode_steps):
                _, state = self.model.step(token, state)
        return self.decode_steps / (time.perf_counter() - start)


def costs(
    models: dict[str, LanguageModel],
    contexts: Sequence[int],
    *,
    allowance: float,
    rounds: int = 5,
    decode_steps: int = 16,
    on_progress: Callable[[int], None] = lambda context: None,
) -> list[dict[str, Any]]:
    """Prefill and decode speed of all models at each context, shortest first.

    A context that would take all models together more than `allowance` seconds gets fewer repeats, and is computed
    where even one would take longer; the shortest is always measured.

    Returns one record a model and context: arch, context, how ("measured", "few steps" where fewer than `rounds`
    repeats were made, "computed"), prefill_tokens_per_second, decode_tokens_per_second, state_bytes.
    """
    records: list[dict[str, Any]] = []
    seconds: dict[str, dict[str, dict[int, float]]] = {name: {"prefill": {}, "decode": {}} for name in models}
    for context in sorted(contexts):
        on_progress(context)
        measured = {}
        repeats = rounds
        if records:
            once = sum(_predict(models[name], seconds[name], context, decode_steps) for name in models)
            repeats = affordable(rounds, once, allowance)
        if repeats:
            readers = {name: Reader(model, context, decode_steps=decode_steps) for name, model in models.items()}
            prefill = interleaved({name: reader.prefill for name, reader in readers.items()}, repeats)
            decode = interleaved({name: reader.decode for name, reader in readers.items()}, repeats)
            for name in models:
                measured[name] = (spread(prefill[name]), spread(decode[name]))
                seconds[name]["prefill"][context] = 1 / measured[name][0]["median"]
                seconds[name]["decode"][context] = 1 / measured[name][1]["median"]
        for name, model in models.items():
            state_bytes = sum(part.state_nbytes(context) for part in _parts(model))
            how = "computed" if not repeats else "measured" if repeats == rounds else "few steps"
            if name in measured:
                read, write = measured[name]
            else:
                read = {"median": 1 / reading(model, seconds[name]["prefill"], context)}
                write = {"median": 1 / writing(model, seconds[name]["decode"], context)}
            records.append(
                {
                    "arch": name,
                    "context": context,
                    "how": how,
                    "prefill_tokens_per_second": read,
                    "decode_tokens_per_second": write,
                    "state_bytes": state_bytes,
                }
            )
    return records


def affordable(rounds: int, once: float, allowance: float) -> int:
    """How many of some rounds fit, if one takes `once` seconds."""
    return rounds if once * rounds <= allowance else int(allowance / once)


def reading(model: LanguageModel, seconds: dict[int, float], context: int) -> float:
    """Seconds of reading a token at a longer context: from the longest measured one, as the FLOPs grow."""
    last = max(seconds)
    flops = {c: total(costs_of(model, (c,))).flops[c] for c in (last, context)}
    return seconds[last] * flops[context] / flops[last]


def writing(model: LanguageModel, seconds: dict[int, float], context: int) -> float:
    """Seconds of writing a token at a longer context: the last measured where no state grows, else on a line."""
    last = max(seconds)
    grows = {c: sum(part.state_nbytes(c) for part in _parts(model)) for c in (last, context)}
    return extrapolate(seconds, context, grows[last] == grows[context])


def extrapolate(seconds: dict[int, float], context: int, constant: bool) -> float:
    """Seconds a token at a longer context: the last measured where nothing grows, else a line through the last two."""
    *before, last = sorted(seconds)
    if constant or not before:
        return seconds[last]
    slope = max(0.0, (seconds[last] - seconds[before[-1]]) / (last - before[-1]))
    return seconds[last] + slope * (context - last)


def _predict(model: LanguageModel, seconds: dict[str, dict[int, float]], context: int, decode_steps: int) -> float:
    """Seconds that one measurement at a longer context will take."""
    read = context * reading(model, seconds["prefill"], context)
    return read + (decode_steps + 1) * writing(model, seconds["decode"], context)


def _parts(model: LanguageModel) -> list[Any]:
    return [part for block in model.blocks for part in (block.mixer, block.channel) if part is not None]


def machine() -> dict[str, Any]:
    """What the measurements were made on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(_memory_bytes() / 2**30, 1),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
