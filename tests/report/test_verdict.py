"""The verdict claims what the numbers show, and no more."""

import math

import pytest
from report.synthetic import records, write

from bestiary.report.results import read
from bestiary.report.statistics import LEAST_SEEDS, binomial, difference, half_width, t_quantile
from bestiary.report.verdict import verdict


@pytest.fixture
def findings(tmp_path):
    """The verdict of a synthetic study, by topic."""

    def make(**options):
        return {f.topic: f.text for f in verdict(read(write(tmp_path, records(**options))))}

    return make


@pytest.mark.parametrize("seeds", [1, 2])
def test_with_too_few_seeds_no_difference_is_shown_however_large_the_gap(findings, seeds):
    text = findings(seeds=seeds, changes={"mamba": 1.0})["Quality"]
    assert text.startswith("No difference shown") and "better" not in text


def test_a_gap_within_the_spread_over_seeds_is_no_difference(findings):
    text = findings(seeds=3, spread=0.2)["Quality"]
    assert "is better than" not in text and "No difference shown between mamba and" in text


def test_a_gap_beyond_the_spread_is_named_with_its_interval(findings):
    text = findings(seeds=3, spread=0.005, changes={"mamba": 2.0})["Quality"]
    assert "mamba is better than" in text and "hyena (by 0.400 ± " in text


def test_models_worse_than_counting_are_called_so(findings):
    assert findings(ngram=1.5)["Floors"].startswith("No model reached the better floor, 6-gram (1.500)")
    assert findings()["Floors"].startswith("Every model predicts")
    assert findings(ngram=2.3)["Floors"].startswith("mamba, gla and striped predict")


def test_recall_is_compared_with_chance_and_never_called_impossible(findings):
    text = findings()["Recall"]
    assert "solved by attention (97%), based (93%) and striped (95%)" in text
    assert "not above guessing among the values in context by hyena (14%) and rwkv4 (13%)" in text
    assert "never 'cannot'" in text and "Chance is 12.5%" in text


def test_whether_attention_is_needed_follows_from_the_best_of_either_kind(findings):
    topic = "Do I need attention?"
    assert "not shown either way" in findings()[topic]
    with_attention = findings(seeds=3, spread=0.002, changes={"attention": 1.9})[topic]
    assert "it helps: attention beats the best without it, mamba, by 0.320" in with_attention
    without = findings(seeds=3, spread=0.002)[topic]
    assert "no: mamba does without it and beats striped by 0.060" in without


def test_a_comparison_of_one_kind_says_that_it_cannot_tell(tmp_path):
    lines = [line for line in records() if line.get("arch") not in ("attention", "striped")]
    last = verdict(read(write(tmp_path, lines)))[-1]
    assert last.text.startswith("None of these models attends")


def test_a_diverged_model_has_no_score_and_the_rest_is_compared(findings):
    assert findings(diverged="gla")["Quality"].startswith("gla diverged: no score.")


def test_a_task_is_judged_by_exact_match_too(findings):
    found = findings(task=True)
    assert "Of 200 held-out prompts, attention answered 78.5% exactly right" in found["Exact match"]
    assert "Floors" not in found


def test_an_unfinished_study_has_a_verdict_on_what_is_there(findings):
    assert "Quality" in findings(finished=False)


@pytest.mark.parametrize(("degrees", "expected"), [(2, 4.30265273), (4, 2.77644511), (30, 2.04227246)])
def test_students_t_has_its_tabled_quantiles(degrees, expected):
    assert t_quantile(0.95, degrees) == pytest.approx(expected, rel=1e-4)


def test_an_interval_of_a_mean_is_the_textbook_one():
    values = [1.0, 2.0, 3.0]
    assert half_width(values) == pytest.approx(4.30265273 / math.sqrt(3), rel=1e-4)
    assert half_width(values[: LEAST_SEEDS - 1]) is None


def test_many_comparisons_widen_the_interval_and_equal_runs_have_none():
    a, b = [1.0, 1.1, 1.2], [2.0, 2.1, 2.2]
    one, many = difference(a, b), difference(a, b, comparisons=21)
    assert one[0] == many[0] == pytest.approx(-1.0) and many[1] > 2 * one[1] > 0
    assert difference([1.0] * 3, [2.0] * 3) == (-1.0, 0.0)


def test_the_interval_of_a_share_is_wilsons():
    low, high = binomial(0.5, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert binomial(0.0, 10) == (pytest.approx(0.0, abs=1e-15), pytest.approx(0.2775, abs=1e-4))
