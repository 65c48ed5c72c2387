"""The decoder language model, for one run or for a stack of runs that train as one.

Holds no training state but the FP8 scales in its layers' buffers. Embeddings and the language
model head are float32 and untied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from foreshock.trainer.blocks.fog import FogMaxBlock
from foreshock.trainer.blocks.fused import cross_entropy
from foreshock.trainer.blocks.llama import LlamaBlock
from foreshock.trainer.blocks.parts import Parts, RMSNorm, rotary_turns
from foreshock.trainer.config import ModelConfig, PrecisionConfig
from foreshock.trainer.faults import Fault
from foreshock.trainer.precision import GemmLinear, LayerFaults

__all__ = ["Decoder"]


class Decoder(nn.Module):
    """Bytes in, logits or loss out.

    Initial weights come from torch's global generator: N(0, init_std^2) for all matrices.

    Args:
        config: Sizes and block.
        precision: Recipe of the blocks' GEMMs; for a stack one per model.
        lead: () for one model, (E,) for a stack of E models of the same sizes.
    """

    def __init__(
        self,
        config: ModelConfig,
        precision: PrecisionConfig | Sequence[PrecisionConfig],
        *,
        lead: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        recipes = (precision,) if isinstance(precision, PrecisionConfig) else tuple(precision)
        if len(recipes) != math.prod(lead):
            raise ValueError(f"{len(recipes)} recipes for {math.prod(lead)} models")
        self.config, self.lead = config, lead
        parts = Parts(recipes, lead)
        block = {"llama3": LlamaBlock, "fog_max": FogMaxBlock}[config.architecture]
        self.embedding = nn.Parameter(torch.empty(*lead, config.vocabulary, config.width))
        self.blocks = nn.ModuleList(block(parts, config) for _ in range(config.layers))
        self.norm: RMSNorm | None = None
        if config.architecture == "llama3":
            self.norm = parts.norm(config.width)
        self.head = nn.Parameter(torch.empty(*lead, config.vocabulary, config.width))
        # FOG: embeddings of unit variance, so that the residual stream needs no norm.
        self._multiplier = 1 / config.init_std if config.architecture == "fog_max" else 1.0
        self._faults: LayerFaults | None = None
        with torch.no_grad():
            for parameter in (self.embedding, *self._matrices(), self.head):
                parameter.normal_(std=config.init_std)

    def linears(self) -> dict[str, GemmLinear]:
        """Linear layers of the blocks by qualified name, in order."""
        return {n: m for n, m in self.named_modules() if isinstance(m, GemmLinear)}

    def _matrices(self) -> list[nn.Parameter]:
        return [linear.weight for linear in self.linears().values()]

    def begin_step(self, step: int, fault: Fault | Sequence[Fault | None] | None) -> None:
        """Let faults act on the layers at this step; call it before each forward of training.

        Args:
            step: 0-based optimizer step.
            fault: Of the run, or one per run of a stack. Faults of data and learning rate do
                nothing here.

        Raises:
            ValueError: A fault names layers that are not there, or scales of a bf16 run.
        """
        faults = tuple(fault) if isinstance(fault, Sequence) else (fault,)
        if self._faults is None or self._faults.faults != faults:
            self._faults = LayerFaults(self.linears(), faults)
        self._faults.begin_step(step)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Predict each next token.

        Args:
            tokens: int64, shape (*lead, B, T).
            targets: The token that follows each, same shape.

        Returns:
            Without targets logits, float32 (*lead, B, T, vocabulary); with targets the mean
            cross-entropy in nats per token, float32 of shape lead.
        """
        head_width = self.config.width // self.config.heads
        turns = rotary_turns(tokens.shape[-1], head_width, tokens.device)
        x = self._embed(tokens)
        for block in self.blocks:
            x = block(x, turns)
        if self.norm is not None:
            x = self.norm(x)
        flat = x.reshape(*self.lead, -1, self.config.width)
        logits = flat @ self.head.transpose(-1, -2)
        if targets is None:
            return logits.view(*tokens.shape, self.config.vocabulary)
        rows = logits.view(-1, self.config.vocabulary)
        losses = cross_entropy(rows, targets.reshape(-1))
        return losses.view(*self.lead, -1).mean(-1)

    def _embed(self, tokens: Tensor) -> Tensor:
        if self.lead:
            models = torch.arange(self.lead[0], device=tokens.device)
            tokens = tokens + self.config.vocabulary * models[:, None, None]
        x = functional.embedding(tokens, self.embedding.reshape(-1, self.config.width))
        return x * self._multiplier if self._multiplier != 1.0 else x
