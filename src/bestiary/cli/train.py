"""`bestiary train`: a language model of any layout, on any text."""

import json
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bestiary import LanguageModel, ModelConfig, hub
from bestiary.cli.common import parse, write_json
from bestiary.data import Batches, Corpus, Tokenizer, load_corpus, shards, tokenizer, train_bpe
from bestiary.data.files import write_whole
from bestiary.errors import UsageError
from bestiary.evaluation import perplexity
from bestiary.ops.native.memory import keep_freed
from bestiary.training import StepInfo, TrainConfig, train
from bestiary.training.checkpoint import checkpoints
from bestiary.training.distributed import Place, join
from bestiary.training.log import read_log


@dataclass(frozen=True)
class Train:
    """Train a language model on text; checkpoints and a log go into a folder, from where --resume goes on exactly.

    Examples:
      bestiary train "mamba*4" --data book.txt --folder runs/mamba
      bestiary train "(hyena*3 attention)*2" --d-model 256 --tokenizer 4096 --train.steps 5000
      bestiary train "gla*6" --data texts/ --train.precision bf16 --train.schedule wsd
      bestiary train "mamba*4" --data book.txt --folder runs/mamba --resume
      torchrun --nproc-per-node 2 -m bestiary train "mamba*4"      several processes, one model: the same batches
    """

    layout: Annotated[str, tyro.conf.Positional]
    """Which mixer each layer has, e.g. "mamba*4"."""
    data: str = "default"
    """A corpus by name (default, shakespeare, kjv, pydoc), a text file, or a folder of them."""
    errors: str = "strict"
    """What to do with bytes that are not UTF-8: strict (report the first one) or replace."""
    folder: Path = Path("runs/train")
    """Where checkpoints, the log and the finished model go."""
    d_model: int = 128
    """Width of the model."""
    tokenizer: str = "bytes"
    """"bytes", a number (train a BPE of that vocabulary), or a tokenizer.json."""
    batch_size: int = 16
    """Rows of a batch, over all processes."""
    sequence_length: int = 256
    """Tokens of a row."""
    device: str = "auto"
    """Where to train: auto (CUDA where there is one, else the CPU), cpu, cuda, cuda:1, mps, xpu."""
    resume: bool = False
    """Go on from the folder's last checkpoint."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How to train."""
    json: Path | None = None
    """Write the result here too."""


def main(argv: list[str]) -> int:
    arguments = parse(Train, argv, "train")
    keep_freed()
    with join(arguments.device) as place:
        return _train(arguments, place)


def _train(arguments: Train, place: Place) -> int:
    console = Console(stderr=True, quiet=not place.leads)
    if place.leads:
        _check_folder(arguments)
    corpus = load_corpus(arguments.data, errors=arguments.errors)
    if corpus.note:
        console.print(f"[yellow]{corpus.note}[/yellow]", highlight=False)
    if place.leads:  # it prepares what the others then find
        shards.build(corpus.train, _tokenizer(arguments, corpus), arguments.folder / "data")
    place.wait()
    tokens = _tokenizer(arguments, corpus)
    data = shards.build(corpus.train, tokens, arguments.folder / "data")
    torch.manual_seed(arguments.train.seed)
    model = LanguageModel(ModelConfig(arguments.layout, arguments.d_model, tokens.vocab_size)).to(place.device)
    batches = Batches(data, arguments.batch_size, arguments.sequence_length, arguments.train.seed)
    held_out = tokens.encode(corpus.validation_text)[: 1 << 16]
    console.print(
        f"{model.n_parameters():,} parameters; {len(data):,} tokens of {corpus.name} to train on, "
        f"{len(held_out):,} held out ({corpus.held_out}); on {place.device}"
        + (f", {place.world} processes" if place.world > 1 else ""),
        highlight=False,
    )

    def evaluate(model: LanguageModel) -> dict[str, float]:
        return perplexity(model, held_out, tokens, window=arguments.sequence_length).to_dict()

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill saves, too
    with _progress(console) as progress:
        done = _last_step(arguments.folder)
        task = progress.add_task("training", total=arguments.train.steps, completed=done, loss="", speed="")

        def show(info: StepInfo) -> None:
            progress.update(
                task, completed=info.step, loss=f"loss {info.loss:.3f}", speed=f"{info.tokens_per_second:,.0f} tokens/s"
            )

        try:
            result = train(
                model,
                batches,
                arguments.train,
                folder=arguments.folder,
                tokenizer=tokens,
                resume=arguments.resume,
                on_step=show,
                evaluate=evaluate,
            )
        except KeyboardInterrupt:
            progress.stop()
            console.print(f"stopped and saved in {arguments.folder}; the same command with --resume goes on")
            return 130
    if not place.leads:
        return 0
    model.eval()
    hub.save(model, tokens, arguments.folder / "model")
    found = result.evaluations[-1] if result.evaluations else _last_evaluation(arguments.folder)
    if found:
        console.print(f"held-out text: {found['bits_per_byte']:.4f} bits per byte")
    console.print(f"the model is in {arguments.folder / 'model'}: bestiary generate {arguments.folder / 'model'}")
    write_json(arguments.json, {"steps": result.step, "tokens": result.tokens, "evaluation": found})
    return 0


def _check_folder(arguments: Train) -> None:
    """Refuse a folder that holds another run, before any work."""
    saved = checkpoints(arguments.folder)
    if saved and not arguments.resume:
        raise UsageError(f"{arguments.folder} holds a run already: add --resume, or choose another --folder")
    wanted = {
        "layout": arguments.layout,
        "data": arguments.data,
        "d_model": arguments.d_model,
        "tokenizer": arguments.tokenizer,
        "batch_size": arguments.batch_size,
        "sequence_length": arguments.sequence_length,
    }
    path = arguments.folder / "run.json"
    if saved and path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{key} was {known.get(key)!r}, now {wanted[key]!r}" for key in wanted if known.get(key) != wanted[key]
        ]
        if changed:
            raise UsageError(f"{arguments.folder} holds another run: {'; '.join(changed)}")
    else:
        write_whole(path, json.dumps(wanted, indent=2))


def _tokenizer(arguments: Train, corpus: Corpus) -> Tokenizer:
    """The tokenizer that was asked for; a BPE is trained once and kept in the folder."""
    if not arguments.tokenizer.isdigit():
        return tokenizer.load(arguments.tokenizer)
    place = arguments.folder / "tokenizer"
    if not (place / tokenizer.JSON_FILE).exists():
        place.mkdir(parents=True, exist_ok=True)
        train_bpe(list(corpus.train), int(arguments.tokenizer)).save(place)
    return tokenizer.load(place)


def _last_step(folder: Path) -> int:
    saved = checkpoints(folder)
    return int(saved[-1].name[5:]) if saved else 0


def _last_evaluation(folder: Path) -> dict[str, Any]:
    found = [line for line in read_log(folder) if "bits_per_byte" in line]
    return found[-1] if found else {}


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=console,
    )
