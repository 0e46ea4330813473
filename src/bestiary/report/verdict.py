"""What a comparison has shown, in plain words: every sentence follows from the numbers by a rule that stands here.

Two models differ only where the interval of their difference over seeds excludes zero; with fewer than three seeds the
spread is unmeasured, and the verdict says "no difference shown". The same gap is never called a result and noise at
once.
"""

import statistics
from dataclasses import dataclass

from bestiary.report import format
from bestiary.report.results import Results
from bestiary.report.statistics import LEAST_SEEDS, binomial, difference

SOLVED = 0.9
"""From this share of right answers on, a recall probe counts as solved."""


@dataclass(frozen=True)
class Finding:
    """One conclusion: what it is about, and a sentence or a few."""

    topic: str
    text: str


def verdict(results: Results) -> list[Finding]:
    """All conclusions that the results allow; the last answers the study's question."""
    parts = [
        ("Quality", _quality(results)),
        ("Floors", _floors(results)),
        ("Exact match", _exact_match(results)),
        ("Recall", _recall(results)),
        ("Memory", _memory(results)),
        ("Speed", _speed(results)),
        ("Do I need attention?", _attention(results)),
    ]
    return [Finding(topic, text) for topic, text in parts if text]


def better(results: Results, a: str, b: str, comparisons: int) -> tuple[float, float] | None:
    """(gap in bits per byte, half its interval) where a is shown to be better than b, else None."""
    found = difference(results.bpb(b), results.bpb(a), comparisons=comparisons)
    return found if found is not None and found[0] - found[1] > 0 else None


def ranked(results: Results) -> list[str]:
    """Architectures with a score, the lowest mean bits per byte first."""
    scored = [arch for arch in results.archs if results.bpb(arch)]
    return sorted(scored, key=lambda arch: statistics.mean(results.bpb(arch)))


def _quality(results: Results) -> str:
    order = ranked(results)
    failed = [arch for arch in results.archs if results.runs.get(arch) and not results.bpb(arch)]
    sentences = [f"{_join(failed)} diverged: no score."] if failed else []
    if len(order) < 2:
        return " ".join(sentences + [f"Only {_join(order)} has a score: nothing to compare."] * len(order))
    what = "bits per byte of the held-out answers" if results.task else "bits per byte of the held-out text"
    first, last = order[0], order[-1]
    means = {arch: statistics.mean(results.bpb(arch)) for arch in order}
    measured = f"The lowest {what} was {means[first]:.3f} ({first}), the highest {means[last]:.3f} ({last})"
    seeds = min(len(results.bpb(arch)) for arch in order)
    if seeds < LEAST_SEEDS:
        runs = "one run" if seeds == 1 else f"{seeds} runs"
        return " ".join(
            [
                *sentences,
                f"No difference shown: with {runs} of each, how far a score moves with the seed is not known. "
                f"{measured}; take the order as a hint, and --minutes 30 for three seeds with intervals.",
            ]
        )
    pairs = len(order) * (len(order) - 1) // 2
    beaten = {arch: better(results, first, arch, pairs) for arch in order[1:]}
    level = [arch for arch, found in beaten.items() if found is None]
    gaps = [f"{arch} (by {found[0]:.3f} ± {found[1]:.3f})" for arch, found in beaten.items() if found]
    sentences.append(f"{measured}.")
    if gaps:
        sentences.append(f"{first} is better than {_join(gaps)}.")
    if level:
        sentences.append(f"No difference shown between {first} and {_join(level)}.")
    sentences.append(f"Intervals hold 19 times in 20 over {seeds} seeds, all {pairs} pairs together.")
    return " ".join(sentences)


def _floors(results: Results) -> str:
    order = ranked(results)
    if not results.floors or not order:
        return ""
    floor = min(results.floors, key=lambda floor: floor.bpb)
    beat = [arch for arch in order if statistics.mean(results.bpb(arch)) < floor.bpb]
    under = [arch for arch in order if arch not in beat]
    counted = f"the better floor, {floor.name} ({floor.bpb:.3f})"
    if not under:
        return f"Every model predicts the text better than {counted}."
    if not beat:
        return (
            f"No model reached {counted}: at this budget, counting predicts this text better than any of them, and "
            "what follows compares beginnings. Give it more minutes."
        )
    verb = "predicts" if len(beat) == 1 else "predict"
    return f"{_join(beat)} {verb} the text better than {counted}; {_join(under)} not yet."


def _exact_match(results: Results) -> str:
    found = {arch: [r.exact_match for r in results.sound(arch) if r.exact_match is not None] for arch in results.archs}
    means = {arch: statistics.mean(values) for arch, values in found.items() if values}
    if not means:
        return ""
    n = next(run.held_out for arch in means for run in results.sound(arch) if run.exact_match is not None) or 0
    best, worst = max(means, key=lambda arch: means[arch]), min(means, key=lambda arch: means[arch])
    low, high = binomial(means[best], n)
    text = (
        f"Of {n:,} held-out prompts, {best} answered {format.percent(means[best])} exactly right "
        f"(between {format.percent(low)} and {format.percent(high)} as far as their number tells)"
    )
    return text + (f", {worst} {format.percent(means[worst])}." if worst != best else ".")


def _recall(results: Results) -> str:
    described = results.study.get("recall") or {}
    means = _recall_means(results)
    if not means or not described:
        return ""
    chance, steps = described["chance"], described["steps"]
    # the probes of one sequence share its pairs, so sequences are counted, not probes
    sequences = max(1, described["probes"] // described["pairs"])
    solved = [arch for arch, mean in means.items() if mean >= SOLVED]
    partly = [arch for arch in means if arch not in solved and binomial(means[arch], sequences)[0] > chance]
    blind = [arch for arch in means if arch not in solved and arch not in partly]

    def scored(archs: list[str]) -> str:
        return _join([f"{arch} ({format.percent(means[arch])})" for arch in archs])

    parts = []
    if solved:
        parts.append(f"solved by {scored(solved)}")
    if partly:
        parts.append(f"in part by {scored(partly)}")
    if blind:
        parts.append(f"not above guessing among the values in context by {scored(blind)}")
    text = f"Looking up {described['pairs']} pairs in context, after {steps} training steps: {_join(parts, ';')}."
    if any(arch not in solved for arch in means):
        text += " A low score says 'not within these steps', never 'cannot'."
    return f"{text} Chance is {format.percent(chance)}."


def _recall_means(results: Results) -> dict[str, float]:
    found = {arch: results.accuracies(arch) for arch in results.archs}
    return {arch: statistics.mean(values) for arch, values in found.items() if values}


def _memory(results: Results) -> str:
    if not results.contexts:
        return ""
    context = results.contexts[-1]
    sizes = {arch: results.state_bytes(arch, context) for arch in results.archs}
    known = {arch: size for arch, size in sizes.items() if size}
    if not known:
        return ""
    most, least = max(known, key=lambda arch: known[arch]), min(known, key=lambda arch: known[arch])
    text = f"After {format.context(context)} tokens, the state of {most} holds {format.size(known[most])}"
    if most != least:
        text += (
            f", that of {least} {format.size(known[least])}, {format.times(known[most] / known[least])} less"
            " (fp32, one sequence)."
        )
    else:
        text += " (fp32, one sequence)."
    growing = [arch for arch in known if _grows(results, arch)]
    constant = [arch for arch in known if arch not in growing]
    if growing and constant:
        text += f" It grows with the context for {_join(growing)}, and stays constant for {_join(constant)}."
    return text


def _grows(results: Results, arch: str) -> bool:
    sizes = [size for context in results.contexts if (size := results.state_bytes(arch, context)) is not None]
    return len(sizes) > 1 and sizes[-1] > sizes[-2]


def _speed(results: Results) -> str:
    """Decoding and training, at the longest measured context; faster only where the ranges do not touch."""
    measured = [context for (_, context), cost in results.costs.items() if cost.how != "computed"]
    texts = []
    if measured:
        context = max(measured)
        found = {arch: results.costs.get((arch, context)) for arch in results.archs}
        speeds = {arch: cost.decode for arch, cost in found.items() if cost}
        where = f"after {format.context(context)} tokens, measured"
        texts.append(_fastest(speeds, "Decoding", where))
    texts.append(_fastest(results.train_speeds, "Training", "measured"))
    text = " ".join(filter(None, texts))
    return f"{text} Measured on this machine; ratios carry further than numbers." if text else ""


def _fastest(speeds: dict, doing: str, where: str) -> str:
    if len(speeds) < 2:
        return ""
    order = sorted(speeds, key=lambda arch: -speeds[arch].median)
    first = speeds[order[0]]
    clear = [arch for arch in order[1:] if (speeds[arch].high or speeds[arch].median) < (first.low or first.median)]
    near = [arch for arch in order[1:] if arch not in clear]
    fastest = f"{_join([order[0], *near])} {'were' if near else 'was'} fastest ({where}: {format.rate(first.median)})"
    if not clear:
        return f"{doing}: no difference shown ({where}: {format.rate(first.median)} and less)."
    ratio = first.median / speeds[order[-1]].median
    return f"{doing}: {fastest}, {format.times(ratio)} as fast as {order[-1]}."


def _attention(results: Results) -> str:
    order = ranked(results)
    attending = [arch for arch in order if results.models[arch].attends]
    free = [arch for arch in order if not results.models[arch].attends]
    if not order:
        return ""
    if not attending or not free:
        which = "None of these models attends" if free else "All of these models attend"
        return f"{which} to its whole past, so this comparison cannot say. Add the other kind with --arch."
    return " ".join(filter(None, [_needs_quality(results, attending, free), _needs_recall(results), _saves(results)]))


def _needs_quality(results: Results, attending: list[str], free: list[str]) -> str:
    what = "this task" if results.task else "predicting this text"
    pairs = len(attending) * len(free)
    best, rival = attending[0], free[0]
    ahead, behind = better(results, best, rival, pairs), better(results, rival, best, pairs)
    enough = min(len(results.bpb(best)), len(results.bpb(rival))) >= LEAST_SEEDS
    if ahead:
        return f"For {what}, it helps: {best} beats the best without it, {rival}, by {ahead[0]:.3f} bits per byte."
    if behind:
        return f"For {what}, no: {rival} does without it and beats {best} by {behind[0]:.3f} bits per byte."
    reason = "no difference shown" if enough else f"not shown either way (fewer than {LEAST_SEEDS} seeds)"
    return f"For {what}: {reason}; the best with attention is {best}, without it {rival}."


def _needs_recall(results: Results) -> str:
    means = _recall_means(results)
    solved = [arch for arch, mean in means.items() if mean >= SOLVED]
    without = [arch for arch in solved if not results.models[arch].attends]
    if without:
        return f"For looking things up in context: {_join(without)} did it without attention."
    if solved:
        return f"For looking things up in context, within these steps: only {_join(solved)} did it, with attention."
    return "For looking things up in context: no model learned it within these steps." if means else ""


def _saves(results: Results) -> str:
    context = results.contexts[-1] if results.contexts else 0
    sizes = {arch: results.state_bytes(arch, context) for arch in results.archs}
    full = [size for arch, size in sizes.items() if size and results.models[arch].attends]
    free = [arch for arch in sizes if not results.models[arch].attends and not _grows(results, arch)]
    small = [size for arch in free if (size := sizes[arch])]
    if not full or not small:
        return ""
    low, high = min(full) / max(small), max(full) / min(small)
    if low <= 1:
        return ""
    ratios = " to ".join(dict.fromkeys([format.times(low), format.times(high)]))
    return f"What it costs: at {format.context(context)} tokens, {ratios} the memory of a constant state."


def _join(parts: list[str], separator: str = ",") -> str:
    """a, b and c."""
    if len(parts) < 2:
        return "".join(parts)
    if separator != ",":
        return f"{separator} ".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
