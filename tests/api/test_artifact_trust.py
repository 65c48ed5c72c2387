"""An artifact from a stranger: types that were not written by us are not built, let alone run."""

from __future__ import annotations

import json
import shutil
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

import foreshock.api.artifact
from foreshock.api.artifact import ArtifactError, load, skops_io

SHIPPED = Path(foreshock.api.artifact.__file__).parent / "artifacts"
MODEL, CARD = "forecaster.skops", "model_card.json"


def touch(path: str) -> None:
    """What a hostile artifact would have us run."""
    Path(path).touch()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The shipped card; the model beside it is each test's."""
    shutil.copy(SHIPPED / CARD, tmp_path / CARD)
    return tmp_path


def hostile(mark: Path) -> list[Any]:
    transformer = FunctionTransformer(partial(touch, str(mark)))
    return [
        touch,
        partial(touch, str(mark)),
        Path(mark),
        Pipeline([("run", transformer), ("fit", LogisticRegression())]),
    ]


@pytest.mark.parametrize("index", range(4))
def test_other_types_than_ours_are_named_and_not_built(folder: Path, index: int) -> None:
    mark = folder / "ran"
    skops_io.dump({"full": hostile(mark)[index]}, folder / MODEL)
    with pytest.raises(ArtifactError, match="not trusted"):
        load(folder)
    assert not mark.exists()


def test_a_changed_shipped_model_is_refused(folder: Path) -> None:
    """The same file with one type in it swapped for a function of the operating system."""
    with zipfile.ZipFile(SHIPPED / MODEL) as source:
        members = {name: source.read(name) for name in source.namelist()}
    schema = json.loads(members["schema.json"])
    changed = json.dumps(schema).replace('"DivergenceForecaster"', '"system"')
    changed = changed.replace('"foreshock.api.forecaster"', '"os"')
    assert '"os"' in changed
    with zipfile.ZipFile(folder / MODEL, "w") as target:
        for name, body in members.items():
            target.writestr(name, changed if name == "schema.json" else body)
    with pytest.raises(ArtifactError, match=r"not trusted.*os\.system"):
        load(folder)


def test_a_pickle_in_its_place_is_not_read(folder: Path) -> None:
    (folder / MODEL).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ArtifactError):
        load(folder)


def test_the_shipped_one_loads(folder: Path) -> None:
    shutil.copy(SHIPPED / MODEL, folder / MODEL)
    assert load(folder).heads
