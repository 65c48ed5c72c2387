"""Transformer blocks: their equations, for one model or a stack of them alike.

A block knows no recipe and no fault: `Parts` hands it the layers it is made of.
"""

from foreshock.trainer.blocks.fog import XIELU, FogMaxBlock
from foreshock.trainer.blocks.llama import LlamaBlock
from foreshock.trainer.blocks.parts import Attention, Parts, RMSNorm, rotary_turns

__all__ = [
    "XIELU",
    "Attention",
    "FogMaxBlock",
    "LlamaBlock",
    "Parts",
    "RMSNorm",
    "rotary_turns",
]
