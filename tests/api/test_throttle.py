"""Rates per token and guesses per address, with a clock of our own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.api.access.throttle import GUESSES, Failures, RateLimits, Rates, network_of


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_ten_seconds_of_requests_at_once_then_the_rate() -> None:
    clock = Clock()
    rates = Rates(RateLimits(requests=5), clock=clock)
    assert [rates.admit("a") for _ in range(50)] == [0.0] * 50
    assert rates.admit("a") == pytest.approx(0.2)
    assert rates.admit("b") == 0.0
    clock.now += 0.2
    assert rates.admit("a") == 0.0
    assert rates.admit("a") > 0


def test_a_large_body_is_paid_for_afterwards() -> None:
    clock = Clock()
    rates = Rates(RateLimits(bytes=100), clock=clock)
    assert rates.admit("a") == 0.0
    rates.charge("a", 1500)
    assert rates.admit("a") == pytest.approx(5.0)
    clock.now += 5.0
    assert rates.admit("a") == 0.0


@given(st.lists(st.floats(0, 3), min_size=1, max_size=200))
def test_no_more_than_burst_and_rate_ever_pass(pauses: list[float]) -> None:
    clock = Clock()
    rates = Rates(RateLimits(requests=3), clock=clock)
    passed = 0
    for pause in pauses:
        clock.now += pause
        passed += rates.admit("a") == 0.0
    assert passed <= 30 + 3 * sum(pauses) + 1e-6


def test_no_limit_keeps_nothing() -> None:
    rates = Rates(RateLimits())
    rates.charge("a", 10**12)
    assert rates.admit("a") == 0.0
    assert not rates._levels


def test_tables_are_bounded() -> None:
    rates = Rates(RateLimits(requests=1), capacity=8)
    failures = Failures(capacity=8)
    for number in range(100):
        rates.admit(str(number))
        failures.add(f"10.0.0.{number}", "digest")
        failures.add("10.1.1.1", str(number))
    assert len(rates._levels) == 8
    assert len(failures) == 8
    assert max(len(g.tried) for g in failures._guessers.values()) <= 32


def test_guesses_are_counted_once_each_and_come_back_slowly() -> None:
    clock = Clock()
    failures = Failures(clock=clock)
    for number in range(GUESSES):
        assert failures.wait("a") == 0.0
        verdict = failures.add("a", str(number))
        assert verdict.fresh
        assert verdict.locked is (number == GUESSES - 1)
    assert failures.wait("a") == pytest.approx(6.0)
    assert failures.wait("b") == 0.0
    clock.now += 6.0
    assert failures.wait("a") == 0.0
    assert not failures.add("a", "0").fresh
    assert failures.wait("a") == 0.0


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "testclient"),
    ],
)
def test_an_ipv6_host_is_one_address_however_many_it_has(address: str, network: str) -> None:
    assert network_of(address) == network
