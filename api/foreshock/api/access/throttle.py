"""How much a token may ask for, and how often an address may guess.

Everything is kept in bounded tables in memory, per process. Knows no HTTP.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

__all__ = ["Failures", "RateLimits", "Rates", "Verdict", "network_of"]

Clock = Callable[[], float]

_MOST_KEYS: Final = 4096
_BURST_SECONDS: Final = 10.0

GUESSES: Final = 10
"""Wrong secrets in a row that an address may try before it has to wait."""

_SECONDS_PER_GUESS: Final = 6.0
_REMEMBERED_GUESSES: Final = 32


@dataclass(frozen=True, slots=True)
class RateLimits:
    """Sustained rates of one token; ten seconds' worth may come at once. 0 = no limit.

    Attributes:
        requests: Requests per second.
        bytes: Bytes of request bodies per second, as they come over the wire.
    """

    requests: int = 0
    bytes: int = 0


@dataclass(slots=True)
class _Level:
    """A token bucket: fills at a rate up to ten seconds' worth, and may be overdrawn."""

    left: float
    at: float

    def fill(self, rate: float, now: float) -> None:
        self.left = min(rate * _BURST_SECONDS, self.left + rate * (now - self.at))
        self.at = now


class Rates:
    """Counts requests and bytes by key.

    Args:
        limits: Of every key.
        clock: Seconds, never going back.
        capacity: Keys remembered; the one not seen for the longest time goes first.
    """

    def __init__(
        self, limits: RateLimits, *, clock: Clock = time.monotonic, capacity: int = _MOST_KEYS
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._capacity = capacity
        self._lock = threading.Lock()
        self._levels: OrderedDict[str, tuple[_Level, _Level]] = OrderedDict()

    def admit(self, key: str) -> float:
        """Take one request; 0, or the seconds after which it would be taken.

        A body is counted when it has come, so that a large one is never refused half-way: the
        requests after it wait until the debt is paid.
        """
        limits = self._limits
        if not limits.requests and not limits.bytes:
            return 0.0
        with self._lock:
            requests, volume = self._of(key)
            waits = [0.0]
            if limits.requests and requests.left < 1:
                waits.append((1 - requests.left) / limits.requests)
            if limits.bytes and volume.left < 0:
                waits.append(-volume.left / limits.bytes)
            if max(waits) == 0:
                requests.left -= 1
            return max(waits)

    def charge(self, key: str, size: int) -> None:
        """Count bytes of a body."""
        if self._limits.bytes:
            with self._lock:
                self._of(key)[1].left -= size

    def _of(self, key: str) -> tuple[_Level, _Level]:
        now = self._clock()
        limits = self._limits
        found = self._levels.get(key)
        if found is None:
            full = (
                _Level(limits.requests * _BURST_SECONDS, now),
                _Level(limits.bytes * _BURST_SECONDS, now),
            )
            self._levels[key] = found = full
            while len(self._levels) > self._capacity:
                self._levels.popitem(last=False)
        self._levels.move_to_end(key)
        found[0].fill(limits.requests, now)
        found[1].fill(limits.bytes, now)
        return found


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a wrong secret led to.

    Attributes:
        fresh: It was not tried lately from this address: a guess, worth noting.
        locked: The address has to wait from now on.
    """

    fresh: bool
    locked: bool


@dataclass(slots=True)
class _Guesser:
    left: float
    at: float
    tried: OrderedDict[str, None] = field(default_factory=OrderedDict)


class Failures:
    """Counts different wrong secrets by address.

    The same wrong secret again is no guess but a client with an old token: however often it comes,
    it locks nobody out who shares its address.

    Args:
        clock: Seconds, never going back.
        capacity: Addresses remembered; the one not heard of for the longest time goes first.
    """

    def __init__(self, *, clock: Clock = time.monotonic, capacity: int = _MOST_KEYS) -> None:
        self._clock = clock
        self._capacity = capacity
        self._lock = threading.Lock()
        self._guessers: OrderedDict[str, _Guesser] = OrderedDict()

    def __len__(self) -> int:
        return len(self._guessers)

    def wait(self, address: str) -> float:
        """Seconds until the address may try again; 0 = now."""
        with self._lock:
            guesser = self._guessers.get(network_of(address))
            if guesser is None:
                return 0.0
            self._fill(guesser)
            return max(0.0, 1 - guesser.left) * _SECONDS_PER_GUESS

    def add(self, address: str, digest: str) -> Verdict:
        """Note a wrong secret, by its digest."""
        key = network_of(address)
        with self._lock:
            guesser = self._guessers.setdefault(key, _Guesser(float(GUESSES), self._clock()))
            self._guessers.move_to_end(key)
            while len(self._guessers) > self._capacity:
                self._guessers.popitem(last=False)
            self._fill(guesser)
            fresh = digest not in guesser.tried
            before = guesser.left
            guesser.tried[digest] = None
            guesser.tried.move_to_end(digest)
            while len(guesser.tried) > _REMEMBERED_GUESSES:
                guesser.tried.popitem(last=False)
            if fresh:
                guesser.left = max(0.0, guesser.left - 1)
            return Verdict(fresh, before >= 1 > guesser.left)

    def _fill(self, guesser: _Guesser) -> None:
        now = self._clock()
        gained = (now - guesser.at) / _SECONDS_PER_GUESS
        guesser.left = min(float(GUESSES), guesser.left + gained)
        guesser.at = now


def network_of(address: str) -> str:
    """What counts as one address: an IPv4 address, or the /64 that an IPv6 host owns whole."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((int(parsed), 64), strict=False))
