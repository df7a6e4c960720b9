"""Adapters as the engine applies them: to the tokens of some sequences of a batch, beside weights that stay.

y = W x + B A x                        LoRA; the factor s is in B
y = m (W + B A) x / ||W + B A||        DoRA; the norm is that of each row
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danlu.adapters.lora import LoRALinear, LowRank
from danlu.adapters.open import makes_up_for_4_bits, trained_in
from danlu.adapters.peft_folder import BASE, WEIGHTS, load_adapter
from danlu.adapters.wrapper import wrappers
from danlu.console import warn
from danlu.errors import DanluError
from danlu.formats.safetensors_header import read_header
from danlu.models.causal_lm import CausalLM
from danlu.nn.config import ModelConfig

_NAME = "served"


@dataclass(frozen=True, eq=False)
class Update:
    """What an adapter adds to one linear layer.

    Attributes:
        a: (rank, in) fp32.
        b: (out, rank) fp32, the factor alpha / rank in it.
        magnitude: of DoRA, the length of each row of the sum, (out,) fp32.
    """

    a: Tensor
    b: Tensor
    magnitude: Tensor | None


def read_updates(folder: str | Path, config: ModelConfig, hf_config: Mapping[str, Any]) -> dict[str, Update]:
    """An adapter in PEFT's layout, by our names of the linear layers it changes.

    Args:
        config: the shape of the base model.
        hf_config: its `config.json`, which tells the family, and so the names.

    Raises:
        DanluError: it does not fit the model, or has what only a merged model has: rows of its own for some tokens, or
            a head's own weights.
    """
    weights = Path(folder) / WEIGHTS
    if weights.is_file() and any(name.endswith(BASE) for name in read_header(weights).entries):
        raise DanluError(
            f"{folder}: holds the head's own weights besides an update of them, which belong to one base model alone; "
            f"merge it: danlu merge BASE {folder} --out OUT"
        )
    if makes_up_for_4_bits(folder):
        raise DanluError(
            f"{folder}: makes up for what 4 bits have lost of its base, and cannot be added to other weights; "
            f"merge it: danlu merge BASE {folder} --out OUT, or train it with adapter_start=zero"
        )
    model = _weightless(config, hf_config)
    load_adapter(model, folder, name=_NAME)
    found = {}
    for place, wrapper in wrappers(model).items():
        if not isinstance(wrapper, LoRALinear):
            raise DanluError(
                f"{folder}: trains the embeddings of tokens, which no sequence of a batch has for itself; "
                f"merge it: danlu merge BASE {folder} --out OUT"
            )
        adapter = wrapper.adapters[_NAME]
        assert isinstance(adapter, LowRank)
        magnitude = None if adapter.magnitude is None else adapter.magnitude.detach()
        found[place] = Update(adapter.a.detach(), adapter.scale * adapter.b.detach(), magnitude)
    if trained_in(folder) == "4bit":
        warn(f"{folder}: was trained on its base in 4 bits (NF4), and is added to the weights that are open here")
    return found


def _weightless(config: ModelConfig, hf_config: Mapping[str, Any]) -> CausalLM:
    """A model to find an adapter's places in; all its weights are one and the same zero."""
    with torch.device("meta"):
        model = CausalLM(config)
    model.hf_config = dict(hf_config)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(()).expand(p.shape), requires_grad=False))
    return model
