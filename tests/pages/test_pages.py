"""Every command and snippet of the documentation runs, or says why it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.api.clickhouse_front import PASSWORD, USER, Front
from tests.api.service import Service
from tests.pages.blocks import (
    OTHER_LANGUAGES,
    ROOT,
    RUN_LANGUAGES,
    Block,
    blocks_of,
    pages,
    statements,
)
from tests.pages.runner import PageRun
from tests.pages.scenes import SCENES, Scene, Stage

BLOCKS = [block for page in pages() for block in blocks_of(page)]
RUNNABLE = [block for block in BLOCKS if block.language in RUN_LANGUAGES]
HERE = [block for block in RUNNABLE if not block.reason and not block.elsewhere]


def where(block: Block) -> str:
    return f"{block.page}:{block.line}"


def test_every_block_says_what_it_is() -> None:
    known = (*RUN_LANGUAGES, *OTHER_LANGUAGES)
    assert [where(block) for block in BLOCKS if block.language not in known] == []


def test_no_command_hides_in_an_indented_block() -> None:
    hidden = [
        f"{page}: {line}"
        for page in pages()
        for line in page.read_text().splitlines()
        if line.startswith(("    foreshock ", "    make ", "    pip ", "    export "))
    ]
    assert hidden == []


def test_at_most_one_command_in_twenty_is_not_run() -> None:
    skipped = sum(block.commands for block in RUNNABLE if block.reason)
    total = sum(block.commands for block in RUNNABLE)
    assert total > 100
    assert 20 * skipped <= total, f"{skipped} of {total}"


def test_what_is_said_to_run_elsewhere_stands_there() -> None:
    elsewhere = [block for block in RUNNABLE if block.elsewhere]
    assert elsewhere
    for block in elsewhere:
        assert block.elsewhere
        file, words = block.elsewhere
        assert words in (ROOT / file).read_text(), where(block)


def test_every_page_with_something_to_run_has_a_scene() -> None:
    assert {block.page for block in HERE} == set(SCENES)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("a\nb\n", 2),
        ("# said\n\na\n", 1),
        ("a \\\n  b\n", 1),
        ("for x in 1; do\n  a\ndone\nb\n", 2),
        ("cat <<E\nx\nE\n", 1),
        ("a 'b\nc'\n", 1),
    ],
)
def test_statements_are_whole(text: str, count: int) -> None:
    assert len(statements(text)) == count


@pytest.mark.parametrize(
    ("language", "text", "word"),
    [("bash", "true\nfalse\n", "exit code 1"), ("python", "x = 1\nx + y\n", "NameError")],
)
def test_a_block_that_fails_fails_its_test(
    tmp_path: Path, language: str, text: str, word: str
) -> None:
    (tmp_path / "scratch").mkdir()
    with (
        PageRun(tmp_path, tmp_path / "scratch") as page,
        pytest.raises(AssertionError, match=f"(?s)page.md:7.*{word}"),
    ):
        page.run(Block("page.md", 7, language, text))


def test_blocks_share_folder_and_environment(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    with PageRun(tmp_path, tmp_path / "scratch", before="y = 2") as page:
        page.run(Block("page.md", 1, "bash", "export X=1\nmkdir sub\ncd sub\n"))
        code = "import os\nassert os.environ['X'] == '1'\nassert os.getcwd().endswith('sub')\n"
        page.run(Block("page.md", 2, "python", code + "x = y"))
        page.run(Block("page.md", 3, "python", "assert x == 2"))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("stage")
    service = Service(folder)
    service.start()
    yield Stage.build(folder, service.url)
    assert service.stop() == 0, service.log


def cases() -> list[object]:
    marks = {page: [pytest.mark.long] if scene.long else [] for page, scene in SCENES.items()}
    return [pytest.param(page, id=page, marks=marks[page]) for page in SCENES]


@pytest.mark.debian
@pytest.mark.parametrize("name", cases())
def test_page_runs(name: str, stage: Stage, tmp_path: Path) -> None:
    scene, scratch, folder = SCENES[name], tmp_path / "scratch", tmp_path / "here"
    scratch.mkdir()
    folder.mkdir()
    scene.prepare(stage, folder)
    with ExitStack() as stack:
        replaced = _replaced(scene, stage, stack, tmp_path)
        service = stage.service if scene.served else None
        page = PageRun(folder, scratch, replaced=replaced, before=scene.before, service=service)
        stack.enter_context(page)
        if scene.default_url:
            page.run(Block(name, 0, "bash", f"export FORESHOCK_URL={page.url}"))
        for block in (block for block in RUNNABLE if block.page == name):
            if block in HERE:
                page.run(block)
            elif block.reason and scene.stand_in:
                page.run(replace(block, text=scene.stand_in))


def _replaced(scene: Scene, stage: Stage, stack: ExitStack, folder: Path) -> dict[str, str]:
    """Addresses of the page and those that stand for them here."""
    found = {}
    if scene.other:
        found[scene.other] = stage.service.removeprefix("http://")
    if scene.clickhouse:
        (folder / "clickhouse").mkdir()
        front = Front(folder / "clickhouse")
        front.start()
        stack.callback(front.kill)
        found[scene.clickhouse] = f"{USER}:{quote(PASSWORD, safe='')}@{front.place}"
    return found
