"""`danlu tokenizer train`: byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909) of a data folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from danlu import config as configs
from danlu.console import note, progress
from danlu.data.folder import DataFolder, Document, Split
from danlu.data.tokens import batches
from danlu.errors import DanluError
from danlu.formats.card import Stage
from danlu.tokenizer.chat_template import CHATML
from danlu.tokenizer.config import TokenizerConfig
from danlu.tokenizer.definition import around, finished
from danlu.tokenizer.pre_tokens import OWN, PRE_TOKENS
from danlu.tokenizer.special import END_OF_TEXT, KEPT_WHEN_DECODED, PAD, SPECIAL_TOKENS
from danlu.tokenizer.tokenizer import Tokenizer

MEASURED_BYTES = 64 << 20  # of each split, for the bytes per token on the card


def train_tokenizer(config: TokenizerConfig) -> Path:
    """Train a tokenizer on the train split of a data folder; return the tokenizer folder.

    The same data and options give the same files. Of chats, the messages' text is learnt from.

    Raises:
        DanluError: the vocabulary is larger than the data supports, or the folders cannot be used.
    """
    config = configs.validate(config)
    data = DataFolder(config.data)
    stage = Stage.open(
        config.out,
        kind="tokenizer",
        verb="tokenizer train",
        config=config,
        inputs={"data": config.data},
        overwrite=config.overwrite,
    )
    if stage.finished:
        note(f"{config.out}: already made, nothing to do")
        return config.out
    with stage.preparing():
        tokenizer = train_on(
            _texts(data, "train", config.sample_bytes, "learning"),
            config.vocab_size,
            config.min_frequency,
            config.pre_tokens,
        )
    tokenizer.save(stage.out)

    measured = {
        split: bytes_per_token(tokenizer, _texts(data, split, min(config.sample_bytes, MEASURED_BYTES), "measuring"))
        for split in data.splits()
    }
    sizes = tokenizer.token_bytes()
    # Of code, the longest tokens of all are indentation; those with letters tell what the text is about.
    words = [i for i in range(tokenizer.vocab_size) if any(c.isalnum() for c in tokenizer.decode([i]))]
    longest = sorted((i for i in words if sizes[i]), key=lambda i: (-int(sizes[i]), i))[:40]
    stage.finish(
        metrics={
            "vocab_size": tokenizer.vocab_size,
            "bytes_per_token": measured["train"],
            "bytes_per_token_heldout": measured.get("heldout"),
        },
        details={
            "longest_tokens": [tokenizer.decode([i]) for i in longest],
            "special_tokens": list(SPECIAL_TOKENS),
            "pre_tokens": config.pre_tokens,
        },
    )
    figures = ", ".join(f"{figure:.2f} bytes per token ({split})" for split, figure in measured.items())
    note(f"{config.out}: {tokenizer.vocab_size:,} tokens, {figures}")
    return config.out


def train_on(texts: Iterable[str], vocab_size: int, min_frequency: int = 2, pre_tokens: str = "llama-bpe") -> Tokenizer:
    """Train a tokenizer on a stream of texts, which is read once.

    Args:
        pre_tokens: ``danlu`` or a name of :data:`danlu.tokenizer.pre_tokens.PRE_TOKENS`.

    Raises:
        DanluError: the texts hold too few repeated pairs for ``vocab_size`` tokens.
    """
    pre = OWN if pre_tokens == "danlu" else PRE_TOKENS[pre_tokens]
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=pre.ignore_merges))
    backend.pre_tokenizer = pre.build()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # all 256 bytes, whether the data has them or not
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if (found := backend.get_vocab_size()) < vocab_size:
        raise DanluError(
            f"vocab_size: {vocab_size} tokens are more than the data supports ({found} with min_frequency "
            f"{min_frequency}); choose at most {found}, or give more data"
        )
    backend.post_processor = around(backend, END_OF_TEXT, None, [END_OF_TEXT])  # a prompt begins like a document
    definition = finished(backend)
    for token in definition["added_tokens"]:
        token["special"] = token["content"] not in KEPT_WHEN_DECODED
    return Tokenizer(
        definition,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "pad_token": PAD,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHATML,
        },
    )


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """UTF-8 bytes per token over a stream of texts."""
    n_bytes = n_tokens = 0
    for batch in batches(texts, len):
        n_bytes += sum(len(text.encode()) for text in batch)
        n_tokens += sum(map(len, tokenizer.encode_batch(batch)))
    return n_bytes / max(n_tokens, 1)


def _texts(data: DataFolder, split: Split, sample_bytes: int, what: str) -> Iterator[str]:
    """Texts of a split; of a split larger than ``sample_bytes``, an even sample that depends on the documents alone."""
    n_bytes = data.card.metrics.get(f"{split}_bytes") or 0
    share = min(1.0, sample_bytes / n_bytes) if n_bytes else 1.0
    with progress(f"{what} ({split} text)", total=n_bytes * share or None, unit="bytes") as advance:
        for document in data.documents(split):
            if int(document.sha256[:8], 16) < share * 2**32:
                text = _text_of(document)
                advance(len(text.encode()))
                yield text


def _text_of(document: Document) -> str:
    if document.kind == "text":
        return document.text
    return "\n".join(str(message.get("content") or "") for message in document.messages())
