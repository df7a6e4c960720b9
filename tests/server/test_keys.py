"""Keys: the file and its verbs, whose a key is, what a running server notices, limits and quotas."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from guarded_app import make_key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danlu import (
    CreateKeyConfig,
    KeysUsageConfig,
    ListKeysConfig,
    RevokeKeyConfig,
    create_key,
    keys_usage,
    list_keys,
    revoke_key,
)
from danlu.errors import DanluError
from danlu.server.access import keys as module
from danlu.server.access import usage
from danlu.server.access.database import Database
from danlu.server.access.key_file import Limits, add_key, end_key, read_keys
from danlu.server.access.keys import LOCAL, Admission, Caller, Keys
from danlu.server.access.usage import Usage
from danlu.server.errors import ApiError

names = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=64)
limit = st.none() | st.integers(1, 2**40)
fields = st.sampled_from(["version", "keys", "id", "name", "sha256", "created", "models", "revoked", "tokens_total"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(fields, inner, max_size=5),
    max_leaves=8,
)
limits = st.builds(Limits, requests_per_minute=limit, tokens_per_minute=limit, tokens_per_day=limit, tokens_total=limit)


@pytest.fixture
def used() -> Iterator[Usage]:
    database = Database(None, [usage.TABLE])
    yield Usage(database)
    asyncio.run(database.close())


# ------------------------------------------------------------------------------------------------------- the file


@given(
    made=st.dictionaries(names, st.tuples(limits, st.none() | st.lists(names, max_size=3).map(tuple)), max_size=4),
    data=st.data(),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_keys_come_back_from_the_file_as_they_were(
    tmp_path: Path, made: dict[str, tuple[Limits, tuple[str, ...] | None]], data: st.DataObject
) -> None:
    path = tmp_path / "keys.json"
    path.unlink(missing_ok=True)
    kept = {}
    for name, (key_limits, models) in made.items():
        kept[name], secret = add_key(path, name, models=models, limits=key_limits)
        assert kept[name].sha256 == hashlib.sha256(secret.encode()).hexdigest()
        assert re.fullmatch(r"sk-danlu-[\w-]{43}", secret)
        assert secret not in path.read_text()
    if not made:
        return
    assert read_keys(path) == list(kept.values())
    assert path.stat().st_mode & 0o777 == 0o600
    gone = data.draw(st.sampled_from(sorted(made)))
    end_key(path, gone)
    assert [key.name for key in read_keys(path) if key.revoked is None] == [name for name in made if name != gone]
    again, _ = add_key(path, gone, limits=Limits())  # the name is free, the id is not used again
    assert again.id != kept[gone].id


@given(rows=json_values)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_another_json_is_told_to_be_no_file_of_keys(tmp_path: Path, rows: object) -> None:
    path = tmp_path / "keys.json"
    for content in (rows, {"version": 1, "keys": [rows]}):
        path.write_text(json.dumps(content))
        with pytest.raises(DanluError, match=r"keys\.json"):
            read_keys(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"version": 1, "keys": [' + b"9" * 5000])
def test_a_broken_file_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(content)
    for use in (read_keys, lambda path: add_key(path, "bob", limits=Limits()), lambda path: end_key(path, "bob")):
        with pytest.raises(DanluError, match=r"keys\.json"):
            use(path)
    assert path.read_bytes() == content


def test_everything_wrong_with_a_file_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    make_key(tmp_path)
    row = json.loads(path.read_text())["keys"][0]
    rows = [row, row, row | {"id": "a b", "sha256": "12"}, row | {"tokens_total": -1, "colour": "red"}]
    path.write_text(json.dumps({"version": 1, "keys": rows}))
    with pytest.raises(DanluError) as error:
        read_keys(path)
    for part in (
        "keys.2: sha256",
        "keys.2: id",
        "keys.3: tokens_total",
        "keys.3: unknown key 'colour'",
        "called 'alice'",
    ):
        assert part in str(error.value)
    path.write_text(json.dumps({"version": 2, "keys": []}))
    with pytest.raises(DanluError, match="version 2"):
        read_keys(path)


def test_a_link_to_the_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "keys.json").symlink_to(tmp_path / "real" / "keys.json")
    make_key(tmp_path)
    assert (tmp_path / "keys.json").is_symlink()
    assert len(read_keys(tmp_path / "real" / "keys.json")) == 1


def test_many_processes_make_keys_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "danlu", "keys", "create", "--data", str(tmp_path)]
    processes = [
        subprocess.Popen([*command, f"key {number}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for number in range(6)
    ]
    secrets = [process.communicate()[0].strip() for process in processes]
    kept = {key.name: key.sha256 for key in read_keys(tmp_path / "keys.json")}
    assert kept == {
        f"key {number}": hashlib.sha256(secret.encode()).hexdigest() for number, secret in enumerate(secrets)
    }


# ------------------------------------------------------------------------------------------------------ the verbs


def test_the_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = create_key(
        CreateKeyConfig(
            name="alice [red]", data=tmp_path, models=("a,b", "c"), tokens_per_day=5000, requests_per_minute=9
        )
    )
    assert capsys.readouterr().out == secret + "\n"
    create_key(CreateKeyConfig(name="鲍勃", data=tmp_path))
    revoke_key(RevokeKeyConfig(name="鲍勃", data=tmp_path))
    with pytest.raises(DanluError, match=r"no valid key '鲍勃'; there are: 'alice \[red\]'"):
        revoke_key(RevokeKeyConfig(name="鲍勃", data=tmp_path))
    with pytest.raises(DanluError, match="there is a key"):
        create_key(CreateKeyConfig(name="alice [red]", data=tmp_path))
    capsys.readouterr()
    rows = list_keys(ListKeysConfig(data=tmp_path))
    shown = capsys.readouterr().out
    for text in ("alice [red]", "a, b, c", "9 requests a minute", "鲍勃"):
        assert text in " ".join(shown.split())
    assert [(row["name"], row["models"], row["revoked"] is None) for row in rows] == [
        ("alice [red]", ("a", "b", "c"), True),
        ("鲍勃", None, False),
    ]
    list_keys(ListKeysConfig(data=tmp_path, json=True))
    printed = capsys.readouterr().out
    assert json.loads(printed) == json.loads(json.dumps(rows))
    assert read_keys(tmp_path / "keys.json")[0].sha256 not in printed


@pytest.mark.parametrize("name", ["", " a", "a\n", "x" * 65, "a\0b", "\x1b[31m"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DanluError, match="name: must be"):
        create_key(CreateKeyConfig(name=name, data=tmp_path))
    assert not (tmp_path / "keys.json").exists()


def test_impossible_options_are_refused(tmp_path: Path) -> None:
    for wrong in ({"models": ("a,,b",)}, {"tokens_per_day": 0}, {"requests_per_minute": -1}):
        with pytest.raises(DanluError, match=next(iter(wrong))):
            create_key(CreateKeyConfig(name="alice", data=tmp_path, **wrong))
    for use in (list_keys, lambda config: revoke_key(RevokeKeyConfig(name="a", data=config.data))):
        with pytest.raises(DanluError, match="`danlu keys create NAME` makes it"):
            use(ListKeysConfig(data=tmp_path))
    with pytest.raises(DanluError, match="`danlu serve` makes it"):
        keys_usage(KeysUsageConfig(data=tmp_path))


def test_usage_is_shown_by_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, _ = add_key(tmp_path / "keys.json", "alice", limits=Limits())
    add_key(tmp_path / "keys.json", "bob", limits=Limits())

    async def run() -> None:
        database = Database(tmp_path / "server.sqlite3", [usage.TABLE])
        for caller in (Caller(key.id, "alice"), Caller(key.id, "alice"), LOCAL):
            await record(Usage(database), caller, 1000, 20)
        rows = keys_usage(KeysUsageConfig(data=tmp_path, json=True))  # while a server has it
        printed = json.loads(capsys.readouterr().out)
        assert printed == rows
        today = {row["name"]: tuple(row["today"].values()) for row in rows}
        assert today == {"alice": (2, 2000, 0, 40), "bob": (0, 0, 0, 0), "local": (1, 1000, 0, 20)}
        await database.close()

    asyncio.run(run())
    keys_usage(KeysUsageConfig(data=tmp_path))
    assert re.search(r"alice +2 +2,000 +40 +2 +2,000 +40", capsys.readouterr().out)


# -------------------------------------------------------------------------------------------------- a running server


def test_every_key_is_compared_whichever_is_right(tmp_path: Path, used: Usage, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = [make_key(tmp_path, f"key {number}") for number in range(7)]
    keys = Keys(tmp_path / "keys.json", used)
    compared = []
    real = module.hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda a, b: (compared.append((a, b)), real(a, b))[1])
    for presented, name in [(secrets[0], "key 0"), (secrets[6], "key 6"), ("sk-danlu-wrong", None), ("", None)]:
        compared.clear()
        with contextlib.suppress(ApiError) if name is None else contextlib.nullcontext():
            assert keys.check(presented.encode(), "1.2.3.4").name == name
        assert len(compared) == 7
        assert all(len(a) == len(b) == 64 for a, b in compared)


def test_changes_of_the_file_are_seen_within_a_second(tmp_path: Path, used: Usage) -> None:
    assert module.LOOK_EVERY < 1
    path = tmp_path / "keys.json"
    keys = Keys(path, used)
    assert not keys.required
    alice = make_key(tmp_path, "alice")
    assert soon(lambda: keys.required)
    assert keys.check(alice.encode(), "").name == "alice"
    bob = make_key(tmp_path, "bob")
    assert soon(lambda: is_valid(keys, bob))
    end_key(path, "alice")
    assert soon(lambda: not is_valid(keys, alice))
    assert is_valid(keys, bob)


def test_a_file_that_breaks_or_goes_keeps_the_last_good_keys(
    tmp_path: Path, used: Usage, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.json"
    alice = make_key(tmp_path, "alice")
    good = path.read_bytes()
    keys = Keys(path, used)
    path.write_text("{")
    time.sleep(0.6)
    assert is_valid(keys, alice)
    path.unlink()
    time.sleep(0.6)
    assert is_valid(keys, alice)
    assert keys.required
    time.sleep(0.6)
    assert is_valid(keys, alice)
    told = [record.getMessage() for record in caplog.records]
    assert [text.split(" (")[0] for text in told] == [  # each once
        f"the keys stay as they were: {path}:1: is not valid JSON",
        f"the keys stay as they were: {path}: cannot be read",
    ]
    path.write_bytes(good)
    end_key(path, "alice")
    assert soon(lambda: not is_valid(keys, alice))
    assert keys.required


def test_a_file_that_was_named_has_to_be_there(tmp_path: Path, used: Usage) -> None:
    with pytest.raises(DanluError, match=r"does not exist; make it with: danlu keys create NAME --api-key-file"):
        Keys(tmp_path / "keys.json", used, must_exist=True)
    (tmp_path / "keys.json").write_text("{}")
    with pytest.raises(DanluError, match="is no file of keys"):
        Keys(tmp_path / "keys.json", used)


def test_wrong_keys_wait_longer_and_longer_and_right_ones_never(tmp_path: Path, used: Usage) -> None:
    alice = make_key(tmp_path).encode()
    keys = Keys(tmp_path / "keys.json", used)
    statuses = []
    for _ in range(8):
        with pytest.raises(ApiError) as error:
            keys.check(b"wrong", "10.0.0.1")
        statuses.append(error.value.status)
    assert statuses == [401] * 5 + [429] * 3
    assert int(error.value.headers["Retry-After"]) >= 1
    assert keys.check(alice, "10.0.0.1").name == "alice"
    with pytest.raises(ApiError) as error:
        keys.check(b"wrong", "10.0.0.2")
    assert error.value.status == 401


# ----------------------------------------------------------------------------------------------- limits and quotas


def caller_with(name: str = "alice", **given: int) -> Caller:
    return Caller(f"key_{name}", name, None, Limits(**given))


async def record(used: Usage, caller: Caller, prompt: int, answer: int) -> None:
    await used.record(
        caller, model="m", route="/v1/x", request_id="r", prompt_tokens=prompt, completion_tokens=answer, status=200
    )


def refused(error: ApiError) -> tuple[int, str | None]:
    return error.status, error.code


async def tried(keys: Keys, caller: Caller, tokens: int, least: int | None = None) -> Admission | ApiError:
    try:
        return await keys.admit(caller, tokens, least=least)
    except ApiError as error:
        return error


def test_requests_a_minute(tmp_path: Path, used: Usage) -> None:
    async def run() -> None:
        keys, alice = Keys(tmp_path / "keys.json", used), caller_with(requests_per_minute=3)
        for left in (2, 1, 0):
            keys.settle(await keys.admit(alice, 10), 10)
            assert keys.headers(alice)["x-ratelimit-remaining-requests"] == str(left)
        error = await tried(keys, alice, 10)
        assert isinstance(error, ApiError)
        assert refused(error) == (429, "rate_limit_exceeded")
        assert 55 <= int(error.headers["Retry-After"]) <= 60
        assert isinstance(await tried(keys, caller_with("bob", requests_per_minute=3), 10), Admission)
        assert keys.headers(LOCAL) == {}

    asyncio.run(run())


def test_tokens_a_minute_and_what_is_reserved(tmp_path: Path, used: Usage) -> None:
    async def run() -> None:
        keys, alice = Keys(tmp_path / "keys.json", used), caller_with(tokens_per_minute=100)
        one = await keys.admit(alice, 60)
        assert keys.headers(alice)["x-ratelimit-remaining-tokens"] == "40"
        error = await tried(keys, alice, 50)
        assert isinstance(error, ApiError)
        assert refused(error) == (429, "rate_limit_exceeded")
        keys.settle(one, 10)
        keys.settle(one, 90)  # a second time counts nothing
        assert keys.headers(alice)["x-ratelimit-remaining-tokens"] == "90"
        assert (await keys.admit(alice, 500, least=20)).tokens == 90
        never = await tried(keys, alice, 101)
        assert isinstance(never, ApiError)
        assert never.headers["x-should-retry"] == "false"

    asyncio.run(run())


@given(st.integers(1, 300), st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1)), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_quotas_hold_whatever_runs_at_once(quota: int, requests: list[tuple[int, float]]) -> None:
    """However requests overlap, no more is used than the quota, and no request is refused that would have fitted."""

    async def run() -> None:
        database = Database(None, [usage.TABLE])
        used = Usage(database)
        keys, alice = Keys(Path("none.json"), used), caller_with(tokens_total=quota, tokens_per_day=quota)
        spent = held = 0

        async def request(tokens: int, share: float) -> None:
            nonlocal spent, held
            await asyncio.sleep(0)
            admission = await tried(keys, alice, tokens)
            if isinstance(admission, ApiError):
                assert refused(admission) == (429, "insufficient_quota")
                assert spent + held + tokens > quota
                return
            held += tokens
            assert spent + held <= quota
            await asyncio.sleep(0)
            cost = int(tokens * share)
            keys.settle(admission, cost)
            held, spent = held - tokens, spent + cost
            await record(used, alice, cost, 0)

        await asyncio.gather(*(request(tokens, share) for tokens, share in requests))
        assert spent <= quota
        assert (await used.of(alice.id)).tokens == spent
        again = Keys(Path("none.json"), used)  # the server starts again
        left = quota - spent
        if left:
            assert isinstance(await tried(again, alice, left), Admission)
        assert isinstance(await tried(again, alice, left + 1), ApiError)
        await database.close()

    asyncio.run(run())


def test_a_day_ends_at_midnight(tmp_path: Path, used: Usage) -> None:
    now = 86400.0 * 20000 + 86390

    async def run() -> None:
        nonlocal now
        keys = Keys(tmp_path / "keys.json", used, clock=lambda: now)
        alice = caller_with(tokens_per_day=100, tokens_total=150)
        keys.settle(await keys.admit(alice, 100), 100)
        error = await tried(keys, alice, 1)
        assert isinstance(error, ApiError)
        assert refused(error) == (429, "insufficient_quota")
        assert error.headers["Retry-After"] == "10"
        assert "today" in error.message
        now += 11
        keys.settle(await keys.admit(alice, 50), 50)
        error = await tried(keys, alice, 1)
        assert isinstance(error, ApiError)
        assert "altogether" in error.message
        assert "Retry-After" not in error.headers

    asyncio.run(run())


def test_usage_that_was_recorded_survives_kill(tmp_path: Path) -> None:
    """kill -9 right after record() has returned: the row and the sums are there, and a quota knows them."""
    program = """
import asyncio, sys
from pathlib import Path
from danlu.server.access import usage
from danlu.server.access.database import Database
from danlu.server.access.keys import Caller
async def run():
    used = usage.Usage(Database(Path(sys.argv[1]), [usage.TABLE]))
    for _ in range(10**9):
        await used.record(Caller("key_alice", "alice"), model="m", route="r", request_id="r", prompt_tokens=3,
                          completion_tokens=4)
        print("told", flush=True)
asyncio.run(run())
"""
    path = tmp_path / "server.sqlite3"
    process = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(20):
        assert process.stdout.readline() == "told\n"
    os.kill(process.pid, signal.SIGKILL)
    told = 20 + sum(line == "told\n" for line in process.stdout)
    process.wait()
    process.stdout.close()

    async def run() -> None:
        database = Database(path, [usage.TABLE])
        used = Usage(database)
        sums = await used.of("key_alice")
        rows = await database.read(lambda c: c.execute("SELECT count(*), sum(prompt_tokens) FROM usage").fetchone())
        assert sums.requests >= told
        assert rows == (sums.requests, 3 * sums.requests)
        assert sums.tokens == 7 * sums.requests
        assert (await used.days("key_alice"))[0][1].requests > 0
        keys = Keys(tmp_path / "keys.json", used)
        assert isinstance(await tried(keys, caller_with(tokens_total=sums.tokens), 1), ApiError)
        assert isinstance(await tried(keys, caller_with(tokens_total=sums.tokens + 1), 1), Admission)
        await database.close()

    asyncio.run(run())


def is_valid(keys: Keys, secret: str) -> bool:
    try:
        keys.check(secret.encode(), "")
    except ApiError:
        return False
    return True


def soon(holds: module.Callable[[], bool]) -> bool:
    """Whether it comes to hold; a busy machine gets more than the second that users are promised."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.05)
    return False
