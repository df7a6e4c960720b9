"""What `danlu tokenizer train` takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from danlu.config import REQUIRED, option
from danlu.tokenizer.special import SPECIAL_TOKENS


@dataclass(frozen=True)
class TokenizerConfig:
    """Options of :func:`danlu.tokenizer.train.train_tokenizer`."""

    data: Path = option(REQUIRED, "Data folder made by `danlu data build` or `danlu data mine`.", positional=True)
    out: Path = option(REQUIRED, "Tokenizer folder to make.", affects_result=False)
    vocab_size: int = option(
        8192,
        "Size of the vocabulary, special tokens and the 256 bytes included; 4096 to 8192 suit a CPU, 32768 a GPU.",
        unit="tokens",
        gt=256 + len(SPECIAL_TOKENS),
        le=1_000_000,
    )
    pre_tokens: Literal["llama-bpe", "qwen2", "smollm", "gpt-2", "danlu"] = option(
        "llama-bpe",
        "Where text is cut before pairs are merged. All but `danlu` are known to llama.cpp, so that the model can be "
        "exported to GGUF; `danlu` makes tokens of source code 7 % longer.",
    )
    min_frequency: int = option(2, "A pair is merged into a token only if it occurs this often.", ge=1)
    sample_bytes: int = option(
        1 << 30, "Text to learn from; of a larger corpus, documents are sampled evenly.", unit="bytes", ge=1
    )
    overwrite: bool = option(False, "Replace the folder when it holds another result.", affects_result=False)
