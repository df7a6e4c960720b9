"""The chat page's conversations through their routes, on a real database."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import hypothesis
import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from server_process import ServerProcess
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from danlu.server.access.database import Database
from danlu.server.access.keys import Caller
from danlu.server.conversations import routes as conversations
from danlu.server.conversations import store as conversation_store
from danlu.server.errors import ApiError, answer_error

PLACE = "/api/conversations"
MiB = 1 << 20


class AskedBy:
    """The middleware of keys, but that the client says who it is."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            name = dict(scope["headers"]).get(b"x-caller", b"ann").decode()
            scope.setdefault("state", {})["caller"] = Caller(name, name)
        await self.app(scope, receive, send)


def client_of(database: Database, caller: str = "ann") -> TestClient:
    app = FastAPI(exception_handlers=dict.fromkeys((ApiError, RequestValidationError), answer_error))
    app.state.serving = SimpleNamespace(database=database)
    app.add_middleware(AskedBy)
    app.include_router(conversations.router)
    return TestClient(app, headers={"x-caller": caller})


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "server.sqlite3", [conversation_store.TABLES])
    yield opened
    anyio.run(opened.close)


@pytest.fixture
def client(database: Database) -> TestClient:
    return client_of(database)


def begin(client: TestClient, **fields: Any) -> str:
    answer = client.post(PLACE, json=fields)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def save(client: TestClient, id: str, message: str, content: str, parent: str | None = None, **fields: Any) -> None:
    body = {"role": "user", "parent": parent, "content": content, **fields}
    answer = client.put(f"{PLACE}/{id}/messages/{message}", json=body)
    assert answer.status_code == 200, answer.text


def found(client: TestClient, q: str, **more: Any) -> list[str]:
    answer = client.get(PLACE, params={"q": q, **more})
    assert answer.status_code == 200, answer.text
    return [one["title"] for one in answer.json()["data"]]


def without_ids(conversation: dict[str, Any]) -> dict[str, Any]:
    """As an import has to bring it back: messages are told by their place."""
    place = {message["id"]: i for i, message in enumerate(conversation["messages"])}
    messages = [
        {**message, "id": place[message["id"]], "parent": place.get(message["parent"])}
        for message in conversation["messages"]
    ]
    leaves = [place[leaf] for leaf in conversation["leaves"]]
    return {**conversation, "id": None, "messages": messages, "leaves": leaves}


ANSWER = {
    "role": "assistant", "content": "Hi!", "reasoning": "greet", "reasoning_seconds": 0.5, "model": "tiny",
    "tool_calls": [{"id": "call_1", "name": "look", "arguments": "{}"}], "finish_reason": "stop",
    "stats": {"first_token_seconds": 0.25, "tokens_per_second": 12.5, "prompt_tokens": 3, "completion_tokens": 2},
    "logprobs": [["Hi", -0.5], ["!", -1.25, [["?", -2.0]]]], "created_at": 1763800000.25,
}  # fmt: skip


def test_a_conversation_is_made_read_changed_and_deleted(client: TestClient) -> None:
    fields = {"title": "First", "system": "Be short.", "parameters": {"temperature": 0.5}, "models": ["tiny", "other"]}
    id = begin(client, **fields)
    save(client, id, "q", "Hello")
    assert client.put(f"{PLACE}/{id}/messages/a", json={**ANSWER, "parent": "q"}).status_code == 200

    whole = client.get(f"{PLACE}/{id}").json()
    assert {name: whole[name] for name in fields} == fields
    question, answer = whole["messages"]
    assert (question["id"], question["parent"], question["content"]) == ("q", None, "Hello")
    assert answer == {"id": "a", "parent": "q", **ANSWER}

    changed = client.patch(f"{PLACE}/{id}", json={"title": "Second", "leaves": ["a", "q"]}).json()
    assert (changed["title"], changed["leaves"], changed["system"]) == ("Second", ["a", "q"], "Be short.")
    assert client.patch(f"{PLACE}/{id}", json={"title": None}).status_code == 400
    assert client.patch(f"{PLACE}/{id}", json={"leaves": ["nobody"]}).status_code == 400

    assert client.delete(f"{PLACE}/{id}").status_code == 204
    assert client.get(f"{PLACE}/{id}").json()["error"]["code"] == "conversation_not_found"
    assert found(client, "Hello") == []


def test_a_growing_answer_is_saved_again_and_keeps_its_place(client: TestClient) -> None:
    id = begin(client)
    save(client, id, "q", "Count")
    for content in ("one", "one two", "one two three", "one two three"):
        save(client, id, "a", content, "q", role="assistant")
    save(client, id, "b", "other", "q", role="assistant")
    before = client.get(f"{PLACE}/{id}").json()["messages"]
    save(client, id, "a", "one two three four", "q", role="assistant")
    after = client.get(f"{PLACE}/{id}").json()["messages"]
    assert [message["id"] for message in after] == ["q", "a", "b"]
    assert after[1] == {**before[1], "content": "one two three four"}
    save(client, id, "a", "uno dos", "q", role="assistant")
    assert (len(found(client, "dos")), found(client, "three")) == (1, [])
    elsewhere = client.put(f"{PLACE}/{id}/messages/a", json={"role": "assistant", "parent": "b"})
    assert (elsewhere.status_code, elsewhere.json()["error"]["param"]) == (400, "parent")


class Tree(RuleBasedStateMachine):
    """A conversation against a dict of its messages."""

    messages = Bundle("messages")

    @initialize()
    def open(self) -> None:
        self.database = Database(None, [conversation_store.TABLES])
        self.client = client_of(self.database)
        self.client.__enter__()  # one event loop for all requests
        self.id = begin(self.client)
        self.told: dict[str, tuple[str | None, str]] = {}
        self.leaves: list[str] = []

    @rule(target=messages, content=st.text(st.sampled_from("ab丹炉 "), max_size=8))
    def ask(self, content: str) -> str:
        return self._add(None, content)

    @rule(target=messages, parent=messages, content=st.text(st.sampled_from("ab丹炉 "), max_size=8))
    def answer(self, parent: str, content: str) -> str:
        return self._add(parent, content)

    def _add(self, parent: str | None, content: str) -> str:
        id = str(uuid.uuid4())
        body = {"role": "user", "parent": parent, "content": content}
        answer = self.client.put(f"{PLACE}/{self.id}/messages/{id}", json=body)
        if parent is None or parent in self.told:
            assert answer.status_code == 200
            self.told[id] = parent, content
        else:
            assert answer.status_code == 400
        return id

    @rule(message=messages, other=messages)
    def hang_elsewhere(self, message: str, other: str) -> None:
        answer = self.client.put(f"{PLACE}/{self.id}/messages/{message}", json={"role": "user", "parent": other})
        allowed = self.told[message][0] == other if message in self.told else other in self.told
        assert answer.status_code == (200 if allowed else 400)
        if allowed:
            self.told[message] = other, ""

    @rule(message=messages, content=st.text(st.sampled_from("ab丹炉 "), max_size=8))
    def write_again(self, message: str, content: str) -> None:
        if message in self.told:
            parent, _ = self.told[message]
            save(self.client, self.id, message, content, parent)
            self.told[message] = parent, content

    @rule(message=consumes(messages))
    def delete(self, message: str) -> None:
        answer = self.client.delete(f"{PLACE}/{self.id}/messages/{message}")
        assert answer.status_code == (204 if message in self.told else 404)
        if message not in self.told:
            return
        parent, gone = self.told[message][0], {message}
        for id, (above, _) in self.told.items():  # a parent stands before its children
            if above in gone:
                gone.add(id)
        self.told = {id: one for id, one in self.told.items() if id not in gone}
        kept = [parent if leaf in gone else leaf for leaf in self.leaves]
        self.leaves = [leaf for leaf in kept if leaf is not None]

    @rule(leaf=messages)
    def show(self, leaf: str) -> None:
        answer = self.client.patch(f"{PLACE}/{self.id}", json={"leaves": [leaf, leaf]})
        assert answer.status_code == (200 if leaf in self.told else 400)
        if leaf in self.told:
            self.leaves = [leaf, leaf]

    @invariant()
    def is_as_told(self) -> None:
        if not hasattr(self, "told"):
            return
        whole = self.client.get(f"{PLACE}/{self.id}").json()
        assert {one["id"]: (one["parent"], one["content"]) for one in whole["messages"]} == self.told
        assert whole["leaves"] == self.leaves
        seen: set[str | None] = {None}
        for message in whole["messages"]:
            assert message["parent"] in seen
            seen.add(message["id"])

    @rule(word=st.sampled_from(["丹炉", "aba", "ab", "丹炉a"]))
    def search(self, word: str) -> None:
        hit = any(word in content for _, content in self.told.values())
        assert bool(self.client.get(PLACE, params={"q": word}).json()["data"]) == hit

    def teardown(self) -> None:
        if not hasattr(self, "database"):
            return
        self.client.__exit__()
        for table in ("conversation_titles", "conversation_texts"):  # raises where index and texts differ
            check = f"INSERT INTO {table} ({table}, rank) VALUES ('integrity-check', 1)"
            anyio.run(self.database.write, lambda connection, check=check: connection.execute(check).close())
        anyio.run(self.database.close)


TestTree = Tree.TestCase
TestTree.settings = hypothesis.settings(max_examples=8, stateful_step_count=16, deadline=None)


def test_a_message_is_deleted_with_what_hangs_below(client: TestClient) -> None:
    id, other = begin(client), begin(client)
    for message, parent in {"q": None, "a": "q", "b": "q", "c": "a", "d": "c", "k": "b"}.items():
        save(client, id, message, "x", parent)
    for message, parent in {"c": None, "k": "c"}.items():  # the same ids, elsewhere
        save(client, other, message, "x", parent)

    def left(conversation: str) -> tuple[list[str], list[str]]:
        whole = client.get(f"{PLACE}/{conversation}").json()
        return [message["id"] for message in whole["messages"]], whole["leaves"]

    client.patch(f"{PLACE}/{id}", json={"leaves": ["d", "k", "a"]})
    assert client.delete(f"{PLACE}/{id}/messages/a").status_code == 204
    assert left(id) == (["q", "b", "k"], ["q", "k", "q"])  # the message before is shown instead
    assert left(other) == (["c", "k"], [])
    assert client.delete(f"{PLACE}/{id}/messages/a").json()["error"]["code"] == "message_not_found"
    assert client.delete(f"{PLACE}/{id}/messages/q").status_code == 204
    assert left(id) == ([], [])


def test_a_key_sees_nothing_of_another(database: Database) -> None:
    ann, bob = client_of(database, "ann"), client_of(database, "bob")
    id = begin(ann, title="Secret plan")
    save(ann, id, "q", "burn the letters")
    for method, path, body in [
        ("GET", "", None),
        ("PATCH", "", {"title": "mine"}),
        ("DELETE", "", None),
        ("PUT", "/messages/q", {"role": "user", "content": "x"}),
        ("DELETE", "/messages/q", None),
        ("GET", "/export", None),
        ("GET", "/export?format=markdown", None),
    ]:
        answer = bob.request(method, f"{PLACE}/{id}{path}", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "conversation_not_found"), (method, path)
    assert found(bob, "") == found(bob, "letters") == found(bob, "Secret") == found(bob, "en") == []
    assert bob.get(f"{PLACE}/export").json()["conversations"] == []
    assert ann.get(f"{PLACE}/{id}").json()["messages"][0]["content"] == "burn the letters"
    other = begin(bob)
    save(bob, other, "q", "of the same id")  # ids of messages are told within a conversation
    assert ann.get(f"{PLACE}/{id}").json()["messages"][0]["content"] == "burn the letters"


@pytest.mark.parametrize(
    ("q", "hits"),
    [
        ("furnace", ["stove"]),
        ("FURN", ["stove"]),
        ("丹炉", ["炼丹"]),
        ("丹", ["炼丹"]),
        ("老君的", ["炼丹"]),
        ("stove", ["stove"]),
        ("st", ["stove", "sql"]),  # newest first
        ("炼丹 老君", ["炼丹"]),  # one in the title, the other in a message
        ("furnace alchemist", ["stove"]),  # in different messages
        ("furnace 丹", []),
        ("100%", ["sql"]),
        ("0%", ["sql"]),
        ("0_", []),
        ('"quoted"', ["sql"]),
        ('""', []),
        ("a OR b", []),
        ("content:furnace", []),
        ("NEAR(", []),
        ("'; DROP", ["sql"]),
        ("ÄPFEL", ["sql"]),
        ("nothing", []),
    ],
)
def test_search(client: TestClient, q: str, hits: list[str]) -> None:
    texts = {
        "sql": ['best 100% of "quoted" \'; DROP TABLE it, Äpfel'],
        "炼丹": ["太上老君的丹炉里有什么？"],
        "stove": ["An old furnace", "The alchemist"],
    }
    for title, contents in texts.items():
        id = begin(client, title=title)
        for i, content in enumerate(contents):
            save(client, id, f"m{i}", content)
    assert found(client, q) == hits


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1, max_size=12)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(WORDS, st.text(max_size=80), st.text(max_size=80))
def test_what_a_message_says_is_found_and_shown(word: str, before: str, after: str) -> None:
    database = Database(None, [conversation_store.TABLES])
    client = client_of(database)
    # "\x00" and lone surrogates are refused before the routes.
    text = re.sub("[\x00\ud800-\udfff]", "", f"{before}{word}{after}")
    try:
        save(client, begin(client), "m", text)
        (hit,) = client.get(PLACE, params={"q": word}).json()["data"]
        assert word.casefold() in hit["snippet"].casefold()
        assert len(hit["snippet"]) <= 2 * 60 + len(word) + 2
        assert found(client, f"{word}~~~") == []
    finally:
        anyio.run(database.close)


def test_a_search_that_takes_too_long_is_given_up(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    id = begin(client, title="long")
    for i in range(50):
        save(client, id, str(i), "x" * 10_000)
    monkeypatch.setattr("danlu.server.conversations.search.SECONDS", -1.0)
    answer = client.get(PLACE, params={"q": "zz"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "search_too_long")
    monkeypatch.undo()
    assert found(client, "xx") == ["long"]


def test_the_list_comes_in_pages_newest_first(client: TestClient) -> None:
    stamps = [100.0, 300.0, 200.0, 200.0, 200.0, 50.5]
    whole = [{"title": str(i), "updated_at": at} for i, at in enumerate(stamps)]
    sent = {"format": "danlu-conversations", "version": 1, "conversations": whole}
    assert client.post(f"{PLACE}/import", json=sent).status_code == 201
    seen: list[dict[str, Any]] = []
    page = client.get(PLACE, params={"limit": 2}).json()
    while True:
        seen += page["data"]
        assert page["has_more"] == (page["next"] is not None)
        if page["next"] is None:
            break
        page = client.get(PLACE, params={"limit": 2, "before": page["next"]}).json()
    assert [one["updated_at"] for one in seen] == [300.0, 200.0, 200.0, 200.0, 100.0, 50.5]
    assert {one["title"] for one in seen} == set("012345")
    assert found(client, "", before="200.0") == ["0", "5"]
    assert client.get(PLACE, params={"before": "yesterday"}).status_code == 400


def test_what_was_written_to_last_comes_first(client: TestClient) -> None:
    first, second = begin(client, title="first"), begin(client, title="second")
    assert found(client, "") == ["second", "first"]
    save(client, first, "m", "hello")
    assert found(client, "") == ["first", "second"]
    assert client.patch(f"{PLACE}/{second}", json={"title": "renamed"}).status_code == 200
    assert found(client, "") == ["first", "renamed"]


def test_json_exports_are_imported_as_they_were(client: TestClient) -> None:
    ids = []
    for title in ("Poems / 诗", 'a "quoted" title'):
        id = begin(client, title=title, system="s", parameters={"stop": ["\n"]}, models=["tiny"])
        save(client, id, "q", "Hello")
        for answer in ("a", "b"):
            assert client.put(f"{PLACE}/{id}/messages/{answer}", json={**ANSWER, "parent": "q"}).status_code == 200
        client.patch(f"{PLACE}/{id}", json={"leaves": ["a"]})
        ids.append(id)
    one = client.get(f"{PLACE}/{ids[0]}/export")
    assert one.headers["content-disposition"] == (
        "attachment; filename=\"Poems - -.json\"; filename*=UTF-8''Poems%20-%20%E8%AF%97.json"
    )
    both = client.get(f"{PLACE}/export")
    assert both.headers["content-disposition"].startswith('attachment; filename="danlu-conversations-')
    assert one.json()["conversations"][0] in both.json()["conversations"]
    for id in ids:
        client.delete(f"{PLACE}/{id}")
    assert len(client.post(f"{PLACE}/import", json=both.json()).json()["data"]) == 2
    again = client.get(f"{PLACE}/export").json()
    assert [*map(without_ids, again["conversations"])] == [*map(without_ids, both.json()["conversations"])]
    assert {one["id"] for one in again["conversations"]}.isdisjoint(ids)


@pytest.mark.parametrize(
    ("messages", "leaves"),
    [
        ([("a", "b"), ("b", "a")], []),  # a circle
        ([("a", "a")], []),
        ([("a", None), ("a", None)], []),
        ([("a", "gone")], []),
        ([("b", "a"), ("a", None)], []),  # before its parent
        ([("a", None)], ["b"]),
    ],
)
def test_an_import_with_one_mistake_leaves_nothing(
    client: TestClient, messages: list[tuple[str, str | None]], leaves: list[str]
) -> None:
    wrong = {"leaves": leaves, "messages": [{"id": id, "parent": parent, "role": "user"} for id, parent in messages]}
    body = {"format": "danlu-conversations", "version": 1, "conversations": [{"title": "fine"}, wrong]}
    answer = client.post(f"{PLACE}/import", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
    assert found(client, "") == []


@pytest.mark.parametrize(
    "body",
    [
        {"format": "danlu-conversations"},
        {"format": "danlu-conversations", "version": 2, "conversations": []},
        {"format": "markdown"},
        {"format": "markdown", "text": "# Hello", "conversations": []},
        {"format": "markdown", "text": "# Some other file\n\nwith text"},
        {"format": "csv", "text": ""},
        {},
    ],
)
def test_what_is_no_export_is_refused(client: TestClient, body: dict[str, Any]) -> None:
    assert client.post(f"{PLACE}/import", json=body).status_code == 400


@pytest.mark.parametrize(
    "fields",
    [
        {"content": "x" * (MiB + 1)},
        {"content": "丹" * (MiB // 3 + 1)},
        {"content": "x" * MiB, "reasoning": "x"},
        {"role": "system"},
        {"logprobs": [["a", float(10**300), [["b"]]]]},
        {"logprobs": [["a", "b"]]},
        {"stats": {"tokens": "many"}},
        {"created_at": -1},
        {"parent": "no such"},
        {"unknown": 1},
    ],
)
def test_messages_have_bounds(client: TestClient, fields: dict[str, Any]) -> None:
    id = begin(client)
    answer = client.put(f"{PLACE}/{id}/messages/m", json={"role": "user", **fields})
    assert answer.status_code == 400, answer.text
    assert client.get(f"{PLACE}/{id}").json()["messages"] == []


def test_a_message_of_a_mebibyte_is_kept(client: TestClient) -> None:
    id = begin(client)
    save(client, id, "m", "丹" * (MiB // 3))
    assert client.get(f"{PLACE}/{id}").json()["messages"][0]["content"] == "丹" * (MiB // 3)
    assert client.post(PLACE, json={"parameters": {"a": "x" * 70_000}}).status_code == 400
    assert client.post(PLACE, json={"title": "x" * 201}).status_code == 400


def test_there_are_only_so_many(client: TestClient, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation_store, "MESSAGES", 2000)
    monkeypatch.setattr(conversation_store, "CONVERSATIONS", 3)
    messages = [{"id": str(i), "parent": str(i - 1) if i else None, "role": "user"} for i in range(2000)]
    body = {"format": "danlu-conversations", "conversations": [{"title": "full", "messages": messages}]}
    full = client.post(f"{PLACE}/import", json=body).json()["data"][0]["id"]
    answer = client.put(f"{PLACE}/{full}/messages/one-more", json={"role": "user"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "too_many_messages")
    save(client, full, "5", "replaced", "4")
    assert client.delete(f"{PLACE}/{full}/messages/1").status_code == 204  # with a chain of 1,998 below it
    assert [one["id"] for one in client.get(f"{PLACE}/{full}").json()["messages"]] == ["0"]

    id = begin(client)
    monkeypatch.setattr(conversation_store, "CONVERSATION_BYTES", 1000)
    save(client, id, "m", "x" * 900)
    answer = client.put(f"{PLACE}/{id}/messages/n", json={"role": "user", "content": "x" * 100})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conversation_too_large")

    two = {"format": "danlu-conversations", "conversations": [{}, {}]}
    answer = client.post(f"{PLACE}/import", json=two)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "too_many_conversations")
    begin(client)
    assert client.post(PLACE, json={}).json()["error"]["code"] == "too_many_conversations"
    begin(client_of(database, "bob"))


def test_markdown_goes_out_and_comes_back(client: TestClient) -> None:
    id = begin(client, title="Poems", system="Be short.", models=["tiny"], parameters={"temperature": 0.5})
    save(client, id, "q", "Write one.")
    assert client.put(f"{PLACE}/{id}/messages/a", json={**ANSWER, "parent": "q"}).status_code == 200
    save(client, id, "b", "other branch", "q", role="assistant")
    client.patch(f"{PLACE}/{id}", json={"leaves": ["a"]})
    file = client.get(f"{PLACE}/{id}/export", params={"format": "markdown"})
    assert file.headers["content-type"].startswith("text/markdown")
    assert 'filename="Poems.md"' in file.headers["content-disposition"]
    shown = "\n".join(line for line in file.text.splitlines() if not line.startswith("<!--"))
    parts = ["# Poems", "## System", "Be short.", "## User", "Write one.", "## Assistant (tiny)"]
    parts += ["<details><summary>Reasoning</summary>", "greet", "</details>", "Hi!"]
    assert [line for line in shown.splitlines() if line] == parts

    new = client.post(f"{PLACE}/import", json={"format": "markdown", "text": file.text}).json()["data"][0]["id"]
    old = client.get(f"{PLACE}/{id}").json()
    old["messages"] = [{**message, "logprobs": None} for message in old["messages"] if message["id"] != "b"]
    assert without_ids(client.get(f"{PLACE}/{new}").json()) == without_ids(old)

    other = client.get(f"{PLACE}/{id}/export", params={"format": "markdown", "leaf": "b"}).text
    assert "other branch" in other
    assert "greet" not in other
    assert client.get(f"{PLACE}/{id}/export", params={"format": "markdown", "leaf": "c"}).status_code == 404
    assert client.get(f"{PLACE}/{id}/export", params={"format": "json", "leaf": "b"}).status_code == 400


def test_what_was_answered_outlives_kill_9(model_folder: Path, tmp_path: Path) -> None:
    """Of a real server, in the moment after the answer."""
    saved: list[str] = []
    id = ""
    for _ in range(2):
        server = ServerProcess(f"--model=tiny={model_folder}", data=tmp_path).wait_until_listening()
        try:
            with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as client:
                id = id or client.post(PLACE, json={"title": "kept"}).json()["id"]
                assert [one["id"] for one in client.get(f"{PLACE}/{id}").json()["messages"]] == saved
                for _ in range(20):
                    saved.append(str(uuid.uuid4()))
                    body = {"role": "user", "content": "丹炉" * 500}
                    assert client.put(f"{PLACE}/{id}/messages/{saved[-1]}", json=body).status_code == 200
                hits = client.get(PLACE, params={"q": "丹炉丹"}).json()["data"]
                assert [one["title"] for one in hits] == ["kept"]
        finally:
            server.kill()
