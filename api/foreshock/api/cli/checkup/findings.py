"""What a check says: how it stands, and what to do where it is not well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "Verdict", "note", "ok", "wrong"]

Verdict = Literal["ok", "note", "wrong"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence about the set-up.

    Attributes:
        check: What was looked at, in a word.
        verdict: ok; note, which may be meant so; or wrong.
        text: What was found.
        remedy: What to do; empty only where it is ok.
    """

    check: str
    verdict: Verdict
    text: str
    remedy: str = ""


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", text)


def note(check: str, text: str, remedy: str) -> Finding:
    """It may be meant so."""
    return Finding(check, "note", text, remedy)


def wrong(check: str, text: str, remedy: str) -> Finding:
    """Something will not work."""
    return Finding(check, "wrong", text, remedy)
