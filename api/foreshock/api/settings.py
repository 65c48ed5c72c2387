"""What the service is told at start, from `FORESHOCK_*` in the environment and the command line.

Frozen, checked when made, and the only place that reads the environment. Holds secrets (the token,
receivers' addresses), so its repr leaves them out.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Self

import sqlalchemy as sa

from foreshock.api.database import DatabaseUrlError, database_url
from foreshock.api.store_url import StorePlace, StoreUrlError, parse_store

__all__ = ["Settings", "SettingsError", "is_loopback"]

_MEBIBYTE: Final = 1024 * 1024
_SHORTEST_TOKEN: Final = 16
_LABEL: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.+")


class SettingsError(ValueError):
    """A setting is wrong; the message names it and says what is allowed."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a socket bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of one service.

    Attributes:
        data_dir: Folder of the store and the registry; one process per folder.
        store: Where statistics are kept, see `store_url.py`; empty: in the data folder.
        database: Where runs, ledger and alerts are kept, see `database.py`; empty: likewise.
        host: Address to listen on. Any address but loopback needs a token (`check_reach`).
        port: TCP port; 0 takes a free one.
        token: Bootstrap token: every scope, every project. None: only tokens made by
            `foreshock token create` open, and on the loopback address, as long as there are none,
            everyone is let in.
        public_url: Where people reach the page, for links in alerts; https makes cookies secure.
        tls_cert: PEM file with the certificate chain; empty = plain HTTP.
        tls_key: PEM file with its private key.
        session_hours: How long signing in to the page lasts.
        token_requests: Requests per second of one token, ten seconds' worth at once; 0 = no limit.
        token_bytes: Bytes of request bodies per second of one token, likewise.
        audit_days: Audit entries are deleted after so long; 0 keeps them.
        max_body_bytes: Largest request body as it comes in.
        max_decoded_bytes: Largest body once decompressed (Arrow buffers counted decompressed).
        max_json_bytes: Largest JSON body once decompressed; JSON costs far more memory than Arrow.
        retention_days: Records received longer ago are deleted; 0 keeps them. Series and heatmaps
            go on from rollups.
        rollup_retention_days: Rollups made longer ago are deleted; 0 keeps them. Not shorter than
            `retention_days`.
        min_free_bytes: Below so much free disk new batches get 503: the engine needs room to merge,
            and does not survive a disk that is really full.
        fsync: Whether an acknowledged batch survives a power cut (else only a killed process).
        group_batches: Most batches in one INSERT.
        group_milliseconds: Longest wait for a group to fill.
        queue_batches: Batches waiting for the writer before new ones get 503.
        queue_bytes: Their bytes in memory, likewise.
        query_seconds: Longest run time of one read of the store.
        query_bytes: Most memory of one read of the store.
        query_clients: Reads of the store at the same time.
        live_queue_batches: Batches waiting for live analysis before it re-reads from the store.
        analysis_workers: Processes that score live runs; 0 scores in the service's own, -1 takes
            half of the cores.
        max_connections: Open connections; more are closed at once.
        head_seconds: Longest wait for the head of a request, and for a client that reads nothing of
            its answer, three times as long.
        body_seconds: Time that any body may take to come, besides its bytes at `body_bytes_rate`.
        body_bytes_rate: Bytes a second that a body must come with.
        receiving_bytes: Bodies of all requests under way; above it new ones get 503.
        stale_intervals: A run is stale when it was silent for so many of its usual intervals,
        stale_seconds: and for at least so many seconds.
        threshold_factor: Of the forecaster's alarm threshold; above 1 pages less often. What suits
            one's own runs `foreshock replay` says.
        alert_urls: apprise addresses that get alerts.
        alertmanager_urls: Alertmanager base addresses.
        external_labels: Labels that Prometheus adds to its alerts (`external_labels`), each as
            name=value: with them the service's alerts and the rules' are the same to Alertmanager.
        remind_minutes: A firing alert that nobody acknowledged pages again after so long, except
            through Alertmanager, which repeats by itself; 0 = never.

    Raises:
        SettingsError: A value is out of range, or a certificate stands without its key.
    """

    data_dir: Path = Path("foreshock-data")
    store: str = field(default="", repr=False)
    database: str = field(default="", repr=False)
    host: str = "127.0.0.1"
    port: int = 8420
    token: str | None = field(default=None, repr=False)
    public_url: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    session_hours: int = 168
    token_requests: int = 1000
    token_bytes: int = 256 * _MEBIBYTE
    audit_days: int = 365
    max_body_bytes: int = 64 * _MEBIBYTE
    max_decoded_bytes: int = 256 * _MEBIBYTE
    max_json_bytes: int = 32 * _MEBIBYTE
    retention_days: int = 0
    rollup_retention_days: int = 0
    min_free_bytes: int = 512 * _MEBIBYTE
    fsync: bool = True
    group_batches: int = 32
    group_milliseconds: int = 20
    queue_batches: int = 256
    queue_bytes: int = 1024 * _MEBIBYTE
    query_seconds: int = 30
    query_bytes: int = 2048 * _MEBIBYTE
    query_clients: int = 4
    live_queue_batches: int = 1024
    analysis_workers: int = -1
    max_connections: int = 1024
    head_seconds: int = 20
    body_seconds: int = 30
    body_bytes_rate: int = 16 * 1024
    receiving_bytes: int = 512 * _MEBIBYTE
    stale_intervals: int = 10
    stale_seconds: int = 300
    threshold_factor: float = 1.0
    alert_urls: tuple[str, ...] = field(default=(), repr=False)
    alertmanager_urls: tuple[str, ...] = field(default=(), repr=False)
    external_labels: tuple[str, ...] = ()
    remind_minutes: int = 240

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"port is {self.port}; allowed: 0 (any free one) to 65535")
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; allowed: 1 or more")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; allowed: 0 (none) or more")
        self._check_retention()
        if bool(self.tls_cert) != bool(self.tls_key):
            raise SettingsError("tls_cert and tls_key belong together; one of them is not set")
        try:
            parse_store(self.store, self.data_dir)
            database_url(self.database, self.data_dir)
        except (StoreUrlError, DatabaseUrlError) as error:
            raise SettingsError(str(error)) from None
        self._check_analysis()
        if self.token is not None and len(self.token) < _SHORTEST_TOKEN:
            raise SettingsError(
                f"the token has {len(self.token)} characters; use {_SHORTEST_TOKEN} or more"
            )

        self._check_labels()

    def _check_analysis(self) -> None:
        if not 0 < self.threshold_factor < math.inf:
            raise SettingsError(
                f"threshold_factor is {self.threshold_factor}; allowed: above 0 (1 is the model's)"
            )
        if self.analysis_workers < -1:
            raise SettingsError(
                f"analysis_workers is {self.analysis_workers}; allowed: -1 (half of the cores), "
                "0 (none of their own) or more"
            )

    def _check_labels(self) -> None:
        for pair in self.external_labels:
            if _LABEL.fullmatch(pair) is None or pair.startswith("__"):
                raise SettingsError(
                    f"external_labels has {pair!r}; allowed: name=value, as in cluster=a"
                )

    def _check_retention(self) -> None:
        kept, records = self.rollup_retention_days, self.retention_days
        if kept and (not records or kept < records):
            raise SettingsError(
                f"rollup_retention_days is {kept}: rollups are what is left of records, so that "
                f"retention_days ({records or 'for good'}) may not be longer"
            )

    @property
    def store_place(self) -> StorePlace:
        """Where statistics are kept."""
        return parse_store(self.store, self.data_dir)

    @property
    def database_place(self) -> sa.URL:
        """Where runs, ledger and alerts are kept."""
        return database_url(self.database, self.data_dir)

    @property
    def alert_labels(self) -> tuple[tuple[str, str], ...]:
        """Name and value of each of `external_labels`."""
        pairs = (pair.partition("=") for pair in self.external_labels)
        return tuple((name, value) for name, _, value in pairs)

    @property
    def page_url(self) -> str:
        """Where people reach the page: `public_url`, else where the service listens."""
        scheme = "https" if self.tls_cert else "http"
        return (self.public_url or f"{scheme}://{self.host}:{self.port}").rstrip("/")

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str], overrides: Mapping[str, object] | None = None
    ) -> Self:
        """Read `FORESHOCK_<NAME>` for every attribute (`FORESHOCK_DATA` for the folder).

        Args:
            environment: Usually `os.environ`. Empty values count as not set.
            overrides: Attribute name to value; None counts as not given. Wins.

        Raises:
            SettingsError: A value does not parse, or the settings do not fit together.
        """
        values: dict[str, Any] = {}
        for item in fields(cls):
            variable = _VARIABLES.get(item.name, f"FORESHOCK_{item.name.upper()}")
            text = environment.get(variable, "").strip()
            if text:
                values[item.name] = _parse(variable, text, _parser(item.default))
        values |= {k: v for k, v in (overrides or {}).items() if v is not None}
        return cls(**values)


_VARIABLES: Final = {"data_dir": "FORESHOCK_DATA"}
_POSITIVE: Final = (
    "max_body_bytes",
    "max_decoded_bytes",
    "max_json_bytes",
    "min_free_bytes",
    "group_batches",
    "group_milliseconds",
    "queue_batches",
    "queue_bytes",
    "query_seconds",
    "query_bytes",
    "query_clients",
    "live_queue_batches",
    "session_hours",
    "max_connections",
    "head_seconds",
    "body_seconds",
    "body_bytes_rate",
    "receiving_bytes",
)
_NOT_NEGATIVE: Final = (
    "retention_days",
    "rollup_retention_days",
    "token_requests",
    "token_bytes",
    "audit_days",
    "remind_minutes",
)
_TRUTH: Final = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def _boolean(text: str) -> bool:
    if text.lower() not in _TRUTH:
        raise ValueError(f"{text!r}; allowed: {', '.join(_TRUTH)}")
    return _TRUTH[text.lower()]


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


def _parser(default: object) -> Callable[[str], object]:
    # bool first: it is an int too.
    if isinstance(default, bool):
        return _boolean
    if isinstance(default, int):
        return int
    if isinstance(default, float):
        return float
    if isinstance(default, tuple):
        return _list
    return Path if isinstance(default, Path) else str


def _parse(variable: str, text: str, parser: Callable[[str], object]) -> object:
    try:
        return parser(text)
    except ValueError as error:
        raise SettingsError(f"{variable} does not read: {error}") from None
