"""Reports: what a study's result files say, as a terminal table, pictures, a page and plain words.

Everything here is made from the result files alone, so a report can be made again, anywhere, also of a study that runs.
"""

from pathlib import Path

from bestiary.data.files import write_whole
from bestiary.report import html, plots
from bestiary.report.results import Results, read
from bestiary.report.verdict import Finding, verdict

__all__ = ["Finding", "Results", "read", "verdict", "write_report"]


def write_report(folder: Path) -> Path:
    """Write report.html and the pictures (PNG) into a study's folder; returns the page's path.

    Raises:
        UsageError: the folder holds no comparison.
    """
    results = read(folder)
    plots.draw_all(results, folder)
    page = folder / "report.html"
    write_whole(page, html.page(results))
    return page
