"""What torch says about this machine, as one line of JSON; run as a process of its own.

So that a torch that crashes, hangs or fills a device's memory does so to nobody else.
"""

from __future__ import annotations

import json
import sys

__all__ = ["main"]


def main() -> None:
    """Print it."""
    import torch

    available = torch.cuda.is_available()
    devices = range(torch.cuda.device_count()) if available else ()
    found = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "devices": [
            {
                "name": torch.cuda.get_device_name(index),
                "capability": list(torch.cuda.get_device_capability(index)),
            }
            for index in devices
        ],
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
