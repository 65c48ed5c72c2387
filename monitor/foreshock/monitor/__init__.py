"""Watch a low-precision training run from the inside.

    from foreshock.monitor import watch
    w = watch(model, optimizer, run="llama-1b")

`Client` reads what the service made of it. Importing this package loads no torch; `watch` and
`Watch` do, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreshock.monitor.client import Client
    from foreshock.monitor.session import Watch, watch

__all__ = ["Client", "Watch", "watch"]


def __getattr__(name: str) -> Any:
    if name == "Client":
        from foreshock.monitor.client import Client

        return Client
    if name in __all__:
        from foreshock.monitor import session

        return getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
