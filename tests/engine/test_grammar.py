"""Answers of random models against independent judges of their structure: jsonschema, re, and Python."""

from __future__ import annotations

import contextlib
import json
import re
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import sentencepiece

from danlu.engine.config import SamplingParams
from danlu.engine.grammar import Grammar, vocabulary_of
from danlu.errors import DanluError
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.tokenizer.train import train_on
from random_answers import random_answer

TEXTS = [
    f'def f{i}(x):\n    return {{"key": [x, {i}.5], "丹炉": null}}  # it is true that it is false\n' for i in range(200)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_on(TEXTS, 330, 2)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """SentencePiece: tokens with spaces in front, bytes for what it does not know."""
    folder = tmp_path_factory.mktemp("pieces")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(folder / "tokenizer"), vocab_size=340, model_type="bpe",
        byte_fallback=True, character_coverage=0.999, minloglevel=2,
    )  # fmt: skip
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def large(smollm2: Path) -> Tokenizer:
    return Tokenizer.load(smollm2)


def answer(tokenizer: Tokenizer, grammar: Grammar, seed: int, max_tokens: int = 400) -> str | None:
    return random_answer(tokenizer, grammar.fork(), seed, lambda token: token.strip() in (b'"', b"}", b"]"), max_tokens)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "丹炉", 7, None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
LIST = {
    "type": "object",
    "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["next"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    LIST,
    {
        "type": "array",
        "items": {"type": "number", "exclusiveMinimum": -2, "maximum": 9.5},
        "minItems": 1,
        "maxItems": 4,
    },
    {"anyOf": [{"const": {"a": [1, "b"]}}, {"type": "boolean"}, {"type": "string", "pattern": "^[a-f]{2,5}$"}]},
]


@pytest.mark.parametrize("kind", ["tokenizer", "pieces"])
@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_json_follows_its_schema(kind: str, schema: dict[str, Any], request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    grammar = Grammar.compile(SamplingParams(json_schema=schema), tokenizer)
    assert grammar is not None
    ended = [text for seed in range(25) if (text := answer(tokenizer, grammar, seed)) is not None]
    assert len(ended) >= 20
    for text in ended:
        jsonschema.validate(json.loads(text), schema)
    assert len(set(ended)) > 1


@pytest.mark.parametrize("kind", ["tokenizer", "pieces"])
@pytest.mark.parametrize(
    "regex",
    [
        r"\d{3}-\d{1,4}",
        r"(?:ab|c)*d?",
        r"[^a-z\s]{2,4}/\w+",
        'a/b\n"c" \\| .',
        r"丹炉{2,3}",
        r"(?i)yes|no",
        r"[^\D]\D[\W_]\S\s[]\d-][^]\d][^\W][^\S]\\d",
    ],
)
def test_answers_match_their_regular_expression(kind: str, regex: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    grammar = Grammar.compile(SamplingParams(regex=regex), tokenizer)
    assert grammar is not None
    ended = [text for seed in range(8) if (text := answer(tokenizer, grammar, seed)) is not None]
    assert ended
    for text in ended:
        assert re.fullmatch(regex, text), text


def test_a_choice_is_made_whole(tokenizer: Tokenizer) -> None:
    choices = ("yes", "yesterday", 'a "b" \\n', "丹炉\n", "/no/")
    grammar = Grammar.compile(SamplingParams(choice=choices), tokenizer)
    assert grammar is not None
    found = {answer(tokenizer, grammar, seed) for seed in range(40)}
    assert len(found) >= 4
    assert found <= set(choices)


def test_lark_grammars_are_followed(tokenizer: Tokenizer) -> None:
    source = '// sums\nstart: sum\nsum: NUMBER | "(" sum OPERATOR sum ")"\nOPERATOR: "+" | "*"\nNUMBER: /[1-9][0-9]?/\n'
    grammar = Grammar.compile(SamplingParams(grammar=source), tokenizer)
    assert grammar is not None
    found = [text for seed in range(60) if (text := answer(tokenizer, grammar, seed)) is not None]
    for text in found:
        assert re.fullmatch(r"[0-9()+*]+", text)
        compile(text, "answer", "eval")
    assert any("(" in text for text in found)


def test_the_end_is_allowed_where_the_grammar_may_end_and_only_there(tokenizer: Tokenizer) -> None:
    stop = np.array(sorted(tokenizer.stop_ids))
    grammar = Grammar.compile(SamplingParams(regex="ab?"), tokenizer)
    assert grammar is not None
    wide = tokenizer.vocab_size + 7  # padding behind the vocabulary is never allowed

    def allowed() -> set[int]:
        row = np.zeros(wide, dtype=np.float32)
        grammar.mask(row, stop)
        assert set(row) <= {0.0, -np.inf}
        return set(np.flatnonzero(row == 0).tolist())

    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    assert allowed() == {i for i in range(tokenizer.vocab_size) if tokenizer.decode_bytes([i]) in (b"a", b"ab")}
    grammar.accept(a)
    assert allowed() == {b, *stop}
    assert not grammar.finished
    other = grammar.fork()
    grammar.accept(b)
    assert grammar.finished
    assert not other.finished
    assert allowed() == set(stop)
    with pytest.raises(DanluError, match="cannot be followed"):
        other.accept(a)


def test_no_structure_is_no_grammar(tokenizer: Tokenizer) -> None:
    assert Grammar.compile(SamplingParams(), tokenizer) is None
    assert vocabulary_of(tokenizer) is vocabulary_of(tokenizer)


def nested(n: int, opening: str, closing: str) -> str:
    return opening * n + "{}" + closing * n


def chain(n: int) -> dict[str, Any]:
    links = {f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(n)}
    return {"$defs": {**links, f"d{n}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def doubling(name: str, n: int) -> str:
    lines = [f"{name}{i}: {name}{i + 1} {name}{i + 1}" for i in range(n)]
    return f"start: {name}0\n" + "\n".join(lines) + f'\n{name}{n}: "a"\n'


REFUSED: list[dict[str, Any]] = [
    *[{"regex": text} for text in ("foo**", "(?<=x)*", "{1,100000}", "(a)\\1", "a{99999999999}", "[", "a\\", "\ud800")],
    *[{"regex": text} for text in ("[^\\s\\S]", "[[:alpha:]]", "[a-z&&b]")],
    *[{"regex": "(" * n + ")" * n} for n in (300, 9_000, 60_000)],
    *[{"json_schema": nested(n, '{"items":', "}")} for n in (300, 60_000)],
    *[{"json_schema": nested(n, '{"anyOf":[', "]}")} for n in (300, 60_000)],
    *[{"json_schema": text} for text in ("5", "{", "[]", "null", '{"minimum": NaN}', '{"type": "strin"}')],
    {"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}},
    {"json_schema": {"enum": []}},
    {"json_schema": {"not": {}}},
    {"json_schema": {"x-guidance": {"lenient": True}, "not": {}}},
    {"json_schema": {"type": "number", "minimum": float("inf")}},
    {"json_schema": {"type": "string", "pattern": "(?<=x)*"}},
    {"json_schema": {"$ref": "http://example.com/schema"}},
    {"json_schema": {"$ref": "#"}},
    {"json_schema": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
    {"json_schema": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
    {"json_schema": chain(3_000)},
    {"json_schema": {"properties": {f"p{i}": {} for i in range(30_000)}}},
    {"json_schema": {"enum": [f"value {i}" for i in range(100_000)]}},
    *[{"grammar": text} for text in (" ", "start: (", "start: b", 'foo: "a"', "start: a\na: a", 'start: A\nA: "a" A')],
    {"grammar": "%import .secrets.KEY\nstart: KEY"},
    {"grammar": "start: " + "(" * 9_000 + '"a"' + ")" * 9_000},
    {"grammar": doubling("r", 400)},
    {"grammar": doubling("R", 25)},
    {"choice": tuple(f"text {i}" for i in range(6_000))},
    {"choice": ("\ud800",)},
]  # fmt: skip


@pytest.mark.parametrize("options", REFUSED, ids=lambda options: str(options)[:50].encode("ascii", "replace").decode())
def test_what_cannot_be_followed_is_refused_at_once(tokenizer: Tokenizer, options: dict[str, Any]) -> None:
    began = time.thread_time()
    with pytest.raises(DanluError, match=rf"^({'|'.join(options)}|text): .{{5,400}}$"):
        Grammar.compile(SamplingParams(**options), tokenizer)
    assert time.thread_time() - began < 1


@pytest.mark.parametrize(
    "options",
    [
        {"regex": "a{1,100000}"},
        {"regex": "(a{1,400}){1,400}"},
        {"regex": "(.*a.{20}|.*b.{20})x"},
        {"json_schema": chain(250)},
        {"json_schema": {"type": "array", "minItems": 10**8, "items": {"type": "string", "maxLength": 10**8}}},
        {"grammar": doubling("r", 290)},
        {"grammar": 'start: e\ne: e e | e e e | "a" | '},
    ],
    ids=lambda options: str(options)[:50],
)
def test_work_for_a_token_is_bounded(tokenizer: Tokenizer, options: dict[str, Any]) -> None:
    """What is hard to follow is followed, or given up with an error, in bounded time."""
    grammar = Grammar.compile(SamplingParams(**options), tokenizer)
    assert grammar is not None
    began = time.thread_time()
    with contextlib.suppress(DanluError):
        answer(tokenizer, grammar, 0, max_tokens=40)
    assert time.thread_time() - began < 4


def test_a_real_vocabulary_is_masked_in_less_than_a_millisecond(large: Tokenizer) -> None:
    grammar = Grammar.compile(SamplingParams(json_schema=PERSON), large)
    assert grammar is not None
    stop, seconds = np.array(large.stop_ids), []
    for seed in range(3):
        running, rng = grammar.fork(), np.random.default_rng(seed)
        for _ in range(60):
            row = rng.standard_normal(large.vocab_size).astype(np.float32)
            began = time.thread_time()
            running.mask(row, stop)
            seconds.append(time.thread_time() - began)
            token_id = int(row.argmax())
            if token_id in large.stop_ids or running.finished:
                break
            running.accept(token_id)
    assert float(np.median(seconds)) < 1e-3
    text = answer(large, grammar, 0)
    if text is not None:
        jsonschema.validate(json.loads(text), PERSON)
