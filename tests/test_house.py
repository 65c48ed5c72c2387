"""The house keeps its shape: packaging, import directions, sizes, and a README that is true."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PORTIONS = ("monitor", "trainer", "api")
SOURCES = [p for portion in PORTIONS for p in (ROOT / portion).rglob("*.py")]
ALL_PYTHON = [
    *SOURCES,
    *(
        p
        for d in ("tests", "dashboards", "benchmarks", "examples")
        for p in (ROOT / d).rglob("*.py")
    ),
]


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts[1:])
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, known: set[str]) -> set[str]:
    """Modules of ours that a file imports when it is imported; TYPE_CHECKING blocks left out."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= inner or ({node.module} & known)
        pending.extend(ast.iter_child_nodes(node))
    return found


def test_namespace_has_no_init() -> None:
    """One would hide the other two portions in a checkout."""
    strays = [ROOT / portion / "foreshock" / "__init__.py" for portion in PORTIONS]
    assert [p for p in strays if p.exists()] == []


@pytest.mark.parametrize("portion", PORTIONS)
def test_top_folders_hold_only_their_portion(portion: str) -> None:
    """They stand on sys.path in a checkout, so anything else in them could be imported."""
    python = {p.parent.relative_to(ROOT / portion).parts[0] for p in (ROOT / portion).rglob("*.py")}
    assert python == {"foreshock"}
    assert (ROOT / portion / "foreshock" / portion / "py.typed").exists()


def test_no_import_cycles() -> None:
    names = {module_name(p): p for p in SOURCES}
    graph = {name: imported_modules(path, set(names)) - {name} for name, path in names.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("path", ALL_PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_is_short_and_explained(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    assert ast.get_docstring(ast.parse(text)), "a module says what it is for"


def test_service_and_record_load_no_torch() -> None:
    code = (
        "import foreshock.monitor.record, foreshock.api.app, foreshock.api.scorer, sys;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_service_starts_without_what_only_its_workers_need() -> None:
    absent = ("sklearn", "scipy", "skops")
    imports = "import foreshock.api.cli.server, sys"
    code = f"{imports}; sys.exit(any(m in sys.modules for m in {absent!r}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_forecast_core_needs_no_web_framework_and_no_store() -> None:
    modules = "features", "labels", "forecaster", "evaluation"
    imports = ", ".join(f"foreshock.api.{m}" for m in modules)
    absent = ("fastapi", "sqlalchemy", "clickhouse_connect", "torch")
    code = f"import {imports}, sys; sys.exit(any(m in sys.modules for m in {absent!r}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_wheel_holds_every_module_and_data_file(tmp_path: Path) -> None:
    """A missing folder is left out of a wheel without a word."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("foreshock/")}
    tree = {
        str(p.relative_to(ROOT / portion))
        for portion in PORTIONS
        for p in (ROOT / portion / "foreshock").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert packed == tree


def test_console_script_answers() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from foreshock.api.cli.main import run; run()", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    for command in ("demo", "serve", "train", "sweep", "score", "fit", "evaluate", "import"):
        assert re.search(rf"\b{command}\b", done.stdout), command


def test_every_dependency_is_pinned_for_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pinned = {
        re.split(r"[=<>\[]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    groups = [
        project["project"]["dependencies"],
        project["project"]["optional-dependencies"]["trainer"],
        project["project"]["optional-dependencies"]["api"],
        project["dependency-groups"]["dev"],
    ]
    wanted = {re.split(r"[=<>\[]", d)[0].lower().replace("_", "-") for g in groups for d in g}
    assert wanted <= pinned


def test_readme_tree_is_true() -> None:
    """Every path the README's tree names exists."""
    readme = (ROOT / "README.md").read_text()
    (tree,) = re.findall(r"```tree\n(.*?)```", readme, re.DOTALL)
    paths = [line.split()[0] for line in tree.splitlines() if line.strip()]
    assert len(paths) > 10
    assert [p for p in paths if not (ROOT / p).exists()] == []


def test_readme_images_and_links_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    local = [t for t in re.findall(r"\]\(([^)#]+)", readme) if not t.startswith("http")]
    assert [t for t in local if not (ROOT / t).exists()] == []


def test_ci_runs_the_three_targets() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert all(f"make {target}" in script for target in ("check", "test", "test-long"))
