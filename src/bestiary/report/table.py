"""The results of a comparison as tables, whose rows are decided here once for the terminal and the page."""

import statistics
from dataclasses import dataclass

import rich.table
from rich.markup import escape

from bestiary.report import format
from bestiary.report.results import Cost, Results
from bestiary.report.statistics import half_width

MARKS = {"measured": "", "few steps": "*", "computed": "~"}
LEGEND = "* few repeats   ~ computed from the shorter contexts"


@dataclass(frozen=True)
class Table:
    """A table of texts: `left` columns of words, then numbers; a line is drawn above the rows of `sections`."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    left: int = 1
    sections: tuple[int, ...] = ()
    note: str = ""

    def rich(self) -> rich.table.Table:
        """For the terminal."""
        table = rich.table.Table(title=self.title, title_justify="left", caption=self.note, caption_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i < self.left else "right")
        for i, row in enumerate(self.rows):
            if i in self.sections:
                table.add_section()
            table.add_row(*(escape(cell) for cell in row))
        return table


def quality(results: Results) -> Table:
    """A row an architecture: size, bits per byte, recall, speed of training; then the floors."""
    task = bool(results.task)
    columns = ["model", "parameters", "answer bits/byte" if task else "bits/byte"]
    columns += ["exact match"] if task else []
    columns += ["recall", "training"]
    rows: list[tuple[str, ...]] = []
    for arch, model in results.models.items():
        speed = results.train_speeds.get(arch)
        row = [arch, format.count(model.parameters), score(results, arch)]
        if task:
            matches = [run.exact_match for run in results.sound(arch) if run.exact_match is not None]
            row.append(format.percent(statistics.mean(matches) if matches else None))
        accuracies = results.accuracies(arch)
        row.append(format.percent(statistics.mean(accuracies) if accuracies else None))
        row.append(format.rate(speed.median if speed else None))
        rows.append(tuple(row))
    floors = [(floor.name, "", format.bits(floor.bpb), *([""] if task else []), "", "") for floor in results.floors]
    recall = results.study.get("recall") or {}
    if recall:
        guess = format.percent(recall["chance"])
        floors.append(("chance", "", "", *([""] if task else []), guess, ""))
    title = "What they learned" + (f" from {format.count(results.study['tokens'])} tokens" if results.study else "")
    return Table(title, tuple(columns), [*rows, *floors], sections=(len(rows),))


def score(results: Results, arch: str) -> str:
    """Bits per byte: the mean and its interval over seeds, or the one that there is."""
    values = results.bpb(arch)
    if not values:
        return "diverged" if results.runs.get(arch) else format.MISSING
    half = half_width(values)
    return format.bits(statistics.mean(values)) + (f" ± {half:.3f}" if half is not None else "")


def costs(results: Results) -> Table:
    """Reading, writing and remembering at each context length."""
    contexts = results.contexts
    quantities = {
        "reading, tok/s": lambda cost: format.count(cost.prefill.median) + MARKS[cost.how],
        "writing, tok/s": lambda cost: format.count(cost.decode.median) + MARKS[cost.how],
        "state": lambda cost: format.size(cost.state_bytes),
    }
    rows: list[tuple[str, ...]] = []
    sections: list[int] = []
    for quantity, show in quantities.items():
        sections.append(len(rows))
        for arch in results.archs:
            found: list[Cost | None] = [results.costs.get((arch, context)) for context in contexts]
            if any(found):
                rows.append((quantity, arch, *(show(cost) if cost else format.MISSING for cost in found)))
    columns = ("what", "model", *(f"at {format.context(context)}" for context in contexts))
    return Table("What they cost, by context length", columns, rows, 2, tuple(sections), _note(results))


def _note(results: Results) -> str:
    """What the marks mean, and how far repeats of a measurement lay apart."""
    speeds = [*results.train_speeds.values()]
    speeds += [speed for cost in results.costs.values() for speed in (cost.prefill, cost.decode)]
    ranges = [(s.high - s.low) / s.median for s in speeds if s.low is not None and s.high is not None and s.repeats > 1]
    if not ranges:
        return LEGEND
    typical, widest = format.percent(statistics.median(ranges)), format.percent(max(ranges))
    return f"{LEGEND}   repeats of a measurement: {typical} from lowest to highest, {widest} at worst"


def rates(results: Results) -> Table:
    """The learning rates that were tried, the loss at the end of each trial, the chosen one marked."""
    tried = sorted({trial.lr for trial in results.trials if trial.of == "text"})
    rows = []
    for arch in results.archs:
        chosen = {run.lr for run in results.runs.get(arch, [])}
        trials = [trial for trial in results.trials if trial.of == "text" and trial.arch == arch]
        cells = []
        for lr in tried:
            found = sorted((trial for trial in trials if trial.lr == lr), key=lambda trial: trial.steps)
            losses = ["diverged" if trial.diverged else format.bits(trial.loss) for trial in found]
            cells.append((", ".join(losses) or format.MISSING) + (" ✓" if lr in chosen and found else ""))
        if trials:
            rows.append((arch, *cells))
    columns = ("model", *(f"{lr:g}" for lr in tried))
    return Table("Learning rates: loss after each trial, nats a token (✓ taken)", columns, rows)


def models(results: Results) -> Table:
    """What was built."""
    rows: list[tuple[str, ...]] = [
        (model.arch, model.family, model.layout, str(model.d_model), f"{model.parameters:,}")
        for model in results.models.values()
    ]
    return Table("What was built", ("model", "family", "layout", "d_model", "parameters"), rows, 3)
