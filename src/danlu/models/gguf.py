"""GGUF files as model folders: the `config.json` that says the same, and the weights under Hugging Face's names.

The families then open both alike. What a file says in its metadata comes from outside: every key of its architecture is
honoured or refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from danlu.errors import DanluError
from danlu.formats.gguf_blocks import PLAIN_DTYPES, PackedTensor, dequantize
from danlu.formats.weights import TensorInfo, Weights
from danlu.models.gguf_metadata import Metadata, Stored, rounded
from danlu.models.gguf_names import (
    ARCHITECTURES,
    KEYS,
    OPTIONAL_KEYS,
    Architecture,
    Shifted,
    Stacked,
    Turned,
    architecture_of,
)
from danlu.models.gguf_rope import FREQUENCIES, LONG_FACTORS, SHORT_FACTORS, rope_fields

MAX_LAYERS, MAX_EXPERTS = 10_000, 10_000

# The 27B models of Gemma scale scores by dim / heads; llama.cpp knows them by their number of layers.
LARGE_GEMMA_LAYERS = {"gemma2": 46, "gemma3": 62}

_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}


def from_gguf(file: Stored) -> tuple[Weights, dict[str, Any]]:
    """A GGUF file as a model folder holds it.

    Returns:
        The weights under Hugging Face's names, and the content of `config.json`.

    Raises:
        DanluError: the architecture or something it asks for is not supported, or metadata and tensors do not fit.
    """
    metadata = Metadata(file)
    n_experts = metadata.integer("expert_count", 0, least=0, most=MAX_EXPERTS)
    architecture = architecture_of(metadata.architecture, n_experts)
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise DanluError(f"{file.path}: is of the architecture {metadata.architecture!r}; danlu opens {known}")
    content = _config(file, metadata, architecture)
    metadata.finish()
    return HFView(file, architecture, content), content


# ---- config.json


def _config(file: Stored, metadata: Metadata, architecture: Architecture) -> dict[str, Any]:
    """The content of `config.json`."""
    content: dict[str, Any] = {"architectures": [architecture.hf_class], "model_type": architecture.model_type}
    embedding = file.infos.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise DanluError(f"{file.path}: has no matrix token_embd.weight")
    content["vocab_size"] = embedding.shape[0]
    metadata.get("vocab_size")  # said twice: the embedding's rows are what counts
    for key, field in {**KEYS, **architecture.keys}.items():
        if key.endswith("epsilon"):
            content[field] = metadata.number(key)
        elif key in OPTIONAL_KEYS:
            content[field] = metadata.integer(key, content["num_attention_heads"])
        elif key == "feed_forward_length" and "expert_feed_forward_length" in architecture.keys:
            content[field] = metadata.integer(key, metadata.integer("expert_feed_forward_length"))
        else:
            content[field] = metadata.integer(key, most=MAX_LAYERS if key == "block_count" else 2**31 - 1)
    content |= architecture.fixed
    metadata.only("attention.causal", True)
    metadata.only("expert_gating_func", 0, 1)  # 1 is softmax
    metadata.only("expert_weights_scale", 0.0, 1.0)
    metadata.only("expert_weights_norm", True, *([] if architecture.keys else [False]))
    metadata.only("tensor_data_layout", "Meta AI original pth")  # says only how rows are turned, as they always are

    head_dim = _head_dim(metadata, architecture, content)
    metadata.only("attention.scale", 0.0, rounded(head_dim**-0.5))
    content |= _biases(file, architecture)
    content |= _windows(metadata, architecture, content["num_hidden_layers"])
    content |= _gemma(metadata, content, head_dim)
    content |= rope_fields(file, metadata, architecture, content, head_dim)
    content["tie_word_embeddings"] = "output.weight" not in file.infos
    for role, field in _IDS.items():
        if (token_id := metadata.token_id(role)) is not None and token_id < content["vocab_size"]:
            content[field] = token_id
    return content


def _head_dim(metadata: Metadata, architecture: Architecture, content: dict[str, Any]) -> int:
    usual = content["hidden_size"] // content["num_attention_heads"]
    head_dim = metadata.integer("attention.key_length", usual)
    metadata.only("attention.value_length", head_dim)
    if architecture.head_dim == "never" and head_dim != usual:
        raise metadata.error("attention.key_length", f"is {head_dim}; {architecture.model_type} has {usual}")
    if architecture.head_dim == "always" or (architecture.head_dim == "odd" and head_dim != usual):
        content["head_dim"] = head_dim
    return head_dim


def _biases(file: Stored, architecture: Architecture) -> dict[str, Any]:
    """Whether there are biases, where the file tells by its tensors and `config.json` by a field."""
    if architecture.model_type == "llama":
        return {
            "attention_bias": "blk.0.attn_q.bias" in file.infos,
            "mlp_bias": "blk.0.ffn_up.bias" in file.infos,
        }
    return {"attention_bias": "blk.0.attn_q.bias" in file.infos} if architecture.model_type == "glm4" else {}


def _windows(metadata: Metadata, architecture: Architecture, n_layers: int) -> dict[str, Any]:
    if not architecture.window_period:
        return {}
    window = metadata.integer("attention.sliding_window", 4096 if architecture.model_type == "gemma2" else 0, least=0)
    pattern = metadata.get("attention.sliding_window_pattern")
    if pattern is None:
        pattern = architecture.window_period
    if type(pattern) is int and 0 < pattern <= MAX_LAYERS:
        slides = [layer % pattern < pattern - 1 or architecture.window_period == 1 for layer in range(n_layers)]
    elif isinstance(pattern, list) and len(pattern) == n_layers and all(type(item) is bool for item in pattern):
        slides = pattern
    else:
        raise metadata.error("attention.sliding_window_pattern", f"is {pattern!r:.60}; expected how often, or a list")
    if architecture.window_period == 1:  # of Phi-3 every layer has the window, and no list
        return {"sliding_window": window or None}
    kinds = ["sliding_attention" if window and slide else "full_attention" for slide in slides]
    return {"sliding_window": window or None, "layer_types": kinds}


def _gemma(metadata: Metadata, content: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Scale and caps of the scores."""
    name = metadata.architecture
    if name not in LARGE_GEMMA_LAYERS:
        return {}
    large = content["num_hidden_layers"] == LARGE_GEMMA_LAYERS[name]
    scalar = content["hidden_size"] // content["num_attention_heads"] if large else head_dim
    usual = {"gemma2": (50.0, 30.0), "gemma3": (0.0, 0.0)}[name]
    keys = ("attn_logit_softcapping", "final_logit_softcapping")
    caps = {key: metadata.number(key, cap) or None for key, cap in zip(keys, usual, strict=True)}
    return {"query_pre_attn_scalar": scalar, **caps}


# ---- weights


@dataclass(frozen=True)
class _Place:
    """Where a Hugging Face tensor is in the file: the tensor, how it is stored, and which expert of it."""

    name: str
    source: object
    expert: int | None = None


class HFView:
    """The weights of a GGUF file under Hugging Face's names; each is converted when it is asked for."""

    def __init__(self, file: Stored, architecture: Architecture, content: Mapping[str, Any]) -> None:
        self.path, self._file, self._content = file.path, file, content
        self._places: dict[str, _Place] = {}
        self.infos: dict[str, TensorInfo] = {}
        for name, info in file.infos.items():
            if name in (FREQUENCIES, LONG_FACTORS, SHORT_FACTORS) or name.endswith(".attn_rot_embd"):
                continue  # no weights: they are in the config
            self._add(name, info, architecture)

    def _add(self, name: str, info: TensorInfo, architecture: Architecture) -> None:
        layer = re.match(r"blk\.(\d{1,5})\.", name)
        source = architecture.tensors.get(name if layer is None else name.replace(layer[0], "blk.{i}.", 1))
        if source is None or (layer is not None and int(layer[1]) >= self._content["num_hidden_layers"]):
            raise DanluError(f"{self.path}: holds {name}, which models of type {architecture.model_type} do not have")
        theirs = source if isinstance(source, str) else source.theirs
        if layer is not None:
            theirs = theirs.replace("{i}", str(int(layer[1])))
        if not isinstance(source, Stacked):
            self._places[theirs] = _Place(name, source)
            self.infos[theirs] = TensorInfo(theirs, info.dtype, info.shape, info.n_bytes)
            return
        number = self._content.get("num_local_experts", self._content.get("num_experts"))
        if len(info.shape) != 3 or info.shape[0] != number:
            raise DanluError(
                f"{self.path}: {name} has the shape {info.shape}; expected the matrices of {number} experts"
            )
        for expert in range(info.shape[0]):
            one = theirs.replace("{e}", str(expert))
            self._places[one] = _Place(name, source, expert)
            self.infos[one] = TensorInfo(one, info.dtype, info.shape[1:], info.n_bytes // info.shape[0])

    def tensor(self, name: str) -> Tensor:
        """See :class:`danlu.formats.weights.Weights`."""
        if name not in self._places:
            raise DanluError(f"{self.path}: has no tensor for {name}")
        place = self._places[name]
        if place.expert is not None:
            packed = self._file.packed(place.name)
            data = packed.data[place.expert]
            if packed.kind in ("F16", "BF16"):
                return self._file.tensor(place.name)[place.expert]
            return dequantize(data, packed.kind, packed.shape[1:])
        stored = self._file.tensor(place.name)
        if isinstance(place.source, Turned):
            return halves(stored, self._heads(place, stored))
        if isinstance(place.source, Shifted):
            return (stored.float() - 1).to(stored.dtype)
        return stored

    def packed(self, name: str) -> PackedTensor | None:
        """A matrix in the blocks of the file, its rows in Hugging Face's order; None for what is not stored in blocks
        or not as it stands."""
        place = self._places[name]
        if place.expert is not None or isinstance(place.source, Shifted):
            return None
        packed = self._file.packed(place.name)
        if packed.kind in PLAIN_DTYPES or len(packed.shape) != 2:
            return None
        if isinstance(place.source, Turned):
            return replace(packed, data=halves(packed.data, self._heads(place, packed.data)))
        return packed

    def _heads(self, place: _Place, stored: Tensor) -> int:
        assert isinstance(place.source, Turned)
        heads: int = self._content[place.source.heads]
        if stored.shape[0] % (2 * heads):
            raise DanluError(f"{self.path}: {place.name} has {stored.shape[0]} rows, which {heads} heads cannot share")
        return heads


def halves(tensor: Tensor, heads: int) -> Tensor:
    """Rows from llama.cpp's order, in which the two of a rotated pair are neighbours, to Hugging Face's, where they
    are half a head apart."""
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def neighbours(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of :func:`halves`."""
    pairs = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
