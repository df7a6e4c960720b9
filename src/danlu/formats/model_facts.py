"""What a model is, told by its config.json or GGUF metadata alone, for families danlu runs and those it does not.

Nothing here decides how a model is run; a value that is missing or odd is left out. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danlu import files
from danlu.errors import DanluError

_HF_NAMES = {
    "n_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "dim": ("hidden_size", "n_embd", "d_model", "dim"),
    "n_heads": ("num_attention_heads", "n_head", "n_heads"),
    "n_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "ffn_dim": ("intermediate_size", "n_inner", "ffn_dim"),
    "n_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok", "num_experts_per_token"),
    "vocab_size": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    "window": ("sliding_window",),
    "latent_dim": ("kv_lora_rank",),
}
_GGUF_NAMES = {
    "n_layers": "block_count",
    "dim": "embedding_length",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "ffn_dim": "feed_forward_length",
    "n_experts": "expert_count",
    "experts_per_token": "expert_used_count",
    "vocab_size": "vocab_size",
    "context": "context_length",
    "window": "attention.sliding_window",
    "latent_dim": "attention.kv_lora_rank",
}
_GGUF_TOKENIZERS = {
    "gpt2": "BPE, byte-level",
    "llama": "SentencePiece BPE",
    "bert": "WordPiece",
    "t5": "SentencePiece Unigram",
}

_ENCODERS = ("bert", "roberta", "electra", "deberta", "mpnet", "t5encoder")
"""Words in the names of architectures that read a text at once and keep no cache."""

_WINDOW_PERIOD = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "gemma3n": 5, "gpt-oss": 2, "gpt_oss": 2, "cohere2": 4}
"""Every n-th layer of these sees everything, the others the window, where the file itself does not tell."""

_WINDOW_EVERYWHERE = ("mistral", "mixtral", "phi3", "starcoder2")

_MAX_LAYERS = 100_000


@dataclass(frozen=True)
class ModelFacts:
    """Hyper-parameters; None is not told. A tuple has a value for each layer.

    Attributes:
        windows: for each layer the most positions its KV cache keeps: None is all, 0 is a layer without attention.
        latent_dim: rank of multi-head latent attention, whose cache is not keys and values.
    """

    architecture: str | None = None
    n_layers: int | None = None
    dim: int | None = None
    n_heads: int | tuple[int, ...] | None = None
    n_kv_heads: int | tuple[int, ...] | None = None
    head_dim: int | None = None
    ffn_dim: int | tuple[int, ...] | None = None
    n_experts: int | None = None
    experts_per_token: int | None = None
    vocab_size: int | None = None
    context: int | None = None
    window: int | None = None
    rope_base: float | None = None
    latent_dim: int | None = None
    windows: tuple[int | None, ...] | None = None

    def kv_cache_bytes(self, context: int) -> int | None:
        """Bytes of the KV cache of one sequence in fp16 or bf16, None where it has none or it cannot be told."""
        if not isinstance(self.n_layers, int) or self.n_kv_heads is None or self.head_dim is None or self.latent_dim:
            return None
        if any(word in (self.architecture or "").lower() for word in _ENCODERS):
            return None
        return kv_cache_bytes(self.n_layers, self.n_kv_heads, self.head_dim, context, windows=self.windows)


@dataclass(frozen=True)
class TokenizerFacts:
    """What is known of a tokenizer; None is not told."""

    kind: str
    vocab_size: int | None
    chat_template: bool


def kv_cache_bytes(
    n_layers: int,
    n_kv_heads: int | Sequence[int],
    head_dim: int,
    context: int,
    *,
    windows: Sequence[int | None] | None = None,
    element_bytes: float = 2,
    batch: int = 1,
) -> int:
    """Size of a KV cache: for every layer 2 (keys, values) x heads x head_dim x positions.

    Args:
        n_kv_heads: of every layer, or one number for each.
        context: positions a sequence has.
        windows: for each layer the most positions it keeps: None for all, 0 for a layer without attention.
        element_bytes: 2 for fp16 and bf16, 1 for fp8.
        batch: sequences.
    """
    heads = [n_kv_heads] * n_layers if isinstance(n_kv_heads, int) else n_kv_heads
    kept = [context if window is None else min(context, window) for window in windows or [None] * n_layers]
    cells = sum(n * positions for n, positions in zip(heads, kept, strict=True))
    return round(2 * cells * head_dim * batch * element_bytes)


def facts_from_hf(content: Mapping[str, Any]) -> ModelFacts:
    """Facts from a config.json; from its text part, where a model has several."""
    part = content.get("text_config")
    merged = {**content, **part} if isinstance(part, dict) else dict(content)
    found = {ours: next((merged[name] for name in names if name in merged), None) for ours, names in _HF_NAMES.items()}
    architectures = content.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    rope = merged.get("rope_parameters")
    rope_base = merged.get("rope_theta", rope.get("rope_theta") if isinstance(rope, dict) else None)
    model_type = merged.get("model_type")
    facts = _clean({**found, "architecture": first or content.get("model_type"), "rope_base": rope_base})
    if not isinstance(facts["n_layers"], int):
        return ModelFacts(**facts)
    return ModelFacts(**facts, windows=_hf_windows(merged, model_type, facts["n_layers"], facts["window"]))


def facts_from_gguf(metadata: Mapping[str, Any]) -> ModelFacts:
    """Facts from the metadata of a GGUF file."""
    architecture = metadata.get("general.architecture")
    found = {ours: metadata.get(f"{architecture}.{name}") for ours, name in _GGUF_NAMES.items()}
    tokens = metadata.get("tokenizer.ggml.tokens")
    found["vocab_size"] = len(tokens) if isinstance(tokens, list) else found["vocab_size"]
    found |= {"architecture": architecture, "rope_base": metadata.get(f"{architecture}.rope.freq_base")}
    facts = _clean(found)
    if not isinstance(facts["n_layers"], int):
        return ModelFacts(**facts)
    pattern = metadata.get(f"{architecture}.attention.sliding_window_pattern", _WINDOW_PERIOD.get(str(architecture)))
    return ModelFacts(**facts, windows=_windows(pattern, facts["n_layers"], facts["window"]))


def _clean(found: dict[str, Any]) -> dict[str, Any]:
    """Only what is of the right type and size, and what follows from the rest: heads share their dims evenly, and
    without grouping every head has its own keys."""
    facts: dict[str, Any] = dict.fromkeys((*_HF_NAMES, "architecture", "rope_base"))
    for key, value in found.items():
        layered = isinstance(value, list) and key in ("n_heads", "n_kv_heads", "ffn_dim")
        if key == "architecture":
            facts[key] = value if isinstance(value, str) else None
        elif key == "rope_base":
            facts[key] = float(value) if type(value) in (int, float) else None
        elif layered and value and all(type(item) is int and 0 <= item < 2**31 for item in value):
            facts[key] = value[0] if len(set(value)) == 1 else tuple(value)
        elif type(value) is int and 0 < value < 2**31:
            facts[key] = value
    layers = facts["n_layers"]
    if layers is not None and layers > _MAX_LAYERS:
        facts["n_layers"] = layers = None
    for key in ("n_heads", "n_kv_heads", "ffn_dim"):
        if isinstance(facts[key], tuple) and len(facts[key]) != layers:
            facts[key] = None
    if facts["head_dim"] is None and facts["dim"] and isinstance(facts["n_heads"], int):
        facts["head_dim"] = facts["dim"] // facts["n_heads"]
    if facts["n_kv_heads"] is None:
        facts["n_kv_heads"] = facts["n_heads"]
    return facts


def _hf_windows(
    config: Mapping[str, Any], model_type: Any, n_layers: int, window: int | None
) -> tuple[int | None, ...] | None:
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == n_layers:
        kept = {"full_attention": None, "sliding_attention": window, "chunked_attention": window}
        return tuple(kept.get(kind, 0) if isinstance(kind, str) else None for kind in kinds)
    if window is None or config.get("use_sliding_window") is False:
        return None
    if config.get("use_sliding_window") is True:  # Qwen2: the first layers see everything
        first = config.get("max_window_layers")
        return tuple(window if isinstance(first, int) and layer >= first else None for layer in range(n_layers))
    if model_type in _WINDOW_EVERYWHERE:
        return (window,) * n_layers
    return _windows(config.get("sliding_window_pattern", _WINDOW_PERIOD.get(str(model_type))), n_layers, window)


def _windows(pattern: Any, n_layers: int, window: int | None) -> tuple[int | None, ...] | None:
    """From a truth value for each layer, or n where every n-th layer sees everything."""
    if window is None:
        return None
    if isinstance(pattern, list) and len(pattern) == n_layers:
        return tuple(window if slides else None for slides in pattern)
    if type(pattern) is int and pattern > 0:
        return tuple(window if layer % pattern < pattern - 1 else None for layer in range(n_layers))
    return None


def tokenizer_in_folder(folder: Path) -> TokenizerFacts | None:
    """The tokenizer of a model folder, None if it has none.

    Raises:
        DanluError: one of its files is damaged.
    """
    settings = (
        files.read_json_object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    )
    chat = bool(settings.get("chat_template")) or (folder / "chat_template.jinja").is_file()
    path = folder / "tokenizer.json"
    if path.is_file():
        content = files.read_json_object(path)
        model = content.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(model, dict) or not isinstance(vocab, (dict, list)):
            raise DanluError(f"{path}: is not a tokenizer of the tokenizers library (no model.vocab)")
        kind = str(model.get("type", "BPE"))
        byte_level = "ByteLevel" in _types(content.get("pre_tokenizer")) | _types(content.get("decoder"))
        added = content.get("added_tokens")
        texts = {str(token.get("content")) for token in added if isinstance(token, dict)} if added else set()
        known = (
            vocab if isinstance(vocab, dict) else {str(item[0]) for item in vocab if isinstance(item, list) and item}
        )
        return TokenizerFacts(kind + ", byte-level" * byte_level, len(vocab) + len(texts - set(known)), chat)
    others = {"tokenizer.model": "SentencePiece", "vocab.json": "BPE, byte-level", "vocab.txt": "WordPiece"}
    for name, kind in others.items():
        if (folder / name).is_file():
            return TokenizerFacts(kind, None, chat)
    return None


def tokenizer_in_gguf(metadata: Mapping[str, Any]) -> TokenizerFacts | None:
    """The tokenizer inside a GGUF file, None if it has none."""
    name = metadata.get("tokenizer.ggml.model")
    if not isinstance(name, str) or name == "none":
        return None
    tokens = metadata.get("tokenizer.ggml.tokens")
    size = len(tokens) if isinstance(tokens, list) else None
    return TokenizerFacts(_GGUF_TOKENIZERS.get(name, name), size, bool(metadata.get("tokenizer.chat_template")))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    return files.read_json_object(folder / "config.json")


def _types(part: Any) -> set[str]:
    """The types of a tokenizer's step, and of the steps of a sequence."""
    if not isinstance(part, dict):
        return set()
    steps = [part, *(part.get("pretokenizers") or []), *(part.get("decoders") or [])]
    return {str(step.get("type")) for step in steps if isinstance(step, dict)}
