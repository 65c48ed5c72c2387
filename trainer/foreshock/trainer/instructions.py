"""Fine-tuning on prompts and responses: the loss counts the responses' bytes alone.

The set is a file of JSON lines with "prompt" and "response", or is made here: small tasks on
words and numbers that a model of text has not seen.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch

from foreshock.trainer.config import RunConfig
from foreshock.trainer.task import Batch

__all__ = ["Instructions", "Pair", "generated", "pairs_of", "read_pairs"]

_COUNT: Final = 4096
_STREAM: Final = 1 << 34
_END: Final = "\n"
_TEXT: Final = """
state tensor scale layer model batch token train loss value range small large first last left right
open close plain round sharp table chair water light stone river green white black
"""
_WORDS: Final = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt, and the response to learn."""

    prompt: str
    response: str


def generated(count: int = _COUNT, seed: int = 0) -> list[Pair]:
    """Tasks such as reversing a word or adding two numbers; the same for the same arguments."""
    chance = random.Random(seed)
    pairs = []
    for _ in range(count):
        kind = chance.randrange(4)
        word = chance.choice(_WORDS)
        if kind == 0:
            pair = Pair(f"reverse {word} = ", word[::-1])
        elif kind == 1:
            pair = Pair(f"upper {word} = ", word.upper())
        elif kind == 2:
            a, b = chance.randrange(50), chance.randrange(50)
            pair = Pair(f"add {a} and {b} = ", str(a + b))
        else:
            times = chance.randrange(2, 4)
            pair = Pair(f"repeat {word} {times} = ", " ".join([word] * times))
        pairs.append(pair)
    return pairs


def read_pairs(path: Path) -> list[Pair]:
    """From a file of JSON lines.

    Raises:
        ValueError: It is missing or empty, or a line has no prompt and response.
    """
    if not path.is_file():
        raise ValueError(f"data.folder {str(path)!r} is not a file; give JSON lines of prompts")
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            content = json.loads(line)
            pairs.append(Pair(str(content["prompt"]), str(content["response"])))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} line {number}: not an object with prompt and response"
            ) from error
    if not pairs:
        raise ValueError(f"{path} holds no line; give JSON lines with prompt and response")
    return pairs


def pairs_of(folder: str | None) -> list[Pair]:
    """The set that `data.folder` names; None makes one."""
    return generated() if folder is None else read_pairs(Path(folder))


@dataclass(frozen=True, slots=True, kw_only=True)
class Instructions:
    """Prompts with their responses, one after the other in each sequence.

    A sequence is filled with whole pairs; what is left at its end repeats the newline and is not
    counted.

    Attributes:
        config: The run.
        pairs: The set.
    """

    config: RunConfig
    pairs: Sequence[Pair]
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        text = json.dumps([[p.prompt, p.response] for p in self.pairs])
        object.__setattr__(self, "sha256", hashlib.sha256(text.encode()).hexdigest())
        longest = max(len(_bytes(p)[0]) + len(_bytes(p)[1]) for p in self.pairs)
        room = self.config.data.sequence_length + 1
        if longest > room:
            raise ValueError(
                f"a prompt with its response has {longest} bytes; data.sequence_length is "
                f"{room - 1}"
            )
        if self.config.model.vocabulary < 256:
            raise ValueError(
                f"model.vocabulary is {self.config.model.vocabulary}; instructions are bytes: 256"
            )

    def batch(self, step: int) -> Batch:
        """Pairs drawn at random by seed and step."""
        config = self.config
        draw = np.random.Generator(np.random.Philox(key=[config.seed, _STREAM + step]))
        rows = [self._row(draw) for _ in range(config.data.batch_size)]
        tokens = torch.from_numpy(np.stack([row for row, _ in rows]).astype(np.int64))
        counted = torch.from_numpy(np.stack([mask for _, mask in rows]))
        return Batch(tokens=tokens, counted=counted[:, 1:])

    def _row(self, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        room = self.config.data.sequence_length + 1
        row, counted = bytearray(), list[bool]()
        while True:
            prompt, response = _bytes(self.pairs[int(draw.integers(len(self.pairs)))])
            if len(row) + len(prompt) + len(response) > room:
                break
            row += prompt + response
            counted += [False] * len(prompt) + [True] * len(response)
        rest = room - len(row)
        row += _END.encode() * rest
        return np.frombuffer(bytes(row), np.uint8), np.array(counted + [False] * rest)


def _bytes(pair: Pair) -> tuple[bytes, bytes]:
    return pair.prompt.encode(), (pair.response + _END).encode()
