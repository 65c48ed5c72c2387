"""Sealed batches from the spool to the service, in a thread of its own.

A file leaves the disk only when the service has said that it is durable there. Never in a hurry:
whatever the service does, it costs the training nothing but disk.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum
from pathlib import Path
from typing import Final
from urllib.parse import quote

import httpx

from foreshock.monitor.certificates import verification
from foreshock.monitor.spool import Outbox, SpoolError, leftovers

__all__ = ["Service", "Shipped", "Shipper", "ship_leftovers"]

_LOGGER = logging.getLogger("foreshock.monitor")
_ARROW: Final = "application/vnd.apache.arrow.stream"
_FIRST_WAIT: Final = 0.5
_LONGEST_WAIT: Final = 60.0
_IDLE_WAIT: Final = 1.0
# Answers that say "never", about this batch or this request as it is.
_REFUSALS: Final = (400, 409, 410, 413, 415, 422)


class _Answer(Enum):
    TAKEN = "taken"
    REFUSED = "refused"
    LATER = "later"


@dataclass(frozen=True, slots=True)
class _Outcome:
    answer: _Answer
    reason: str = ""
    wait: float | None = None


@dataclass(frozen=True, slots=True)
class Shipped:
    """What became of leftovers.

    Attributes:
        batches: Acknowledged by the service.
        refused: Put aside, with the reason beside them.
        waiting: Still on disk, because the service did not answer.
        reason: Why the last one waits or was refused.
    """

    batches: int = 0
    refused: int = 0
    waiting: int = 0
    reason: str = ""


class Service:
    """The two calls of the service that a training job makes.

    Args:
        url: Base address, e.g. http://127.0.0.1:8420.
        token: Bearer token with the scope write, or None.
        timeout: Seconds for one answer.
        transport: Instead of the network, for tests.

    Raises:
        ValueError: The address is not http or https, or `FORESHOCK_CA` is no certificate.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url is {url!r}; allowed: http://... or https://...")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(
            base_url=url.rstrip("/") + "/api/v1/",
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=5.0),
            verify=verification(),
            transport=transport,
        )
        self._known: set[Path] = set()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def put(self, outbox: Outbox, path: Path) -> _Outcome:
        """Hand over one batch, making its run known first if need be.

        Raises:
            SpoolError: The outbox cannot say which run it belongs to.
            FileNotFoundError: The batch has gone in the meantime.
        """
        body = path.read_bytes()
        if outbox.folder not in self._known:
            outcome = self._register(outbox)
            if outcome.answer is not _Answer.TAKEN:
                return outcome
        outcome = self._put(outbox, path, body)
        if outcome.answer is _Answer.LATER and outcome.reason.startswith("404"):
            self._known.discard(outbox.folder)
        return outcome

    def _register(self, outbox: Outbox) -> _Outcome:
        body = outbox.registration()
        outcome = self._send(lambda: self._client.post("runs", json=body))
        if outcome.answer is _Answer.TAKEN:
            self._known.add(outbox.folder)
        return outcome

    def _put(self, outbox: Outbox, path: Path, body: bytes) -> _Outcome:
        address = f"runs/{quote(outbox.run, safe='')}/batches/{outbox.batch_id(path)}"
        return self._send(
            lambda: self._client.put(address, content=body, headers={"Content-Type": _ARROW})
        )

    def _send(self, request: Callable[[], httpx.Response]) -> _Outcome:
        try:
            response = request()
        except httpx.HTTPError as error:
            return _Outcome(_Answer.LATER, f"{type(error).__name__}: {error}")
        if response.is_success:
            return _Outcome(_Answer.TAKEN)
        reason = f"{response.status_code}: {response.text[:500]}"
        if response.status_code in _REFUSALS:
            return _Outcome(_Answer.REFUSED, reason)
        return _Outcome(_Answer.LATER, reason, _retry_after(response))


def _retry_after(response: httpx.Response) -> float | None:
    value = response.headers.get("Retry-After")
    if value is None:
        return None
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return None


class Shipper:
    """A daemon thread that empties an outbox, and old ones beside it when it has nothing to do.

    Args:
        service: Closed by `close`.
        outbox: Of the run that is being watched.
        root: Spool folder in which leftovers are looked for; None leaves them.
    """

    def __init__(self, service: Service, outbox: Outbox, *, root: Path | None = None) -> None:
        self._service = service
        self._outbox = outbox
        self._root = root
        self._wake = threading.Event()
        self._deadline: float | None = None
        self._failures = 0
        self._last_log = -float("inf")
        self._thread = threading.Thread(target=self._run, name="foreshock-shipper", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """There is a new batch."""
        self._wake.set()

    def close(self, timeout: float) -> bool:
        """Send what is left, for at most `timeout` seconds; True if nothing is left."""
        self._deadline = time.monotonic() + timeout
        self._wake.set()
        self._thread.join(timeout)
        return not self._outbox.sealed()

    def _run(self) -> None:
        try:
            if self._root is not None and not self._outbox.sealed():
                self._ship_leftovers(self._root)
            while not self._closing_and_done():
                self._ship_own()
        finally:
            self._service.close()

    def _closing_and_done(self) -> bool:
        if self._deadline is None:
            return False
        return time.monotonic() >= self._deadline or not self._outbox.sealed()

    def _ship_own(self) -> None:
        self._wake.clear()
        for path in self._outbox.sealed():
            wait = self._ship(self._outbox, path)
            if wait is not None:
                self._sleep(wait)
                return
        if self._deadline is None:
            self._wake.wait(_IDLE_WAIT)

    def _ship_leftovers(self, root: Path) -> None:
        for outbox in leftovers(root):
            for path in outbox.sealed():
                # The run that is alive comes first; what is left now is left for the next start.
                if self._outbox.sealed() or self._deadline or self._ship(outbox, path) is not None:
                    return
            outbox.remove_if_empty()

    def _ship(self, outbox: Outbox, path: Path) -> float | None:
        """Send one batch; seconds to wait if it has to stay."""
        try:
            outcome = self._service.put(outbox, path)
        except FileNotFoundError:
            return None
        except (SpoolError, OSError) as error:
            outcome = _Outcome(_Answer.LATER, str(error))
        _settle(outbox, path, outcome)
        if outcome.answer is _Answer.TAKEN:
            self._failures = 0
            return None
        self._log(outcome)
        if outcome.answer is _Answer.REFUSED:
            return None
        # The service forgot the run (404): making it known again needs no pause the first time.
        unknown = outcome.reason.startswith("404")
        wait = 0.0 if unknown and self._failures == 0 else _back_off(self._failures)
        self._failures += 1
        return max(wait, min(outcome.wait or 0.0, _LONGEST_WAIT))

    def _sleep(self, seconds: float) -> None:
        """Wait out a pause; new batches do not end it, closing does."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._deadline is not None and time.monotonic() + left > self._deadline:
                left = min(left, 0.2)
            time.sleep(min(left, 0.2))
            if self._deadline is not None and time.monotonic() >= self._deadline:
                return

    def _log(self, outcome: _Outcome) -> None:
        now = time.monotonic()
        if now - self._last_log < 60:
            return
        self._last_log = now
        what = "refused a batch" if outcome.answer is _Answer.REFUSED else "does not take batches"
        _LOGGER.warning(
            "the service %s (%s); training goes on, records are kept in %s",
            what,
            outcome.reason,
            self._outbox.folder,
        )


def _settle(outbox: Outbox, path: Path, outcome: _Outcome) -> None:
    try:
        if outcome.answer is _Answer.TAKEN:
            path.unlink(missing_ok=True)
        elif outcome.answer is _Answer.REFUSED:
            outbox.refuse(path, outcome.reason)
    except OSError as error:
        # Sent again later: the service knows a batch that it has seen.
        _LOGGER.warning("%s could not be moved out of the spool: %s", path, error)


def _back_off(failures: int) -> float:
    longest = min(_FIRST_WAIT * 2.0 ** min(failures, 16), _LONGEST_WAIT)
    return longest * random.uniform(0.5, 1.0)


def ship_leftovers(
    service: Service, root: Path, *, progress: Callable[[Path], None] | None = None
) -> Shipped:
    """Send everything that processes which ended left under a root, oldest launch first.

    Args:
        service: Left open.
        root: Spool folder.
        progress: Called with each batch after its answer.

    Returns:
        Counts; a service that does not answer ends the work, and what is left waits on disk.
    """
    batches = refused = 0
    reason = ""
    for outbox in leftovers(root):
        pending = outbox.sealed()
        while pending:
            try:
                outcome = service.put(outbox, pending[0])
                if outcome.answer is _Answer.LATER and outcome.reason.startswith("404"):
                    outcome = service.put(outbox, pending[0])
            except (SpoolError, OSError) as error:
                outcome = _Outcome(_Answer.LATER, str(error))
            reason = outcome.reason or reason
            if outcome.answer is _Answer.LATER:
                waiting = len(pending)
                return Shipped(batches, refused, waiting, reason)
            _settle(outbox, pending[0], outcome)
            if progress is not None:
                progress(pending[0])
            batches += outcome.answer is _Answer.TAKEN
            refused += outcome.answer is _Answer.REFUSED
            pending = pending[1:]
        outbox.remove_if_empty()
    return Shipped(batches, refused, 0, reason)
