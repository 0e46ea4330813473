"""Numbers as people read them: three digits at most, a unit, and a word where there is no number."""

import math

MISSING = "-"


def count(n: float | None) -> str:
    """A number of things: 412345 is "412 k", 1.3e6 "1.3 M", 7.1e9 "7.1 B" (1e9), 2e12 "2.0 T" (1e12)."""
    return _scaled(n, ("", "k", "M", "B", "T"))


def size(n_bytes: float | None) -> str:
    """Bytes in decimal units: 12400 is "12.4 kB", 1.5e6 "1.5 MB"."""
    return _scaled(n_bytes, ("B", "kB", "MB", "GB", "TB"))


def rate(tokens_per_second: float | None) -> str:
    """A speed: 12400 is "12.4 k tok/s"."""
    text = count(tokens_per_second)
    return text if text == MISSING else f"{text} tok/s"


def bits(value: float | None) -> str:
    """Bits per byte, to the third decimal."""
    return MISSING if not known(value) else f"{value:.3f}"


def percent(share: float | None) -> str:
    """A share in per cent, with a decimal where there is one: "12.5%", "93%"."""
    if not known(share):
        return MISSING
    assert share is not None
    return f"{100 * share:.1f}".removesuffix(".0") + "%"


def times(ratio: float) -> str:
    """A ratio of at least 1: "1.4 times", "12 times"."""
    return f"{ratio:.1f} times" if ratio < 9.95 else f"{ratio:,.0f} times"


def duration(seconds: float | None) -> str:
    """A length of time: "45 s", "12 min", "3.4 h"."""
    if not known(seconds):
        return MISSING
    assert seconds is not None
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def context(tokens: int) -> str:
    """A context length: 256, 2k (2048), 8k, 32k."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,}"


def known(value: float | None) -> bool:
    """Whether there is a number to show."""
    return value is not None and math.isfinite(value)


def _scaled(value: float | None, units: tuple[str, ...]) -> str:
    if not known(value):
        return MISSING
    assert value is not None
    power = 0
    while power < len(units) - 1 and abs(value) >= (999.5 if power else 1000):  # 999.6 k would read 1,000 k
        value, power = value / 1000, power + 1
    text = f"{value:.0f}" if power == 0 and value == round(value) else _digits(value)
    return f"{text} {units[power]}".strip()


def _digits(value: float) -> str:
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 0.995 or value == 0 else f"{value:.2g}"
