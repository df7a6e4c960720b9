"""An encoder-decoder behind /v1/completions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_process import serving

from danlu.engine.config import SamplingParams
from danlu.engine.engine import Engine
from danlu.tokenizer.train import train_on
from tiny_t5 import t5_folder

TEXT = "def f1(x)"
ASKED = {"model": "t5", "prompt": TEXT, "max_tokens": 12, "temperature": 0}
http = httpx.Client(trust_env=False, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "t5"
    t5_folder(folder, train_on([f"def f{i}(x): return x + {i}" for i in range(100)], 300))
    return folder


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(f"--model=t5={folder}", data=tmp_path_factory.mktemp("t5-server")) as server:
        yield server.url


def test_an_answer_is_the_engines(url: str, folder: Path) -> None:
    with Engine(folder) as engine:
        (expected,) = engine.generate([TEXT], SamplingParams(temperature=0, max_new_tokens=12))
    answer = http.post(f"{url}/v1/completions", json=ASKED).json()
    assert answer["choices"][0]["text"] == expected.completions[0].text
    assert answer["usage"]["prompt_tokens"] == len(expected.prompt_ids)
    by_ids = http.post(f"{url}/v1/completions", json={**ASKED, "prompt": expected.prompt_ids}).json()
    assert by_ids["choices"][0]["text"] == expected.completions[0].text


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("chat/completions", {"model": "t5", "messages": [{"role": "user", "content": TEXT}]}, "no chat template"),
        ("completions", {**ASKED, "suffix": "x"}, "suffix"),
        ("completions", {**ASKED, "echo": True, "logprobs": 1}, "encoder-decoder"),
    ],
)
def test_what_it_cannot_do_is_refused(url: str, path: str, body: dict[str, object], message: str) -> None:
    answer = http.post(f"{url}/v1/{path}", json=body)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
