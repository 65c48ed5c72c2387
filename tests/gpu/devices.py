"""Where the tests of this folder run: a CUDA device, or a CPU with Triton's interpreter.

Under TRITON_INTERPRET=1 Triton runs its kernels in numpy, on tensors of the CPU. The same
assertions then hold without a device (tests/monitor/test_interpreted.py); what needs the device
itself is marked `cuda`.
"""

from __future__ import annotations

import os

import torch

__all__ = ["DEVICE", "INTERPRETED"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
