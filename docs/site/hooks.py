"""What mkdocs calls while it builds the site: pages from elsewhere and written ones, links."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

# mkdocs loads this file by its path, and its neighbours are found from the root.
sys.path.insert(0, str(Path(__file__).parents[2]))

from docs.site.command_page import command_page
from docs.site.http_page import http_page
from docs.site.links import BROUGHT, ROOT, rewrite
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

__all__ = ["on_config", "on_files", "on_page_markdown"]

# Its hint about MkDocs 2 is no fault of ours.
logging.getLogger("mkdocs.material").setLevel(logging.ERROR)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name every decision in the navigation, so that a new one needs no line of its own."""
    found = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    decisions = [f"decisions/{path.name}" for path in found]
    nav: list[Any] = config.nav or []
    config.nav = [{"Decisions": decisions} if "Decisions" in entry else entry for entry in nav]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in `docs/`."""
    for path, page in BROUGHT.items():
        if page not in files.src_uris:
            text = (ROOT / path).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "reference/cli.md", content=command_page()))
    files.append(File.generated(config, "reference/http.md", content=http_page()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links of the repository become links of the site."""
    return rewrite(markdown, page.file.src_uri)
