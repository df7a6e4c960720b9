"""Tiny random encoder-decoders in the shapes of T5 and BART, and a tokenizer of letters for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paged_sequences import SHAPE, random_model

from danlu.models.encoder_decoder import EncoderDecoder
from danlu.nn.config import EncoderDecoderConfig, ModelConfig

FAMILIES: dict[str, dict[str, Any]] = {
    "t5": {"relative_buckets": 10, "relative_max_distance": 11, "attention_scale": 1.0, "head_scale": 0.2},
    "bart": {
        "learned_positions": True, "position_offset": 2, "count_padding": True, "norm": "layer", "embed_norm": True,
        "arrangement": "post", "final_norm": False, "gated": False, "activation": "gelu", "qkv_bias": True,
        "attention_out_bias": True, "ffn_bias": True, "head_bias": True,
    },
}  # fmt: skip

PAD, END, FIRST = 0, 1, 2  # then letters
LETTERS = 29


def encoder_decoder(options: dict[str, Any], seed: int = 0) -> EncoderDecoder:
    """A random one; ``options`` are those of a family, and others."""
    stack = ModelConfig(**{**SHAPE, "n_layers": 2, **options, "causal": False})
    decoder = ModelConfig(**{**SHAPE, "tie_embeddings": True, **options, "cross_attention": True})
    return random_model(lambda: EncoderDecoder(EncoderDecoderConfig(stack, decoder, decoder_start_id=PAD)), seed)


class LetterTokenizer:
    """What the engine needs of a tokenizer, at one letter a token; texts for the encoder end with END."""

    stop_ids = (END,)

    def encode_for_encoder(self, text: str) -> tuple[list[int], list[int]]:
        ids = [ord(letter) - ord("a") + 3 for letter in text] + [END]
        return ids, [0] * len(ids)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        return self.decode_bytes(ids).decode()

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return bytes(i - 3 + ord("a") for i in ids if i >= 3)

    def is_special(self, token_id: int) -> bool:
        return token_id < 3
