"""The page of a comparison: one file, nothing loaded from elsewhere, no script; light or dark as the reader's is."""

import json
from html import escape

from bestiary.report import format, plots, table
from bestiary.report.results import Results
from bestiary.report.verdict import Finding, verdict

CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d5dae0; --back: #ffffff; --panel: #f5f7f9;
  --accent: #0060a0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #a0a8b2; --line: #3a424c; --back: #14181d;
  --panel: #1d232a; --accent: #6cb6ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 1.2rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.4rem 0 0.2rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 0.6rem; }
p { max-width: 46rem; margin: 0.5rem 0; }
.soft, figcaption, footer { color: var(--soft); font-size: 0.9rem; }
.answer { border-left: 4px solid var(--accent); background: var(--panel); padding: 0.7rem 1rem; margin: 1.2rem 0;
  max-width: 50rem; }
.answer strong { display: block; }
dl { max-width: 50rem; margin: 0; }
dt { font-weight: 600; margin-top: 0.8rem; }
dd { margin: 0.1rem 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
th.word, td.word { text-align: left; }
tr.section td { border-top: 2px solid var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
figure { margin: 0; min-width: 0; }
figure svg { width: 100%; height: auto; display: block; }
details { border-bottom: 1px solid var(--line); padding: 0.4rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); padding: 0.8rem; font-size: 0.85rem;
  margin: 0.5rem 0; }
code { overflow-wrap: anywhere; }
"""


def page(results: Results) -> str:
    """The whole document."""
    findings = verdict(results)
    parts = [
        _head(results, findings),
        _section("Pictures", _figures(results)),
        _section("Numbers", _table(table.quality(results)) + _table(table.costs(results)) + _how(results)),
        _section("What they write", _samples(results)),
        _section("How it was done", _method(results)),
        _section("What it shows", _findings(findings)),
    ]
    body = "\n".join(filter(None, parts))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(_title(results))}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def _title(results: Results) -> str:
    return f"{len(results.archs)} architectures on {_subject(results)}"


def _subject(results: Results) -> str:
    corpus = results.study.get("corpus") or {}
    return str(corpus.get("name") or results.task or "a text")


def _head(results: Results, findings: list[Finding]) -> str:
    study, corpus = results.study, results.study.get("corpus") or {}
    same = f"{format.count(study['tokens'])} training tokens each, the same in the same order, " if study else ""
    sizes = [model.parameters for model in results.models.values()]
    line = f"{same}{format.count(min(sizes))} to {format.count(max(sizes))} parameters"
    notes = [] if results.finished else ["This study has not finished: what is missing below is still to come."]
    if corpus.get("note"):
        notes.append(corpus["note"])
    answer = findings[-1] if findings else None
    return "\n".join(
        [
            f"<h1>{escape(_title(results))}</h1>",
            f'<p class="soft">{escape(line)}.</p>',
            *(f"<p><strong>{escape(note)}</strong></p>" for note in notes),
            f'<div class="answer"><strong>{escape(answer.topic)}</strong>{escape(answer.text)}</div>' if answer else "",
        ]
    )


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def _findings(findings: list[Finding]) -> str:
    items = "\n".join(f"<dt>{escape(f.topic)}</dt>\n<dd>{escape(f.text)}</dd>" for f in findings)
    return f"<dl>\n{items}\n</dl>" if items else ""


def _table(content: table.Table) -> str:
    if not content.rows:
        return ""

    def cells(row: tuple[str, ...], tag: str) -> str:
        kinds = [' class="word"' if i < content.left else "" for i in range(len(row))]
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row))

    rows = [
        f"<tr{' class=section' if i and i in content.sections else ''}>{cells(row, 'td')}</tr>"
        for i, row in enumerate(content.rows)
    ]
    note = f'<p class="soft">{escape(content.note)}</p>' if content.note else ""
    return (
        f"<p><strong>{escape(content.title)}</strong></p>\n"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(content.title)}">\n<table>\n'
        f"<thead><tr>{cells(content.columns, 'th')}</tr></thead>\n"
        f"<tbody>\n{chr(10).join(rows)}\n</tbody>\n</table>\n</div>\n{note}"
    )


def _how(results: Results) -> str:
    """How the numbers of the tables came about, in the reader's words."""
    if not results.study:
        return ""
    recall = results.study.get("recall") or {}
    lines = [
        "Bits per byte: how many bits the model needs for each byte of text that it did not train on; less is better."
        if not results.task
        else "Bits per byte: how many bits the model needs for each byte of the held-out answers; less is better.",
        recall.get("description", ""),
        "Reading is a whole context in one pass, writing is one token after another; state is what one sequence keeps. "
        "Speeds are medians of interleaved repeats.",
    ]
    return "".join(f'<p class="soft">{escape(line)}</p>' for line in lines if line)


def _figures(results: Results) -> str:
    figures = [
        f"<figure>\n{plots.svg(results, plot)}\n<figcaption>{escape(plot.text)}</figcaption>\n</figure>"
        for plot in plots.available(results)
    ]
    return f'<div class="plots">\n{chr(10).join(figures)}\n</div>' if figures else ""


def _samples(results: Results) -> str:
    items = []
    for i, sample in enumerate(results.samples.values()):
        opened = " open" if i == 0 else ""
        items.append(
            f"<details{opened}><summary>{escape(sample.arch)}</summary>\n<pre>{escape(sample.text)}</pre></details>"
        )
    if not items:
        return ""
    sample = next(iter(results.samples.values()))
    how = f"Prompt {sample.prompt!r}, temperature {sample.temperature}, the same seed for all."
    return f'<p class="soft">{escape(how)}</p>\n' + "\n".join(items)


def _method(results: Results) -> str:
    study = results.study
    parts = [_table(table.models(results)), _table(table.rates(results))]
    if study:
        machine, versions, corpus = study["machine"], study["versions"], study.get("corpus") or {}
        took = f", {format.duration(results.seconds)} in all" if results.seconds else ""
        sentences = [
            f"{study['steps']} steps of {study['batch_size']} rows of {study['sequence_length']} {study['tokenizer']}; "
            f"seeds {', '.join(map(str, study['seeds']))}. {_trials(study['trial_steps'])}",
            _corpus(corpus),
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['platform']}"
            + (f", {machine['gpu']}" if machine.get("gpu") else "")
            + "; "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
            + f"; begun {study['started']}{took}.",
            "Small models, trained briefly: what they show need not hold at a thousand times the size.",
        ]
        parts += [f"<p>{escape(sentence)}</p>" for sentence in sentences if sentence]
        parts.append(
            "<details><summary>All options</summary>\n"
            f"<pre>{escape(json.dumps(study['config'], indent=2))}</pre></details>"
        )
    return "\n".join(filter(None, parts))


def _trials(lengths: list[int]) -> str:
    first, *others = lengths
    on = "".join(f", the better ones for {steps}" for steps in others)
    return f"Each learning rate was tried for {first} steps{on}, and the run goes on from the best one's beginning."


def _corpus(corpus: dict) -> str:
    sizes = [
        f"{format.size(corpus[key])} {what}"
        for key, what in (("train_bytes", "to train on"), ("validation_bytes", "of held-out text scored"))
        if corpus.get(key)
    ]
    facts = [*sizes, *(str(corpus[key]) for key in ("held_out", "licence", "source") if corpus.get(key))]
    return f"Text: {corpus.get('name')} ({'; '.join(facts)})." if corpus else ""
