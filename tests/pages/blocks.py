"""Fenced blocks of the documentation, and what is said about running them. Runs nothing."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["OTHER_LANGUAGES", "ROOT", "RUN_LANGUAGES", "Block", "blocks_of", "pages", "statements"]

ROOT: Final = Path(__file__).parents[2]
RUN_LANGUAGES: Final = ("python", "bash")
OTHER_LANGUAGES: Final = ("text", "tree", "math", "yaml", "json", "toml")
_BROUGHT: Final = ("README.md", "CONTRIBUTING.md", "dashboards/runbook.md")
_PORTIONS: Final = ("monitor", "trainer", "api", "dashboards", "benchmarks")
_FENCE: Final = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARKER: Final = re.compile(r"<!-- (?:(not run)|(run by) (\S+)): (.+?) -->\n\Z")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block.

    Attributes:
        page: Path in the repository.
        line: Of the fence.
        language: After the fence.
        text: What stands in it.
        reason: Why it is not run; empty where it is.
        elsewhere: A file that runs it, and words of it that say so; empty where there is none.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str = ""
    elsewhere: tuple[str, str] | tuple[()] = ()

    @property
    def commands(self) -> int:
        """How many things there are to run: statements of a shell, or one piece of Python."""
        return len(statements(self.text)) if self.language == "bash" else 1


def pages() -> list[Path]:
    """Every page that users read, but for decisions, which tell what was and run nothing."""
    docs = [p for p in (ROOT / "docs").rglob("*.md") if "decisions" not in p.parts]
    portions = [ROOT / name / "README.md" for name in _PORTIONS]
    return sorted([*docs, *portions, *(ROOT / name for name in _BROUGHT)])


def blocks_of(path: Path) -> list[Block]:
    """The blocks of one page, in order."""
    text = path.read_text(encoding="utf-8")
    return [_block(path, text, found) for found in _FENCE.finditer(text)]


def _block(path: Path, text: str, found: re.Match[str]) -> Block:
    marker = _MARKER.search(text[: found.start()])
    not_run = marker is not None and marker[1] is not None
    return Block(
        page=str(path.relative_to(ROOT)),
        line=text.count("\n", 0, found.start()) + 1,
        language=found[1],
        text=found[2],
        reason=marker[4] if marker is not None and not_run else "",
        elsewhere=(marker[3], marker[4]) if marker is not None and not not_run else (),
    )


def statements(text: str) -> list[str]:
    """A shell's text as pieces that are whole by themselves.

    Raises:
        ValueError: The last one never ends.
    """
    found, open_lines = [], ""
    for line in text.splitlines(keepends=True):
        if not open_lines and (not line.strip() or line.startswith("#")):
            continue
        open_lines += line
        if _is_whole(open_lines):
            found.append(open_lines.rstrip())
            open_lines = ""
    if open_lines:
        raise ValueError(f"not a whole statement: {open_lines}")
    return found


def _is_whole(text: str) -> bool:
    # A line that ends in a backslash goes on, although bash takes it as it is.
    if text.rstrip("\n").endswith("\\"):
        return False
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    return done.returncode == 0 and not done.stderr
