"""The conformance kit: laws that every mixer obeys, and the means to check them on a user's own."""

from bestiary.conformance.case import Case
from bestiary.conformance.laws import LAWS, Law
from bestiary.conformance.run import Verdict, check

__all__ = ["LAWS", "Case", "Law", "Verdict", "check"]
