"""The pictures of a comparison. Each model keeps one colour, line and marker in all of them.

Colours are told apart by most colour-blind readers (Okabe and Ito, 2008); models that attend to their whole past are
dashed. Drawn twice: on white for PNG files, and with the ink of the page for the report, which may be dark.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from bestiary.data.files import write_whole
from bestiary.report import format
from bestiary.report.results import Results

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999", "#9467BD", "#8C6D1F")
MARKERS = "osD^vPX<>h"
INK = "#123457"  # stands for the page's own text colour; replaced in SVG
SIZE = (5.2, 3.7)
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.18,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "svg.fonttype": "none",
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}


@dataclass(frozen=True)
class Plot:
    """A picture: its file name, what it shows in words (for those who cannot see it), and how to draw it."""

    name: str
    text: str
    draw: Callable[[Results, Axes], None]
    has_data: Callable[[Results], bool]


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Write each picture as PNG, and overview.png with all of them; returns the paths."""
    paths = []
    with matplotlib.rc_context(STYLE):
        for plot in available(results):
            figure = Figure(figsize=SIZE, layout="constrained")
            axes = figure.subplots()
            plot.draw(results, axes)
            _legend(results, axes)
            paths.append(_save(figure, folder / f"{plot.name}.png"))
        paths.append(_save(_overview(results), folder / "overview.png"))
    return paths


def svg(results: Results, plot: Plot) -> str:
    """A picture as an inline SVG whose text and axes take the colour of the text around it."""
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    ink: dict[Any, Any] = dict.fromkeys(inked, INK) | {"svg.hashsalt": plot.name}
    with matplotlib.rc_context(STYLE | ink):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        plot.draw(results, axes)
        _legend(results, axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def available(results: Results) -> list[Plot]:
    """The pictures that there are results for."""
    return [plot for plot in PLOTS if plot.has_data(results)]


def _overview(results: Results) -> Figure:
    plots = available(results)
    rows = max(1, (len(plots) + 1) // 2)
    figure = Figure(figsize=(2 * SIZE[0], rows * 0.85 * SIZE[1] + 0.7), layout="constrained")
    all_axes = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes in all_axes[len(plots) :]:
        axes.axis("off")
    for plot, axes in zip(plots, all_axes):
        plot.draw(results, axes)
    shown = {arch: line for axes in all_axes for line, arch in zip(*axes.get_legend_handles_labels())}
    archs = [arch for arch in results.archs if arch in shown]
    figure.legend([shown[arch] for arch in archs], archs, loc="outside lower center", ncols=min(7, max(1, len(archs))))
    return figure


def _look(results: Results, arch: str) -> dict:
    i = results.archs.index(arch)
    style = "--" if results.models[arch].attends else ("-", "-.", ":")[min(2, i // len(COLOURS))]
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": style, "label": arch}


def _marked(results: Results, arch: str) -> dict:
    return _look(results, arch) | {"marker": MARKERS[results.archs.index(arch) % len(MARKERS)]}


def _legend(results: Results, axes: Axes) -> None:
    if len(results.archs) > 1 and axes.get_legend_handles_labels()[0]:
        figure = axes.get_figure()
        assert figure is not None
        columns = 4 if max(map(len, results.archs)) < 14 else 2 if max(map(len, results.archs)) < 40 else 1
        figure.legend(loc="outside lower center", ncols=columns)


def _loss(results: Results, axes: Axes) -> None:
    lowest, highest = [], []
    for arch in results.archs:
        for i, run in enumerate(results.sound(arch)):
            look = _look(results, arch) | ({} if i == 0 else {"label": None, "alpha": 0.4})
            axes.plot([x for x, _ in run.curve], [y for _, y in run.curve], **look)
            late = [y for _, y in run.curve[len(run.curve) // 10 :]]
            lowest.append(min(late, default=0.0))
            highest.append(max(late, default=1.0))
    for i, floor in enumerate(sorted(results.floors, key=lambda floor: floor.bpb)):
        axes.axhline(floor.bpb, color=matplotlib.rcParams["text.color"], linewidth=0.8, linestyle=(0, (1, 2)))
        _level_label(axes, floor.name, floor.bpb, below=i == 0 and len(results.floors) > 1)
        lowest.append(floor.bpb)
        highest.append(floor.bpb)
    low, high = min(lowest), max(highest)
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set(title="Learning", xlabel="training tokens", ylabel="training loss, bits per byte")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format.count(x)))


def _recall(results: Results, axes: Axes) -> None:
    for arch in results.archs:
        for i, recall in enumerate(results.recalls.get(arch, [])):
            look = _marked(results, arch) | ({} if i == 0 else {"label": None, "alpha": 0.4})
            axes.plot([x for x, _ in recall.curve], [100 * y for _, y in recall.curve], **look)
    chance = (results.study.get("recall") or {}).get("chance")
    if chance is not None:
        axes.axhline(100 * chance, color=matplotlib.rcParams["text.color"], linewidth=0.8, linestyle=(0, (1, 2)))
        _level_label(axes, "chance", 100 * chance)
    axes.set_ylim(-3, 103)
    axes.set(title="Recall in context", xlabel="training steps of the probe", ylabel="right answers, %")


def _state(results: Results, axes: Axes) -> None:
    for arch in results.archs:
        sizes = [(c, size) for c in results.contexts if (size := results.state_bytes(arch, c))]
        axes.plot([c for c, _ in sizes], [size for _, size in sizes], **_marked(results, arch))
    _by_context(results, axes)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: format.size(y)))
    axes.set(title="Memory of one sequence", xlabel="tokens of context", ylabel="state")


def _decode(results: Results, axes: Axes) -> None:
    computed = False
    for arch in results.archs:
        found = [results.costs[arch, c] for c in results.contexts if (arch, c) in results.costs]
        look = _marked(results, arch)
        axes.plot([cost.context for cost in found], [1000 / cost.decode.median for cost in found], **look)
        late = [cost for cost in found if cost.how == "computed"]
        computed = computed or bool(late)
        # a computed point is hollow
        hollow = {"marker": look["marker"], "color": look["color"], "markerfacecolor": "white", "linestyle": "none"}
        axes.plot([cost.context for cost in late], [1000 / cost.decode.median for cost in late], **hollow)
    _by_context(results, axes)
    axes.set_ylim(bottom=0)
    label = "ms a token" + (", hollow: computed" if computed else "")
    axes.set(title="Time to write a token", xlabel="tokens of context", ylabel=label)


def _level_label(axes: Axes, text: str, y: float, *, below: bool = False) -> None:
    """Names a horizontal line at its right end, above it or below."""
    side = "top" if below else "bottom"
    axes.annotate(text, (1, y), xycoords=("axes fraction", "data"), ha="right", va=side, fontsize=8)


def _by_context(results: Results, axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(results.contexts, [format.context(context) for context in results.contexts])
    axes.xaxis.set_minor_locator(NullLocator())


PLOTS = (
    Plot(
        "loss",
        "Loss on the training text, against tokens; dotted: floors on the held-out text.",
        _loss,
        lambda results: any(results.sound(arch) for arch in results.archs),
    ),
    Plot(
        "recall",
        "Right answers of the recall probe while it trains; dotted: chance.",
        _recall,
        lambda results: bool(results.recalls),
    ),
    Plot(
        "state",
        "What a sequence keeps in memory after so many tokens.",
        _state,
        lambda results: any(results.state_bytes(arch, c) for arch in results.archs for c in results.contexts),
    ),
    Plot(
        "decode",
        "Time for one more token after so many tokens of context.",
        _decode,
        lambda results: bool(results.costs),
    ),
)


def _save(figure: Figure, path: Path) -> Path:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, facecolor="white")
    write_whole(path, file.getvalue())
    return path
