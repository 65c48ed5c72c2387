"""Requests to the service that are asked again while that may help, and answers that are errors.

Knows no call of the API.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import httpx

from foreshock.monitor.client.errors import NoAnswer, problem_of

__all__ = ["Body", "ByteReader", "Http", "Retry"]

_AGAIN: Final = (429, 502, 503, 504)
_LONGEST_WAIT: Final = 10.0


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how patiently a call is asked again.

    Attributes:
        tries: Requests in all; 1 asks once.
        first_wait: Seconds before the second; doubles each time, up to ten seconds.
        sleep: Waits; for tests.
    """

    tries: int = 5
    first_wait: float = 0.2
    sleep: Callable[[float], None] = time.sleep

    def wait(self, failures: int, asked: float | None) -> None:
        """Wait after so many failures, at least as long as the service asked for."""
        longest = min(self.first_wait * 2.0 ** (failures - 1), _LONGEST_WAIT)
        seconds = longest * random.uniform(0.5, 1.0)
        self.sleep(max(seconds, min(asked or 0.0, _LONGEST_WAIT)))


@dataclass(frozen=True, slots=True)
class Body:
    """Bytes to send, and what they are."""

    content: bytes
    media_type: str


class Http:
    """The connections to one service.

    Args:
        client: Its base address is that of the service.
        retry: Patience.
    """

    def __init__(self, client: httpx.Client, retry: Retry) -> None:
        self._client = client
        self._retry = retry

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def rest(self) -> None:
        """Wait a little before something is asked anew that had an answer."""
        self._retry.wait(1, None)

    def ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        json: Any = None,
        body: Body | None = None,
        again: bool = True,
    ) -> httpx.Response:
        """An answer of 2xx.

        Args:
            method: HTTP method.
            path: Below the base address.
            query: None values are left out.
            json: A JSON body.
            body: Any other.
            again: Whether asking twice does no harm.

        Raises:
            NoAnswer: Nobody answers.
            Problem: The service says no, in the end.
        """
        headers = {} if body is None else {"Content-Type": body.media_type}
        content = None if body is None else body.content

        def send() -> httpx.Response:
            return self._client.request(
                method, path, params=_given(query), json=json, content=content, headers=headers
            )

        answer = self._patiently(send, again=again)
        _check(answer)
        return answer

    @contextmanager
    def stream(
        self,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: httpx.Timeout | None = None,
    ) -> Generator[httpx.Response]:
        """An answer whose body is read as it comes; asked again only before it begins.

        Raises:
            NoAnswer: Nobody answers, or the connection ends.
            Problem: The service says no.
        """
        request = self._client.build_request(
            "GET",
            path,
            params=_given(query),
            headers=headers,
            timeout=self._client.timeout if timeout is None else timeout,
        )
        answer = self._patiently(lambda: self._client.send(request, stream=True), again=True)
        try:
            if not answer.is_success:
                answer.read()
            _check(answer)
            yield answer
        except httpx.TransportError as error:
            raise NoAnswer(f"{request.url}: {error or type(error).__name__}") from None
        finally:
            answer.close()

    def _patiently(self, send: Callable[[], httpx.Response], *, again: bool) -> httpx.Response:
        tries = self._retry.tries if again else 1
        for failures in range(1, tries + 1):
            last = failures == tries
            try:
                answer = send()
            except httpx.TransportError as error:
                if last:
                    reason = str(error) or type(error).__name__
                    raise NoAnswer(f"{self._client.base_url} does not answer: {reason}") from None
                self._retry.wait(failures, None)
                continue
            if last or answer.status_code not in _AGAIN:
                return answer
            asked = _seconds(answer.headers.get("Retry-After"))
            answer.close()
            self._retry.wait(failures, asked)
        raise AssertionError("tries is 1 or more")


def _given(query: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (query or {}).items() if value is not None}


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _check(answer: httpx.Response) -> None:
    if answer.is_success:
        return
    try:
        body = answer.json()
    except ValueError:
        body = None
    raise problem_of(answer.status_code, body, answer.text)


class ByteReader(io.RawIOBase):
    """An answer's body as a file, for readers of Arrow streams."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = b""

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the next piece goes."""
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = piece
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count
