"""The runbook as one HTML page, with an anchor for each alert: for Prometheus and for the service.

Its text is `runbook.md`'s. Loads nothing from elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import markdown

__all__ = ["runbook_page"]

_SOURCE: Final = Path(__file__).resolve().parent / "runbook.md"

# Contrast of text is above 7 in both schemes.
_STYLE: Final = """
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 46em; margin: 2em auto; padding: 0 1em; }
h2 { margin-top: 2em; border-top: 1px solid #8886; padding-top: 1em; }
h2:target { background: #ffd54a40; }
code { font-family: ui-monospace, monospace; font-size: 0.92em; }
"""

_PAGE: Final = """<!doctype html>
<!-- Written by `make dashboards` from dashboards/runbook.md. -->
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>foreshock: runbook</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def runbook_page() -> str:
    """The page; no curly braces in pairs, which Prometheus would take for a template."""
    text = _SOURCE.read_text(encoding="utf-8")
    # Headings are names of alerts, so their anchors are these in lower case.
    body = markdown.markdown(text, extensions=["toc"])
    return _PAGE.format(style=_STYLE, body=body)
