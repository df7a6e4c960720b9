"""GET /v1/models of a server whose models were not asked for yet."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx

from danlu.server.access.key_file import Limits, add_key
from danlu.server.app import create_app
from danlu.server.config import ServeConfig


def asked(folder: Path, key: str | None, *paths: str) -> list[httpx.Response]:
    """Answers of a server in this process that has loaded nothing."""
    config = ServeConfig(model=("one=/nowhere/one", "org/two=/nowhere/two"), data=folder, page=False)
    app = create_app(config)

    async def ask() -> list[httpx.Response]:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", headers=headers) as client:
            answers = [await client.get(path) for path in paths]
        await app.state.serving.database.close()
        return answers

    return asyncio.run(ask())


def test_nothing_is_loaded_to_tell_what_there_is(tmp_path: Path) -> None:
    listed, one = asked(tmp_path, None, "/v1/models", "/v1/models/org/two")
    body: dict[str, Any] = listed.json()
    assert [model["id"] for model in body["data"]] == ["one", "org/two"]
    assert body["data"][1] == one.json()
    assert one.json()["danlu"]["state"] == "unloaded"
    assert one.json()["danlu"]["loaded"] is False
    assert one.json()["danlu"]["kind"] is None


def test_a_key_sees_the_models_that_it_may_use(tmp_path: Path) -> None:
    _, secret = add_key(tmp_path / "keys.json", "alice", models=("org/two",), limits=Limits())
    listed, hidden, seen = asked(tmp_path, secret, "/v1/models", "/v1/models/one", "/v1/models/org/two")
    assert [model["id"] for model in listed.json()["data"]] == ["org/two"]
    assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, "model_not_found")
    assert seen.status_code == 200
    (refused,) = asked(tmp_path, None, "/v1/models")
    assert refused.status_code == 401
