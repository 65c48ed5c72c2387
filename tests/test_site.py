"""The site: builds without a warning, loads nothing from elsewhere, and leaves nothing out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer.main
from docs.site.command_page import command_page
from docs.site.links import BROUGHT, rewrite
from docs.site.math import fence

from foreshock.api.cli.main import app
from foreshock.monitor.record import STATISTICS

ROOT = Path(__file__).parent.parent
# What a browser would fetch without being asked; links that a reader follows are another thing.
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make site` does; a proxy that is not there stands in for no network."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


class Loads(HTMLParser):
    """Addresses that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get(LOADED.get(tag, ""))
        if address and dict(attrs).get("rel") != "canonical":
            self.found.append(address)


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        parser = Loads()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.found
        assert [a for a in parser.found if re.match(r"(https?:)?//", a)] == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_every_page_of_the_sources_is_there(site: Path) -> None:
    sources = [p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md")]
    wanted = [*map(str, sources), *BROUGHT.values()]
    assert [page for page in wanted if not (site / page).with_suffix(".html").is_file()] == []


def test_the_reference_has_every_operation_and_every_command(site: Path) -> None:
    described = json.loads((ROOT / "docs" / "openapi.json").read_text())
    operations = [o["operationId"] for p in described["paths"].values() for o in p.values()]
    page = (site / "reference" / "http.html").read_text(encoding="utf-8")
    assert [name for name in operations if f'<h2 id="{name}">' not in page] == []
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    text = command_page()
    assert [name for name in commands if f"## foreshock {name}" not in text] == []
    assert "From `FORESHOCK_URL`" in text


def test_the_reference_is_made_of_docstrings(site: Path) -> None:
    page = (site / "reference" / "monitor.html").read_text(encoding="utf-8")
    assert 'id="foreshock.monitor.session.watch"' in page
    client = (site / "reference" / "client.html").read_text(encoding="utf-8")
    for name in ("Client.risk_history", "Client.save_incident"):
        assert f'id="foreshock.monitor.client.client.{name}"' in client


def test_every_statistic_is_explained() -> None:
    page = (ROOT / "docs" / "statistics.md").read_text()
    explained = re.findall(r"[a-z0-9_]+", page)
    assert [name for name in STATISTICS if name not in explained] == []


def test_formulas_are_drawn_without_a_script(site: Path) -> None:
    page = (site / "statistics.html").read_text(encoding="utf-8")
    source = (ROOT / "docs" / "statistics.md").read_text()
    assert page.count("<math") == source.count("```math") > 5
    drawn = fence(r"\frac{a}{b}", "math", "math", {}, None)
    assert drawn.startswith('<div class="math"><math')
    assert "<mfrac>" in drawn


@pytest.mark.parametrize(
    ("page", "text", "there"),
    [
        ("portions/monitor.md", "[i](../docs/integrations.md)", "[i](../integrations.md)"),
        ("deploy.md", "[b](benchmarks.md#a-b)", "[b](benchmarks.md#a-b)"),
        ("index.md", "[r](../dashboards/runbook.md#x)", "[r](runbook.md#x)"),
        ("how-to/doctor.md", "[m](../../monitor/README.md)", "[m](../portions/monitor.md)"),
        ("changelog.md", "[d](docs/deploy.md)", "[d](deploy.md)"),
        ("contributing.md", "[`s`](monitor/foreshock/monitor/session.py)", "`s`"),
        ("index.md", "[a](https://a.example) [b](#b)", "[a](https://a.example) [b](#b)"),
        ("index.md", "```text\n[i](nothing.md)\n```", "```text\n[i](nothing.md)\n```"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(page: str, text: str, there: str) -> None:
    assert rewrite(text, page) == there


def test_a_link_to_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"docs/deploy\.md links to gone\.md"):
        rewrite("[x](gone.md)", "deploy.md")
