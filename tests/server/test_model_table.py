"""The table of models: loaded when asked for, unloaded for others, started again when they die."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from danlu.engine.config import SamplingParams
from danlu.errors import DanluError
from danlu.server import models as table
from danlu.server.config import ServeConfig
from danlu.server.errors import ApiError
from danlu.server.models import Models
from danlu.server.operation.metrics import Metrics
from danlu.server.protocol import TextPrompt

GREEDY = SamplingParams(max_new_tokens=4, temperature=0.0)


def run(models: tuple[str, ...], work: Callable[[Models], Awaitable[None]], **options: object) -> None:
    """Run ``work`` on a table of models, and end all processes."""

    async def inside() -> None:
        config = ServeConfig(model=models, kv_memory=16, **options)  # type: ignore[arg-type]
        found = Models(config, Metrics([]))
        try:
            await work(found)
        finally:
            pids = [entry.model.pid for entry in found.entries.values() if entry.model is not None]
            await found.close()
            assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]

    asyncio.run(inside())


async def ask(models: Models, name: str | None) -> str:
    """A short answer."""
    async with models.use(models.entry(name)) as model, model.generate(TextPrompt("def"), GREEDY) as stream:
        return "".join([piece.text async for piece in stream])


def test_models_are_loaded_once_when_they_are_asked_for(model_folder: Path) -> None:
    async def work(models: Models) -> None:
        await models.preload()
        assert [entry.state for entry in models.entries.values()] == ["loaded", "unloaded"]
        first, second = await asyncio.gather(ask(models, "b"), ask(models, "b"))
        assert first == second == await ask(models, None)
        assert [entry.state for entry in models.entries.values()] == ["loaded", "loaded"]

    run((f"a={model_folder}", f"b={model_folder}"), work)


def test_the_least_used_is_unloaded_for_another(model_folder: Path) -> None:
    async def work(models: Models) -> None:
        await ask(models, "a")
        await ask(models, "b")
        await ask(models, "a")
        models.budget = models.entry("a").memory + models.entry("b").memory
        await ask(models, "c")
        assert {name: entry.state for name, entry in models.entries.items()} == {
            "a": "loaded", "b": "unloaded", "c": "loaded",
        }  # fmt: skip
        models.budget = models.entry("a").memory + models.entry("c").memory
        async with models.use(models.entry("a")), models.use(models.entry("c")):
            with pytest.raises(ApiError, match="no room") as refused:
                await ask(models, "b")
        assert refused.value.status == 503
        assert "Retry-After" in refused.value.headers
        assert await ask(models, "b")  # now others are idle

    run(tuple(f"{name}={model_folder}" for name in "abc"), work)


def test_a_model_larger_than_the_budget_is_refused(model_folder: Path) -> None:
    async def work(models: Models) -> None:
        models.budget = 10_000
        with pytest.raises(ApiError, match="model_memory"):
            await ask(models, "a")

    run((f"a={model_folder}",), work)


def test_a_process_that_died_is_started_again(model_folder: Path) -> None:
    async def work(models: Models) -> None:
        told = await ask(models, "a")
        entry = models.entry("a")
        assert entry.model is not None
        os.kill(entry.model.pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            while entry.model is not None:
                await asyncio.sleep(0.01)
        assert await ask(models, "a") == told

    run((f"a={model_folder}",), work)


def test_a_broken_model_is_told_each_time_and_tried_again_later(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model_folder, broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:1000])

    async def work(models: Models) -> None:
        with pytest.raises(DanluError, match=r"model\.safetensors"):
            await models.preload()
        (broken / "model.safetensors").write_bytes(weights)
        with pytest.raises(ApiError, match="cannot be loaded") as refused:
            await ask(models, "a")  # not tried at every request
        assert refused.value.status == 503
        monkeypatch.setattr(table, "RETRY_FAILED_SECONDS", 0.0)
        assert await ask(models, "a")

    run((f"a={broken}",), work)


def test_names() -> None:
    config = ServeConfig(model=("smollm2", "mine=/models/x.gguf", "/models/folder", "./some/file.gguf"))
    models = Models(config, Metrics([]))
    assert {entry.name: entry.source for entry in models.entries.values()} == {
        "smollm2": "smollm2",
        "mine": "/models/x.gguf",
        "folder": "/models/folder",
        "file": "./some/file.gguf",
    }
    assert models.entry(None).name == "smollm2"
    for unknown, told in (("nobody", "nobody"), ("mine:style", "adapter")):
        with pytest.raises(ApiError, match=told) as refused:
            models.entry(unknown)
        assert (refused.value.status, refused.value.code) == (404, "model_not_found")
    assert "same name" in ServeConfig(model=("a=x", "a=y")).problems()[0]
    assert "names no model" in ServeConfig(model=("=x",)).problems()[0]
    assert "origin" in ServeConfig(cors_origin=("example.org",)).problems()[0]
