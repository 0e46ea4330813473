"""`bestiary info`: what a layout costs, before anything is trained."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table

from bestiary import channel_mixers, mixers
from bestiary.cli.common import load_language_model, parse, write_json
from bestiary.errors import UsageError
from bestiary.models import EncoderConfig, LanguageModel, MaskedLanguageModel, ModelConfig, presets
from bestiary.models.costs import CONTEXTS, Cost, costs, total
from bestiary.report.format import context, count, size


@dataclass(frozen=True)
class Info:
    """Parameters, forward FLOPs a token and bytes of state, layer by layer, at several context lengths.

    Without a layout: the mixers there are, with their options. Nothing is allocated: any size can be asked for.

    Examples:
      bestiary info
      bestiary info "(mamba*3 attention)*4" --d-model 768 --vocab-size 50280
      bestiary info runs/mymodel                   a folder that `bestiary train` wrote
      bestiary info stripedhyena-7b                a published shape, by name
      bestiary info m2-bert-80m-32k                another, of an encoder
      bestiary info "gla*12" --contexts 1024 65536
    """

    layout: Annotated[str | None, tyro.conf.Positional] = None
    """A layout, a folder with a trained model, or the name of a published shape."""
    d_model: int = 256
    """Width of the model."""
    vocab_size: int = 256
    """Number of token ids."""
    contexts: tuple[int, ...] = CONTEXTS
    """Context lengths to cost."""
    json: Path | None = None
    """Write the results here too."""


def main(argv: list[str]) -> int:
    arguments = parse(Info, argv, "info")
    console = Console()
    if arguments.layout is None:
        console.print(_mixers())
        return 0
    if any(context < 1 for context in arguments.contexts) or not arguments.contexts:
        raise UsageError(f"contexts must be positive numbers of tokens, not {list(arguments.contexts)}")
    model = _model(arguments.layout, arguments)
    parts = costs(model, arguments.contexts)
    config = model.config
    console.print(f"{config.layout}, d_model {config.d_model}, vocabulary {config.vocab_size}", highlight=False)
    console.print(_table(parts, arguments.contexts, "flops"))
    console.print(_table(parts, arguments.contexts, "state_bytes"))
    console.print("A multiply-add is two FLOPs; training takes three times as many. The state is in fp32.")
    write_json(arguments.json, {"config": config.to_dict(), "parts": [asdict(part) for part in [*parts, total(parts)]]})
    return 0


def _model(layout: str, arguments: Info) -> LanguageModel | MaskedLanguageModel:
    """The model that was asked for; one that is only counted holds no numbers."""
    if Path(layout).is_dir():
        return load_language_model(layout)[0]
    known = layout in presets.names()
    config = presets.get(layout) if known else ModelConfig(layout, arguments.d_model, arguments.vocab_size)
    with torch.device("meta"):
        return MaskedLanguageModel(config) if isinstance(config, EncoderConfig) else LanguageModel(config)


def _table(parts: list[Cost], contexts: tuple[int, ...], what: str) -> Table:
    """A line for each run of equal layers; `what` is "flops" (a token, forward) or "state_bytes"."""
    title, show = ("FLOPs a token, forward", count) if what == "flops" else ("state of one sequence", size)
    table = Table("layers", "part", title=title, title_justify="left")
    for column in ("parameters", *(f"at {context(length)}" for length in contexts)):
        table.add_column(column, justify="right")

    def row(label: str, part: Cost) -> None:
        table.add_row(label, part.name, count(part.parameters), *(show(getattr(part, what)[c]) for c in contexts))

    row("", parts[0])
    first = 1
    for i in range(1, len(parts) + 1):
        if i == len(parts) or parts[i] != parts[first]:
            row(f"{first}" if i == first + 1 else f"{first}-{i - 1}", parts[first])
            first = i
    table.add_section()
    row("", total(parts))
    return table


def _mixers() -> Table:
    table = Table(title="mixers", title_justify="left")
    for column in ("name", "what", "options and defaults", "followed by"):
        table.add_column(column)
    for registry in (mixers.registry, channel_mixers.registry):
        for name in registry.names():
            cls = registry.get(name)
            options = ", ".join(f"{key}={value}" for key, value in registry.options(name).items())
            after = (cls.channel_mixer or "-") if registry is mixers.registry else ""
            table.add_row(name, (cls.__doc__ or "").strip().splitlines()[0], options, after)
        table.add_section()
    return table
