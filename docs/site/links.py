"""Where files of the repository stand on the site, and links between them. Writes nothing."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

__all__ = ["BROUGHT", "ROOT", "WRITTEN", "repository_path", "rewrite", "site_uri"]

ROOT: Final = Path(__file__).parents[2]

BROUGHT: Final = {
    "monitor/README.md": "portions/monitor.md",
    "trainer/README.md": "portions/trainer.md",
    "api/README.md": "portions/api.md",
    "dashboards/README.md": "portions/dashboards.md",
    "benchmarks/README.md": "portions/benchmarks.md",
    "dashboards/runbook.md": "runbook.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
}
"""Pages that stand elsewhere in the repository: path there to page of the site."""

WRITTEN: Final = ("reference/cli.md", "reference/http.md")
"""Pages of the site that are made while it is built."""

_BACK: Final = {page: path for path, page in BROUGHT.items() if path != "README.md"}
_LINK: Final = re.compile(r"(!?)\[([^\]\n]+)\]\((?!https?:|#|mailto:)([^)\s#]*)(#[^)\s]*)?\)")
_FENCE: Final = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)


def repository_path(page: str) -> str:
    """The file of the repository that a page of the site is made of."""
    return _BACK.get(page, f"docs/{page}")


def site_uri(path: str) -> str | None:
    """The page or file of the site for a path of the repository; None where it has none."""
    if path in BROUGHT:
        return BROUGHT[path]
    inside = path.removeprefix("docs/")
    if inside == path or path.endswith(".py"):
        return None
    return inside if inside in WRITTEN or (ROOT / path).is_file() else None


def rewrite(text: str, page: str) -> str:
    """Links and pictures of a page, made for the repository, as those of the site.

    What the site does not have keeps its words and loses its link.

    Raises:
        ValueError: A link names no file of the repository.
    """
    parts = _FENCE.split(text)
    # Every second one is a fence, which holds no links.
    parts[::2] = [_LINK.sub(_rewriter(page), part) for part in parts[::2]]
    return "".join(parts)


def _rewriter(page: str) -> Callable[[re.Match[str]], str]:
    path = repository_path(page)

    def replaced(link: re.Match[str]) -> str:
        mark, words, target, anchor = link[1], link[2], link[3], link[4] or ""
        there = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if (uri := site_uri(there)) is not None:
            return (
                f"{mark}[{words}]({posixpath.relpath(uri, posixpath.dirname(page) or '.')}{anchor})"
            )
        if not (ROOT / there).exists():
            raise ValueError(f"{path} links to {target}, which is not in the repository")
        return words

    return replaced
