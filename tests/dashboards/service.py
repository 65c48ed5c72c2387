"""A real service process on a free port, for tests that look at it from outside."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx

from foreshock.api.cli.processes import Children

__all__ = ["Service", "running_service"]

COMMAND: Final = ("-c", "from foreshock.api.cli.main import run; run()", "serve")


@dataclass(frozen=True, slots=True)
class Service:
    """Where a service answers.

    Attributes:
        address: `http://127.0.0.1:<port>`.
        client: With that base address, and the token if there is one.
    """

    address: str
    client: httpx.Client


@contextmanager
def running_service(
    folder: Path,
    *,
    port: int = 0,
    environment: Mapping[str, str] | None = None,
    command: Sequence[str] = COMMAND,
) -> Generator[Service]:
    """Start `foreshock serve` on data in `folder`, and end it.

    Args:
        folder: For data and log; the same one again continues.
        port: 0 takes a free one.
        environment: Further FORESHOCK_ variables.
        command: What to start instead, for Python.
    """
    port_file = folder / "port"
    port_file.unlink(missing_ok=True)
    given = {"FORESHOCK_DATA": str(folder / "data"), **(environment or {})}
    arguments = (*command, "--port", str(port), "--port-file", str(port_file))
    with Children(folder) as children:
        children.start("service", arguments, given)
        address = f"http://127.0.0.1:{children.wait_for_file('service', port_file, 60)}"
        token = given.get("FORESHOCK_TOKEN")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with httpx.Client(base_url=address, headers=headers, timeout=30) as client:
            yield Service(address, client)
