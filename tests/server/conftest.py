"""Real servers: one with a tiny untrained chat model, one with SmolLM2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from page_driver import browser, keep, page_server, visit  # noqa: F401  (fixtures)
from server_process import ServerProcess, serving
from tiny_cross_encoder import cross_encoder_folder


@pytest.fixture(scope="session")
def tiny_server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`danlu serve tiny=...` on a free port, without keys."""
    with serving(f"--model=tiny={model_folder}", data=tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="session")
def smollm2_server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`danlu serve smollm2=...` on a free port, without keys."""
    data = tmp_path_factory.mktemp("smollm2-server")
    with serving(f"--model=smollm2={smollm2}", "--kv-memory=512", data=data) as server:
        yield server


@pytest.fixture(scope="session")
def ranker_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random cross-encoder."""
    return cross_encoder_folder(tmp_path_factory.mktemp("models") / "ranker")


@pytest.fixture(scope="session")
def text_url(
    model_folder: Path, minilm: Path, ranker_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Where the tiny model, MiniLM and a cross-encoder are served, as tiny, minilm and org/ranker."""
    models = (f"--model=tiny={model_folder}", f"--model=minilm={minilm}", f"--model=org/ranker={ranker_folder}")
    with serving(*models, data=tmp_path_factory.mktemp("text-server")) as server:
        yield server.url


@pytest.fixture(scope="session")
def tiny_url(tiny_server: ServerProcess) -> str:
    """Where the tiny model is served."""
    return tiny_server.url


@pytest.fixture(scope="session")
def smollm2_url(smollm2_server: ServerProcess) -> str:
    """Where SmolLM2 is served."""
    return smollm2_server.url
