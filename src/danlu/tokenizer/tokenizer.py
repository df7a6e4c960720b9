"""The tokenizer: text, bytes and chats to ids and back, on top of the Hugging Face `tokenizers` library.

Two rules hold everywhere. Nothing is normalised but by what a family's own definition says, so decoding gives back
exactly what a byte-level tokenizer encoded. And text is only text: ``<|im_end|>`` in a document or in a user's message
is nine characters like any others, unless the caller says ``allow_special=True``; only a chat template's own markers
become special tokens.

A folder in the Hugging Face layout is what is read and written: ``tokenizer.json``, ``tokenizer_config.json`` (with
the chat template) and ``special_tokens_map.json``; `transformers.AutoTokenizer` opens the same folder and gives the
same ids.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from danlu import files
from danlu.errors import DanluError
from danlu.tokenizer import encoder_inputs
from danlu.tokenizer.backend import build, is_marker, require_encodable, without_markers
from danlu.tokenizer.chat_template import CHATML, ChatTemplate, Disguise, Message, plain_message, template_of
from danlu.tokenizer.definition import CONFIG, ROLES, SPECIAL_MAP, TOKENIZER, around, text_of
from danlu.tokenizer.load import open_tokenizer
from danlu.tokenizer.special import END_OF_TEXT, IM_END, IM_START, PAD, SPECIAL_TOKENS, STOPS
from danlu.tokenizer.token_text import BYTE_TO_CHAR, bytes_of_ids, kind_of


class Tokenizer:
    """A tokenizer with its special tokens and chat template; safe to share between threads.

    Args:
        definition: content of ``tokenizer.json``.
        config: content of ``tokenizer_config.json``: ``bos_token``, ``eos_token``, ``pad_token``, ``chat_template``.
        where: the folder, for error messages.
        words: added tokens that are not flagged as special and are recognised in any text, as its words are.

    Attributes:
        vocab_size: number of ids, special tokens included.
        bos_id: begins every document; an encoder's ``cls_id`` where it has no other.
        eos_id: ends a text; an encoder's ``sep_id`` where it has no other.
        pad_id: fills rows up; equal to ``eos_id`` where the vocabulary has no token for it.
        unk_id, cls_id, sep_id, mask_id: ``None`` where the vocabulary has no such token.
        add_bos, add_eos: whether the family puts ``bos_id`` in front of a plain prompt, ``eos_id`` behind a text.
        stop_ids: ids at which generation ends, ``eos_id`` among them.
        kind: ``byte-level``, ``sentencepiece`` or ``wordpiece``.
        where: the folder or file it was opened from.
        fingerprint: hex digest that changes with the ids or the chat template.

    Raises:
        DanluError: the definition cannot be used.
    """

    def __init__(
        self,
        definition: Mapping[str, Any],
        config: Mapping[str, Any] | None = None,
        where: object = "tokenizer",
        *,
        words: Collection[str] = (),
    ) -> None:
        self._definition = dict(definition)
        self._config = dict(config or {})
        self.where = where
        added = self._definition.get("added_tokens") or []
        self._full = build(self._definition, where)
        self._markers: dict[str, int] = {
            token["content"]: token["id"] for token in added if is_marker(token) and token["content"] not in words
        }
        self._plain = build(without_markers(self._definition, self._markers), where)
        self._plain.encode_special_tokens = True

        longest_first = sorted(self._markers, key=len, reverse=True)
        self._marker_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._marker_ids = frozenset(self._markers.values())
        self._special_ids = frozenset(token["id"] for token in added if token.get("special"))
        self._vocab: dict[str, int] = self._full.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(self._vocab.values()) + 1
        self.kind = kind_of(self._definition)

        self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            self._vocab.get(text_of(self._config.get(f"{role}_token")) or "") for role in ("unk", "cls", "sep", "mask")
        )
        self.eos_id: int = self._id_from_config("eos_token", END_OF_TEXT, "</s>", fallback=self.sep_id)
        begins = self.cls_id if self.cls_id is not None else self.eos_id
        self.bos_id: int = self._id_from_config("bos_token", END_OF_TEXT, fallback=begins)
        self.pad_id: int = self._id_from_config("pad_token", PAD, fallback=self.eos_id)
        self.add_bos, self.add_eos = self._add_ends()
        end_of_turn = self._vocab.get(text_of(self._config.get("eot_token")) or "", self.eos_id)
        self.stop_ids: tuple[int, ...] = tuple(
            sorted({self.eos_id, end_of_turn, *(self._markers[text] for text in STOPS if text in self._markers)})
        )

        source = template_of(self._config)
        if source is None and {IM_START, IM_END} <= self._markers.keys():
            source = CHATML
        variables = {name: text for name in ROLES if (text := text_of(self._config.get(name))) is not None}
        self._template = ChatTemplate(source, variables) if source is not None else None

    @cached_property
    def fingerprint(self) -> str:
        source = None if self._template is None else self._template.source
        essence = [self._definition, source, self.bos_id, self.eos_id, self.pad_id]
        return hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest()

    # ---- at rest

    @property
    def definition(self) -> Mapping[str, Any]:
        """Content of ``tokenizer.json``."""
        return self._definition

    @property
    def config(self) -> Mapping[str, Any]:
        """Content of ``tokenizer_config.json``, with the chat template."""
        own = {"chat_template": self._template.source} if self._template is not None else {}
        return {**self._config, **own}

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Open a tokenizer folder, a model folder or a .gguf file.

        A folder holds ``tokenizer.json``, or SentencePiece's ``tokenizer.model``, BERT's ``vocab.txt``, GPT-2's
        ``vocab.json`` with ``merges.txt``, or one .gguf file.

        Raises:
            DanluError: there is none of these, or it is broken, or what the other files say does not fit it.
            MissingExtra: a SentencePiece model needs the package ``sentencepiece``.
        """
        return open_tokenizer(Path(path))

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into a folder, in the Hugging Face layout."""
        path = Path(folder)
        special = {name: text for name in ROLES if (text := text_of(self._config.get(name))) is not None}
        files.write_json(path / TOKENIZER, self._definition)
        files.write_json(path / CONFIG, self.config)
        files.write_json(path / SPECIAL_MAP, special)

    # ---- text

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of a text; nothing is added in front or behind.

        Args:
            allow_special: take ``<|im_end|>`` and its like in the text for the special tokens.

        Raises:
            DanluError: the text holds a lone surrogate, which no encoding of Unicode can write.
        """
        require_encodable(text)
        backend = self._full if allow_special else self._plain
        return list(backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Like :meth:`encode` for many texts at once, on all cores."""
        for text in texts:
            require_encodable(text)
        return [list(found.ids) for found in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_bytes(self, content: bytes) -> list[int]:
        """Ids of any bytes: UTF-8 stretches as text, every other byte as the token of that byte.

        ``decode_bytes(encode_bytes(b)) == b`` for all ``b``, and ``encode_bytes(text.encode()) == encode(text)``.

        Raises:
            DanluError: the vocabulary is not byte-level.
        """
        if self.kind != "byte-level":
            raise DanluError(f"{self.where}: is not a byte-level tokenizer; it can encode text only")
        ids: list[int] = []
        for stretch in re.split("([\udc80-\udcff]+)", content.decode("utf-8", errors="surrogateescape")):
            if stretch and "\udc80" <= stretch[0] <= "\udcff":
                ids += [self._byte_ids[byte] for byte in stretch.encode("utf-8", errors="surrogateescape")]
            elif stretch:
                ids += self.encode(stretch)
        return ids

    def encode_for_encoder(
        self, text: str, pair: str | None = None, max_length: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids of a text, or of two, with the special tokens that the family puts round them: ``[CLS] a [SEP] b [SEP]``.

        Args:
            max_length: of the whole; tokens are left away at the end of the longer text, of both when they are equal.

        Returns:
            ``(ids, types)``; the type of a token is 0, or 1 where the family marks the second text so.

        Raises:
            DanluError: ``max_length`` has no room for the special tokens; errors of :meth:`encode`.
        """
        for part in (text, pair or ""):
            require_encodable(part)
        return encoder_inputs.encode(self._plain, self._full, text, pair, max_length)

    def encode_words(self, words: Sequence[str], max_length: int | None = None) -> tuple[list[int], list[int | None]]:
        """Ids of words, with the family's special tokens, and the index of the word that each token is a part of.

        The index is ``None`` for special tokens. Errors as :meth:`encode_for_encoder`.
        """
        for word in words:
            require_encodable(word)
        return encoder_inputs.encode_words(self._plain, self._full, words, max_length)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 (a character cut in two) become U+FFFD.

        The ids begin a text: a space that the tokenizer put in front of it is left out.

        Args:
            skip_special: leave special tokens out (thinking and tool markers stay: they are the answer's structure).
        """
        if skip_special:
            ids = [i for i in ids if i not in self._special_ids]
        self._require_ids(ids)
        if self.kind != "byte-level":
            return str(self._full.decode(list(ids), skip_special_tokens=False))
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of ids; special tokens stand for their own text.

        Each token has its bytes wherever it stands, so a text can be put together piece by piece:
        ``decode_bytes(a + b) == decode_bytes(a) + decode_bytes(b)``. A space that the tokenizer put in front of a text
        (SentencePiece) or a word (WordPiece) is there too.
        """
        self._require_ids(ids)
        return b"".join([self._bytes_of_ids[i] for i in ids])

    def is_special(self, token_id: int) -> bool:
        """Whether ``decode(skip_special=True)`` leaves the token out."""
        return token_id in self._special_ids

    def id_of(self, token: str) -> int:
        """Id of a token by its text, e.g. ``<|im_end|>``.

        Raises:
            DanluError: the vocabulary has no such token.
        """
        found = self._full.token_to_id(token)
        if found is None:
            raise DanluError(f"{self.where}: the vocabulary has no token {token!r}")
        return int(found)

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """(vocab_size,) number of UTF-8 bytes each token stands for, as :meth:`decode_bytes` has them; 0 for special
        tokens, which stand for no text."""
        sizes = [0 if i in self._marker_ids else len(b) for i, b in enumerate(self._bytes_of_ids)]
        return np.array(sizes, dtype=np.int32)

    # ---- chats

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, as ``apply_chat_template(tokenize=False)`` of transformers renders it.

        Reasoning written inside an assistant's content, as ``<think>...</think>answer``, counts as its
        ``reasoning_content``.

        Args:
            add_generation_prompt: end with the header of an answer, for the model to go on.
            tools: JSON schemas of functions the model may call.
            template_options: what else the template reads, such as ``documents`` or ``enable_thinking``.

        Raises:
            DanluError: there is no chat template, it refuses the conversation, or exceeds the limits of the sandbox
                (time, memory, length).
        """
        return self._require_template().render(
            [plain_message(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            options=template_options,
        )

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of :meth:`render_chat`. The template's markers are special tokens, what messages or tools say is not."""
        template = self._require_template()
        disguise = Disguise(self._marker_pattern, template.source)
        conversation = disguise.put_on(
            {"messages": [plain_message(m) for m in messages], "tools": tools, "options": dict(template_options or {})}
        )
        text = template.render(
            conversation["messages"],
            add_generation_prompt=add_generation_prompt,
            tools=conversation["tools"],
            options=conversation["options"],
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
        template_options: Mapping[str, Any] | None = None,
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
        ids = self.encode_chat(messages, tools=tools, template_options=template_options)
        if train_on == "all":
            return ids, [True] * len(ids)
        mask = [False] * len(ids)
        for turn, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            prompt = self.encode_chat(messages[:turn], True, tools, template_options)
            answered = ids
            if turn + 1 < len(messages):
                answered = self.encode_chat(messages[: turn + 1], False, tools, template_options)
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
            raise DanluError(f"{self.where}: has no chat template; add one as chat_template to {CONFIG}")
        return self._template

    def _id_from_config(self, name: str, *usual: str, fallback: int | None = None) -> int:
        """Id of the token that the config names, else of the first usual one, else the fallback."""
        text = text_of(self._config.get(name))
        if text is not None:
            found = self._full.token_to_id(text)
            if found is None:
                raise DanluError(f"{self.where}: {name} is {text!r}, which is not in the vocabulary; mend {CONFIG}")
            return int(found)
        for text in usual:
            if text in self._markers:
                return self._markers[text]
        if fallback is None:
            raise DanluError(f"{self.where}: names no {name}; add it to {CONFIG}")
        return fallback

    def _add_ends(self) -> tuple[bool, bool]:
        """Whether ``bos_id`` and ``eos_id`` stand round a text: by the config, else by the post-processor.

        Where they differ, the post-processor follows the config, as transformers has it.
        """
        found = list(self._full.encode("", add_special_tokens=True).ids)
        begins = found[:1] == [self.bos_id]
        ends = found[int(begins) :][-1:] == [self.eos_id]
        own = all(self._vocab.get(token) == i for i, token in enumerate(SPECIAL_TOKENS))
        wanted = [self._config.get("add_bos_token"), self._config.get("add_eos_token")]
        add_bos = wanted[0] if isinstance(wanted[0], bool) else begins or own  # our documents begin with <|endoftext|>
        add_eos = wanted[1] if isinstance(wanted[1], bool) else ends
        if (add_bos, add_eos) != (begins, ends):
            names = {i: token for token, i in self._vocab.items()}
            before, after = names[self.bos_id] if add_bos else None, names[self.eos_id] if add_eos else None
            self._full.post_processor = around(self._full, before, after, [before] if before is not None else [])
        return add_bos, add_eos

    def _require_ids(self, ids: Sequence[int]) -> None:
        strange = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if strange is not None:
            raise DanluError(f"{self.where}: token id {strange} is outside the vocabulary of {self.vocab_size}")

    @functools.cached_property
    def _byte_ids(self) -> list[int]:
        """Id of the token of each single byte."""
        return [self.id_of(BYTE_TO_CHAR[byte]) for byte in range(256)]

    @functools.cached_property
    def _bytes_of_ids(self) -> list[bytes]:
        return bytes_of_ids(self._definition, self._vocab, self._markers)
