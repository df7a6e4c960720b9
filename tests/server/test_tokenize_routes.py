"""/tokenize, /detokenize and /v1/models over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from danlu.tokenizer.tokenizer import Tokenizer

TEXT = "def f1(x):  # 丹炉 😀"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}]
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
http = httpx.Client(trust_env=False, timeout=60)  # one: each would read the system's certificates


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.load(model_folder)


def post(url: str, path: str, **body: Any) -> httpx.Response:
    return http.post(f"{url}{path}", json=body)


def test_a_text_becomes_its_tokens_and_comes_back(text_url: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    begin = [tokenizer.bos_id] if tokenizer.add_bos else []
    with_special = post(text_url, "/tokenize", model="tiny", prompt=TEXT).json()
    assert with_special == {"count": len(begin + ids), "max_model_len": 4096, "tokens": begin + ids, "token_strs": None}
    bare = post(text_url, "/tokenize", model="tiny", prompt=TEXT, add_special_tokens=False).json()
    assert bare["tokens"] == ids
    assert post(text_url, "/detokenize", model="tiny", tokens=ids).json() == {"prompt": TEXT}
    assert post(text_url, "/detokenize", tokens=[]).json() == {"prompt": ""}


def test_token_texts_put_the_text_together(text_url: str, tokenizer: Tokenizer) -> None:
    body = {"prompt": TEXT, "add_special_tokens": False, "return_token_strs": True}
    names = post(text_url, "/tokenize", **body).json()["token_strs"]
    as_bytes = [
        bytes.fromhex(name.removeprefix("bytes:").replace("\\x", "")) if name.startswith("bytes:") else name.encode()
        for name in names
    ]
    assert b"".join(as_bytes).decode() == TEXT


def test_messages_become_what_a_chat_completion_reads(text_url: str, tokenizer: Tokenizer) -> None:
    found = post(text_url, "/tokenize", messages=CHAT).json()
    assert found["tokens"] == tokenizer.encode_chat(CHAT, add_generation_prompt=True)
    told = post(text_url, "/v1/chat/completions", messages=CHAT, max_tokens=1).json()
    assert told["usage"]["prompt_tokens"] == found["count"]
    bare = post(text_url, "/tokenize", messages=CHAT, add_generation_prompt=False).json()
    assert bare["tokens"] == tokenizer.encode_chat(CHAT)
    with_tool = post(text_url, "/tokenize", messages=CHAT, tools=[TOOL]).json()
    told = post(text_url, "/v1/chat/completions", messages=CHAT, tools=[TOOL], max_tokens=1).json()
    assert told["usage"]["prompt_tokens"] == with_tool["count"] > found["count"]
    begun = [*CHAT, {"role": "assistant", "content": "def"}]
    continued = post(text_url, "/tokenize", messages=begun, continue_final_message=True).json()
    assert continued["tokens"] == found["tokens"] + tokenizer.encode("def")


def test_encoders_tokenize_with_their_own_special_tokens(text_url: str, minilm: Path) -> None:
    reference = AutoTokenizer.from_pretrained(minilm)
    found = post(text_url, "/tokenize", model="minilm", prompt="a Cat").json()
    assert (found["tokens"], found["max_model_len"]) == (reference("a Cat")["input_ids"], 256)
    bare = post(text_url, "/tokenize", model="minilm", prompt="a Cat", add_special_tokens=False).json()
    assert bare["tokens"] == reference("a Cat", add_special_tokens=False)["input_ids"]
    long = post(text_url, "/tokenize", model="minilm", prompt="word " * 300).json()
    assert long["count"] == 302


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": CHAT}, "prompt"),
        ("/tokenize", {"prompt": "x", "tools": [TOOL]}, "tools"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"messages": CHAT, "add_special_tokens": False}, "add_special_tokens"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": CHAT, "model": "minilm"}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [1.0]}, "tokens.0"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(text_url: str, path: str, body: dict[str, Any], param: str) -> None:
    answer = post(text_url, path, **body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_models_are_listed_with_what_is_known_of_them(text_url: str) -> None:
    client = openai.OpenAI(base_url=f"{text_url}/v1", api_key="none", max_retries=0)
    for name, path in (("minilm", "/v1/embeddings"), ("org/ranker", "/tokenize")):
        field = "input" if path == "/v1/embeddings" else "prompt"
        assert post(text_url, path, **{"model": name, field: "x"}).status_code == 200
    models = {model.id: model.to_dict() for model in client.models.list()}
    assert list(models) == ["tiny", "minilm", "org/ranker"]
    facts: dict[str, Any] = {name: model["danlu"] for name, model in models.items()}
    assert [facts[name]["kind"] for name in models] == ["generate", "embed", "rank"]
    assert [facts[name]["context"] for name in models] == [4096, 256, 40]
    assert facts["tiny"]["chat"]
    assert facts["tiny"]["fills_middle"]
    assert all(one["loaded"] and one["memory"] > 1 << 20 for one in facts.values())
    one = client.models.retrieve("org/ranker").to_dict()
    assert {key: one[key] for key in ("id", "object", "owned_by")} == {
        "id": "org/ranker", "object": "model", "owned_by": "danlu",
    }  # fmt: skip
    with pytest.raises(openai.NotFoundError, match="there is no model 'org/other'"):
        client.models.retrieve("org/other")
