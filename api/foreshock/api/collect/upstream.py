"""What a relay says to the service, or to the next relay. Keeps nothing."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final
from urllib.parse import quote

import httpx

from foreshock.monitor.record import StepReport, compress, encode_reports

__all__ = ["Answer", "Outcome", "Upstream"]

# Answers that say "never", about this request as it is.
_REFUSALS: Final = (400, 409, 410, 413, 415, 422)


class Answer(Enum):
    """What to do with what was sent."""

    TAKEN = "taken"
    REFUSED = "refused"
    UNKNOWN = "unknown"  # 404: the launch has to be announced first
    LATER = "later"
    NOBODY = "nobody"  # no answer at all


@dataclass(frozen=True, slots=True)
class Outcome:
    """An answer, its reason, and for how many seconds it asks not to be asked again."""

    answer: Answer
    reason: str = ""
    wait: float = 0.0


class Upstream:
    """The three calls that a relay makes; one thread.

    Args:
        url: Base address.
        token: Bearer token, or None.
        authorities: Who may vouch for the other side's certificate.
        timeout: Seconds for one answer.

    Attributes:
        sent_bytes: Bytes of bodies sent so far, repeats included.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        authorities: ssl.SSLContext | None = None,
        timeout: float = 60.0,
    ) -> None:
        self._client = httpx.Client(
            base_url=url.rstrip("/") + "/api/v1/",
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(timeout, connect=5.0),
            # By default the system's authorities, or those of SSL_CERT_FILE.
            verify=authorities or ssl.create_default_context(),
            # The addresses of a cluster are no business of a proxy.
            trust_env=False,
        )
        self.sent_bytes = 0

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def announce(self, body: dict[str, Any]) -> Outcome:
        """Make a launch known."""
        return self._send(lambda: self._client.post("runs", json=body))

    def put_batch(self, run: str, name: str, media_type: str, body: bytes) -> Outcome:
        """Hand over one batch."""
        self.sent_bytes += len(body)
        address = f"runs/{quote(run, safe='')}/batches/{name}"
        headers = {"Content-Type": media_type}
        return self._send(lambda: self._client.put(address, content=body, headers=headers))

    def put_reports(self, run: str, launch_id: str, reports: Sequence[StepReport]) -> Outcome:
        """Hand over reports of one launch."""
        body, encoding = compress(encode_reports(reports))
        self.sent_bytes += len(body)
        address = f"runs/{quote(run, safe='')}/reports/{launch_id}"
        headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
        return self._send(lambda: self._client.put(address, content=body, headers=headers))

    def _send(self, request: Callable[[], httpx.Response]) -> Outcome:
        try:
            response = request()
        except httpx.HTTPError as error:
            return Outcome(Answer.NOBODY, f"{type(error).__name__}: {error}")
        if response.is_success:
            return Outcome(Answer.TAKEN)
        reason = f"{response.status_code}: {response.text[:500]}"
        if response.status_code in _REFUSALS:
            return Outcome(Answer.REFUSED, reason)
        if response.status_code == 404:
            return Outcome(Answer.UNKNOWN, reason)
        asked = response.headers.get("Retry-After", "")
        return Outcome(Answer.LATER, reason, float(asked) if asked.isdigit() else 0.0)
