"""Bytes of text as tokens, and the batch of any step of any run.

A batch depends on the corpus, the seed and the step alone, so a run resumes without any reader
state. It deliberately keeps nothing on disk and knows no tokenizer.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from foreshock.trainer.config import DataConfig
from foreshock.trainer.faults import BadBatch, Fault

__all__ = ["Corpus", "batch", "load_corpus"]

# Third-party code and tests are no part of "the standard library's source"; the build's own
# settings (_sysconfigdata*) differ from machine to machine.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_BAD_BATCH_STREAM = 1 << 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Corpus:
    """A text as one row of bytes.

    Attributes:
        tokens: Every byte, uint8, shape (bytes,).
        sha256: Hex digest of the bytes: what a run was trained on.
        name: Where they are from, for people.
    """

    tokens: torch.Tensor
    sha256: str
    name: str


def load_corpus(folder: str | None = None) -> Corpus:
    """Read a text: every file of a folder in the order of their paths, or Python's own source.

    Args:
        folder: A folder of text files, searched recursively; hidden and binary files are left out.
            None takes the sources of the running Python's standard library, without tests. Their
            bytes depend on the version of Python: compare `sha256`.

    Raises:
        ValueError: The folder is missing, is no folder, or holds no text.
    """
    if folder is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [p for p in _walk(root, _SKIPPED_FOLDERS) if _is_library_source(p)]
        name = f"Python {sysconfig.get_python_version()} standard library"
    else:
        root = Path(folder)
        if not root.is_dir():
            what = "is not a folder" if root.exists() else "does not exist"
            raise ValueError(f"data.folder {folder!r} {what}; give a folder that holds text files")
        files = _walk(root, set())
        name = str(root)
    text = bytearray(b"\n\n".join(_texts(files)))
    if not text:
        raise ValueError(f"no text in {root}: it holds no file, or only empty or binary ones")
    tokens = torch.frombuffer(text, dtype=torch.uint8)
    return Corpus(tokens=tokens, sha256=hashlib.sha256(text).hexdigest(), name=name)


def _walk(root: Path, skipped: set[str]) -> list[Path]:
    """Every visible file below `root` in the order of its path; folders are skipped early."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in skipped and not s.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _is_library_source(path: Path) -> bool:
    return path.suffix == ".py" and not path.name.startswith("_sysconfigdata")


def _texts(files: list[Path]) -> Iterator[bytes]:
    for path in files:
        content = path.read_bytes()
        if content and b"\0" not in content:
            yield content


def batch(
    corpus: Corpus, config: DataConfig, seed: int, step: int, fault: Fault | None = None
) -> torch.Tensor:
    """The sequences of one step, drawn at random places; inputs [:, :-1], targets [:, 1:].

    Args:
        corpus: The text.
        config: Sizes.
        seed: Of the order; every seed has its own.
        step: Which step; with `seed` it decides the whole batch.
        fault: A `BadBatch` breaks the batches of its steps; any other fault changes nothing here.

    Returns:
        int64, shape (batch_size, sequence_length + 1).

    Raises:
        ValueError: The text is shorter than one sequence.
    """
    length = config.sequence_length + 1
    places = corpus.tokens.numel() - length + 1
    if places < 1:
        raise ValueError(
            f"{corpus.name} holds {corpus.tokens.numel()} bytes and one sequence needs {length}; "
            "give more text or a smaller data.sequence_length"
        )
    random = _generator(seed, step)
    starts = torch.from_numpy(random.integers(0, places, config.batch_size))
    tokens = corpus.tokens[starts[:, None] + torch.arange(length)].long()
    if isinstance(fault, BadBatch) and fault.active(step):
        return _broken(tokens, fault, _generator(seed, step + _BAD_BATCH_STREAM))
    return tokens


def _generator(seed: int, step: int) -> np.random.Generator:
    # Philox is counter based: no state to save, and neighbouring keys are independent streams.
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, step]))


def _broken(tokens: torch.Tensor, fault: BadBatch, random: np.random.Generator) -> torch.Tensor:
    if fault.kind == "noise":
        return torch.from_numpy(random.integers(0, 256, tuple(tokens.shape)))
    if fault.kind == "constant":
        return torch.full_like(tokens, int(random.integers(0, 256)))
    return torch.from_numpy(random.permuted(tokens.numpy(), axis=1))
