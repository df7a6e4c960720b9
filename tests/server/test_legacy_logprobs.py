"""Offsets of tokens in a text, however both are cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as some

from danlu.server.api.legacy_logprobs import LOWEST, LegacyLogprobs, joined, token_name, top_of
from danlu.server.protocol import TokenLogprob

SPECIAL = b"<|im_end|>"


def entry(token: bytes) -> tuple[bytes, TokenLogprob]:
    return token, TokenLogprob(0, token, -1.0, [])


@given(some.text(alphabet="ab 丹炉é😀\n<", max_size=30), some.data())
def test_a_token_begins_where_its_first_new_character_does(text: str, data: some.DataObject) -> None:
    """Tokens may end inside a character, special ones are no part of the text, and the text may come late."""
    whole = text.encode()
    cuts = sorted(data.draw(some.sets(some.integers(1, max(1, len(whole) - 1)), max_size=8)))
    tokens = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    expected = [len(whole[:cut].decode(errors="ignore")) for cut in [0, *cuts]]
    start = data.draw(some.integers(0, 5))
    late, parts, told = LegacyLogprobs(start, ahead=True), [], 0
    for i, token in enumerate(tokens):
        certain = len(text) if i == len(tokens) - 1 else data.draw(some.integers(told, expected[i + 1]))
        parts.append(late.add([entry(token)], text[told:certain]))
        told = certain
    assert joined(parts)["text_offset"] == [start + at for at in expected]
    for at in data.draw(some.lists(some.integers(0, len(tokens)), max_size=3)):
        tokens.insert(at, SPECIAL)
        expected.insert(at, expected[at] if at < len(expected) else len(text))
    found = LegacyLogprobs(start).add(map(entry, tokens), text)
    assert found["text_offset"] == [start + at for at in expected]


def test_a_space_in_front_that_the_text_does_not_have_is_no_character() -> None:
    tokens = [(b"<s>", None), (b" Hello", None), (b" world", None)]
    assert LegacyLogprobs().add(tokens, "Hello world")["text_offset"] == [0, 0, 5]
    assert LegacyLogprobs().add(tokens, " Hello world")["text_offset"] == [0, 0, 6]


def test_tokens_that_are_no_text_are_told_as_bytes() -> None:
    assert [token_name(data) for data in (b"a", "炉".encode(), b"\xe7\x82", b"\x00")] == [
        "a",
        "炉",
        "bytes:\\xe7\\x82",
        "\0",
    ]


def test_the_likeliest_of_two_tokens_with_the_same_text_counts() -> None:
    one = TokenLogprob(7, b"a", -3.0, [(5, b"a", -1.0), (6, b"b", -2.0)])
    assert top_of(one) == {"a": -1.0, "b": -2.0}
    assert top_of(TokenLogprob(7, b"c", float("-inf"), [(5, b"a", -1.0)])) == {"a": -1.0, "c": LOWEST}
