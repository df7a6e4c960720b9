"""Adapters with random weights, for models in memory, and the model that each makes of its base."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from danlu.adapters.config import AdapterShape, Kind
from danlu.adapters.lora import attach, merge
from danlu.adapters.peft_folder import load_adapter, save_adapter
from danlu.adapters.wrapper import is_adapter, unwrap
from danlu.models.causal_lm import CausalLM


def random_adapter(
    model: CausalLM,
    folder: Path,
    rank: int,
    targets: tuple[str, ...] = ("all-linear",),
    kind: Kind = "lora",
    token_ids: tuple[int, ...] = (),
    seed: int = 0,
) -> Path:
    """An adapter folder for a model; what begins as zero is random, too."""
    adapted = copy.deepcopy(model)
    attach(adapted, AdapterShape(kind, rank, targets=targets, token_ids=token_ids), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if is_adapter(name) and name.endswith(".b"):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3 / rank**0.5)
            elif is_adapter(name) and name.endswith(".magnitude"):
                p.mul_(1 + 0.2 * torch.randn(p.shape, generator=generator))
    save_adapter(adapted, folder, base=None)
    return folder


def merged(model: CausalLM, folder: Path) -> CausalLM:
    """A copy of a model with an adapter in its weights."""
    adapted = copy.deepcopy(model)
    load_adapter(adapted, folder)
    merge(adapted)
    unwrap(adapted)
    return adapted.eval()
