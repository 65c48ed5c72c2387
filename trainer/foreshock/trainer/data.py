"""The batch of any step of any run, and what is held out of it.

A batch depends on the corpus, the seed and the step alone, so a run resumes without any reader
state, on any number of processes. Where texts come from is `sources.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch

from foreshock.trainer import sources
from foreshock.trainer.config import DataConfig
from foreshock.trainer.faults import BadBatch, Fault

__all__ = [
    "Corpus",
    "batch",
    "broken_batch",
    "corpus_of",
    "held_out_batch",
    "load_corpus",
    "sequence_starts",
    "text_at",
]

_BAD_BATCH_STREAM: Final = 1 << 32
_HELD_OUT_STREAM: Final = 1 << 33
_CHAPTERS: Final = 64
"""The text is cut into so many parts of equal length; each gives its share to what is held out."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Corpus:
    """A text as one row of tokens.

    Attributes:
        tokens: Every token, an integer type, shape (tokens,); bytes are uint8.
        sha256: Hex digest of their bytes: what a run was trained on.
        name: Where they are from, for people.
        other: The text that takes turns with this one.
    """

    tokens: torch.Tensor
    sha256: str
    name: str
    other: Corpus | None = None


def load_corpus(folder: str | None = None) -> Corpus:
    """Read a text: every file of a folder in the order of their paths, or Python's own source.

    Args:
        folder: A folder of text files, searched recursively; hidden and binary files are left out.
            None takes the sources of the running Python's standard library, without tests. Their
            bytes depend on the version of Python: compare `sha256`.

    Raises:
        ValueError: The folder is missing, is no folder, or holds no text.
    """
    return _corpus(sources.python_sources() if folder is None else sources.text_folder(folder))


def corpus_of(config: DataConfig) -> Corpus:
    """The text that a run's configuration names, with the one that takes turns with it.

    Raises:
        ValueError: It is not there, empty, or needs a package that is not installed.
    """
    first = _source(config, config.source, config.folder)
    if config.alternate is None:
        return first
    kind, _, path = config.alternate.partition(":")
    if kind == "stdlib":
        kind, path = "text", ""
    elif kind not in ("sotu", "docstrings") and not path:
        raise ValueError(
            f"data.alternate is {config.alternate!r}; allowed: sotu, stdlib, docstrings, "
            "text:FOLDER, tokens:FILE, huggingface:FOLDER"
        )
    second = _source(config, kind, path or None)
    return replace(first, other=second, sha256=f"{first.sha256}+{second.sha256}")


def _source(config: DataConfig, kind: str, path: str | None) -> Corpus:
    if kind == "sotu":
        return _corpus(sources.sotu())
    if kind == "docstrings":
        return _corpus(sources.docstrings())
    if kind == "text":
        return load_corpus(path)
    if kind == "instructions":
        # What a fine-tuned model is evaluated on: the text that it may forget.
        return load_corpus(None)
    if kind == "tokens" and path:
        return _corpus(sources.read_tokens(path))
    if kind == "huggingface" and path:
        return _corpus(sources.huggingface(path, config.column, config.tokenizer))
    raise ValueError(f"no such text: {kind!r}; allowed: text, tokens, sotu, huggingface")


def _corpus(text: sources.Text) -> Corpus:
    tokens, sha256, name = text
    return Corpus(tokens=tokens, sha256=sha256, name=name)


def batch(
    corpus: Corpus, config: DataConfig, seed: int, step: int, fault: Fault | None = None
) -> torch.Tensor:
    """The sequences of one step, drawn at random places; inputs [:, :-1], targets [:, 1:].

    Args:
        corpus: The text; with another that takes turns, the step decides which it is.
        config: Sizes.
        seed: Of the order; every seed has its own.
        step: Which step; with `seed` it decides the whole batch.
        fault: A `BadBatch` breaks the batches of its steps; any other fault changes nothing here.

    Returns:
        int64, shape (batch_size, sequence_length + 1).

    Raises:
        ValueError: The text is shorter than one sequence.
    """
    text = text_at(corpus, config, step)
    starts = sequence_starts(text, config, seed, step)
    places = torch.from_numpy(starts)[:, None] + torch.arange(config.sequence_length + 1)
    tokens = _take(text.tokens, places)
    if isinstance(fault, BadBatch) and fault.active(step):
        return broken_batch(tokens, fault, seed, step)
    return tokens


def text_at(corpus: Corpus, config: DataConfig, step: int) -> Corpus:
    """Which of two texts a step reads."""
    if corpus.other is None:
        return corpus
    if config.switch_at:
        return corpus.other if step >= config.switch_at else corpus
    return corpus.other if step // config.alternate_every % 2 else corpus


def sequence_starts(
    text: Corpus, config: DataConfig, seed: int, step: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where the sequences of a step begin in the text it reads, int64 (batch_size,).

    Raises:
        ValueError: The text is shorter than one sequence.
    """
    spans = _training_spans(text, config.held_out)
    starts = _starts(text, config, spans, _generator(seed, step))
    if config.repeats > 1 and (config.repeats_until == 0 or step < config.repeats_until):
        kept = starts[: config.batch_size // config.repeats]
        starts = np.tile(kept, config.repeats)
    return starts


def broken_batch(tokens: torch.Tensor, fault: BadBatch, seed: int, step: int) -> torch.Tensor:
    """What a fault leaves of a batch, shape kept."""
    return _broken(tokens, fault, _generator(seed, step + _BAD_BATCH_STREAM))


def held_out_batch(corpus: Corpus, config: DataConfig, number: int) -> torch.Tensor:
    """A batch of text that no training batch holds; depends on the text and `number` alone.

    Returns:
        int64, shape (batch_size, sequence_length + 1).

    Raises:
        ValueError: Nothing is held out, or too little for one sequence.
    """
    if config.held_out == 0:
        raise ValueError("nothing is held out: set data.held_out to a share above 0, such as 0.05")
    random = _generator(_split_seed(corpus), number + _HELD_OUT_STREAM)
    return _drawn(corpus, config, _held_out_spans(corpus, config.held_out), random)


def _drawn(
    corpus: Corpus, config: DataConfig, spans: np.ndarray, random: np.random.Generator
) -> torch.Tensor:
    """Sequences that start anywhere in the spans and lie in one of them each.

    Args:
        corpus: The text.
        config: Sizes.
        spans: First token and end of each, int64, shape (spans, 2).
        random: Decides.
    """
    starts = torch.from_numpy(_starts(corpus, config, spans, random))
    return _take(corpus.tokens, starts[:, None] + torch.arange(config.sequence_length + 1))


def _starts(
    corpus: Corpus, config: DataConfig, spans: np.ndarray, random: np.random.Generator
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    length = config.sequence_length + 1
    places = np.maximum(spans[:, 1] - spans[:, 0] - length + 1, 0)
    before = np.concatenate(([0], np.cumsum(places)))
    if before[-1] < 1:
        raise ValueError(
            f"{corpus.name} holds {corpus.tokens.numel()} bytes and one sequence needs {length}; "
            "give more text or a smaller data.sequence_length"
        )
    drawn = random.integers(0, int(before[-1]), config.batch_size)
    span = np.searchsorted(before, drawn, side="right") - 1
    starts: np.ndarray[tuple[int], np.dtype[np.int64]] = spans[span, 0] + drawn - before[span]
    return starts


def _take(tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    # torch indexes no unsigned type but uint8.
    if tokens.dtype in (torch.uint16, torch.uint32):
        return torch.from_numpy(tokens.numpy()[places.numpy()].astype(np.int64))
    return tokens[places].long()


def _training_spans(corpus: Corpus, held_out: float) -> np.ndarray:
    size = corpus.tokens.numel()
    if held_out == 0:
        return np.array([[0, size]])
    kept = _held_out_spans(corpus, held_out)
    return np.stack((np.append(0, kept[:, 1]), np.append(kept[:, 0], size)), 1)


def _held_out_spans(corpus: Corpus, held_out: float) -> np.ndarray:
    size = corpus.tokens.numel()
    chapter = size // _CHAPTERS
    window = round(chapter * held_out)
    offset = _split_seed(corpus) % max(1, chapter - window)
    firsts = offset + chapter * np.arange(_CHAPTERS)
    return np.stack((firsts, firsts + window), 1)


def _split_seed(corpus: Corpus) -> int:
    return int(corpus.sha256[:12], 16)


def _generator(seed: int, step: int) -> np.random.Generator:
    # Philox is counter based: no state to save, and neighbouring keys are independent streams.
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, step]))


def _broken(tokens: torch.Tensor, fault: BadBatch, random: np.random.Generator) -> torch.Tensor:
    if fault.kind == "noise":
        return torch.from_numpy(random.integers(0, 256, tuple(tokens.shape)))
    if fault.kind == "constant":
        return torch.full_like(tokens, int(random.integers(0, 256)))
    return torch.from_numpy(random.permuted(tokens.numpy(), axis=1))
