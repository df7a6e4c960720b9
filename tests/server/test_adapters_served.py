"""Adapters of a real server: loaded when asked for, beside their model, each answered as if it were merged."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from guarded_app import bearer, make_key
from server_process import ServerProcess

from danlu import serve
from danlu.engine.config import SamplingParams
from danlu.engine.engine import Engine
from danlu.engine.engine_config import EngineConfig
from danlu.errors import DanluError
from danlu.models.load import load_model
from danlu.server.access.key_file import Limits, add_key
from danlu.server.config import ServeConfig
from danlu.server.models import Models
from danlu.server.operation.metrics import Metrics
from danlu.server.remote import RemoteModel
from danlu.tokenizer.tokenizer import Tokenizer
from random_adapters import merged, random_adapter

PROMPT = "def f1(x):"
TEMPLATE = "{% for message in messages %}<<{{ message.content }}>>{% endfor %}"


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    model = load_model(model_folder)
    made = {name: random_adapter(model, folder / name, 4, seed=seed) for seed, name in enumerate(("style", "tone"), 1)}
    tokenizer = Tokenizer.load(model_folder)
    own = Tokenizer(tokenizer.definition, {**tokenizer.config, "chat_template": TEMPLATE})
    own.save(made["tone"])
    made["broken"] = folder / "broken"
    shutil.copytree(made["style"], made["broken"])
    weights = (made["broken"] / "adapter_model.safetensors").read_bytes()
    (made["broken"] / "adapter_model.safetensors").write_bytes(weights[:200])
    return made


@pytest.fixture(scope="module")
def expected(model_folder: Path, adapters: dict[str, Path]) -> dict[str, str]:
    """Greedy answers of the model and of those with an adapter merged, by name."""
    model, tokenizer = load_model(model_folder), Tokenizer.load(model_folder)
    models = {"tiny": model}
    models |= {f"tiny:{name}": merged(model, adapters[name]) for name in ("style", "tone")}
    params = SamplingParams(temperature=0, max_new_tokens=12)
    answers = {}
    for name, one in models.items():
        with Engine(one, EngineConfig(kv_memory=16), tokenizer) as engine:
            answers[name] = engine.generate([PROMPT], params)[0].completions[0].text
    assert len(set(answers.values())) == 3
    return answers


@pytest.fixture(scope="module")
def served(
    model_folder: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Two names of the tiny model, with keys; an adapter is broken."""
    data = tmp_path_factory.mktemp("adapters-served")
    make_key(data, "first")
    server = ServerProcess(
        f"--model=tiny={model_folder}", f"--model=other={model_folder}", f"--adapter=style={adapters['style']}",
        f"--adapter=tiny:tone={adapters['tone']}", f"--adapter=broken={adapters['broken']}",
        f"--adapter=other:style={adapters['style']}", "--kv-memory=16", data=data,
    )  # fmt: skip
    try:
        yield server.wait_until_ready()
    finally:
        server.kill()


@pytest.fixture(scope="module")
def keys(served: ServerProcess) -> dict[str, dict[str, str]]:
    """Headers with keys for everything, for a model, for an adapter."""
    secrets = {
        name: add_key(served.data / "keys.json", name, models=models, limits=Limits())[1]
        for name, models in (("all", None), ("model", ("tiny",)), ("adapter", ("tiny:style",)))
    }
    headers = {name: bearer(secret) for name, secret in secrets.items()}
    for _ in range(100):  # within a second the server has seen them
        if httpx.get(f"{served.url}/v1/models", headers=headers["adapter"], trust_env=False).status_code == 200:
            break
    return headers


def post(served: ServerProcess, headers: dict[str, str], path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{served.url}{path}", headers=headers, json=body, trust_env=False, timeout=60)


def complete(served: ServerProcess, headers: dict[str, str], model: str) -> httpx.Response:
    return post(served, headers, "/v1/completions", model=model, prompt=PROMPT, max_tokens=12, temperature=0)


def listed(served: ServerProcess, headers: dict[str, str]) -> dict[str, Any]:
    found = httpx.get(f"{served.url}/v1/models", headers=headers, trust_env=False).json()["data"]
    return {model["id"]: model for model in found}


def test_each_is_answered_as_if_merged(
    served: ServerProcess, keys: dict[str, dict[str, str]], expected: dict[str, str]
) -> None:
    """All at once: in the same steps, and the first requests of an adapter while it is being loaded."""
    before = listed(served, keys["all"])
    assert (before["tiny:style"]["root"], before["tiny:style"]["parent"]) == ("tiny", "tiny")
    assert (before["tiny"]["root"], before["tiny"]["parent"]) == ("tiny", None)
    assert not before["tiny:style"]["danlu"]["loaded"]
    names = list(expected) * 6
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: complete(served, keys["all"], name).json(), names))
    for name, answer in zip(names, answers, strict=True):
        assert answer["model"] == name
        assert answer["choices"][0]["text"] == expected[name]
    after = listed(served, keys["all"])["tiny:style"]["danlu"]
    assert after["loaded"]
    assert after["kind"] == "generate"
    told = httpx.get(f"{served.url}/metrics", headers=keys["all"], trust_env=False).text
    for name in expected:
        assert f'danlu_requests_total{{model="{name}",route="/v1/completions",status="200"}} 6.0' in told


def test_a_broken_adapter_is_told_and_its_model_goes_on(
    served: ServerProcess, keys: dict[str, dict[str, str]], expected: dict[str, str]
) -> None:
    for _ in range(2):
        refused = complete(served, keys["all"], "tiny:broken")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_not_loaded")
        assert "adapter_model.safetensors" in refused.json()["error"]["message"]
    assert complete(served, keys["all"], "tiny").json()["choices"][0]["text"] == expected["tiny"]
    unknown = complete(served, keys["all"], "tiny:nobody")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert "'tiny' has no adapter 'nobody'" in unknown.json()["error"]["message"]


def test_a_key_for_a_model_holds_for_its_adapters_and_not_the_reverse(
    served: ServerProcess, keys: dict[str, dict[str, str]]
) -> None:
    own = {"tiny", "tiny:style", "tiny:tone", "tiny:broken"}
    for key, seen, hidden in (("model", own, "other:style"), ("adapter", {"tiny:style"}, "tiny")):
        assert listed(served, keys[key]).keys() == seen
        assert complete(served, keys[key], "tiny:style").status_code == 200
        assert complete(served, keys[key], hidden).status_code == 404
    unnamed = post(served, keys["adapter"], "/v1/completions", prompt=PROMPT, max_tokens=2)
    assert unnamed.json()["model"] == "tiny:style"
    usage = httpx.get(f"{served.url}/api/usage", headers=keys["adapter"], trust_env=False).json()
    assert usage["total"]["requests"] == 2


def test_every_route_takes_the_adapter_and_its_chat_template(
    served: ServerProcess, keys: dict[str, dict[str, str]]
) -> None:
    def asked(path: str, model: str, **body: Any) -> Any:
        answer = post(served, keys["all"], path, model=model, **body)
        assert answer.status_code == 200, answer.text
        assert answer.json().get("model", model) == model
        return answer.json()

    messages = [{"role": "user", "content": "return"}]
    ids = asked("/tokenize", "tiny:tone", messages=messages)["tokens"]
    assert asked("/detokenize", "tiny", tokens=ids)["prompt"].endswith("<<return>>")
    assert asked("/tokenize", "tiny:style", messages=messages) == asked("/tokenize", "tiny", messages=messages)
    for path, body in (
        ("/v1/embeddings", {"input": "def"}),
        ("/v1/score", {"text_1": "def f", "text_2": "return"}),
        ("/v1/completions", {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 1}),
        ("/v1/chat/completions", {"messages": messages, "max_tokens": 8, "temperature": 0}),
        ("/v1/messages", {"messages": messages, "max_tokens": 8, "temperature": 0}),
        ("/v1/responses", {"input": "return", "max_output_tokens": 16, "temperature": 0}),
    ):
        results = []
        for name in ("tiny", "tiny:style"):
            answer = asked(path, name, **body)
            results.append([answer.get(key) for key in ("data", "choices", "content", "output")])
        assert _without_ids(results[0]) != _without_ids(results[1]), path


def _without_ids(value: Any) -> str:
    found = json.loads(json.dumps(value), object_hook=lambda one: {k: v for k, v in one.items() if k != "id"})
    return json.dumps(found)


def test_a_process_that_is_started_again_loads_them_again(model_folder: Path, adapters: dict[str, Path]) -> None:
    config = ServeConfig(model=(f"tiny={model_folder}",), adapter=(f"style={adapters['style']}",), kv_memory=16)

    async def work() -> None:
        models = Models(config, Metrics([]))
        entry = models.entry("tiny:style")
        used: list[RemoteModel] = []
        try:
            for _ in range(2):
                async with models.use(entry) as model:
                    used.append(model)
                    assert entry.state == "loaded"
                await models._unload(models.entry("tiny"))
                assert entry.state == "unloaded"
        finally:
            await models.close()
        assert used[0] is not used[1]

    asyncio.run(work())


def test_what_is_wrong_is_told_at_once(model_folder: Path, tmp_path: Path) -> None:
    for adapter, told in (
        (("style",), "is no adapter"),
        (("a:=x",), "is no adapter"),
        (("nobody:style=x",), "'nobody'"),
        (("style=x", "tiny:style=y"), "named twice"),
    ):
        problems = ServeConfig(model=("tiny=x",), adapter=adapter).problems()
        assert len(problems) == 1
        assert told in problems[0]
    with pytest.raises(DanluError, match=r"is not an adapter folder \(no adapter_config.json\)"):
        serve(ServeConfig(model=(f"tiny={model_folder}",), adapter=(f"style={tmp_path}",), data=tmp_path / "data"))
