"""The proof that a family is right: a tiny random model of `transformers`, opened by danlu, computes the same.

In one pass, packed into padded batches on either side, token by token and in chunks with a cache; saved by danlu and
opened by `transformers` again; and with the same gradients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from danlu.models.causal_lm import CausalLM
from danlu.models.family import family_of
from danlu.models.load import checkpoint_tensors, load_model, save_model
from danlu.models.transformer import Transformer
from danlu.nn.kv_cache import KVCache


def random_reference(config: Any, auto_class: Any, seed: int = 0) -> Any:
    """A model of `transformers` for a config, with every weight random: biases of zero and norms of one would hide
    mistakes."""
    torch.manual_seed(seed)
    reference = auto_class.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            is_norm = p.ndim == 1 and name.endswith("weight")
            offset = p.mean().item() if is_norm else 0.0  # norm weights are near one, or near zero where one is added
            p.copy_(torch.randn(p.shape, generator=generator) * (0.15 if p.ndim > 1 else 0.1) + offset)
    return reference


def random_ids(vocab_size: int, *shape: int, seed: int = 1, avoid: int | None = None) -> Tensor:
    """Token ids; ``avoid`` (a padding id, which some models mask by itself) is left out."""
    ids = torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    return ids if avoid is None else torch.where(ids == avoid, (avoid + 1) % vocab_size, ids)


def padding(side: str, batch: int, t: int) -> Tensor:
    """(batch, t) bool: row i has 3 i padding tokens on a side."""
    column = torch.arange(t)
    pads = 3 * torch.arange(batch)[:, None]
    return column >= pads if side == "left" else column < t - pads


def check_causal_lm(config: Any, folder: Path, *, t: int = 24, atol: float = 1e-4, chunk: int = 5) -> CausalLM:
    """Everything that must hold for a decoder; returns our model."""
    from transformers import AutoModelForCausalLM

    reference = random_reference(config, AutoModelForCausalLM)
    reference.save_pretrained(folder / "theirs")
    model = load_model(folder / "theirs")
    ids = random_ids(config.vocab_size, 3, t, avoid=config.pad_token_id)
    with torch.no_grad():
        expected = reference(ids).logits
        assert expected.std() > 0.1, "the reference is too quiet to show a difference"
        close(model(ids), expected, atol, "one pass")
        for side in ("left", "right"):
            real = padding(side, 3, t)
            positions = (real.long().cumsum(1) - 1).clamp(min=0)
            takes = "position_ids" in reference.forward.__code__.co_varnames
            arguments = {"position_ids": positions} if takes else {}
            theirs = reference(ids, attention_mask=real.long(), **arguments).logits
            close(model(ids, real_bt=real)[real], theirs[real], atol, f"padding on the {side}")
        for size in (1, chunk):
            cache = KVCache(model.config, 3, t)
            pieces = [model(piece, cache=cache) for piece in ids.split(size, dim=1)]
            close(torch.cat(pieces, dim=1), expected, atol, f"{size} tokens at a time")
        check_left_padded_cache(model, ids, atol)
    check_round_trip(model, reference, AutoModelForCausalLM, folder / "ours", lambda m: m(ids), expected, atol)
    check_gradients(model, reference, lambda m: m(ids), folder, atol)
    return model


def check_left_padded_cache(model: CausalLM, ids: Tensor, atol: float) -> None:
    """A short row in a batch with longer ones gets what it gets alone."""
    pads = torch.arange(len(ids)) * 3
    cache = KVCache(model.config, len(ids), ids.shape[1], left_pad_b=pads)
    batch = torch.cat([model(piece, cache=cache) for piece in ids.split(7, dim=1)], dim=1)
    for row, pad in enumerate(pads.tolist()):
        close(batch[row, pad:], model(ids[row : row + 1, pad:])[0], atol, "left-padded cache")


def check_round_trip(
    model: Transformer, reference: Any, auto_class: Any, folder: Path, run: Any, expected: Tensor, atol: float
) -> None:
    """Saved by danlu, opened by `transformers`: no tensor missing or left over, and the same numbers."""
    save_model(model, folder)
    again, info = auto_class.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert type(again) is type(reference)
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    assert not info["mismatched_keys"], info["mismatched_keys"]
    with torch.no_grad():
        close(first(run(again.eval())), expected, atol, "saved by danlu")


def check_gradients(model: Transformer, reference: Any, run: Any, folder: Path, atol: float) -> None:
    """The gradients of a loss, compared under the names of the checkpoint: each model is saved with its gradients in
    place of its weights."""
    loss_of(run(model)).backward()
    loss_of(run(reference)).backward()
    with torch.no_grad():
        for p in {*model.parameters(), *reference.parameters()}:
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
            p.grad = None
    ours = checkpoint_tensors(model, family_of(model.hf_config["model_type"]), torch.float32)
    reference.save_pretrained(folder / "gradients")
    theirs = load_file(folder / "gradients" / "model.safetensors")
    assert ours.keys() <= theirs.keys()
    assert max(g.abs().max() for g in ours.values()) > 1e-3
    for name, gradient in ours.items():
        close(gradient, theirs[name], atol, f"gradient of {name}")


def loss_of(output: Any) -> Tensor:
    """A loss that every output has a part in."""
    logits = first(output)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)) / logits.numel() ** 0.5
    return (logits.float().log_softmax(-1) * weights).sum()


def first(output: Any) -> Tensor:
    """The logits of either side's output."""
    return output if isinstance(output, Tensor) else output[0]


def close(ours: Tensor, theirs: Tensor, atol: float, what: str) -> None:
    difference = (ours - theirs).abs().max().item()
    assert difference < atol, f"{what}: differs by {difference:.2e}"
