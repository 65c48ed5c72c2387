"""Kinds of layers that the monitor knows, and how it finds them in a model.

Adapters of optional libraries are asked only in a process that has loaded the library.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Final

from foreshock.monitor.layers.adapter import Adapter, HookContext
from foreshock.monitor.layers.plain import GemmAdapter
from foreshock.monitor.layers.tap import TapAdapter

__all__ = ["Adapter", "HookContext", "adapters"]

# Library, module and class of its adapter; its layers subclass nn.Linear or nothing of torch's,
# so they are asked before the plain one.
_OPTIONAL: Final = (
    ("transformers.pytorch_utils", "foreshock.monitor.layers.conv1d", "Conv1DAdapter"),
    ("torchao", "foreshock.monitor.layers.torchao", "TorchaoAdapter"),
    (
        "transformer_engine",
        "foreshock.monitor.layers.transformer_engine",
        "TransformerEngineAdapter",
    ),
)


def adapters() -> Sequence[Adapter]:
    """The adapters of this process, the most particular first."""
    found: list[Adapter] = []
    for library, module, name in _OPTIONAL:
        if library in sys.modules:
            found.append(getattr(importlib.import_module(module), name)())
    return (*found, GemmAdapter(), TapAdapter())
