"""torch.compile where it pays: block by block, and around the loss of a large vocabulary.

All blocks share one compilation. Layers of the native backend and of Transformer Engine stay
outside of it and cut a block's graph into what lies between the GEMMs.
"""

from __future__ import annotations

from foreshock.trainer.model import Decoder

__all__ = ["compile_model"]


def compile_model(model: Decoder, *, backend: str = "inductor") -> None:
    """Compile a model in place; names of parameters and buffers stay as they are."""
    for block in model.blocks:
        block.compile(backend=backend, dynamic=False)
    if model.narrow:
        model.head_loss.compile_inside(backend)
