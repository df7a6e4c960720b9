"""Tokenizers out of GGUF metadata (llama.cpp's `tokenizer.ggml.*` keys), and so of any .gguf file.

Five kinds are read: ``gpt2`` (byte-level BPE), ``llama`` (SentencePiece BPE by scores), ``gemma4`` (the same by
merges), ``t5`` (unigram) and ``bert`` (WordPiece). Text is cut and merged as llama.cpp does it, which puts the leading
space of SentencePiece in front of every stretch between special tokens. The metadata comes from outside: lengths, types
and ids are checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from danlu.errors import DanluError
from danlu.tokenizer.definition import BLANK, Config, added, around, finished
from danlu.tokenizer.legacy import word_piece
from danlu.tokenizer.pre_tokens import PRE_TOKENS
from danlu.tokenizer.sentencepiece import (
    BYTE,
    BYTES_WRITTEN_OUT,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    bpe_model,
    decoder,
    spaces,
    unigram_model,
)

if TYPE_CHECKING:
    from danlu.tokenizer.tokenizer import Tokenizer

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
ID_KEYS = {  # seperator is how the key is spelt
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "eot_token": "eot_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
# What llama.cpp takes where a file does not say.
USUAL_IDS = {
    "gpt2": {},
    "llama": {"bos_token": 1, "eos_token": 2, "unk_token": 0},
    "gemma4": {},
    "t5": {"eos_token": 1, "unk_token": 2, "pad_token": 0},
    "bert": {"bos_token": 101, "unk_token": 100, "sep_token": 102, "pad_token": 0, "mask_token": 103},
}
USUALLY_BEGINS = {"gpt2": False, "llama": True, "gemma4": True, "t5": False, "bert": True}
BEGINS_BY_PRE = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
ROBERTA_LIKE = ("roberta-bpe", "jina-v1-en", "jina-v2-code")  # a second end stands between two texts


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: object = "GGUF metadata") -> Tokenizer:
    """The tokenizer that a GGUF file holds.

    Args:
        metadata: key -> value, as :class:`danlu.formats.gguf_file.GGUFFile` gives it.
        where: the file, for error messages.

    Raises:
        DanluError: the metadata is broken, or its kind of tokenizer or way to cut text is not known here.
    """
    from danlu.tokenizer.tokenizer import Tokenizer

    vocabulary = _Vocabulary(metadata, where)
    if vocabulary.model not in READERS:
        raise DanluError(
            f"{where}: holds a tokenizer of the kind {vocabulary.model!r}; expected one of {', '.join(READERS)}"
        )
    try:
        backend = READERS[vocabulary.model](vocabulary)
    except DanluError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise DanluError(f"{where}: its tokenizer cannot be used ({error})") from error
    config = vocabulary.config()
    _add_tokens(backend, vocabulary)
    _add_ends(backend, vocabulary, config)
    return Tokenizer(finished(backend), config, where=where)


class _Vocabulary:
    """The checked metadata.

    Attributes:
        tokens: text of each id; no text is there twice.
        types: type of each id, SentencePiece's.
        roles: ``bos_token`` and its like -> id.
    """

    def __init__(self, metadata: Mapping[str, Any], where: object) -> None:
        self.where = where
        self._metadata = metadata
        self.model: str = self.value("model", str)
        self.pre: str = self.value("pre", str, "default") if self.model == "gpt2" else ""
        # llama.cpp's name for a token without text; whole vocabularies are padded with them.
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self.items("tokens", str))]
        if not self.tokens:
            raise DanluError(f"{where}: {PREFIX}tokens is empty")
        if len(set(self.tokens)) < len(self.tokens):
            twice = Counter(self.tokens).most_common(1)[0][0]
            raise DanluError(f"{where}: {PREFIX}tokens holds {twice!r} twice; convert the model again")
        self.types = self.items("token_type", int, [NORMAL] * len(self.tokens), len(self.tokens))
        self.roles = {role: i for role, i in USUAL_IDS.get(self.model, {}).items() if i < len(self.tokens)}
        for role, key in ID_KEYS.items():
            i = self.value(key, int, self.roles.get(role, -1))
            if 0 <= i < len(self.tokens):  # llama.cpp passes over an id beyond the vocabulary, and files have them
                self.roles[role] = i

    def value(self, name: str, kind: type, default: Any = None) -> Any:
        """One value of a type.

        Raises:
            DanluError: it is missing and has no default, or is of another type.
        """
        found = self._metadata.get(PREFIX + name, default)
        if found is None:
            raise DanluError(f"{self.where}: has no {PREFIX}{name}, so it holds no tokenizer; fetch another file")
        if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
            raise DanluError(f"{self.where}: {PREFIX}{name} must be of the type {kind.__name__}, got {found!r:.60}")
        return found

    def items(self, name: str, kind: type, default: Any = None, length: int | None = None) -> list[Any]:
        """A list of values of one type, of a given length.

        Raises:
            DanluError: as :meth:`value`, or the length is another.
        """
        found: list[Any] = self.value(name, list, default)
        strange = next((item for item in found if not isinstance(item, kind)), None)
        if strange is not None:
            raise DanluError(f"{self.where}: {PREFIX}{name} holds {strange!r:.60}, expected {kind.__name__}")
        if length is not None and len(found) != length:
            raise DanluError(f"{self.where}: {PREFIX}{name} has {len(found)} items for {length} tokens")
        return found

    def scores(self) -> list[float]:
        """Score of each token."""
        return [float(score) for score in self.items("scores", float, None, len(self.tokens))]

    def merges(self) -> list[tuple[str, str]]:
        """Pairs of tokens that become one, the most urgent first."""
        pairs = []
        for merge in self.items("merges", str):
            blank = merge.find(" ", 1)  # the first character may be a blank itself
            if blank < 0 or blank + 1 == len(merge):
                raise DanluError(f"{self.where}: {PREFIX}merges holds {merge!r:.60}, expected two tokens and a blank")
            pairs.append((merge[:blank], merge[blank + 1 :]))
        return pairs

    def role(self, name: str) -> str | None:
        """Text of the token of a role."""
        return self.tokens[self.roles[name]] if name in self.roles else None

    def config(self) -> Config:
        """What ``tokenizer_config.json`` says."""
        begins = USUALLY_BEGINS[self.model] or self.pre in BEGINS_BY_PRE
        config: Config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{role: self.tokens[i] for role, i in self.roles.items()},
            "add_bos_token": self.value("add_bos_token", bool, begins),
            "add_eos_token": self.value("add_eos_token", bool, self.model == "t5"),
        }
        if self.model == "bert":
            config |= {"cls_token": config.get("cls_token", config.get("bos_token"))}
            config = {role: text for role, text in config.items() if not role.startswith("add_") and text is not None}
        template = self._metadata.get(TEMPLATE)
        if isinstance(template, str):
            config["chat_template"] = template
        return config


def _byte_level(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    if vocabulary.pre not in PRE_TOKENS:
        raise DanluError(
            f"{vocabulary.where}: cuts text in the way {vocabulary.pre!r} ({PREFIX}pre), which danlu does not know; "
            "use the model's folder in the Hugging Face layout"
        )
    pre = PRE_TOKENS[vocabulary.pre]
    vocab = {token: i for i, token in enumerate(vocabulary.tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=vocabulary.merges(), ignore_merges=pre.ignore_merges))
    backend.pre_tokenizer = pre.build()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    scores = dict(zip(vocabulary.tokens, vocabulary.scores(), strict=True))
    types = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    backend = tokenizers.Tokenizer(bpe_model(scores, types, vocabulary.role("unk_token"), BYTE in vocabulary.types))
    prefix = vocabulary.value("add_space_prefix", bool, True)
    backend.normalizer = spaces(b"", remove_extra=False, prefix=normalizers.Prepend(BLANK) if prefix else None)
    backend.decoder = decoder(strip_blank=prefix)
    return backend


def _gemma4(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(vocabulary.tokens)}
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=vocabulary.merges(),
            unk_token=vocabulary.role("unk_token"),
            fuse_unk=True,
            byte_fallback=any(token == "<0x00>" for token in vocabulary.tokens),
        )
    )
    backend.normalizer = spaces(b"", remove_extra=False, prefix=None)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
    backend.decoder = decoder(strip_blank=False)
    return backend


def _unigram(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    pieces = list(zip(vocabulary.tokens, vocabulary.scores(), vocabulary.types, strict=True))
    if "unk_token" not in vocabulary.roles:
        raise DanluError(f"{vocabulary.where}: names no unknown token ({PREFIX}unknown_token_id)")
    byte_fallback = BYTE in vocabulary.types
    backend = tokenizers.Tokenizer(unigram_model(pieces, vocabulary.roles["unk_token"], byte_fallback))
    charsmap = vocabulary.items("precompiled_charsmap", int, [])
    prefix = vocabulary.value("add_space_prefix", bool, False)
    backend.normalizer = spaces(
        bytes(byte & 0xFF for byte in charsmap),
        remove_extra=vocabulary.value("remove_extra_whitespaces", bool, False),
        prefix=normalizers.Prepend(BLANK) if prefix else None,
    )
    if byte_fallback:
        backend.pre_tokenizer = BYTES_WRITTEN_OUT
    backend.decoder = decoder(strip_blank=prefix)
    return backend


def _word_piece(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    # Written with a blank in front of every first piece, instead of ## in front of every other.
    for i, (token, type_) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if token.startswith(BLANK):
            vocabulary.tokens[i] = token[1:]
        elif type_ not in (CONTROL, UNKNOWN, USER_DEFINED) and i not in vocabulary.roles.values():
            vocabulary.tokens[i] = "##" + token
    vocab = {token: i for i, token in enumerate(vocabulary.tokens)}
    if len(vocab) < len(vocabulary.tokens) or "unk_token" not in vocabulary.roles:
        raise DanluError(f"{vocabulary.where}: its WordPiece vocabulary is broken; convert the model again")
    lowercase = vocabulary.value("normalizer.lowercase", bool, True)
    return word_piece(
        vocab,
        vocabulary.tokens[vocabulary.roles["unk_token"]],
        lowercase,
        strip_accents=vocabulary.value("normalizer.strip_accents", bool, lowercase),
    )


def _add_tokens(backend: tokenizers.Tokenizer, vocabulary: _Vocabulary) -> None:
    roles = {i for role, i in vocabulary.roles.items() if role != "unk_token" or vocabulary.model != "gpt2"}
    later = []
    for i, (token, type_) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if type_ in (CONTROL, UNKNOWN) or (i in roles and type_ != BYTE):
            later.append(added(token, special=True))
        elif type_ == USER_DEFINED:
            later.append(added(token, special=False))
    backend.add_tokens(later)  # all at once: each call looks at all added before


def _add_ends(backend: tokenizers.Tokenizer, vocabulary: _Vocabulary, config: Config) -> None:
    """What stands round a text: the post-processor."""
    bos, eos = config.get("bos_token"), config.get("eos_token")
    if vocabulary.model == "bert":
        backend.post_processor = around(backend, config.get("cls_token"), config.get("sep_token"))
        return
    before, after = bos if config["add_bos_token"] else None, eos if config["add_eos_token"] else None
    for key, wanted, token in (("add_bos_token", config["add_bos_token"], bos), ("add_eos_token", after, eos)):
        if wanted and token is None:
            raise DanluError(f"{vocabulary.where}: asks for {key}, but names no such token")
    if before is None and after is None:
        return
    second_end = [after] if after is not None and vocabulary.pre in ROBERTA_LIKE else []
    # Only RoBERTa's kind and T5 have pairs; whatever else begins texts would begin the second one too.
    between = second_end if second_end or before is None else [token for token in (before,) if token is not None]
    backend.post_processor = around(backend, before, after, between)


READERS: dict[str, Callable[[_Vocabulary], tokenizers.Tokenizer]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "gemma4": _gemma4,
    "t5": _unigram,
    "bert": _word_piece,
}
