"""Answers of a given structure: JSON of a schema, a regular expression, a choice, or a Lark grammar.

llguidance follows the answer byte by byte and tells before each token which ones keep it inside the grammar; all others
are barred, so every answer that ends by itself has the structure. One that is cut off by `max_new_tokens` has it only
so far. What a request may ask for is bounded: text, rules and nesting of the grammar here, the work for each token in
llguidance.
"""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from danlu.engine.config import SamplingParams
from danlu.engine.json_schema import read_schema
from danlu.engine.regular_expression import read_regex
from danlu.engine.sampling import Ids, Row
from danlu.errors import DanluError
from danlu.tokenizer.backend import require_encodable

if TYPE_CHECKING:
    from danlu.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")

MAX_CHARS = 100_000
MAX_CHOICES = 5_000
MAX_LARK_CHARS = 20_000
MAX_RULES = 300
MAX_TERMINAL = 20_000

STACK = 256 << 20
"""llguidance descends into grammars by recursion, which no depth limit of its own holds back: 1,000 schemas that refer
to each other overflow the usual 8 MiB and end the process. Within these limits, this holds the deepest grammar."""

WHITE_SPACE = r"[ \n\t]{1,16}"
"""Between the tokens of JSON: a small model that may write any amount of it does."""

_LIMITS = LLParserLimits(
    initial_lexer_fuel=300_000,
    step_lexer_fuel=100_000,
    step_max_items=5_000,
    max_lexer_states=50_000,
    verbose_errors=False,
)


class Grammar:
    """How far one answer has come in its structure."""

    def __init__(self, matcher: LLMatcher, option: str) -> None:
        self._matcher, self._option = matcher, option

    @classmethod
    def compile(cls, params: SamplingParams, tokenizer: Tokenizer) -> Grammar | None:
        """The grammar that ``params`` ask for, at its beginning; None where they ask for none.

        Raises:
            DanluError: it is not written correctly, uses what is not supported, admits nothing, or is too large.
        """
        option = params.structure
        if option is None:
            return None
        source = getattr(params, option)
        text = _WRITERS[option](source)
        vocabulary = vocabulary_of(tokenizer)
        matcher = _with_stack(lambda: _matcher(vocabulary, text, option))
        return cls(matcher, option)

    def mask(self, row: Row, stop_ids: Ids) -> None:
        """Set logits, (vocab,), to -inf in place where a token would leave the grammar; stop tokens stay where the
        answer may end.

        Raises:
            DanluError: the grammar became too complex to follow.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        _require_sound(self._matcher, self._option)
        allowed = np.zeros(len(row), dtype=np.float32)
        known = np.unpackbits(bits, bitorder="little")[: len(row)]
        allowed[: len(known)] = known
        allowed[stop_ids] = self._matcher.is_accepting()
        # 1 - 1 / allowed is 0 or -inf. Without a branch, as no processor foresees which tokens are allowed.
        with np.errstate(divide="ignore"):
            row += 1 - 1 / allowed

    def accept(self, token_id: int) -> None:
        """The token, which is no stop token, was chosen.

        Raises:
            DanluError: the grammar does not admit it.
        """
        if not self._matcher.consume_token(token_id):
            _require_sound(self._matcher, self._option)

    def fork(self) -> Grammar:
        """The same place for another answer."""
        return Grammar(self._matcher.deep_copy(), self._option)

    @property
    def finished(self) -> bool:
        """Nothing more can follow: the answer is complete."""
        return bool(self._matcher.is_stopped() and self._matcher.is_accepting())

    @property
    def may_end(self) -> bool:
        """The answer has the structure as it stands."""
        return bool(self._matcher.is_accepting())


def vocabulary_of(tokenizer: Tokenizer) -> LLTokenizer:
    """A tokenizer's tokens as llguidance has them; made once for each tokenizer."""
    if tokenizer not in _VOCABULARIES:
        _VOCABULARIES[tokenizer] = LLTokenizer(TokenizerWrapper(_Tokens(tokenizer)))
    return _VOCABULARIES[tokenizer]


_VOCABULARIES: weakref.WeakKeyDictionary[Tokenizer, LLTokenizer] = weakref.WeakKeyDictionary()


class _Tokens:
    """A tokenizer in the shape that llguidance wants."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        # Those without text, gaps of the vocabulary among them, can follow no grammar. Tags of tool calls and thoughts
        # have some: it is part of the answer, and a model that has such a token would not spell it.
        self.special_token_ids = [i for i, text in enumerate(self.tokens) if not text or tokenizer.is_special(i)]
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        special = set(self.special_token_ids)
        self._ids = {text: i for i, text in enumerate(self.tokens) if i not in special}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes) -> list[int]:
        """Any tokens that write the bytes; they are never put into an answer."""
        ids, start = [], 0
        while start < len(text):
            length = next((n for n in range(self._longest, 0, -1) if text[start : start + n] in self._ids), None)
            if length is not None:
                ids.append(self._ids[text[start : start + length]])
            start += length or 1
        return ids


def _matcher(vocabulary: LLTokenizer, text: str, option: str) -> LLMatcher:
    matcher = LLMatcher(vocabulary, text, log_level=0, limits=_LIMITS)
    _require_sound(matcher, option)
    first = matcher.compute_bitmask()
    if matcher.is_error() or not (any(first) or matcher.is_accepting()):
        raise DanluError(f"{option}: admits no answer at all, or only endless ones; mend it")
    return matcher


def _require_sound(matcher: LLMatcher, option: str) -> None:
    if matcher.is_error():
        lines = [line.strip() for line in matcher.get_error().splitlines()]
        reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error:")), (lines or [""])[0])
        raise DanluError(f"{option}: cannot be followed ({reason[:200]})")


def _with_stack(function: Callable[[], T]) -> T:
    """Call it where recursion finds room."""
    found: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:
            errors.append(error)

    with _STACK_SIZE:
        before = threading.stack_size(STACK)
        try:
            thread = threading.Thread(target=run)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return found[0]


_STACK_SIZE = threading.Lock()


_JSON: Any = {"whitespace_pattern": WHITE_SPACE, "lenient": False, "coerce_one_of": False}
"""How schemas are followed."""


def _from_schema(source: str | dict[str, Any]) -> str:
    schema = read_schema(source)
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON)
    except ValueError as error:  # its own bound of nesting, 128 at present
        raise DanluError(f"json_schema: cannot be followed ({error})") from None


def _from_regex(source: str) -> str:
    return LLMatcher.grammar_from_regex(read_regex(source))


def _from_choice(source: Sequence[str]) -> str:
    if len(source) > MAX_CHOICES:
        raise DanluError(f"choice: has {len(source)} texts; at most {MAX_CHOICES} can be told apart")
    _require_short("choice", "".join(source), MAX_CHARS)
    return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in source))


def _from_lark(source: str) -> str:
    source, lark = _read_schemas(source)
    _require_short("grammar", lark, MAX_LARK_CHARS)
    bare = re.sub(_LITERAL, "*", lark)  # what is left are names
    pieces = re.split(r"^[ \t]*+[?!]?([a-zA-Z_]\w*+)[^\n:|]*+:", bare, flags=re.MULTILINE)
    bodies = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    sizes: dict[str, int] = {}
    if len(bodies) > MAX_RULES or any(_written_out(name, bodies, sizes) > MAX_TERMINAL for name in bodies):
        raise DanluError(
            f"grammar: is too large; it may have {MAX_RULES} rules, and terminals of {MAX_TERMINAL} characters when "
            "those in them are written out"
        )
    return LLMatcher.grammar_from_lark(source)


# It takes time in proportion to the text, whatever is in it: nothing is tried again, and what has no end matches, too.
_LITERAL = r'//.*|"(?:\\.|[^"\\\n])*+"?|/(?:\\.|[^/\\\n])++/?'


def _read_schemas(source: str) -> tuple[str, str]:
    """The grammar with its JSON schemas (``%json {...}``) checked, and to be followed as others are; and without."""
    _require_short("grammar", source, MAX_CHARS)
    whole, bare, end = "", "", 0
    for found in re.finditer(rf"{_LITERAL}|%json\s*(?={{)", source):
        if found.start() < end or not found[0].startswith("%json"):
            continue
        try:
            _, length = json.JSONDecoder().raw_decode(source[found.end() :])
        except (ValueError, RecursionError):
            raise DanluError("grammar: what follows %json is not JSON, or is nested too deeply") from None
        schema = read_schema(source[found.end() : found.end() + length]) | {"x-guidance": _JSON}
        before = source[end : found.end()]
        whole, bare, end = f"{whole}{before}{json.dumps(schema)}", bare + before, found.end() + length
    return whole + source[end:], bare + source[end:]


def _written_out(name: str, bodies: dict[str, str], sizes: dict[str, int]) -> int:
    """Length of a terminal after each terminal in it was replaced by its definition, which is what llguidance does."""
    if name not in sizes:
        sizes[name] = 0  # circular definitions are its to refuse
        body = bodies.get(name, "") if name.isupper() else ""
        inside = re.findall(r"\b[A-Z_][A-Z0-9_]*\b", body)
        sizes[name] = len(body) + sum(_written_out(other, bodies, sizes) for other in inside)
    return sizes[name]


def _require_short(name: str, text: str, limit: int) -> None:
    if len(text) > limit:
        raise DanluError(f"{name}: has {len(text)} characters; at most {limit} can be followed")
    require_encodable(text)


_WRITERS: dict[str, Callable[[Any], str]] = {
    "json_schema": _from_schema,
    "regex": _from_regex,
    "choice": _from_choice,
    "grammar": _from_lark,
}
"""Each kind of structure as llguidance reads it."""
