"""Transformer blocks: their equations, for one model or a stack of them alike.

A block knows no recipe and no fault: `Parts` hands it the layers it is made of.
"""

from foreshock.trainer.blocks.architectures import ARCHITECTURES, Anatomy
from foreshock.trainer.blocks.attention import Attention, bounded_scale, rotary_turns
from foreshock.trainer.blocks.experts import Experts
from foreshock.trainer.blocks.layers import Block
from foreshock.trainer.blocks.mlp import XIELU
from foreshock.trainer.blocks.parts import Parts, RMSNorm

__all__ = [
    "ARCHITECTURES",
    "XIELU",
    "Anatomy",
    "Attention",
    "Block",
    "Experts",
    "Parts",
    "RMSNorm",
    "bounded_scale",
    "rotary_turns",
]
