"""The decoder language model, for one run or for a stack of runs that train as one.

Holds no training state but the FP8 scales in its layers' buffers. Embeddings and the language
model head are float32, where activations are bfloat16 with a product in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from foreshock.trainer.blocks import ARCHITECTURES, Experts, Parts, RMSNorm, rotary_turns
from foreshock.trainer.blocks.fused import cross_entropy
from foreshock.trainer.config import ModelConfig, PrecisionConfig
from foreshock.trainer.faults import Fault
from foreshock.trainer.head_loss import HeadLoss
from foreshock.trainer.precision import (
    GemmLinear,
    LayerFaults,
    around_forward,
    leave_in_bf16,
)

__all__ = ["Decoder", "TokenSplit"]


class TokenSplit:
    """Which tokens of every sequence this process has between the blocks: here, all of them."""

    def own(self, tokens: Tensor) -> Tensor:
        """This process's tokens; (..., T) to (..., T / processes)."""
        return tokens

    def loss(self, loss: Tensor) -> Tensor:
        """The mean over all processes' tokens, 0-dim."""
        return loss

    def logits(self, logits: Tensor) -> Tensor:
        """All processes' tokens, (..., T, V)."""
        return logits


class Decoder(nn.Module):
    """Bytes in, logits or loss out.

    Initial weights come from torch's global generator: N(0, init_std^2) for all matrices.

    Args:
        config: Sizes and architecture.
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
        self.narrow = all(recipe.activations == "bfloat16" for recipe in recipes)
        if lead and any(recipe.activations == "bfloat16" for recipe in recipes):
            raise ValueError("a stack keeps activations in float32; train alone for bfloat16")
        self.config, self.lead = config, lead
        parts = Parts(recipes, lead)
        anatomy = ARCHITECTURES[config.architecture]
        self.embedding = nn.Parameter(torch.empty(*lead, config.vocabulary, config.width))
        self.blocks = nn.ModuleList(anatomy.block(parts, config) for _ in range(config.layers))
        self.norm: RMSNorm | None = parts.norm(config.width) if anatomy.final_norm else None
        self.head: nn.Parameter | None = None
        if not config.tied:
            self.head = nn.Parameter(torch.empty(*lead, config.vocabulary, config.width))
        leave_in_bf16(self.blocks, recipes)
        self._around = around_forward(recipes)
        self._multiplier = 1 / config.init_std if anatomy.unit_embeddings else 1.0
        self._faults: LayerFaults | None = None
        self.head_loss = HeadLoss()
        self.split = TokenSplit()
        with torch.no_grad():
            for parameter in self._matrices():
                parameter.normal_(std=config.init_std)

    def linears(self) -> dict[str, GemmLinear]:
        """Linear layers of the blocks by qualified name, in order."""
        return {n: m for n, m in self.named_modules() if isinstance(m, GemmLinear)}

    def _matrices(self) -> list[nn.Parameter]:
        """In the order in which they draw their initial values."""
        axes = 2 + len(self.lead)
        inside = [p for p in self.blocks.parameters() if p.dim() == axes]
        return [self.embedding, *inside, *([] if self.head is None else [self.head])]

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
        for layer in self._faults.layers.values():
            layer.begin_step()

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Predict each next token.

        Args:
            tokens: int64, shape (*lead, B, T).
            targets: The token that follows each, same shape.

        Returns:
            Without targets logits, float32 (*lead, B, T, vocabulary); with targets the mean
            cross-entropy in nats per token, float32 of shape lead.
        """
        turns = rotary_turns(tokens.shape[-1], self.config.head_width, tokens.device)
        if self.narrow:
            turns = torch.view_as_real(turns)
        tokens = self.split.own(tokens)
        targets = None if targets is None else self.split.own(targets)
        x = self._embed(tokens)
        with self._around():
            for block in self.blocks:
                x = block(x, turns)
        if self.norm is not None:
            x = self.norm(x)
        flat = x.reshape(*self.lead, -1, self.config.width)
        head = self.embedding if self.head is None else self.head
        if self.narrow and targets is not None:
            loss = self.head_loss(flat, head, targets.reshape(-1))
            return self._balanced(self.split.loss(loss))
        weight = head.float() if head.dtype == torch.bfloat16 else head
        logits = flat.to(weight.dtype) @ weight.transpose(-1, -2)
        if targets is None:
            return self.split.logits(logits.view(*tokens.shape, self.config.vocabulary))
        rows = logits.view(-1, self.config.vocabulary)
        losses = cross_entropy(rows, targets.reshape(-1))
        return self._balanced(self.split.loss(losses.view(*self.lead, -1).mean(-1)))

    def _balanced(self, loss: Tensor) -> Tensor:
        """The same loss, with the load-balancing loss of experts in its gradient alone."""
        for module in self.modules():
            if isinstance(module, Experts) and module.balance is not None:
                balance = self.config.balance * module.balance
                loss = loss + (balance - balance.detach())
        return loss

    def extra_repr(self) -> str:
        """What stands outside the blocks, for the audit that `print(model)` is."""
        config = self.config
        head = "tied head" if config.tied else "head"
        kind = "float32, product in bfloat16" if self.narrow else "float32"
        outside = f"embedding and {head} {config.vocabulary} x {config.width} in {kind}"
        scaled = "" if self._multiplier == 1.0 else f", embeddings times {self._multiplier:g}"
        return f"{config.architecture}, {outside}{scaled}"

    def _embed(self, tokens: Tensor) -> Tensor:
        if self.lead:
            models = torch.arange(self.lead[0], device=tokens.device)
            tokens = tokens + self.config.vocabulary * models[:, None, None]
        x = functional.embedding(tokens, self.embedding.reshape(-1, self.config.width))
        if x.dtype == torch.bfloat16:
            x = x.float()
        x = x * self._multiplier if self._multiplier != 1.0 else x
        return x.to(torch.bfloat16) if self.narrow else x
