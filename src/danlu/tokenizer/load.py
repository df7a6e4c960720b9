"""Opening a tokenizer, in whatever form a folder or a file holds it.

In this order: ``tokenizer.json``; SentencePiece's ``tokenizer.model`` or ``spiece.model``; BERT's ``vocab.txt``;
``vocab.json`` with ``merges.txt``; a ``.gguf`` file. All but the first are turned into the content of a
``tokenizer.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu import files
from danlu.errors import DanluError
from danlu.tokenizer.definition import (
    CONFIG,
    ROLES,
    SPECIAL_MAP,
    TEMPLATE,
    TOKENIZER,
    Config,
    Definition,
    add_later_tokens,
    added,
    around,
    finished,
    read_small_text,
    text_of,
)
from danlu.tokenizer.legacy import class_of, read_vocab_and_merges, read_vocab_txt

if TYPE_CHECKING:
    import tokenizers

    from danlu.tokenizer.tokenizer import Tokenizer

SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")

# SentencePiece is only a part of these: they shift ids or change the text before it.
SHIFTED_CLASSES = frozenset(
    (
        "Albert",
        "Barthez",
        "BigBird",
        "Camembert",
        "Cpm",
        "DebertaV2",
        "FNet",
        "M2M100",
        "MBart",
        "MBart50",
        "Marian",
        "Nllb",
        "PLBart",
        "Pegasus",
        "Reformer",
        "RemBert",
        "SeamlessM4T",
        "Siglip",
        "Speech2Text",
        "Udop",
        "XGLM",
        "XLMProphetNet",
        "XLMRoberta",
        "XLNet",
    )
)


def open_tokenizer(path: Path) -> Tokenizer:
    """See :meth:`danlu.tokenizer.tokenizer.Tokenizer.load`."""
    from danlu.tokenizer.tokenizer import Tokenizer

    if path.is_file():
        if path.suffix == ".gguf":
            return _open_gguf(path)
        raise DanluError(f"{path}: is not a tokenizer; give its folder, or a .gguf file")
    if (path / TOKENIZER).is_file():
        return Tokenizer(files.read_json_object(path / TOKENIZER), _read_config(path), where=path)
    reader = next((read for names, read in READERS if all((path / name).is_file() for name in names)), None)
    if reader is not None:
        config = _read_config(path)
        definition, found = reader(path, config)
        # The class that the config names would build another pipeline in transformers than the one converted here.
        config = {key: value for key, value in config.items() if value is not None}
        return Tokenizer(definition, {**found, **config, "tokenizer_class": "PreTrainedTokenizerFast"}, where=path)
    if len(found_gguf := sorted(path.glob("*.gguf"))) == 1:
        return _open_gguf(found_gguf[0])
    raise DanluError(
        f"{path}: has no {TOKENIZER}; expected a tokenizer or model folder in the Hugging Face layout, a SentencePiece "
        "tokenizer.model, a vocab.txt, vocab.json with merges.txt, or a .gguf file"
    )


def _read_config(path: Path) -> Config:
    config: Config = {}
    for name in (CONFIG, SPECIAL_MAP):  # what both say is taken from the first
        for key, value in files.read_json_object(path / name).items() if (path / name).is_file() else ():
            if value is not None:
                config.setdefault(key, value)
    if (path / TEMPLATE).is_file():
        config["chat_template"] = read_small_text(path / TEMPLATE)
    return config


def _open_gguf(path: Path) -> Tokenizer:
    from danlu.formats.gguf_file import GGUFFile
    from danlu.tokenizer.gguf import tokenizer_from_gguf

    return tokenizer_from_gguf(GGUFFile(path).metadata, where=path)


def _read_sentencepiece_folder(path: Path, config: Mapping[str, Any]) -> tuple[Definition, Config]:
    from danlu.tokenizer.sentencepiece import read_sentencepiece

    name = class_of(config)
    if name.removesuffix("Tokenizer") in SHIFTED_CLASSES:
        raise DanluError(
            f"{path}: the ids of a {name} are not those of its SentencePiece model; save it with transformers once, "
            "so that there is a tokenizer.json"
        )
    file = next(path / name for name in SENTENCEPIECE_FILES if (path / name).is_file())
    backend, found = read_sentencepiece(file)
    if not add_later_tokens(backend, path, config) and name == "T5Tokenizer":  # sentinels, counted down to the end
        n_sentinels = config.get("extra_ids", 100)
        if not isinstance(n_sentinels, int) or not 0 <= n_sentinels <= 10_000:
            raise DanluError(f"{path / CONFIG}: extra_ids must be a number up to 10000, got {n_sentinels!r}")
        backend.add_special_tokens([added(f"<extra_id_{i}>", special=True) for i in reversed(range(n_sentinels))])
    named = {role: text for role in ROLES if (text := text_of(config.get(role))) is not None}
    found = {**found, **named}
    bos, eos = found.get("bos_token"), found.get("eos_token")
    # Models with a beginning (Llama's family) begin with it; those without (T5's) end texts with their end.
    begins = config.get("add_bos_token", bos is not None and name != "T5Tokenizer") and bos is not None
    ends = config.get("add_eos_token", not begins and bos is None) and eos is not None
    if begins or ends:
        _add_ends(backend, bos if begins else None, eos if ends else None, path)
    return finished(backend), {**found, "add_bos_token": bool(begins), "add_eos_token": bool(ends)}


def _add_ends(backend: tokenizers.Tokenizer, before: str | None, after: str | None, path: Path) -> None:
    for token in (before, after):
        if token is not None and backend.token_to_id(token) is None:
            raise DanluError(f"{path}: {token!r} is not in the vocabulary; mend {CONFIG}")
    backend.post_processor = around(backend, before, after, [before] if before is not None else [])


READERS = (
    *(((name,), _read_sentencepiece_folder) for name in SENTENCEPIECE_FILES),
    (("vocab.txt",), read_vocab_txt),
    (("vocab.json", "merges.txt"), read_vocab_and_merges),
)
