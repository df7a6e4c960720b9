"""Vocabularies from before ``tokenizer.json``: BERT's ``vocab.txt``, GPT-2's ``vocab.json`` with ``merges.txt``.

What these files do not say (how text is cut, what stands round it) follows from the class of tokenizer that
``tokenizer_config.json`` names. A class that does anything more is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from danlu.errors import DanluError
from danlu.tokenizer.definition import (
    Config,
    Definition,
    add_later_tokens,
    added,
    around,
    finished,
    read_small_text,
    text_of,
)
from danlu.tokenizer.pre_tokens import PRE_TOKENS

BERT_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer", "")
GPT2_CLASSES = ("GPT2Tokenizer", "CodeGenTokenizer")
ROBERTA_CLASSES = ("RobertaTokenizer", "BartTokenizer", "LongformerTokenizer", "LEDTokenizer")
QWEN_CLASSES = ("Qwen2Tokenizer",)

BERT_SPECIAL = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
ROBERTA_SPECIAL = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
GPT2_SPECIAL = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}


def read_vocab_txt(folder: Path, config: Mapping[str, Any]) -> tuple[Definition, Config]:
    """BERT's WordPiece; ``do_lower_case``, ``strip_accents`` and ``tokenize_chinese_chars`` of the config are honoured.

    Raises:
        DanluError: the files are broken, or of a class of tokenizer that does more than BERT's.
    """
    name = class_of(config)
    if name not in BERT_CLASSES or config.get("do_basic_tokenize") is False:
        raise DanluError(
            f"{folder}: has only vocab.txt, and its {name or 'tokenizer'} is not BERT's own; save it with "
            "transformers once, so that there is a tokenizer.json"
        )
    tokens = read_small_text(folder / "vocab.txt").split("\n")
    tokens = [token.rstrip("\r") for token in (tokens[:-1] if not tokens[-1] else tokens)]
    vocab = {token: i for i, token in enumerate(tokens)}
    special = _special(config, BERT_SPECIAL, vocab)
    missing = [role for role in ("unk_token", "cls_token", "sep_token") if role not in special]
    if missing:
        raise DanluError(f"{folder}: vocab.txt holds no {' and no '.join(missing)}; name it in tokenizer_config.json")
    backend = word_piece(
        vocab,
        special["unk_token"],
        lowercase=config.get("do_lower_case", True) is not False,
        strip_accents=config.get("strip_accents"),
        chinese_chars=config.get("tokenize_chinese_chars", True) is not False,
    )
    backend.add_special_tokens([added(token, special=True) for token in special.values()])
    add_later_tokens(backend, folder, config)
    backend.post_processor = around(backend, special["cls_token"], special["sep_token"])
    return finished(backend), special


def word_piece(
    vocab: Mapping[str, int], unknown: str, lowercase: bool, strip_accents: bool | None, chinese_chars: bool = True
) -> tokenizers.Tokenizer:
    """BERT's tokenizer (Devlin et al. 2019, arXiv:1810.04805) without a post-processor.

    Args:
        strip_accents: whether é becomes e; ``None``: as ``lowercase``.
        chinese_chars: whether every Chinese character is a word.
    """
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=dict(vocab), unk_token=unknown, max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=chinese_chars, strip_accents=strip_accents, lowercase=lowercase
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return backend


def read_vocab_and_merges(folder: Path, config: Mapping[str, Any]) -> tuple[Definition, Config]:
    """Byte-level BPE of GPT-2's, RoBERTa's and Qwen's kind.

    Raises:
        DanluError: the files are broken, or of another class of tokenizer.
    """
    vocab, merges = _vocab_of(folder / "vocab.json"), _merges_of(folder / "merges.txt")
    name = class_of(config)
    if not name:
        name = ROBERTA_CLASSES[0] if {"<s>", "</s>", "<mask>"} <= vocab.keys() else GPT2_CLASSES[0]
    if name not in GPT2_CLASSES + ROBERTA_CLASSES + QWEN_CLASSES:
        raise DanluError(
            f"{folder}: has only vocab.json and merges.txt, and how a {name} cuts text is not known here; save it "
            "with transformers once, so that there is a tokenizer.json"
        )
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the library raises nothing narrower
        raise DanluError(f"{folder}: vocab.json and merges.txt do not fit each other ({error})") from error
    backend.decoder = decoders.ByteLevel()
    prefix = config.get("add_prefix_space") is True
    usual = {**dict.fromkeys(ROBERTA_CLASSES, ROBERTA_SPECIAL), **dict.fromkeys(GPT2_CLASSES, GPT2_SPECIAL)}
    special = _special(config, usual.get(name, {}), vocab)
    if name in QWEN_CLASSES:
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = PRE_TOKENS["qwen2"].build()
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    add_later_tokens(backend, folder, config)
    backend.add_special_tokens([added(token, special=True) for token in special.values()])
    if name in ROBERTA_CLASSES:
        missing = [role for role in ("cls_token", "sep_token") if role not in special]
        if missing:
            raise DanluError(f"{folder}: vocab.json holds no {missing[0]}; name it in tokenizer_config.json")
        ends = {role: (special[role], vocab[special[role]]) for role in ("sep_token", "cls_token")}
        backend.post_processor = processors.RobertaProcessing(
            ends["sep_token"], ends["cls_token"], trim_offsets=True, add_prefix_space=prefix
        )
    return finished(backend), special


def class_of(config: Mapping[str, Any]) -> str:
    """Class of tokenizer, without the ending of the fast ones; the general classes say nothing and count as none."""
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    return "" if name in ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend") else name


def _special(config: Mapping[str, Any], usual: Mapping[str, str], vocab: Mapping[str, int]) -> dict[str, str]:
    """Role -> token, as the config names them, else as it is usual; only those that the vocabulary holds."""
    named = {
        role: text_of(config.get(role)) or usual.get(role) for role in [*usual, *config] if role.endswith("_token")
    }
    return {role: text for role, text in named.items() if text is not None and text in vocab}


def _vocab_of(path: Path) -> dict[str, int]:
    try:
        vocab = json.loads(read_small_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DanluError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(vocab, dict) or not all(isinstance(i, int) and 0 <= i < 1 << 31 for i in vocab.values()):
        raise DanluError(f"{path}: must hold a JSON object of token and id")
    return vocab


def _merges_of(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(read_small_text(path).split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        halves = line.rstrip("\r").split(" ")
        if len(halves) != 2:
            raise DanluError(f"{path}:{number}: expected two tokens with a blank between, got {line!r:.60}")
        merges.append((halves[0], halves[1]))
    return merges
