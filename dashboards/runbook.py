"""The runbook inside Grafana: one text panel per alert, in a row that is closed until needed.

A link to it holds wherever the dashboards are, without a network. Its text is `runbook.md`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from dashboards.parts import FLEET
from grafana_foundation_sdk.builders import dashboard, text
from grafana_foundation_sdk.models.text import TextMode

__all__ = ["RUNBOOK_FILE", "runbook_panels", "runbook_row", "runbook_sections", "runbook_url"]

RUNBOOK_FILE: Final = Path(__file__).with_name("runbook.md")

_FIRST_PANEL: Final = 900
"""Ids of its panels, which links name; those of others are counted from 1."""


def runbook_sections() -> Mapping[str, str]:
    """Alert name to Markdown."""
    parts = re.split(r"^## (\w+)\n", RUNBOOK_FILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True))


def runbook_panels() -> Mapping[str, int]:
    """Panel id by alert name."""
    return {name: _FIRST_PANEL + place for place, name in enumerate(runbook_sections())}


def runbook_url(alert: str) -> str:
    """Address within Grafana of what to do about an alert.

    Raises:
        KeyError: The runbook says nothing of it.
    """
    return f"/d/{FLEET}/{FLEET}?viewPanel=panel-{runbook_panels()[alert]}"


def runbook_row() -> dashboard.Row:
    """The closed row of the fleet's dashboard that holds the panels."""
    row = dashboard.Row("Runbook").collapsed(True)
    for name, markdown in runbook_sections().items():
        panel = text.Panel().id(runbook_panels()[name]).title(name).mode(TextMode.MARKDOWN)
        panel = panel.content(markdown).height(8).span(12)
        row = row.with_panel(panel.description(f"What {name} means, where to look, what to do."))
    return row
