"""`bestiary compare`: the main job, with its progress, its tables and its verdict."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bestiary import report
from bestiary.cli.common import parse, write_json
from bestiary.report import table
from bestiary.studies import compare as study
from bestiary.studies.compare import CompareConfig


@dataclass(frozen=True)
class Compare:
    """Train several architectures of the same size on the same text; compare quality, recall, speed and memory.

    Writes results.jsonl, pictures and report.html into a folder. Interrupted, the same command goes on where it was.

    Examples:
      bestiary compare                                              seven architectures, the default text, 5 minutes
      bestiary compare --data book.txt --minutes 30                 your text; three seeds, with intervals
      bestiary compare --arch attention mamba "(gla*3 attention)*1"  these, by name or as layouts
      bestiary compare --task pairs.jsonl                           your task: lines of {"prompt": ..., "answer": ...}
      bestiary compare --mixer mypackage.mixers:Mine --arch attention mine
    """

    config: Annotated[CompareConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=CompareConfig)
    restart: bool = False
    """Throw away what the folder holds of an earlier comparison."""
    json: Path | None = None
    """Write the verdict and the scores here too."""


def main(argv: list[str]) -> int:
    arguments = parse(Compare, argv, "compare")
    if arguments.restart:
        study.restart(arguments.config.folder)
    errors = Console(stderr=True)
    try:
        with _Bar(errors) as bar:
            folder = study.compare(arguments.config, bar)
    except KeyboardInterrupt:
        errors.print("stopped; run the same command to go on from here")
        return 130
    page = report.write_report(folder)
    results = report.read(folder)
    console = Console()
    if note := (results.study.get("corpus") or {}).get("note"):
        console.print(note, style="yellow", highlight=False)
    console.print(table.quality(results).rich())
    console.print(table.costs(results).rich())
    findings = report.verdict(results)
    for finding in findings:
        console.print(f"[bold]{finding.topic}[/bold]  {finding.text}", highlight=False)
    console.print(f"\n{page}", highlight=False, soft_wrap=True)
    scores = {arch: {"bpb": results.bpb(arch), "recall": results.accuracies(arch)} for arch in results.archs}
    write_json(arguments.json, {"scores": scores, "verdict": [asdict(finding) for finding in findings]})
    return 0


class _Bar(study.Progress):
    """Phases as they pass, a bar while it trains."""

    def __init__(self, console: Console):
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self.progress = Progress(
            *columns,
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("starting", total=None)

    def __enter__(self) -> "_Bar":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def phase(self, text: str) -> None:
        if not self.progress.console.is_terminal:
            self.progress.console.print(text, highlight=False)
        self.progress.reset(self.task, description=text, total=None)

    def advance(self, done: float, of: float) -> None:
        self.progress.update(self.task, completed=done, total=of)
