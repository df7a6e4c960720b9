"""Tiny random models of `transformers` and adapters of PEFT on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

VOCAB = 80
_SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA: dict[str, Any] = {
    **_SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
_GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_layer": 2, "n_head": 4}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_LLAMA, "attention_bias": True}),
    "llama, tied": ("LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 8}),
    "phi3": ("Phi3Config", _LLAMA),
    "gemma2": ("Gemma2Config", {**_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 7}),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "gpt2": ("GPT2Config", {**_GPT2, "n_embd": 32, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", {**_SMALL, "intermediate_size": 48, "max_position_embeddings": 64}),
    "bloom": ("BloomConfig", {**_GPT2, "hidden_size": 32}),
    "falcon": ("FalconConfig", {**_SMALL, "num_kv_heads": 2, "new_decoder_architecture": True, "bias": True}),
    "falcon, one key head": ("FalconConfig", {**_SMALL, "multi_query": True}),
    "bert": ("BertConfig", {**_SMALL, "intermediate_size": 48, "max_position_embeddings": 64}),
    "roberta": ("RobertaConfig", {**_SMALL, "intermediate_size": 48, "max_position_embeddings": 66}),
}


def save_random(folder: Path, family: str, auto: Any = AutoModelForCausalLM, **options: Any) -> Path:
    """A model of a family with every weight random: biases of zero would hide mistakes."""
    kind, fields = FAMILIES[family]
    torch.manual_seed(0)
    model = auto.from_config(getattr(transformers, kind)(**{**fields, **options}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.mean() * (p.ndim == 1) + torch.randn(p.shape, generator=generator) * 0.15)
    model.save_pretrained(folder)
    return folder


def peft_model(folder: Path, **options: Any) -> Any:
    """A PEFT model on a base, its adapter random and not zero."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **options}
    auto = AutoModelForSequenceClassification if options.get("task_type") == "SEQ_CLS" else AutoModelForCausalLM
    model = get_peft_model(auto.from_pretrained(folder, attn_implementation="eager"), LoraConfig(**options))
    randomize(model)
    return model.eval()


def opened_by_peft(base: Path, adapter: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """An adapter folder as PEFT opens it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(auto.from_pretrained(base, attn_implementation="eager", **options), adapter).eval()


def randomize(model: nn.Module, seed: int = 3) -> None:
    """Every trainable weight becomes random: what begins as zero would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(p * (1 + 0.2 * noise) if "magnitude" in name else 0.2 * noise)


def random_ids(*shape: int) -> Tensor:
    """Token ids."""
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def assert_close(ours: Tensor, theirs: Tensor, atol: float = 1e-4) -> None:
    """Equal up to ``atol``."""
    difference = (ours - theirs).abs().max().item()
    assert difference < atol, f"differs by {difference:.2e}"
