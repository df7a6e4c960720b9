"""How much was used in the last minute, and when there is room again."""

from __future__ import annotations

import ipaddress
import math
from collections import OrderedDict, deque

MINUTE = 60.0


class SlidingMinute:
    """An amount that is used in any 60 seconds. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._used: deque[tuple[float, int]] = deque()
        self._total = 0

    def add(self, amount: int, now: float) -> None:
        """Count ``amount`` as used now."""
        if amount:
            self._used.append((now, amount))
            self._total += amount

    def total(self, now: float) -> int:
        """What was used in the 60 seconds before ``now``."""
        while self._used and self._used[0][0] <= now - MINUTE:
            self._total -= self._used.popleft()[1]
        return self._total

    def seconds_until(self, total: int, now: float) -> float:
        """Seconds until no more than ``total`` was used in a minute, if nothing is added."""
        left = self.total(now)
        for when, amount in self._used:
            if left <= total:
                break
            left -= amount
            if left <= total:
                return when + MINUTE - now
        return 0.0


class WrongKeys:
    """Who sends wrong keys, by address, and how long they are told to wait: longer each time.

    A right key gets in all the same: 256 bits cannot be guessed, and behind a proxy everybody has one address, so that
    to shut an address out would let anybody shut out all.
    """

    FREE, LONGEST, FORGOTTEN_AFTER, MOST = 5, 60.0, 600.0, 4096

    def __init__(self) -> None:
        self._seen: OrderedDict[str, tuple[int, float, float]] = OrderedDict()  # -> count, last time, wait until

    def count(self, address: str, now: float) -> int:
        """A wrong key has come from ``address``; seconds to wait before the next, 0: none."""
        address = _network(address)
        number, last, until = self._seen.pop(address, (0, now, 0.0))
        if now - last > self.FORGOTTEN_AFTER:
            number = 0
        if now >= until:
            number += 1
            if number > self.FREE:
                until = now + min(self.LONGEST, 2.0 ** (number - self.FREE))
        self._seen[address] = (number, now, until)
        if len(self._seen) > self.MOST:
            self._seen.popitem(last=False)
        return max(0, math.ceil(until - now))


def _network(address: str) -> str:
    """An IPv6 address stands for its /64, which is what one customer has."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((found, 64), strict=False)) if found.version == 6 else address
