"""The sliding minute and the back-off of wrong keys, against what is counted by hand."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.server.access.rate_limits import SlidingMinute, WrongKeys

events = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 100)), max_size=30)


@given(events, st.integers(0, 500))
@settings(deadline=None)
def test_a_sliding_minute_counts_the_last_60_seconds(steps: list[tuple[int, int]], limit: int) -> None:
    window, now, used = SlidingMinute(), 0, []
    for pause, amount in steps:
        now += pause
        window.add(amount, now)
        used.append((now, amount))
        assert window.total(now) == sum(n for when, n in used if when > now - 60)
        wait = window.seconds_until(limit, now)
        assert 0 <= wait <= 60
        assert sum(n for when, n in used if when > now + wait - 60) <= limit
        if wait:
            assert sum(n for when, n in used if when > now + wait - 1 - 60) > limit


def test_wrong_keys_are_told_to_wait_longer_up_to_a_minute() -> None:
    wrong, now, waits = WrongKeys(), 0.0, []
    for _ in range(16):
        wait = wrong.count("10.0.0.1", now)
        waits.append(wait)
        now += wait
    assert waits == [0, 0, 0, 0, 0, 2, 4, 8, 16, 32, 60, 60, 60, 60, 60, 60]
    assert wrong.count("10.0.0.1", now + 601) == 0


def test_trying_while_waiting_does_not_make_it_longer() -> None:
    wrong = WrongKeys()
    for _ in range(6):
        wrong.count("10.0.0.1", 0.0)
    assert [wrong.count("10.0.0.1", 0.5) for _ in range(100)] == [2] * 100


def test_a_customer_has_a_whole_ipv6_network_and_tables_stay_small() -> None:
    wrong = WrongKeys()
    for number in range(5):
        wrong.count(f"2001:db8::{number:x}", 0.0)
    assert wrong.count("2001:db8::ffff", 0.0) > 0
    assert wrong.count("2001:db8:0:1::1", 0.0) == 0
    for number in range(3 * WrongKeys.MOST):
        wrong.count(f"client {number}", 0.0)
    assert len(wrong._seen) == WrongKeys.MOST
