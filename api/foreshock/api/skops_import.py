"""Imports skops without torch.

skops lists scikit-learn's estimators when it is imported, and that walk loads scikit-learn's torch
adapter, hence torch, wherever it is installed: seconds and hundreds of megabytes that the service
has no use for. Changes nothing for whoever has torch loaded already.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Final

__all__ = ["import_skops"]

_ADAPTER: Final = "sklearn.externals.array_api_compat.torch"


def import_skops() -> ModuleType:
    """The module `skops.io`."""
    if "torch" in sys.modules or _ADAPTER in sys.modules:
        return importlib.import_module("skops.io")
    # None makes the import fail, which the walk takes for a missing optional package.
    sys.modules[_ADAPTER] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("skops.io")
    finally:
        del sys.modules[_ADAPTER]
