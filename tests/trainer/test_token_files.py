"""A token file holds what the folder holds, and a run on it is the run on the folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from foreshock.api.cli.main import app
from foreshock.trainer.loop import train
from foreshock.trainer.recipes import debug_cpu
from foreshock.trainer.sources import read_tokens, text_folder
from foreshock.trainer.token_files import convert


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "text"
    (root / "b").mkdir(parents=True)
    (root / "a.txt").write_text("the first file " * 40)
    (root / "b" / "c.txt").write_text("and the second, umlaut ü " * 30)
    (root / "d.bin").write_bytes(b"\0\1\2")
    return root


def test_bytes_are_those_that_a_run_reads_from_the_folder(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "train.bin"
    answer = CliRunner().invoke(app, ["tokenize", str(folder), str(file)])
    assert answer.exit_code == 0, answer.output
    tokens, sha256, _ = read_tokens(str(file))
    text, text_sha256, _ = text_folder(str(folder))
    assert bytes(tokens.numpy()) == bytes(text.numpy())
    assert sha256 == text_sha256

    config = debug_cpu(seed=1)
    of_folder = replace(config, steps=3, data=replace(config.data, folder=str(folder)))
    of_file = replace(config, steps=3, data=replace(config.data, folder=str(file), source="tokens"))
    losses = [[s.loss for s in train(c).steps] for c in (of_folder, of_file)]
    assert losses[0] == losses[1]


def test_a_tokenizer_gives_its_ids_in_the_narrowest_type(folder: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "the": 1, "first": 2, "file": 300}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    (path := tmp_path / "tokenizer.json").write_text(model.to_str())
    written = convert(folder, tmp_path / "t.bin", path)
    assert (written.dtype, written.largest) == ("uint16", 300)
    found = np.fromfile(tmp_path / "t.bin", dtype="<u2")
    assert found[:6].tolist() == [1, 2, 300, 1, 2, 300]
    assert json.loads((tmp_path / "t.bin.json").read_text())["tokens"] == found.size


def test_a_folder_without_text_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no text in"):
        convert(tmp_path / "empty", tmp_path / "out" / "t.bin")
    assert list((tmp_path / "out").iterdir()) == []
