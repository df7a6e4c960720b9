"""The proof that an encoder-decoder family is right, as `parity.py` gives it for the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from parity import check_gradients, check_round_trip, close, padding, random_ids, random_reference
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from danlu.models.encoder_decoder import EncoderDecoder
from danlu.models.load import load_model
from danlu.nn.kv_cache import KVCache


def check_encoder_decoder(
    config: Any,
    folder: Path,
    *,
    change: Callable[[Any], None] | None = None,
    unused: tuple[str, ...] = (),
    atol: float = 1e-4,
) -> EncoderDecoder:
    """Everything that must hold for an encoder-decoder; returns our model, with gradients in place of its weights.

    Args:
        change: does something to the reference before it is saved, for what its config does not say.
        unused: tensors that `transformers` has and does not use, and danlu does not write.
    """
    reference = random_reference(config, AutoModelForSeq2SeqLM)
    if change is not None:
        change(reference)
    reference.save_pretrained(folder / "theirs")
    model = load_model(folder / "theirs", EncoderDecoder)
    source = random_ids(config.vocab_size, 3, 20, avoid=config.pad_token_id)
    target = random_ids(config.vocab_size, 3, 14, seed=3, avoid=config.pad_token_id)
    real, target_real = padding("right", 3, 20), padding("right", 3, 14)

    def both_padded(m: Any) -> Tensor:
        if isinstance(m, EncoderDecoder):
            return m(source, target, real_bs=real, decoder_real_bt=target_real)[target_real]
        masks = {"attention_mask": real.long(), "decoder_attention_mask": target_real.long()}
        return m(input_ids=source, decoder_input_ids=target, **masks).logits[target_real]

    with torch.no_grad():
        expected = reference(input_ids=source, decoder_input_ids=target).logits
        assert expected.std() > 0.1, "the reference is too quiet to show a difference"
        close(model(source, target), expected, atol, "one pass")
        for side in ("left", "right"):
            seen = padding(side, 3, 20)
            expected = reference(input_ids=source, attention_mask=seen.long(), decoder_input_ids=target).logits
            close(model(source, target, real_bs=seen), expected, atol, f"source padded on the {side}")
            memory = model.encode(source, seen)
            for size in (1, 5):
                cache = KVCache(model.config.decoder, 3, 14)
                pieces = [model.decode(piece, memory, cache) for piece in target.split(size, dim=1)]
                close(torch.cat(pieces, dim=1), expected, atol, f"{size} tokens at a time")
        expected = both_padded(reference)
        close(both_padded(model), expected, atol, "both padded")
    ours = folder / "ours"
    check_round_trip(model, reference, AutoModelForSeq2SeqLM, ours, both_padded, expected, atol, unused)
    check_gradients(model, reference, both_padded, folder, atol)
    return model
