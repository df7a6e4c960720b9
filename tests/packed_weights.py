"""A model's weights in the blocks of a GGUF type."""

from __future__ import annotations

import torch
from torch import Tensor

from danlu.formats.gguf_blocks import PackedTensor, dequantize, quantize
from danlu.models.causal_lm import CausalLM
from danlu.nn.linear import Linear


def packed(model: CausalLM, kind: str) -> dict[str, Tensor | PackedTensor]:
    """Its weights in blocks; the model itself gets the same numbers."""
    weights: dict[str, Tensor | PackedTensor] = dict(model.named_parameters())
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Linear) or name == "embed":
                shape = tuple(module.weight.shape)
                blocks = quantize(module.weight, kind)
                weights[f"{name}.weight"] = PackedTensor(kind, shape, blocks)
                module.weight.copy_(dequantize(blocks, kind, shape))
    return weights
