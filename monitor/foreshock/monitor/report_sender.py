"""Reports of this rank on their way to a relay, in the background and in nobody's way.

What cannot be sent is dropped and counted, the oldest first; reports with events are kept longest.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from typing import Final
from urllib.parse import quote

import httpx

from foreshock.monitor.certificates import verification
from foreshock.monitor.containment import Containment
from foreshock.monitor.record import StepReport, compress, encode_reports

__all__ = ["ReportSender"]

_LOGGER = logging.getLogger("foreshock.monitor")
_LONGEST_WAIT: Final = 30.0
# Answers that say "never" about this bundle.
_REFUSALS: Final = (400, 409, 410, 413, 415, 422)
_SECONDS_BETWEEN_LOGS: Final = 60.0
_MOST_IN_BUNDLE: Final = 256


class ReportSender:
    """A queue of reports and the thread that empties it.

    Args:
        url: Base address of a relay, `foreshock collect`.
        run: Name of the run.
        launch_id: Of the launch, the same on all ranks.
        token: Bearer token, or None.
        interval: Seconds between bundles; what is queued meanwhile goes together.
        most_reports: Bound on reports that wait.
        transport: Instead of the network, for tests.

    Attributes:
        dropped: Reports given up so far.
        guard: Where failures of `submit` are counted.

    Raises:
        ValueError: The address is not http or https.
    """

    def __init__(
        self,
        url: str,
        *,
        run: str,
        launch_id: str,
        token: str | None = None,
        interval: float = 1.0,
        most_reports: int = 256,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"collect is {url!r}; allowed: http://... or https://...")
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(30.0, connect=5.0),
            verify=verification(),
            transport=transport,
        )
        self._address = f"{url.rstrip('/')}/api/v1/runs/{quote(run, safe='')}/reports/{launch_id}"
        self._interval = interval
        self._most = most_reports
        self.dropped = 0
        self.guard = Containment("reports")
        self._waiting: list[StepReport] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._failures = 0
        self._last_log = -float("inf")
        self._thread = threading.Thread(target=self._run, name="foreshock-reports", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many reports wait."""
        return len(self._waiting)

    def submit(self, report: StepReport) -> None:
        """Queue a report. Never waits and never raises."""
        with self.guard, self._lock:
            self._waiting.append(report)
            if len(self._waiting) > self._most:
                self._drop_one()

    def close(self, timeout: float = 5.0) -> bool:
        """Send what is left for at most `timeout` seconds; True if nothing is left."""
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        self._thread.join(timeout)
        return not self._waiting

    def _drop_one(self) -> None:
        plain = (at for at, report in enumerate(self._waiting) if not report.events)
        del self._waiting[next(plain, 0)]
        self.dropped += 1

    def _run(self) -> None:
        # Ranks start together; they need not send together.
        pause = random.uniform(0.0, self._interval)
        try:
            while not (self._closing.wait(pause) and self._done()):
                pause = self._turn()
                if self._closing.is_set():
                    time.sleep(min(pause, 0.1))
        finally:
            self._client.close()

    def _done(self) -> bool:
        if not self._waiting or time.monotonic() >= self._deadline:
            return True
        # A relay that is gone holds nobody up at the end, but for what must be known.
        return self._failures > 1 and not any(report.events for report in self._waiting)

    def _turn(self) -> float:
        """Send what waits; seconds until the next turn."""
        while bundle := self._waiting[:_MOST_IN_BUNDLE]:
            again = self._send(bundle)
            if again is not None:
                return again
            self._failures = 0
            with self._lock:
                sent = set(map(id, bundle))
                self._waiting = [report for report in self._waiting if id(report) not in sent]
        return self._interval

    def _send(self, bundle: list[StepReport]) -> float | None:
        """Put one bundle; seconds to wait if it has to be sent again."""
        body, encoding = compress(encode_reports(bundle))
        headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
        try:
            response = self._client.put(self._address, content=body, headers=headers)
        except httpx.HTTPError as error:
            return self._put_off(f"{type(error).__name__}: {error}", None)
        if response.is_success:
            return None
        reason = f"{response.status_code}: {response.text[:300]}"
        if response.status_code in _REFUSALS:
            self._log("refused reports", reason)
            self.dropped += len(bundle)
            return None
        return self._put_off(reason, response.headers.get("Retry-After"))

    def _put_off(self, reason: str, retry_after: str | None) -> float:
        self._log("does not take reports", reason)
        longest = min(self._interval * 2.0 ** min(self._failures, 16), _LONGEST_WAIT)
        self._failures += 1
        asked = float(retry_after) if retry_after and retry_after.isdigit() else 0.0
        return max(longest * random.uniform(0.5, 1.0), min(asked, _LONGEST_WAIT))

    def _log(self, what: str, reason: str) -> None:
        now = time.monotonic()
        if now - self._last_log >= _SECONDS_BETWEEN_LOGS:
            self._last_log = now
            _LOGGER.warning("the relay %s (%s); training goes on", what, reason)
