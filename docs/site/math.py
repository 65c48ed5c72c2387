"""Formulas: a fence of the language `math` becomes MathML, which browsers draw without a script."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert

__all__ = ["fence"]


def fence(
    source: str, language: str, class_name: str, options: Any, markdown: Any, **further: Any
) -> str:
    """A formatter of pymdownx.superfences.

    Args:
        source: LaTeX, one formula.
        language: `math`.
        class_name: Of the element.
        options: Not used.
        markdown: Not used.
        further: Not used.
    """
    return f'<div class="{class_name}">{convert(source.strip(), display="block")}</div>'
