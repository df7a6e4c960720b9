"""The tokenizer: text, bytes and chats to ids and back, on top of the Hugging Face `tokenizers` library.

Two rules hold everywhere. Nothing is normalised, so decoding gives back exactly what was encoded. And text is only
text: ``<|im_end|>`` in a document or in a user's message is nine characters like any others, unless the caller says
``allow_special=True``; only a chat template's own markers become special tokens.

A folder in the Hugging Face layout is what is read and written: ``tokenizer.json``, ``tokenizer_config.json`` (with
the chat template) and ``special_tokens_map.json``; `transformers.AutoTokenizer` opens the same folder and gives the
same ids.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tokenizers

from danlu import files
from danlu.errors import DanluError
from danlu.tokenizer.chat_template import CHATML, ChatTemplate, Disguise, Message
from danlu.tokenizer.special import END_OF_TEXT, IM_END, IM_START, PAD, STOPS, THINK

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"  # where newer transformers keep the template


class Tokenizer:
    """A byte-level BPE tokenizer with its special tokens and chat template; safe to share between threads.

    Args:
        definition: content of ``tokenizer.json``.
        config: content of ``tokenizer_config.json``: ``bos_token``, ``eos_token``, ``pad_token``, ``chat_template``.
        where: the folder, for error messages.

    Attributes:
        vocab_size: number of ids, special tokens included.
        bos_id: begins every document.
        eos_id: ends a text.
        pad_id: fills rows up; equal to ``eos_id`` where the vocabulary has no token for it.
        stop_ids: ids at which generation ends, ``eos_id`` among them.
        fingerprint: hex digest that changes with the ids or the chat template.

    Raises:
        DanluError: the definition cannot be used.
    """

    def __init__(
        self, definition: Mapping[str, Any], config: Mapping[str, Any] | None = None, where: object = "tokenizer"
    ) -> None:
        self._definition = dict(definition)
        self._config = dict(config or {})
        self._where = where
        added = self._definition.get("added_tokens") or []
        self._full = _build(self._definition, where)
        # For text that is only text: the same vocabulary, in which every marker counts as special and specials are not
        # recognised. Added tokens that are ordinary text (runs of spaces, in some families) are: models know them.
        as_special = [{**token, "special": _is_marker(token)} for token in added]
        self._plain = _build({**self._definition, "added_tokens": as_special}, where)
        self._plain.encode_special_tokens = True

        self._markers: dict[str, int] = {token["content"]: token["id"] for token in added if _is_marker(token)}
        longest_first = sorted(self._markers, key=len, reverse=True)
        self._marker_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._marker_ids = frozenset(self._markers.values())
        self._special_ids = frozenset(token["id"] for token in added if token.get("special"))
        self.vocab_size: int = max(self._full.get_vocab(with_added_tokens=True).values()) + 1

        self.eos_id: int = self._id_from_config("eos_token", END_OF_TEXT, "</s>")
        self.bos_id: int = self._id_from_config("bos_token", END_OF_TEXT, fallback=self.eos_id)
        self.pad_id: int = self._id_from_config("pad_token", PAD, fallback=self.eos_id)
        self.stop_ids: tuple[int, ...] = tuple(
            sorted({self.eos_id, *(self._markers[text] for text in STOPS if text in self._markers)})
        )

        source = _template_of(self._config)
        if source is None and {IM_START, IM_END} <= self._markers.keys():
            source = CHATML
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        variables = {name: text for name in names if (text := _text_of(self._config.get(name))) is not None}
        self._template = ChatTemplate(source, variables) if source is not None else None
        essence = [self._definition, source, self.bos_id, self.eos_id, self.pad_id]
        self.fingerprint: str = hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest()

    # ---- at rest

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a tokenizer folder or a model folder.

        Raises:
            DanluError: ``tokenizer.json`` is missing or broken, or what the other files say does not fit it.
        """
        path = Path(folder)
        if not (path / TOKENIZER).is_file():
            raise DanluError(
                f"{folder}: has no {TOKENIZER}; expected a tokenizer or model folder in the Hugging Face layout"
            )
        definition = _read_object(path / TOKENIZER)
        config: dict[str, Any] = {}
        for name in (CONFIG, SPECIAL_MAP):  # what both say is taken from the first
            for key, value in _read_object(path / name).items() if (path / name).is_file() else ():
                if value is not None:
                    config.setdefault(key, value)
        if (path / TEMPLATE).is_file():
            config["chat_template"] = (path / TEMPLATE).read_text(encoding="utf-8")
        return cls(definition, config, where=path)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into a folder, in the Hugging Face layout."""
        path = Path(folder)
        config = dict(self._config)
        if self._template is not None:
            config["chat_template"] = self._template.source
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        special = {name: text for name in names if (text := _text_of(config.get(name))) is not None}
        files.write_json(path / TOKENIZER, self._definition)
        files.write_json(path / CONFIG, config)
        files.write_json(path / SPECIAL_MAP, special)

    # ---- text

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of a text; nothing is added in front or behind.

        Args:
            allow_special: take ``<|im_end|>`` and its like in the text for the special tokens.

        Raises:
            DanluError: the text holds a lone surrogate, which no encoding of Unicode can write.
        """
        _require_encodable(text)
        backend = self._full if allow_special else self._plain
        return list(backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Like :meth:`encode` for many texts at once, on all cores."""
        for text in texts:
            _require_encodable(text)
        return [list(found.ids) for found in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_bytes(self, content: bytes) -> list[int]:
        """Ids of any bytes: UTF-8 stretches as text, every other byte as the token of that byte.

        ``decode_bytes(encode_bytes(b)) == b`` for all ``b``, and ``encode_bytes(text.encode()) == encode(text)``.

        Raises:
            DanluError: the vocabulary is not byte-level.
        """
        if not self._is_byte_level:
            raise DanluError(f"{self._where}: is not a byte-level tokenizer; it can encode text only")
        ids: list[int] = []
        for stretch in re.split("([\udc80-\udcff]+)", content.decode("utf-8", errors="surrogateescape")):
            if stretch and "\udc80" <= stretch[0] <= "\udcff":
                ids += [self._byte_ids[byte] for byte in stretch.encode("utf-8", errors="surrogateescape")]
            elif stretch:
                ids += self.encode(stretch)
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 (a character cut in two) become U+FFFD.

        Args:
            skip_special: leave special tokens out (thinking and tool markers stay: they are the answer's structure).
        """
        if skip_special:
            ids = [i for i in ids if i not in self._special_ids]
        if not self._is_byte_level:
            return str(self._full.decode(list(ids), skip_special_tokens=False))
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of ids; special tokens stand for their own text."""
        strange = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if strange is not None:
            raise DanluError(f"{self._where}: token id {strange} is outside the vocabulary of {self.vocab_size}")
        return b"".join([self._bytes_of_ids[i] for i in ids])

    def id_of(self, token: str) -> int:
        """Id of a token by its text, e.g. ``<|im_end|>``.

        Raises:
            DanluError: the vocabulary has no such token.
        """
        found = self._full.token_to_id(token)
        if found is None:
            raise DanluError(f"{self._where}: the vocabulary has no token {token!r}")
        return int(found)

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """(vocab_size,) number of UTF-8 bytes each token stands for; 0 for special tokens, which stand for no text."""
        sizes = [0 if i in self._marker_ids else len(b) for i, b in enumerate(self._bytes_of_ids)]
        return np.array(sizes, dtype=np.int32)

    # ---- chats

    def render_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> str:
        """The text of a conversation, as ``apply_chat_template(tokenize=False)`` of transformers renders it.

        Reasoning written inside an assistant's content, as ``<think>...</think>answer``, counts as its
        ``reasoning_content``.

        Args:
            add_generation_prompt: end with the header of an answer, for the model to go on.
            tools: JSON schemas of functions the model may call.

        Raises:
            DanluError: there is no chat template, or it refuses the conversation.
        """
        return self._require_template().render(
            [_plain_message(message) for message in messages], add_generation_prompt=add_generation_prompt, tools=tools
        )

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Ids of :meth:`render_chat`. The template's markers are special tokens, what messages or tools say is not."""
        template = self._require_template()
        disguise = Disguise(self._marker_pattern, template.source)
        conversation = disguise.put_on({"messages": [_plain_message(m) for m in messages], "tools": tools})
        text = template.render(
            conversation["messages"], tools=conversation["tools"], add_generation_prompt=add_generation_prompt
        )
        ids: list[int] = []
        for piece, is_quotation in disguise.cut(text):
            ids += self.encode(piece, allow_special=not is_quotation)
        return ids

    def encode_chat_with_mask(
        self,
        messages: Sequence[Message],
        train_on: Literal["assistant", "all"] = "assistant",
        tools: Sequence[Any] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and which of them a model should learn to write.

        Args:
            train_on: ``assistant``: what the assistant says in any turn, with the token that ends the turn; ``all``:
            every token.

        Returns:
            ``(ids, mask)`` of equal length; ``mask[i]`` tells that token ``i`` is a target.

        Raises:
            DanluError: the tokens of a prompt are not a prefix of the tokens of prompt and answer, so that the model
                would be trained on other tokens than it meets when it is used. Templates that rewrite earlier turns do
                this.
        """
        ids = self.encode_chat(messages, tools=tools)
        if train_on == "all":
            return ids, [True] * len(ids)
        mask = [False] * len(ids)
        for turn, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            prompt = self.encode_chat(messages[:turn], add_generation_prompt=True, tools=tools)
            answered = self.encode_chat(messages[: turn + 1], tools=tools) if turn + 1 < len(messages) else ids
            if ids[: len(answered)] != answered or answered[: len(prompt)] != prompt:
                raise DanluError(
                    f"message {turn + 1}: its prompt's tokens are not a prefix of the tokens of prompt and answer; "
                    "the chat template rewrites earlier turns or joins the answer to its header: mend the template"
                )
            end = len(answered)
            while end > len(prompt) and answered[end - 1] not in self.stop_ids:
                end -= 1  # what the template writes behind the end of the turn is not the model's to say
            if end == len(prompt):
                end = len(answered)  # the template has no token that ends a turn
            mask[len(prompt) : end] = [True] * (end - len(prompt))
        return ids, mask

    # ---- inside

    def _require_template(self) -> ChatTemplate:
        if self._template is None:
            raise DanluError(f"{self._where}: has no chat template; add one as chat_template to {CONFIG}")
        return self._template

    def _id_from_config(self, name: str, *usual: str, fallback: int | None = None) -> int:
        """Id of the token that the config names, else of the first usual one, else the fallback."""
        text = _text_of(self._config.get(name))
        if text is not None:
            found = self._full.token_to_id(text)
            if found is None:
                raise DanluError(f"{self._where}: {name} is {text!r}, which is not in the vocabulary; mend {CONFIG}")
            return int(found)
        for text in usual:
            if text in self._markers:
                return self._markers[text]
        if fallback is None:
            raise DanluError(f"{self._where}: names no {name}; add it to {CONFIG}")
        return fallback

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(self._definition.get("decoder"))

    @functools.cached_property
    def _byte_ids(self) -> list[int]:
        """Id of the token of each single byte."""
        return [self.id_of(_BYTE_TO_CHAR[byte]) for byte in range(256)]

    @functools.cached_property
    def _bytes_of_ids(self) -> list[bytes]:
        """What each id stands for. Ids the vocabulary leaves out stand for nothing."""
        table = [b""] * self.vocab_size
        added = {token["id"] for token in self._definition.get("added_tokens") or []}
        for token, i in self._full.get_vocab(with_added_tokens=True).items():
            if i in added:
                table[i] = token.encode()
            elif self._is_byte_level and _CHAR_TO_BYTE.keys() >= set(token):
                table[i] = bytes(_CHAR_TO_BYTE[c] for c in token)
            elif found := re.fullmatch("<0x([0-9A-F]{2})>", token):  # SentencePiece's way to write a byte
                table[i] = bytes.fromhex(found[1])
            else:
                table[i] = token.replace("\u2581", " ").encode()
        return table


def _build(definition: Mapping[str, Any], where: object) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps({**definition, "truncation": None, "padding": None}))
    except Exception as error:  # the library raises nothing narrower
        raise DanluError(f"{where}: {TOKENIZER} cannot be read as a tokenizer ({error})") from error
    return backend


def _read_object(path: Path) -> dict[str, Any]:
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise DanluError(f"{path}: must hold a JSON object")
    return content


def _is_marker(added: Mapping[str, Any]) -> bool:
    """Whether an added token marks structure. ``<think>`` does, although it is not flagged as special."""
    return bool(added.get("special")) or re.fullmatch(r"<[^\s<>]+>|\[[A-Z_]+\]", added["content"]) is not None


def _text_of(token: Any) -> str | None:
    """A special token's text, as configs write it: plain or as an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _template_of(config: Mapping[str, Any]) -> str | None:
    """The chat template: one text, or the one named "default" of a list."""
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((item.get("template") for item in template if item.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _plain_message(message: Message) -> dict[str, Any]:
    """A message as templates expect it: text parts joined, reasoning apart from the answer."""
    plain = dict(message)
    content = plain.get("content")
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        plain["content"] = content = "".join(p["text"] for p in content)
    if plain.get("role") == "assistant" and isinstance(content, str) and not plain.get("reasoning_content"):
        opening, closing = THINK
        head, found, answer = content.partition(closing)
        if found and head.lstrip().startswith(opening):
            plain["reasoning_content"] = head.lstrip().removeprefix(opening).strip()
            plain["content"] = answer.lstrip()
    return plain


def _require_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DanluError(
            f"text: character {error.start} is a lone surrogate (U+{code:04X}), which is not Unicode text; "
            "repair the text, or pass bytes to encode_bytes"
        ) from None


def _byte_alphabet() -> dict[int, str]:
    """The character that stands for each byte in GPT-2's alphabet: printable Latin-1 itself, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


_BYTE_TO_CHAR = _byte_alphabet()
_CHAR_TO_BYTE = {char: byte for byte, char in _BYTE_TO_CHAR.items()}
