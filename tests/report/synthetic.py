"""Result files of a comparison that never ran, with the same lines that a real one writes."""

import json
import math
import random
from pathlib import Path
from typing import Any

Record = dict[str, Any]
CONTEXTS = (256, 2048, 8192, 32768)
# family, layout, attends, bits per byte, recall accuracy, seconds per step, state bytes a token kept and in all
ARCHS = {
    "attention": ("Transformer", "attention*4", True, 2.31, 0.97, 1.0, 2048, 0),
    "mamba": ("state-space model", "mamba*8", False, 2.22, 0.88, 1.6, 0, 140_000),
    "gla": ("gated linear attention", "gla*4", False, 2.25, 0.61, 1.1, 0, 110_000),
    "based": ("linear attention + window", "based attention{window=65}", False, 2.34, 0.93, 0.9, 0, 190_000),
    "hyena": ("long convolution", "hyena*4", False, 2.40, 0.14, 0.8, 1600, 0),
    "rwkv4": ("linear RNN", "rwkv4*4", False, 2.37, 0.13, 0.9, 0, 9_000),
    "striped": ("hybrid: 3 hyena, 1 attention", "(hyena*3 attention)*1", True, 2.28, 0.95, 0.9, 1700, 0),
}


def records(
    *,
    seeds: int = 1,
    diverged: str | None = None,
    task: bool = False,
    finished: bool = True,
    changes: dict[str, float] | None = None,
    spread: float = 0.01,
    ngram: float = 2.75,
) -> list[Record]:
    """All lines of a study, deterministic; `changes` replaces architectures' bits per byte."""
    rng = random.Random(0)
    config = {"arch": [], "data": "default", "task": "task.jsonl" if task else None, "minutes": 5.0, "tokens": None}
    config |= {"parameters": 250_000, "seeds": None, "batch_size": 16, "sequence_length": 256}
    config |= {"learning_rates": [0.002, 0.005, 0.012], "folder": "runs/compare", "workers": None, "mixer": []}
    lines: list[Record] = []
    for name, (family, layout, attends, *_, per_token, fixed) in ARCHS.items():
        lines.append(
            {"kind": "model", "arch": name, "layout": layout, "asked_layout": layout, "family": family}
            | {"attends": attends, "d_model": 96, "layers": 4, "parameters": rng.randrange(247_000, 253_000)}
            | {"flops_per_token": {str(c): 5e5 + (400 * c if per_token else 0) for c in CONTEXTS}}
            | {"state_bytes": {str(c): fixed + per_token * c for c in CONTEXTS}}
        )
    lines.append({"kind": "timing", "seconds_per_step": []})
    lines.append(
        {"kind": "study", "title": "compare", "started": "2026-11-24T02:00:00+00:00", "config": config}
        | {"machine": {"cpu": "Some CPU <i>", "cores": 2, "memory_gb": 23.4, "threads": 2, "workers": 2}}
        | {"versions": {"bestiary": "0.1.0", "torch": "2.13.0", "python": "3.11.7"}}
        | {
            "corpus": {
                "name": "shakespeare",
                "note": None,
                "licence": "public domain",
                "source": "https://example.org/t",
            }
        }
        | {"tokens": 819_200, "steps": 200, "trial_steps": [12, 24], "sequence_length": 256, "batch_size": 16}
        | {"seeds": list(range(seeds)), "tokenizer": "bytes", "vocab_size": 256}
        | {
            "recall": {"pairs": 8, "length": 64, "vocab": 512, "probes": 4096, "steps": 300, "chance": 0.125}
            | {"blind": 1 / 256, "description": "Multi-query associative recall: 8 pairs, then every key again."}
        }
    )
    lines[-1]["machine"]["platform"] = "Linux x86_64"
    lines[-1]["corpus"] |= {"train_bytes": 1_003_854, "validation_bytes": 65_536, "held_out": "the last tenth"}
    for name, (_, layout, _, bpb, accuracy, slow, *_) in ARCHS.items():
        bpb = (changes or {}).get(name, bpb)
        for rate in (0.002, 0.005, 0.012):
            failed = name == diverged and rate == 0.012
            loss = None if failed else 2.2 + abs(math.log(rate / 0.005)) / 10
            lines.append({"kind": "trial", "of": "text", "arch": name, "lr": rate, "steps": 24, "loss": loss})
            lines[-1] |= {"accuracy": None, "diverged": failed}
        for seed in range(seeds):
            found = {"kind": "run", "arch": name, "seed": seed, "lr": 0.005, "steps": 200, "layout": layout}
            if name == diverged:
                lines.append(found | {"diverged": True, "loss": None, "message": "loss is nan at step 31"})
            else:
                offset = (0.0, spread, -spread)[seed % 3]
                curve = [[4096 * i, bpb + 5.5 * i**-0.9 + rng.gauss(0, 0.02)] for i in range(1, 201, 3)]
                found |= {"diverged": False, "loss": 1.6, "seconds": 60 * slow, "tokens": 819_200, "curve": curve}
                found |= {"exact_match": 0.3 + accuracy / 2, "answer_nats": 1.2, "held_out": 200} if task else {}
                lines.append(found | {"model_folder": "x", "bpb": bpb + offset})
            curve = [[30 * i, 0.125 + (accuracy - 0.125) * max(0.0, (i - 4) / 6)] for i in range(1, 11)]
            lines.append(
                {"kind": "recall", "arch": name, "seed": seed, "lr": 0.003, "steps": 300, "layout": layout + "x"}
                | {"diverged": False, "accuracy": curve[-1][1], "loss": 1.0, "curve": curve, "parameters": 90_000}
            )
    if finished:
        if not task:
            lines.append({"kind": "floor", "name": "6-gram", "bpb": ngram, "detail": "Witten-Bell"})
            lines.append({"kind": "floor", "name": "xz", "bpb": 3.02, "detail": "what the text adds"})
        for name, (*_, slow, per_token, fixed) in ARCHS.items():
            lines.append({"kind": "train_speed", "arch": name, "tokens_per_second": measured(21_000 / slow, 3)})
            for context in CONTEXTS:
                reading = 24_000 / slow / (1 + (context / 9000 if per_token == 2048 else 0))
                writing = 420 / slow / (1 + (context / 6000 if per_token else 0))
                how = "measured" if context <= 2048 else "few steps" if context == 8192 else "computed"
                repeats = {"measured": 5, "few steps": 2, "computed": 0}[how]
                lines.append(
                    {"kind": "cost", "arch": name, "context": context, "how": how}
                    | {"prefill_tokens_per_second": measured(reading, repeats)}
                    | {"decode_tokens_per_second": measured(writing, repeats)}
                    | {"state_bytes": fixed + per_token * context}
                )
            if not task and name != diverged:
                text = f"ROMEO:\nThis is {name} & <script>alert('x')</script> speaking,\nto you.\n" * 2
                lines.append({"kind": "sample", "arch": name, "prompt": "\n", "text": text, "temperature": 0.8})
        lines.append({"kind": "finished", "seconds": 287.0})
    return lines


def measured(median: float, repeats: int) -> Record:
    """A speed as it is recorded: with its range where it was measured, alone where it was computed."""
    if not repeats:
        return {"median": median}
    return {"median": median, "min": 0.94 * median, "max": 1.05 * median, "repeats": repeats}


def write(folder: Path, lines: list[Record], torn: str = "") -> Path:
    """Write results.jsonl, perhaps with a torn last line; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines) + torn
    (folder / "results.jsonl").write_text(text, encoding="utf-8")
    return folder
