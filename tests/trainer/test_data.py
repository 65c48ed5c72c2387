"""The text and its batches: deterministic, resumable by step alone, clear about bad folders."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from foreshock.trainer.config import DataConfig
from foreshock.trainer.data import Corpus, batch, load_corpus
from foreshock.trainer.faults import BadBatch, LearningRateRamp

SIZES = DataConfig(sequence_length=16, batch_size=4)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    (tmp_path / "text.txt").write_bytes(bytes(range(1, 200)) * 50)
    return load_corpus(str(tmp_path))


def test_default_corpus_is_the_standard_library_without_its_tests() -> None:
    corpus = load_corpus()
    text = bytes(corpus.tokens.numpy())
    assert corpus.tokens.dtype == torch.uint8
    assert corpus.sha256 == hashlib.sha256(text).hexdigest()
    assert len(text) > 5_000_000
    assert b"class OrderedDict" in text
    assert b"class RegressionTests(unittest.TestCase)" not in text
    assert load_corpus().sha256 == corpus.sha256


def test_folder_is_joined_in_path_order_and_binary_and_hidden_files_are_left_out(
    tmp_path: Path,
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "c.bin").write_bytes(b"no\0no")
    (tmp_path / "d.txt").write_bytes(b"")
    assert bytes(load_corpus(str(tmp_path)).tokens.numpy()) == b"first\n\nsecond"


def test_bad_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_corpus(str(tmp_path / "none"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is not a folder"):
        load_corpus(str(tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no text in"):
        load_corpus(str(tmp_path / "empty"))


def test_too_short_text_is_refused_with_both_lengths(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("sixteen letters.")
    short = load_corpus(str(tmp_path))
    with pytest.raises(ValueError, match="holds 16 bytes and one sequence needs 17"):
        batch(short, SIZES, seed=0, step=0)
    fits = DataConfig(sequence_length=15, batch_size=3)
    assert (batch(short, fits, 0, 0) == torch.tensor([list(b"sixteen letters.")] * 3)).all()


def test_batch_follows_from_seed_and_step_alone(corpus: Corpus) -> None:
    later = [batch(corpus, SIZES, seed=3, step=s) for s in range(5, 8)]
    assert torch.equal(later[1], batch(corpus, SIZES, seed=3, step=6))
    assert not torch.equal(later[0], later[1])
    assert not torch.equal(later[0], batch(corpus, SIZES, seed=4, step=5))
    assert later[0].shape == (4, 17)
    assert later[0].dtype == torch.int64


def test_every_sequence_stands_in_the_text(corpus: Corpus) -> None:
    text = bytes(corpus.tokens.numpy())
    for row in batch(corpus, SIZES, seed=1, step=2):
        assert bytes(row.tolist()) in text


@pytest.mark.parametrize("kind", ["noise", "constant", "shuffled"])
def test_bad_batches_last_exactly_their_duration(kind: str, corpus: Corpus) -> None:
    fault = BadBatch(start=4, duration=3, kind=kind)  # type: ignore[arg-type]
    for step in range(10):
        healthy = batch(corpus, SIZES, 0, step)
        broken = batch(corpus, SIZES, 0, step, fault)
        assert torch.equal(healthy, broken) is (step not in (4, 5, 6))
        assert torch.equal(broken, batch(corpus, SIZES, 0, step, fault))


def test_kinds_of_bad_batch_are_what_they_say(corpus: Corpus) -> None:
    healthy = batch(corpus, SIZES, 0, 0)
    noise = batch(corpus, SIZES, 0, 0, BadBatch(start=0, kind="noise"))
    constant = batch(corpus, SIZES, 0, 0, BadBatch(start=0, kind="constant"))
    shuffled = batch(corpus, SIZES, 0, 0, BadBatch(start=0, kind="shuffled"))
    assert 0 <= int(noise.min()) <= int(noise.max()) < 256
    assert bool((constant == constant[0, 0]).all())
    assert torch.equal(shuffled.sort(dim=1).values, healthy.sort(dim=1).values)


def test_other_faults_leave_the_data_alone(corpus: Corpus) -> None:
    ramp = LearningRateRamp(start=0)
    assert torch.equal(batch(corpus, SIZES, 0, 1), batch(corpus, SIZES, 0, 1, ramp))
