"""The page's files, ready to send: own HTML, CSS and modules; Plotly and Swagger UI from packages.

Knows no HTTP framework and computes nothing about runs; the page itself reads the public API.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import importlib.resources
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["CONTENT_SECURITY_POLICY", "PLOTLY", "Asset", "load_assets", "load_docs", "load_index"]

PLOTLY: Final = "plotly.min.js"
SWAGGER: Final = ("swagger-ui-bundle.js", "swagger-ui.css")
"""Swagger UI, as the package fastapi-offline carries it."""

CONTENT_SECURITY_POLICY: Final = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "style-src-attr 'unsafe-inline'",  # Plotly sets style attributes on its SVG elements
        "img-src 'self' data:",  # Plotly paints a heatmap as a data: image
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    ]
)
"""No inline script, no inline style sheet, no eval, nothing from another origin."""

_TYPES: Final = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asset:
    """One file as it goes over the wire.

    Attributes:
        body: The bytes.
        compressed: The same, gzip.
        media_type: Content-Type.
        etag: Quoted entity tag, from the content.
    """

    body: bytes
    compressed: bytes
    media_type: str
    etag: str


def load_assets() -> Mapping[str, Asset]:
    """Every file below `/assets/` by its name; names that are not in here do not exist.

    Raises:
        RuntimeError: A package does not bring the file that it should.
    """
    folder = importlib.resources.files("foreshock.api.page") / "static"
    found = {
        entry.name: _asset(entry.name, entry.read_bytes())
        for entry in folder.iterdir()
        if entry.name.rpartition(".")[2] in _TYPES
    }
    found[PLOTLY] = _asset(PLOTLY, _plotly().encode())
    for name in SWAGGER:
        found[name] = _asset(name, _swagger(name))
    return found


def load_index() -> str:
    """The page's HTML, fitted to the Plotly that is installed."""
    folder = importlib.resources.files("foreshock.api.page") / "static"
    html = (folder / "index.html").read_text(encoding="utf-8")
    html = html.replace("@plotly-version@", importlib.metadata.version("plotly"))
    return html.replace("<!--plotly-guards-->", _guards(_plotly()))


def load_docs() -> str:
    """The HTML of the API reference."""
    folder = importlib.resources.files("foreshock.api.page") / "static"
    html = (folder / "docs.html").read_text(encoding="utf-8")
    return html.replace("@swagger-version@", importlib.metadata.version("fastapi-offline"))


def load_runbook() -> str:
    """The HTML of the runbook: what to do about each alert."""
    page = importlib.resources.files("foreshock.api.page") / "runbook.html"
    return page.read_text(encoding="utf-8")


def _swagger(name: str) -> bytes:
    source = importlib.resources.files("fastapi_offline") / "static" / name
    if not source.is_file():
        raise RuntimeError(
            f"the installed fastapi-offline has no static/{name}; install 'fastapi-offline>=1.7.7'"
        )
    return source.read_bytes()


def _asset(name: str, body: bytes) -> Asset:
    return Asset(
        body=body,
        compressed=gzip.compress(body, 6, mtime=0),
        media_type=_TYPES[name.rpartition(".")[2]],
        etag=f'"{hashlib.sha256(body).hexdigest()[:20]}"',
    )


def _plotly() -> str:
    source = importlib.resources.files("plotly") / "package_data" / PLOTLY
    if not source.is_file():
        raise RuntimeError(
            f"the installed plotly has no package_data/{PLOTLY}; install 'plotly>=6'"
        )
    return source.read_text(encoding="utf-8")


def _guards(script: str) -> str:
    """Elements that keep Plotly from writing inline styles of parts the page does not use.

    Its map library adds a <style> unless an element of a certain id is there; the policy would
    refuse it, with an error in every visitor's console.
    """
    ids = sorted(set(re.findall(r'getElementById\("([0-9a-f]{64})"\)', script)))
    return "\n".join(f'<meta id="{each}">' for each in ids)
