"""Fine-tuning learns responses from where a checkpoint stands; the cloze score knows text."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from foreshock.trainer.checkpoint import CheckpointError
from foreshock.trainer.cloze import cloze_accuracy
from foreshock.trainer.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    StatesConfig,
)
from foreshock.trainer.data import Corpus, corpus_of, held_out_batch
from foreshock.trainer.instructions import Instructions, Pair, generated, read_pairs
from foreshock.trainer.loop import CheckpointPolicy, train
from foreshock.trainer.recipes import debug_cpu
from foreshock.trainer.task import Batch, share_of_loss

TEXT = replace(debug_cpu(seed=2), steps=12, data=DataConfig(sequence_length=48, batch_size=4))
TUNED = replace(TEXT, data=replace(TEXT.data, source="instructions"), steps=20)


def test_only_responses_are_counted() -> None:
    task = Instructions(config=TUNED, pairs=[Pair("ask: ", "yes"), Pair("say: ", "no")])
    found = task.batch(3)
    assert found.counted is not None
    for row, counted in zip(found.tokens, found.counted, strict=True):
        kept = bytes(row[1:][counted].byte().numpy()).decode().split("\n")
        prompts = bytes(row[1:][~counted].byte().numpy()).decode()
        assert set(kept) <= {"yes", "no", ""}
        assert "yes" not in prompts
    assert torch.equal(task.batch(3).tokens, found.tokens)
    assert not torch.equal(task.batch(4).tokens, found.tokens)


def test_the_loss_is_the_mean_over_counted_bytes() -> None:
    task = Instructions(config=TUNED, pairs=generated(50))
    whole = task.batch(0)
    assert whole.counted is not None

    class Uniform(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.zeros(*tokens.shape, 256)

    part = Batch(tokens=whole.tokens, counted=whole.counted, share=float(whole.counted.sum()))
    assert float(share_of_loss(Uniform(), part)) == pytest.approx(math.log(256))


def test_a_run_begins_with_the_weights_of_a_checkpoint(tmp_path: Path) -> None:
    train(TEXT, checkpoints=CheckpointPolicy(folder=tmp_path))
    path = str(tmp_path / "step-00000012.pt")
    text = replace(TEXT, data=replace(TEXT.data, held_out=0.1), steps=1)
    looked = replace(
        text,
        evaluation=EvaluationConfig(every=1),
        optimizer=replace(TEXT.optimizer, learning_rate=1e-9),
    )
    fresh = train(looked).steps[0].eval_loss
    # Another precision and a level of FP8-LM may begin there too.
    for other in (
        looked,
        replace(looked, precision=PrecisionConfig(backend="bf16")),
        replace(looked, states=StatesConfig(level="O3")),
    ):
        begun = train(replace(other, initial=path)).steps[0].eval_loss
        assert begun is not None and fresh is not None  # noqa: PT018
        assert begun < fresh - 0.3

    assert replace(TEXT, initial=path).fingerprint() != TEXT.fingerprint()
    with pytest.raises(CheckpointError, match="is of another model: embedding"):
        train(replace(TEXT, model=ModelConfig(width=48, layers=2, heads=2), initial=path))
    with pytest.raises(CheckpointError, match="not a file"):
        train(replace(TEXT, initial=str(tmp_path / "none.pt")))


def test_responses_are_learnt() -> None:
    rate = OptimizerConfig(learning_rate=1e-2)
    losses = [s.loss for s in train(replace(TUNED, optimizer=rate, steps=40)).steps]
    assert losses[-1] < losses[0] - 1.5


class Oracle(nn.Module):
    """Knows the text by heart: the next byte of any context that occurs in it."""

    def __init__(self, corpus: Corpus, *, knows: bool) -> None:
        super().__init__()
        self.text = bytes(corpus.tokens.numpy())
        self.knows = knows
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 256)
        for row, line in enumerate(tokens):
            known = bytes(line[:20].byte().numpy())
            at = self.text.find(known)
            for place in range(20, tokens.shape[1]):
                if self.knows and at >= 0:
                    logits[row, place, self.text[at + place + 1]] = 10.0
        return logits


def test_who_knows_the_text_answers_every_item_and_who_knows_nothing_none(tmp_path: Path) -> None:
    words = [f"{i * 7919 % 99991:05d}" for i in range(4000)]
    (tmp_path / "a.txt").write_text(" ".join(words))
    data = DataConfig(folder=str(tmp_path), sequence_length=40, batch_size=8, held_out=0.2)
    config = RunConfig(name="c", data=data, evaluation=EvaluationConfig(every=1, cloze=12))
    corpus = corpus_of(data)
    assert held_out_batch(corpus, data, 0).shape == (8, 41)
    assert cloze_accuracy(Oracle(corpus, knows=True), config, corpus) == 1.0
    assert cloze_accuracy(Oracle(corpus, knows=False), config, corpus) == 0.0


def test_a_run_reports_its_score() -> None:
    data = replace(TEXT.data, held_out=0.1)
    looked = replace(TEXT, data=data, evaluation=EvaluationConfig(every=12, cloze=40))
    scores = [s.cloze for s in train(looked).steps]
    assert scores[:-1] == [None] * 11
    assert scores[-1] is not None
    assert 0 <= scores[-1] <= 1


def test_lines_without_a_response_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="line 2: not an object with prompt and response"):
        read_pairs(path)
