"""What goes wrong, by name: every error a user can cause says what is wrong and how to mend it."""

import difflib
from collections.abc import Iterable


class BestiaryError(Exception):
    """Something failed; the message is one clear line. The command line exits with 1."""


class UsageError(BestiaryError, ValueError):
    """The input is wrong, and the message names the field, the value and what is allowed. Exits with 2."""


def unknown(kind: str, name: str, valid: Iterable[str]) -> UsageError:
    """The error for a name that does not exist: lists the valid ones, closest match first."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return UsageError(f"unknown {kind} {name!r}{hint}; valid: {', '.join(valid) or 'none'}")
