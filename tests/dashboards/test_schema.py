"""The dashboards have the types of Grafana's published schema, which TypeScript checks.

`@grafana/schema` comes from the npm registry, in the version of the Grafana in docker-compose.yml.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dashboards.build import DASHBOARDS, FOLDER

pytestmark = [
    pytest.mark.debian,
    pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed"),
]
HERE = Path(__file__).with_name("schema")
BOARDS: dict[str, dict[str, Any]] = {board["uid"]: board for board in (m() for m in DASHBOARDS)}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schema")
    for file in HERE.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    quiet = ("--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts")
    done = subprocess.run(
        ["npm", "install", *quiet],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def checked(compiler: Path, boards: dict[str, dict[str, Any]]) -> str:
    """What TypeScript says of them; nothing if all is well."""
    for old in compiler.glob("board-*.ts"):
        old.unlink()
    for name, board in boards.items():
        # As a literal, so that a member too many is an error too.
        text = f"export const board: Dashboard = {json.dumps(board, indent=1)};\n"
        imported = "import type { Dashboard } from './dashboards.js';\n"
        (compiler / f"board-{name}.ts").write_text(imported + text)
    done = subprocess.run(
        ["node", "node_modules/typescript/lib/tsc.js", "-p", "."],
        cwd=compiler,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode == 0) == (not done.stdout), done.stderr
    return done.stdout


def test_dashboards_have_the_published_types(compiler: Path) -> None:
    assert checked(compiler, BOARDS) == ""


def first(board: dict[str, Any], kind: str) -> dict[str, Any]:
    found: dict[str, Any] = next(panel for panel in board["panels"] if panel["type"] == kind)
    return found


BREAKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a misspelled member": lambda b: first(b, "trend").update(descripton="x"),
    "a word that is none of an enum's": lambda b: first(b, "heatmap")["options"]["yAxis"].update(
        axisPlacement="west"
    ),
    "a missing option": lambda b: first(b, "heatmap")["options"].pop("color"),
    "a kind of panel that there is not": lambda b: first(b, "table").update(type="tabel"),
    "a number for a word": lambda b: b.update(title=3),
    "a misspelled property of a variable": lambda b: b["templating"]["list"][0].update(lable="x"),
}


def test_what_is_wrong_is_found(compiler: Path) -> None:
    boards = {}
    for number, spoil in enumerate(BREAKS.values()):
        boards[f"broken{number}"] = copy.deepcopy(BOARDS["foreshock-numerics"])
        spoil(boards[f"broken{number}"])
    said = checked(compiler, boards)
    for number, what in enumerate(BREAKS):
        assert f"board-broken{number}.ts" in said, what


def test_the_schema_is_that_of_the_grafana_that_is_started() -> None:
    package = json.loads((HERE / "package.json").read_text())
    compose = (FOLDER.parent / "docker-compose.yml").read_text()
    found = re.search(r"grafana/grafana:(\S+)", compose)
    assert found is not None
    assert package["devDependencies"]["@grafana/schema"] == found[1]
