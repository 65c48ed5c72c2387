"""What a watch is told, checked before anything is attached."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from foreshock.monitor.sampling import Cadence
from foreshock.monitor.sinks import Sink
from foreshock.monitor.spool import DEFAULT_MAX_BYTES, NAME_PATTERN
from foreshock.monitor.whatif import known_formats

__all__ = ["WatchSettings", "default_collect", "default_spool", "default_token", "default_url"]

# As the service has it.
_MOST_CONFIG: Final = 4 * 2**20
_LOOKS_LIKE_AN_ID: Final = re.compile(r"[0-9a-f]{32}")


def default_url() -> str | None:
    """The service's address from FORESHOCK_URL, or None."""
    return _from_environment("FORESHOCK_URL")


def default_collect() -> str | None:
    """The relay's address from FORESHOCK_COLLECT, or None."""
    return _from_environment("FORESHOCK_COLLECT")


def default_token() -> str | None:
    """The bearer token from FORESHOCK_TOKEN, or None."""
    return _from_environment("FORESHOCK_TOKEN")


def _from_environment(name: str) -> str | None:
    # What is read from a file of secrets often ends in a line break.
    return (os.environ.get(name) or "").strip() or None


def default_spool() -> Path:
    """The spool folder from FORESHOCK_SPOOL, else ./foreshock-spool."""
    return Path(os.environ.get("FORESHOCK_SPOOL") or "foreshock-spool")


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchSettings:
    """Everything about a watch but the model.

    Attributes:
        run, project: Names under which the service knows the run.
        url: Address of the service; None keeps the records in the spool only.
        collect: Address of a relay (`foreshock collect`), which then gets the records instead of
            the service, and a report of every rank; None reports nothing.
        token: Bearer token.
        spool: Root folder of the spool; None keeps nothing on disk and ships nothing.
        cadence: Steps at which tensors are measured.
        include, exclude: Regular expressions over layer names.
        config: Plain data about the run, shown to people and never analysed.
        tokens_per_step: Tokens per optimizer step over all ranks; gives the scalar tokens.
        first_step: Number of the next optimizer step; more than 0 after a resume.
        sinks: Called with every record, in the worker thread.
        probe: Sum up operands at steps without tensor statistics too, so that the first
            non-finite value has a layer at any step; None does so on a CPU only, because on a GPU
            a sum costs as much as all statistics.
        budget: Largest share of the step time that watching may cost; then the cadence is only
            where it begins.
        what_if: Formats that the run does not use, measured as if it did.
        optimizer_states: Measure the optimizer's moments and the weight gradients too.
        histogram: Count the elements of each tensor by their power of two.
        max_spool_bytes: Bound on what waits on disk.
        launch_id: Identifies this start of the job.

    Raises:
        ValueError: A value is not allowed; the message says which are.
    """

    run: str
    project: str = "default"
    url: str | None = None
    collect: str | None = None
    token: str | None = None
    spool: Path | None = None
    cadence: Cadence = field(default_factory=Cadence)
    include: str | None = None
    exclude: str | None = None
    config: Mapping[str, object] | None = None
    tokens_per_step: int | None = None
    first_step: int = 0
    sinks: Sequence[Sink] = ()
    probe: bool | None = None
    budget: float | None = None
    what_if: Sequence[str] = ()
    optimizer_states: bool = False
    histogram: bool = False
    max_spool_bytes: int = DEFAULT_MAX_BYTES
    launch_id: str = field(default_factory=lambda: str(uuid.uuid4()))

    def __post_init__(self) -> None:
        _check_name("run", self.run)
        _check_name("project", self.project)
        if _LOOKS_LIKE_AN_ID.fullmatch(self.run):
            raise ValueError(f"run is {self.run!r}, which looks like an id; take a name")
        _check_count("first_step", self.first_step, least=0)
        if self.tokens_per_step is not None:
            _check_count("tokens_per_step", self.tokens_per_step, least=1)
        known_formats(self.what_if)
        if not all(callable(sink) for sink in self.sinks):
            raise ValueError("one of sinks cannot be called; a sink is called with every record")
        if self.budget is not None and not (
            isinstance(self.budget, int | float) and 0 < self.budget < 1
        ):
            raise ValueError(
                f"budget is {self.budget}; allowed: above 0 and below 1, e.g. 0.01 for 1 %"
            )
        if (self.url or self.collect) is not None and self.spool is None:
            raise ValueError("url is given without a spool; records reach the service through one")
        _check_address("url", self.url)
        _check_address("collect", self.collect)
        if self.token is not None and not re.fullmatch("[!-~]+", self.token):
            raise ValueError("the token (FORESHOCK_TOKEN) holds what no HTTP header can carry")
        _check_config(self.config)

    @property
    def target(self) -> str | None:
        """Where records go: to the relay, so that it can add to them, else to the service."""
        return self.collect or self.url

    def registration(self, layers: Sequence[str], *, world_size: int) -> dict[str, object]:
        """The body of POST /runs."""
        return {
            "project": self.project,
            "run": self.run,
            "launch_id": self.launch_id,
            "first_step": self.first_step,
            "config": dict(self.config) if self.config is not None else None,
            "layers": list(layers),
            "tokens_per_step": self.tokens_per_step,
            "world_size": world_size,
        }


def _check_name(name: str, value: object) -> None:
    if not isinstance(value, str) or not NAME_PATTERN.fullmatch(value):
        raise ValueError(f"{name} is {value!r}; allowed: 1 to 128 of A-Z a-z 0-9 . _ -")


def _check_count(name: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; allowed: whole numbers, {least} or more")


def _check_address(name: str, value: object) -> None:
    if value is None:
        return
    wrong = f"{name} is {value!r}; allowed: http://host:port or https://host:port"
    if not isinstance(value, str) or re.search(r"\s", value):
        raise ValueError(wrong)
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{wrong} ({error})") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(wrong)


def _check_config(config: object) -> None:
    try:
        if config is not None and not isinstance(config, Mapping):
            raise TypeError(f"it is a {type(config).__name__}, not a dict")
        size = len(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"config is not plain data ({error}); allowed: dicts, lists, text, finite numbers"
        ) from None
    if size > _MOST_CONFIG:
        raise ValueError(
            f"config is {size / 2**20:.1f} MiB as JSON; the service takes at most 4 MiB, so leave "
            "out what is not for people to read"
        )
