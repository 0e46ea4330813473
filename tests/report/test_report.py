"""Results are read back whole, and the page, the pictures and the tables are made from them alone."""

import re
from html.parser import HTMLParser

import pytest
from report.synthetic import ARCHS, CONTEXTS, records, write

from bestiary.errors import UsageError
from bestiary.report import html, plots, table, write_report
from bestiary.report.results import read


class Checker(HTMLParser):
    """Collects tags that stay open, and every address that a browser would load."""

    VOID = frozenset({"meta", "link", "br", "img", "path", "use", "rect"})

    def __init__(self):
        super().__init__()
        self.open, self.loads = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def checked(text):
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    return checker


@pytest.mark.parametrize(
    "options",
    [{}, {"seeds": 3}, {"diverged": "gla"}, {"task": True}, {"finished": False}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_the_page_is_whole_and_loads_nothing_from_elsewhere(tmp_path, options):
    text = write_report(write(tmp_path, records(**options))).read_text(encoding="utf-8")
    assert all(address.startswith(("#", "data:")) for address in checked(text).loads)
    assert "<script" not in text and "@import" not in text and not re.search(r"url\((?!#)", text)


def test_what_models_wrote_cannot_act_on_the_page(tmp_path):
    text = html.page(read(write(tmp_path, records())))
    assert "&lt;script&gt;alert(" in text and "Some CPU &lt;i&gt;" in text


def test_every_picture_is_a_file_of_its_own(tmp_path):
    write_report(write(tmp_path, records()))
    for name in ("loss", "recall", "state", "decode", "overview"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_in_the_page_take_the_colour_of_its_text(tmp_path):
    results = read(write(tmp_path, records()))
    for plot in plots.PLOTS:
        text = plots.svg(results, plot)
        assert plots.INK not in text and "currentColor" in text


def test_the_same_results_make_the_same_page(tmp_path):
    write(tmp_path, records())
    assert html.page(read(tmp_path)) == html.page(read(tmp_path))


def test_the_tables_hold_every_model_and_every_context(tmp_path):
    results = read(write(tmp_path, records()))
    quality, costs = table.quality(results), table.costs(results)
    assert [row[0] for row in quality.rows] == [*ARCHS, "6-gram", "xz", "chance"]
    assert len(costs.rows) == 3 * len(ARCHS) and len(costs.columns) == 2 + len(CONTEXTS)
    assert costs.rows[0] == ("reading, tok/s", "attention", "23.3 k", "19.6 k", "12.6 k*", "5.2 k~")


def test_scores_carry_intervals_from_three_seeds_on(tmp_path):
    assert table.score(read(write(tmp_path / "1", records(seeds=1))), "mamba") == "2.220"
    assert table.score(read(write(tmp_path / "3", records(seeds=3))), "mamba") == "2.220 ± 0.025"
    assert table.score(read(write(tmp_path / "d", records(diverged="gla"))), "gla") == "diverged"


def test_a_torn_last_line_is_passed_over_and_a_broken_one_named(tmp_path):
    write(tmp_path, records(), torn='{"kind": "run", "arch"')
    assert read(tmp_path).finished
    write(tmp_path, records(), torn="no json\n")
    with pytest.raises(UsageError, match=f"line {len(records()) + 1}"):
        read(tmp_path)


def test_a_later_line_replaces_an_earlier_one_of_the_same_run(tmp_path):
    again = {"kind": "run", "arch": "mamba", "seed": 0, "lr": 0.01, "bpb": 9.0, "diverged": False}
    results = read(write(tmp_path, [*records(), again]))
    assert results.bpb("mamba") == [9.0]


@pytest.mark.parametrize("content", [None, "", '{"kind": "floor", "name": "xz", "bpb": 2}\n'])
def test_a_folder_without_a_comparison_is_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / "results.jsonl").write_text(content)
    with pytest.raises(UsageError, match="holds no comparison"):
        read(tmp_path)
