"""From a folder of text to a token file that runs map into memory, a file at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from foreshock.trainer.sources import iter_texts, load_tokenizer

__all__ = ["Written", "convert"]

_BETWEEN = b"\n\n"
Tokens = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Written:
    """What stands beside a token file, in PATH.json.

    Attributes:
        dtype: uint8, uint16 or uint32, little-endian.
        tokens: How many.
        sha256: Of the file.
        largest: Largest token; model.vocabulary has to be above it.
    """

    dtype: str
    tokens: int
    sha256: str
    largest: int


def convert(folder: Path, path: Path, tokenizer: Path | None = None) -> Written:
    """Write every text file of a folder, in the order of their paths, as one token file.

    The file appears under its name when it is whole. Read with data.source tokens; as bytes it
    holds what data.source text reads from the folder.

    Args:
        folder: Searched recursively; hidden and binary files are left out.
        path: The token file; PATH.json is written beside it.
        tokenizer: A tokenizer.json of the package tokenizers; None takes bytes.

    Raises:
        ValueError: No text, or no tokenizer.
    """
    encode, dtype = _encoder(tokenizer)
    digest, count, largest = hashlib.sha256(), 0, 0
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with unfinished.open("wb") as stream:
            for text in _with_gaps(iter_texts(folder)):
                tokens = encode(text)
                content = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False).tobytes()
                stream.write(content)
                digest.update(content)
                count += tokens.size
                largest = max(largest, int(tokens.max(initial=0)))
        if not count:
            raise ValueError(f"no text in {folder}: it holds no file, or only empty or binary ones")
        written = Written(dtype, count, digest.hexdigest(), largest)
        about = {name: getattr(written, name) for name in Written.__slots__}
        Path(f"{path}.json").write_text(json.dumps(about) + "\n")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return written


def _with_gaps(texts: Iterator[bytes]) -> Iterator[bytes]:
    for number, text in enumerate(texts):
        yield _BETWEEN + text if number else text


def _encoder(tokenizer: Path | None) -> tuple[Callable[[bytes], Tokens], str]:
    if tokenizer is None:
        return lambda text: np.frombuffer(text, np.uint8), "uint8"
    model = load_tokenizer(str(tokenizer))
    dtype = np.uint16 if model.get_vocab_size() <= 1 << 16 else np.uint32

    def encode(text: bytes) -> Tokens:
        return np.array(model.encode(text.decode(errors="replace")).ids, dtype=dtype)

    return encode, np.dtype(dtype).name
