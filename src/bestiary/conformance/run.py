"""Running the laws on mixers, and the table of what came out."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.table import Table

from bestiary.conformance.case import Builder, Case
from bestiary.conformance.laws import LAWS, Law, LawBroken


@dataclass(frozen=True)
class Verdict:
    """How a mixer fared under a law: the worst deviation over the examples, and what broke, if something did."""

    mixer: str
    law: str
    worst: float
    tolerance: float
    examples: int
    message: str = ""

    @property
    def holds(self) -> bool:
        return not self.message and self.worst <= self.tolerance


def check(name: str, build: Builder, *, examples: int = 10, seed: int = 0, laws: Iterable[Law] = LAWS) -> list[Verdict]:
    """Try every law that applies on `examples` random cases, with random shapes, cuts and strengths of the gates."""
    mixer = build()
    cases = [Case.draw(build, seed * 1000 + number, d_model=mixer.d_model) for number in range(examples)]
    return [_try(name, law, cases) for law in laws if mixer.causal or not law.causal_only]


def _try(name: str, law: Law, cases: list[Case]) -> Verdict:
    worst = 0.0
    cases = cases[: law.examples]
    for number, case in enumerate(cases):
        try:
            worst = max(worst, law.deviation(case))
            message = ""
        except LawBroken as error:
            message = str(error)
        except Exception as error:  # a crash is a broken law too; the table must still list the others
            message = f"{type(error).__name__}: {error}".splitlines()[0]
        if message or not worst <= law.tolerance:
            where = f"seed {case.seed}, batch {case.batch}, time {case.time}, cuts {case.cuts}, strong {case.strong}"
            return Verdict(
                name, law.name, worst, law.tolerance, number + 1, f"{message or f'off by {worst:.1e}'} ({where})"
            )
    return Verdict(name, law.name, worst, law.tolerance, len(cases))


def table(verdicts: list[Verdict]) -> Table:
    """Laws as rows, mixers as columns; the worst deviation where the law holds, FAILS where not."""
    names = list(dict.fromkeys(verdict.mixer for verdict in verdicts))
    found = {(verdict.mixer, verdict.law): verdict for verdict in verdicts}
    result = Table(title=f"laws x mixers: worst relative deviation (torch {torch.__version__})")
    result.add_column("law")
    for name in names:
        result.add_column(name, justify="right")
    for law in LAWS:
        cells = []
        for name in names:
            verdict = found.get((name, law.name))
            cells.append("-" if verdict is None else f"{verdict.worst:.0e}" if verdict.holds else "[red]FAILS[/red]")
        result.add_row(law.claim, *cells)
    return result
