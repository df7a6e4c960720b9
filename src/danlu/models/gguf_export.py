"""Models as GGUF: metadata and tensors for :func:`danlu.formats.gguf_write.write_gguf`, each tensor made when its turn
comes.

Nothing is dropped in silence. What was planned is read back by :mod:`danlu.models.gguf`, and the shape that comes out
must be the one that went in; the first difference is what GGUF cannot say of this model.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danlu.errors import DanluError
from danlu.formats.gguf_blocks import BLOCKS, PackedTensor
from danlu.formats.gguf_file import GGUFFile
from danlu.formats.gguf_write import GGUFTensor, Typed
from danlu.formats.weights import TensorInfo, Weights
from danlu.models.causal_lm import CausalLM
from danlu.models.family import Family, family_for
from danlu.models.gguf import from_gguf, neighbours
from danlu.models.gguf_names import MODEL_TYPES, Architecture, Shifted, Source, Stacked, Turned, architecture_for
from danlu.models.gguf_rope import FREQUENCIES, llama3_dividers
from danlu.models.hf_config import HFConfig
from danlu.models.names import rules
from danlu.nn.config import ModelConfig, Rope

PLAIN_KINDS = ("F32", "F16", "BF16")

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K": 14, "BF16": 32}
"""llama.cpp's number for a file that is mostly of a type (Q4_K: its Q4_K_S)."""

FALLBACKS = {"Q4_K": "Q8_0"}
"""The type for rows that are no whole number of the wanted type's blocks; if they are none of its own: F16."""

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_TOKENIZER = "tokenizer.ggml."
_UNUSED = 5  # type of a token that stands for nothing
_MATRICES = re.compile(r"(token_embd|output|blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down)(_exps)?))\.weight")


@dataclass(frozen=True)
class Export:
    """What :func:`danlu.formats.gguf_write.write_gguf` takes.

    Attributes:
        fallbacks: names of the tensors that could not be of the wanted type, with the type they got.
    """

    metadata: dict[str, Any]
    tensors: list[GGUFTensor]
    fallbacks: dict[str, str] = field(default_factory=dict)


def to_gguf(
    weights: Weights, content: Mapping[str, Any], where: str, tokenizer: Mapping[str, Any], kind: str | None, name: str
) -> Export:
    """A model of the Hugging Face layout as GGUF.

    Args:
        weights: under Hugging Face's names.
        content: of `config.json`, which is ``where``.
        tokenizer: its metadata, of :func:`danlu.tokenizer.gguf_export.tokenizer_to_gguf`.
        kind: F32, F16, BF16, Q8_0, Q4_0, Q4_1 or Q4_K for the matrices; None: as stored.
        name: the model's, for people.

    Raises:
        DanluError: the family, or something of this model, cannot be written as GGUF; the message names it.
    """
    family = family_for(content, where)
    found = architecture_for(family.model_type)
    if found is None:
        raise DanluError(
            f"{where}: models of type {family.model_type} cannot be written as GGUF; can be: {', '.join(MODEL_TYPES)}"
        )
    config = _shape(family, content, where, weights)
    arch, architecture = found
    if architecture.tied is not None and config.tie_embeddings != architecture.tied:
        raise DanluError(
            f"{where}: tie_word_embeddings is {config.tie_embeddings}; llama.cpp's {arch} has {architecture.tied} only"
        )
    tensors, fallbacks = _tensors(weights, config, family, content, arch, architecture, kind)
    metadata = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": name,
        **_file_type(kind, [tensor.kind for tensor in tensors]),
        **{f"{arch}.{key}": value for key, value in _hyper_parameters(config, arch, architecture).items()},
        **_padded(tokenizer, config.vocab_size, where),
    }
    _require_same(config, metadata, tensors, where, arch)
    return Export(metadata, tensors, fallbacks)


def requantized(file: GGUFFile, kind: str | None) -> Export:
    """A GGUF file of any architecture with its matrices in another type; what is of the type already is copied.

    Raises:
        DanluError: a tensor's type cannot be read.
    """
    fallbacks: dict[str, str] = {}
    tensors = []
    for name, info in file.infos.items():
        chosen = info.dtype
        if kind is not None and _MATRICES.fullmatch(name):
            chosen = kind_for(name, info.shape, kind, fallbacks)
        make: Callable[[], Tensor | PackedTensor] = partial(file.packed, name)
        if chosen != info.dtype:
            make = partial(file.tensor, name)
        tensors.append(GGUFTensor(name, chosen, info.shape, make))
    metadata = {key: _typed(key, value) for key, value in file.metadata.items()}
    if kind is not None:
        metadata |= _file_type(kind, [tensor.kind for tensor in tensors])
    return Export(metadata, tensors, fallbacks)


def kind_for(name: str, shape: Sequence[int], kind: str, fallbacks: dict[str, str]) -> str:
    """The type of a tensor in a file whose matrices are of type ``kind``.

    Norms, biases and routers stay F32: they are small, and errors there move everything. Embedding and output matrix
    are kept at 8 bits in 4-bit files, as nearly as that comes to llama.cpp's 6.
    """
    if len(shape) == 1 or ".ffn_gate_inp." in name:
        return "F32"
    chosen = "Q8_0" if kind.startswith("Q4") and name in ("token_embd.weight", "output.weight") else kind
    while shape[-1] % BLOCKS[chosen][0]:
        chosen = fallbacks[name] = FALLBACKS.get(chosen, "F16")
    return chosen


def _shape(family: Family, content: Mapping[str, Any], where: str, weights: Weights) -> ModelConfig:
    hf = HFConfig(content, where, frozenset(weights.infos))
    config = family.read(hf)
    hf.finish(family.harmless)
    assert isinstance(config, ModelConfig)  # encoder-decoder models are none of those that are exported
    if problems := config.problems():
        raise hf.error("; ".join(problems))
    return config


# ---- tensors


@dataclass(frozen=True)
class _Target:
    """Where a Hugging Face tensor goes."""

    name: str
    source: Source
    theirs: tuple[str, ...]


def _tensors(
    weights: Weights,
    config: ModelConfig,
    family: Family,
    content: Mapping[str, Any],
    arch: str,
    architecture: Architecture,
    kind: str | None,
) -> tuple[list[GGUFTensor], dict[str, str]]:
    """The tensors of the file, and what could not be of the wanted type."""
    expected = _expected(config, family, content)
    if absent := [name for name in expected if name not in weights.infos]:
        raise DanluError(f"{weights.path}: lacks {absent[0]} ({len(absent)} of {len(expected)} tensors are missing)")
    ignored = list(family.ignored)
    if config.tie_embeddings and _HEAD in weights.infos:
        if not torch.equal(weights.tensor(_HEAD), weights.tensor(_EMBEDDING)):
            raise DanluError(f"{weights.path}: {_HEAD} is not {_EMBEDDING}, which config.json ties it to")
        ignored.append(_HEAD)
    surplus = [
        name
        for name in weights.infos
        if name not in expected and not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored)
    ]
    if surplus:
        raise DanluError(f"{weights.path}: holds {surplus[0]}, which config.json has no place for")
    targets = list(_targets(config, architecture, expected))
    placed = {name for target in targets for name in target.theirs}
    if homeless := [name for name in expected if name not in placed]:
        raise DanluError(f"{weights.path}: {homeless[0]} has no place in GGUF's architecture {arch}")
    fallbacks: dict[str, str] = {}
    tensors = []
    for target in targets:
        shape = expected[target.theirs[0]]
        if (stored := weights.infos[target.theirs[0]].shape) != shape:
            raise DanluError(f"{weights.path}: {target.theirs[0]} has shape {stored}; config.json asks for {shape}")
        if isinstance(target.source, Stacked):
            shape = (len(target.theirs), *shape)
        stored_kind = weights.infos[target.theirs[0]].dtype
        wanted = kind or (stored_kind if stored_kind in PLAIN_KINDS else "F32")
        chosen = kind_for(target.name, shape, wanted, fallbacks)
        tensors.append(GGUFTensor(target.name, chosen, shape, partial(_make, weights, target, config)))
    if dividers := _dividers(config.rope, config.head_dim):
        tensors.insert(0, GGUFTensor(FREQUENCIES, "F32", (len(dividers),), lambda: torch.tensor(dividers)))
    return tensors, fallbacks


def _expected(config: ModelConfig, family: Family, content: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the checkpoint, a tied output matrix left out."""
    with torch.device("meta"):
        model = CausalLM.build(config, family, content)
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    found: dict[str, tuple[int, ...]] = {}
    for names, prefix in ((family.names, family.prefix), (family.heads["causal_lm"], "")):
        for rule in rules(names, config, shapes, prefix):
            made = rule.to_theirs([torch.empty(shapes[name], device="meta") for name in rule.ours])
            found |= {name: tuple(tensor.shape) for name, tensor in zip(rule.theirs, made, strict=True)}
    return found


def _targets(config: ModelConfig, architecture: Architecture, expected: Mapping[str, object]) -> Iterator[_Target]:
    """Every tensor of the file that this checkpoint has the parts of, layer by layer."""
    outer = {name: source for name, source in architecture.tensors.items() if "{i}" not in name}
    inner = {name: source for name, source in architecture.tensors.items() if "{i}" in name}
    lines = [(name, source, 0) for name, source in outer.items()]
    lines += [(name, source, i) for i in range(config.n_layers) for name, source in inner.items()]
    for name, source, i in lines:
        theirs = (source if isinstance(source, str) else source.theirs).replace("{i}", str(i))
        parts: tuple[str, ...] = (theirs,)
        if isinstance(source, Stacked) and config.experts is not None:
            parts = tuple(theirs.replace("{e}", str(e)) for e in range(config.experts.number))
        if all(part in expected for part in parts):
            yield _Target(name.replace("{i}", str(i)), source, parts)


def _make(weights: Weights, target: _Target, config: ModelConfig) -> Tensor:
    """The tensor as the file holds it."""
    if isinstance(target.source, Stacked):
        return torch.stack([weights.tensor(name) for name in target.theirs])
    tensor = weights.tensor(target.theirs[0])
    if isinstance(target.source, Turned):
        queries = target.source.heads == "num_attention_heads"
        return neighbours(tensor, config.n_heads if queries else config.n_kv_heads)
    return tensor.float() + 1 if isinstance(target.source, Shifted) else tensor


# ---- metadata


def _hyper_parameters(config: ModelConfig, arch: str, architecture: Architecture) -> dict[str, Any]:
    """What the architecture's keys say, without the architecture in front."""
    assert config.rope is not None
    found: dict[str, Any] = {
        "block_count": config.n_layers,
        "context_length": config.context,
        "embedding_length": config.dim,
        "feed_forward_length": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.rope.dim or config.head_dim,
        "rope.freq_base": config.rope.base,
        **_scaling(config.rope),
    }
    if config.experts is not None:
        found |= {"expert_count": config.experts.number, "expert_used_count": config.experts.top_k}
        if "expert_feed_forward_length" in architecture.keys:
            found["expert_feed_forward_length"] = config.experts.ffn_dim
    if architecture.window_period > 1 and config.window is not None:  # llama.cpp passes over Phi-3's
        found["attention.sliding_window"] = config.window
        if config.full_layers and (period := config.full_layers[0] + 1) != architecture.window_period:
            found["attention.sliding_window_pattern"] = period
    if config.local_rope is not None and config.local_rope != config.rope:
        found["rope.freq_base_swa"] = config.local_rope.base
    if arch == "gemma2":
        found["attn_logit_softcapping"] = config.attention_softcap or 0.0
    if arch in ("gemma2", "gemma3"):
        found["final_logit_softcapping"] = config.logit_softcap or 0.0
    return found


def _scaling(rope: Rope) -> dict[str, Any]:
    """How positions are stretched; Llama 3's way is a tensor of dividers instead."""
    scaling = rope.scaling
    if scaling is None:
        return {}
    if scaling.kind == "llama3":
        return {"rope.scaling.original_context_length": scaling.original_context}
    found: dict[str, Any] = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    if scaling.kind == "yarn":
        found |= {
            "rope.scaling.original_context_length": scaling.original_context,
            "rope.scaling.yarn_beta_fast": scaling.beta_fast,
            "rope.scaling.yarn_beta_slow": scaling.beta_slow,
        }
        if scaling.attention_factor is not None and scaling.factor > 1:  # beside YaRN's own
            found["rope.scaling.attn_factor"] = scaling.attention_factor / (0.1 * math.log(scaling.factor) + 1)
    return found


def _dividers(rope: Rope | None, head_dim: int) -> list[float]:
    """Llama 3's dividers of the frequencies, empty for models without."""
    if rope is None or rope.scaling is None or rope.scaling.kind != "llama3":
        return []
    scaling, turned = rope.scaling, rope.dim or head_dim
    full_turns = scaling.original_context / (2 * math.pi)
    turns = [full_turns * rope.base ** (-2 * i / turned) for i in range(turned // 2)]
    return llama3_dividers(turns, scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor)


def _file_type(kind: str | None, kinds: Sequence[str]) -> dict[str, Any]:
    """What a file says of its types as a whole."""
    most = kind or max(set(kinds) & FILE_TYPES.keys(), key=kinds.count, default="F32")
    quantized = {"general.quantization_version": 2} if set(kinds) - set(PLAIN_KINDS) else {}
    return {"general.file_type": FILE_TYPES[most], **quantized}


def _padded(tokenizer: Mapping[str, Any], vocab_size: int, where: str) -> dict[str, Any]:
    """The tokenizer's metadata with a token for each row of the embedding, as llama.cpp wants it."""
    found = dict(tokenizer)
    missing = vocab_size - len(found[_TOKENIZER + "tokens"])
    if missing < 0:
        raise DanluError(f"{where}: vocab_size is {vocab_size}, and the tokenizer has {-missing} more tokens than that")
    names = [f"[PAD{i}]" for i in range(vocab_size - missing, vocab_size)]
    for key, more in (("tokens", names), ("token_type", [_UNUSED] * missing), ("scores", [-1e6] * missing)):
        if _TOKENIZER + key in found:
            found[_TOKENIZER + key] = [*found[_TOKENIZER + key], *more]
    return found


def _typed(key: str, value: Any) -> Any:
    """A value of another file as it can be written again: reading has lost the width of numbers."""
    if value == []:
        return Typed("STRING", [])
    if key.endswith("precompiled_charsmap"):
        return Typed("UINT8", value)
    numbers = value if isinstance(value, list) else [value]
    if all(type(item) is int for item in numbers) and not all(-(2**31) <= item < 2**31 for item in numbers):
        return Typed("UINT64" if min(numbers) >= 0 else "INT64", value)
    return value


# ---- the check


@dataclass
class _Planned:
    """A file that is still to be written, to be read back."""

    path: Path
    metadata: dict[str, Any]
    infos: dict[str, TensorInfo]
    made: dict[str, GGUFTensor]

    def tensor(self, name: str) -> Tensor:
        tensor = self.made[name].make()
        assert isinstance(tensor, Tensor)
        return tensor

    def packed(self, name: str) -> PackedTensor:
        raise AssertionError(f"the check reads shapes back, and no blocks: {name}")


def _require_same(
    config: ModelConfig, metadata: dict[str, Any], tensors: Sequence[GGUFTensor], where: str, arch: str
) -> None:
    """Refuse a model of which the file would say something else."""
    made = {tensor.name: tensor for tensor in tensors}
    infos = {name: TensorInfo(name, tensor.kind, tensor.shape, tensor.n_bytes) for name, tensor in made.items()}
    weights, content = from_gguf(_Planned(Path(where), metadata, infos, made))
    again = _shape(family_for(content, where), content, where, weights)
    difference = _difference(_without_idle_window(config), _without_idle_window(again))
    if difference is not None:
        name, ours, theirs = difference
        raise DanluError(
            f"{where}: {name} is {ours!r}, which GGUF's architecture {arch} cannot say (it has {theirs!r}); change the "
            "model, or keep it in the Hugging Face layout"
        )


def _without_idle_window(config: ModelConfig) -> ModelConfig:
    """A window that no sequence outgrows is none, and neither is one that no layer has."""
    never = config.window is None or len(config.full_layers) == config.n_layers
    if never:
        return dataclasses.replace(config, window=None, full_layers=(), local_rope=None)
    assert config.window is not None
    if config.window >= config.context and config.local_rope is None:
        return dataclasses.replace(config, window=None, full_layers=())
    return config


def _difference(ours: Any, theirs: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first field in which two configs differ by more than fp32 rounds."""
    if dataclasses.is_dataclass(ours) and type(ours) is type(theirs):
        for f in dataclasses.fields(ours):
            found = _difference(getattr(ours, f.name), getattr(theirs, f.name), f"{name}.{f.name}".lstrip("."))
            if found is not None:
                return found
        return None
    if isinstance(ours, float) and isinstance(theirs, float):
        return None if math.isclose(ours, theirs, rel_tol=1e-6) else (name, ours, theirs)
    return None if ours == theirs else (name, ours, theirs)
