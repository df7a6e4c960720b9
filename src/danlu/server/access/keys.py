"""Who calls, and whether there is room for what they ask: keys, rate limits and quotas of a running server."""

from __future__ import annotations

import hmac
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request

from danlu.errors import DanluError
from danlu.server.access.key_file import Key, Limits, hash_key, read_keys
from danlu.server.access.rate_limits import SlidingMinute, WrongKeys
from danlu.server.access.usage import Usage, day_of
from danlu.server.errors import ApiError
from danlu.server.operation.log_format import log

LOOK_EVERY = 0.5
"""Seconds between two looks whether the file of keys has changed."""

DAY = 86400


@dataclass(frozen=True)
class Caller:
    """Who sent a request.

    Attributes:
        id: what is theirs in the database is kept under it; "local" where the server has no keys.
        models: names they may use, and with a model its adapters; None: all.
    """

    id: str
    name: str
    models: frozenset[str] | None = None
    limits: Limits = field(default_factory=Limits)

    def may_use(self, model: str) -> bool:
        """Whether the key holds for a model, or for an adapter, ``MODEL:NAME``, by its own name or its model's."""
        return self.models is None or model in self.models or model.rpartition(":")[0] in self.models


LOCAL = Caller("local", "local")
"""Whoever calls a server without keys."""


def caller_of(request: Request) -> Caller:
    """Who sent a request, as the middleware of :mod:`danlu.server.access.auth` found out."""
    caller: Caller = request.state.caller
    return caller


@dataclass
class Admission:
    """Room for one request, until :meth:`Keys.settle`.

    Attributes:
        tokens: prompt and answer together may take as many.
    """

    caller: Caller
    tokens: int
    open: bool = True


@dataclass
class _Account:
    """What one key has used and holds at present. The server owns its database, so this stays true."""

    day: str
    today: int
    total: int


class Keys:
    """The keys of a running server. The file is looked at again when it changes.

    Args:
        path: the file of keys.
        usage: what was used before; quotas are held against it.
        must_exist: the file was named by the user; False: a server without the file has no keys.
        clock: seconds since 1970.

    Raises:
        DanluError: the file is missing, or no file of keys.
    """

    def __init__(
        self, path: Path, usage: Usage, *, must_exist: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self.path, self.usage = path, usage
        self._clock = clock
        self._callers: list[tuple[str, Caller]] = []  # hash -> caller, of valid keys
        self._seen: tuple[int, int, int] | None = None  # what the file was when it was last read
        self._looked = -math.inf
        self._required = must_exist
        self._wrong = WrongKeys()
        self._requests: defaultdict[str, SlidingMinute] = defaultdict(SlidingMinute)
        self._tokens: defaultdict[str, SlidingMinute] = defaultdict(SlidingMinute)
        self._reserved: defaultdict[str, int] = defaultdict(int)
        self._accounts: dict[str, _Account] = {}
        if must_exist and not path.exists():
            raise DanluError(f"{path}: does not exist; make it with: danlu keys create NAME --api-key-file {path}")
        if self._state() is not None:
            self._read()
        self._looked = time.monotonic()

    @property
    def required(self) -> bool:
        """Whether a key is needed. It is from the moment on that there is a file of keys, even if all are revoked and
        if the file goes away: a server never opens by itself."""
        self._look()
        return self._required

    def check(self, secret: bytes, address: str) -> Caller:
        """Whose key this is.

        Every key is compared in constant time, whichever it is, so that the time tells nothing.

        Args:
            address: of the client; wrong keys from there have to wait longer and longer.

        Raises:
            ApiError: 401, or 429 after several wrong ones.
        """
        self._look()
        presented = hash_key(secret)
        found = None
        for kept, caller in self._callers:
            if hmac.compare_digest(kept, presented):
                found = caller
        if found is not None:
            return found
        if wait := self._wrong.count(address, time.monotonic()):
            raise ApiError(
                429,
                f"too many wrong keys from this address; try again in {wait} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(wait)},
            )
        raise ApiError(
            401,
            "this key is not valid: it may be mistyped or revoked; `danlu keys create NAME` makes one",
            code="invalid_api_key",
            headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
        )

    def caller(self, key_id: str) -> Caller | None:
        """The caller of a valid key, by its id."""
        self._look()
        return next((caller for _, caller in self._callers if caller.id == key_id), None)

    async def admit(self, caller: Caller, tokens: int, *, least: int | None = None) -> Admission:
        """Take up room for a request: it is counted, and its tokens are reserved until they are settled, so that
        requests at the same time cannot overshoot together.

        Args:
            tokens: the most that prompt and answer can take.
            least: grant less than ``tokens`` where there is less room, but at least so much (the prompt and one token):
                for requests that leave the length of the answer to the server.

        Raises:
            ApiError: 429 with code rate_limit_exceeded or insufficient_quota.
        """
        limits, least = caller.limits, tokens if least is None else min(least, tokens)
        if limits.tokens_per_day is not None or limits.tokens_total is not None:
            await self._open_account(caller)
        # No waiting from here on: what is checked is what is taken.
        now, reserved = time.monotonic(), self._reserved[caller.id]
        granted = tokens
        if limits.requests_per_minute is not None:
            window = self._requests[caller.id]
            if window.total(now) >= limits.requests_per_minute:
                wait = window.seconds_until(limits.requests_per_minute - 1, now)
                raise _too_many(f"the key has {limits.requests_per_minute} requests a minute", wait)
        if limits.tokens_per_minute is not None:
            window, limit = self._tokens[caller.id], limits.tokens_per_minute
            granted = min(granted, limit - reserved - window.total(now))
            if granted < least:
                if least > limit:
                    raise _never(f"this request can take {least} tokens and the key has {limit} a minute", "rate_limit")
                wait = window.seconds_until(max(0, limit - reserved - least), now)
                raise _too_many(f"the key has {limit} tokens a minute, and this request can take {least}", wait)
        for limit_of_quota, used, period in self._quotas(caller):
            granted = min(granted, limit_of_quota - used - reserved)
            if granted < least:
                left = max(0, limit_of_quota - used)
                held = f", {reserved} of which running requests may take" if reserved and left else ""
                message = f"this request can take {least} tokens and the key has {left} left {period}{held}"
                raise _never(message, "quota", retry_after=DAY - self._clock() % DAY if period == "today" else None)
        if limits.requests_per_minute is not None:
            self._requests[caller.id].add(1, now)
        self._reserved[caller.id] += granted
        return Admission(caller, granted)

    def settle(self, admission: Admission, used: int) -> None:
        """The request has ended: ``used`` tokens take the place of what was reserved. Once; later calls do nothing.

        :meth:`Usage.record` keeps them for the next start of the server.
        """
        if not admission.open:
            return
        admission.open = False
        caller = admission.caller
        self._reserved[caller.id] -= admission.tokens
        if caller.limits.tokens_per_minute is not None:
            self._tokens[caller.id].add(used, time.monotonic())
        if (account := self._accounts.get(caller.id)) is not None:
            self._turn_day(account)
            account.today += used
            account.total += used

    def headers(self, caller: Caller) -> dict[str, str]:
        """What is left of the limits a minute, in the headers that OpenAI's clients know."""
        now, found = time.monotonic(), {}
        for name, limit, window, reserved in (
            ("requests", caller.limits.requests_per_minute, self._requests, 0),
            ("tokens", caller.limits.tokens_per_minute, self._tokens, self._reserved[caller.id]),
        ):
            if limit is not None:
                left = max(0, limit - window[caller.id].total(now) - reserved)
                found[f"x-ratelimit-limit-{name}"] = str(limit)
                found[f"x-ratelimit-remaining-{name}"] = str(left)
                found[f"x-ratelimit-reset-{name}"] = f"{math.ceil(window[caller.id].seconds_until(0, now))}s"
        return found

    def _quotas(self, caller: Caller) -> list[tuple[int, int, str]]:
        """(limit, used, in which time) of the quotas that a key has."""
        account = self._accounts.get(caller.id)
        if account is None:
            return []
        self._turn_day(account)
        quotas = [
            (caller.limits.tokens_per_day, account.today, "today"),
            (caller.limits.tokens_total, account.total, "altogether"),
        ]
        return [(limit, used, period) for limit, used, period in quotas if limit is not None]

    async def _open_account(self, caller: Caller) -> None:
        if caller.id not in self._accounts:
            day = day_of(self._clock())
            today, total = await self.usage.of(caller.id, day), await self.usage.of(caller.id)
            # Another request may have opened it meanwhile, and counted.
            self._accounts.setdefault(caller.id, _Account(day, today.tokens, total.tokens))

    def _turn_day(self, account: _Account) -> None:
        if (day := day_of(self._clock())) != account.day:
            account.day, account.today = day, 0

    def _look(self) -> None:
        """Read the file again if it has changed; what is broken changes nothing."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY:
            return
        self._looked = now
        if self._state() == self._seen:
            return
        try:
            self._read()
        except DanluError as error:
            log.warning("the keys stay as they were: %s", error)

    def _state(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> None:
        self._seen = self._state()  # before reading: what is written meanwhile is a change
        keys = read_keys(self.path)
        self._callers = [(key.sha256, _caller(key)) for key in keys if key.revoked is None]
        self._required = True


def _caller(key: Key) -> Caller:
    limits = Limits(
        requests_per_minute=key.requests_per_minute,
        tokens_per_minute=key.tokens_per_minute,
        tokens_per_day=key.tokens_per_day,
        tokens_total=key.tokens_total,
    )
    return Caller(key.id, key.name, None if key.models is None else frozenset(key.models), limits)


def _too_many(message: str, wait: float) -> ApiError:
    """A limit a minute. What running requests hold comes back when they end, which nobody can tell: try soon."""
    seconds = max(1, math.ceil(wait))
    return ApiError(
        429,
        f"{message}; try again in {seconds} s",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds)},
    )


def _never(message: str, kind: str, retry_after: float | None = None) -> ApiError:
    """Trying again does not help, and clients of OpenAI and Anthropic are told so."""
    headers = {"x-should-retry": "false"}
    if retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
    code = "insufficient_quota" if kind == "quota" else "rate_limit_exceeded"
    return ApiError(429, f"{message}; ask for less (max_tokens), or for a higher limit", code=code, headers=headers)
