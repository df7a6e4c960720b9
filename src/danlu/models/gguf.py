"""GGUF files as model folders: the `config.json` that says the same, and the weights under Hugging Face's names.

The families then open both alike. What a file says in its metadata comes from outside: every key of its architecture is
honoured or refused by name.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from danlu.errors import DanluError
from danlu.formats.gguf_blocks import PackedTensor, dequantize
from danlu.formats.weights import TensorInfo, Weights
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

MAX_LAYERS, MAX_EXPERTS = 10_000, 10_000

FREQUENCIES = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"

# The 27B models of Gemma scale scores by dim / heads; llama.cpp knows them by their number of layers.
LARGE_GEMMA_LAYERS = {"gemma2": 46, "gemma3": 62}

_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}


class Stored(Protocol):
    """What is needed of a :class:`danlu.formats.gguf_file.GGUFFile`."""

    @property
    def path(self) -> Path:
        """What was opened."""

    @property
    def metadata(self) -> dict[str, Any]:
        """Key -> value."""

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Name -> what is known of the tensor."""

    def tensor(self, name: str) -> Tensor:
        """A tensor, dequantised to fp32 where it is quantised."""

    def packed(self, name: str) -> PackedTensor:
        """A tensor as its bytes lie in the file."""


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


class Metadata:
    """The metadata of a file's architecture, and which of its keys have been read."""

    def __init__(self, file: Stored) -> None:
        self.path, self._all = file.path, file.metadata
        kind = self._all.get("general.type", "model")
        if kind != "model":
            raise DanluError(f"{file.path}: is of the type {kind!r}, not a model")
        architecture = self._all.get("general.architecture")
        if not isinstance(architecture, str):
            raise DanluError(f"{file.path}: names no architecture (general.architecture)")
        self.architecture = architecture
        self._read: set[str] = set()

    def error(self, key: str, message: str) -> DanluError:
        """An error that names file and key."""
        return DanluError(f"{self.path}: {self.architecture}.{key} {message}")

    def get(self, key: str) -> Any:
        """The value of a key, None where it is absent; the architecture stands in front of the key."""
        self._read.add(key)
        return self._all.get(f"{self.architecture}.{key}")

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = 2**31 - 1) -> int:
        """A whole number; required without a default. A list that says the same for every layer counts as one."""
        value = self.get(key)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, list):
            raise self.error(key, "differs from layer to layer, which is not supported")
        if value is None and default is not None:
            return default
        if value is None:
            raise self.error(key, "is missing")
        if type(value) is not int or not least <= value <= most:
            raise self.error(key, f"is {value!r:.60}; expected a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; required without a default."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.error(key, "is missing")
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.error(key, f"is {value!r:.60}; expected a number")
        return shortest(float(value))

    def only(self, key: str, *values: Any) -> None:
        """Refuse a value that cannot be honoured; absent ones can."""
        value = self.get(key)
        if value is not None and value not in values:
            expected = " or ".join(map(repr, values))
            raise self.error(key, f"is {value!r:.60}, which is not supported; supported: {expected}")

    def token_id(self, name: str) -> int | None:
        """The id of a token by its role."""
        value = self._all.get(f"tokenizer.ggml.{name}")
        return value if type(value) is int else None

    def finish(self) -> None:
        """Refuse keys of the architecture that nobody has read. Zero, false and empty stand for their absence."""
        prefix = f"{self.architecture}."
        unread = [
            key
            for key, value in self._all.items()
            if key.startswith(prefix) and key.removeprefix(prefix) not in self._read and value not in (0, False, "", [])
        ]
        if unread:
            raise DanluError(
                f"{self.path}: {', '.join(sorted(unread))}: not known for this architecture, and may change what the "
                "model computes"
            )


def shortest(value: float) -> float:
    """The shortest decimal that is the same number in fp32: 1e-05 where a file says 9.999999747378752e-06."""
    try:
        raw = struct.pack("<f", value)
    except OverflowError:
        return value
    if struct.unpack("<f", raw)[0] != value:
        return value
    return next(short for n in range(6, 18) if struct.pack("<f", short := float(f"{value:.{n}g}")) == raw)


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
    metadata.only("attention.scale", 0.0, _float32(head_dim**-0.5))
    content |= _biases(file, architecture)
    content |= _windows(metadata, architecture, content["num_hidden_layers"])
    content |= _gemma(metadata, content, head_dim)
    content |= _rope(file, metadata, architecture, content, head_dim)
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


# ---- rotary positions


def _rope(
    file: Stored, metadata: Metadata, architecture: Architecture, content: Mapping[str, Any], head_dim: int
) -> dict[str, Any]:
    """``rope_theta`` and its like, which both generations of transformers read."""
    found: dict[str, Any] = {"rope_theta": metadata.number("rope.freq_base", 10_000.0)}
    turned = metadata.integer("rope.dimension_count", head_dim)
    if turned != head_dim or architecture.model_type == "glm4":
        found["partial_rotary_factor"] = turned / head_dim
    if architecture.model_type == "gemma3_text":
        found["rope_local_base_freq"] = metadata.number("rope.freq_base_swa", 10_000.0)
    metadata.get("rope.scaling.finetuned")  # tells of the training
    kind = metadata.get("rope.scaling.type")
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 0.0))
    original = metadata.integer("rope.scaling.original_context_length", 0, least=0)
    attention_factor = metadata.number("rope.scaling.attn_factor", 0.0)
    if LONG_FACTORS in file.infos or SHORT_FACTORS in file.infos:
        found["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": _factors(file, SHORT_FACTORS, turned),
            "long_factor": _factors(file, LONG_FACTORS, turned),
            **({"attention_factor": attention_factor} if attention_factor else {}),
        }
        found["original_max_position_embeddings"] = original or content["max_position_embeddings"]
        return found
    if kind not in (None, "none", "linear", "yarn"):
        raise metadata.error("rope.scaling.type", f"is {kind!r:.60}, which is not supported; supported: linear, yarn")
    if FREQUENCIES in file.infos:
        if factor not in (0.0, 1.0):
            raise metadata.error("rope.scaling.factor", f"comes with {FREQUENCIES}, which scales already")
        dividers = _factors(file, FREQUENCIES, turned)
        if any(divider != 1.0 for divider in dividers):
            scaling = llama3_scaling(dividers, found["rope_theta"], turned, original)
            if scaling is None:
                raise DanluError(f"{file.path}: {FREQUENCIES} scales the positions in another way than Llama 3 does")
            found["rope_scaling"] = scaling
    elif kind == "yarn" and factor not in (0.0, 1.0):
        metadata.only("rope.scaling.yarn_ext_factor", 1.0)
        metadata.only("rope.scaling.yarn_attn_factor", 1.0)
        # llama.cpp multiplies YaRN's own factor, 0.1 ln(s) + 1, by the file's.
        own = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        found["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original or content["max_position_embeddings"],
            "beta_fast": metadata.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": metadata.number("rope.scaling.yarn_beta_slow", 1.0),
            **({"attention_factor": attention_factor * own} if attention_factor not in (0.0, 1.0) else {}),
        }
        return found
    elif kind != "none" and factor not in (0.0, 1.0):
        found["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    if attention_factor not in (0.0, 1.0):
        raise metadata.error("rope.scaling.attn_factor", f"is {attention_factor:g}, which is not supported here")
    return found


def _factors(file: Stored, name: str, turned: int) -> list[float]:
    """A divider for each pair of dimensions."""
    info = file.infos.get(name)
    if info is None or info.shape != (turned // 2,) or info.dtype not in ("F32", "F16", "BF16"):
        raise DanluError(f"{file.path}: {name} must hold {turned // 2} numbers")
    values = file.tensor(name).float()
    if not (values.isfinite() & (values > 0)).all():
        raise DanluError(f"{file.path}: {name} must hold positive numbers")
    return [shortest(value) for value in values.tolist()]


def llama3_scaling(dividers: Sequence[float], base: float, turned: int, original: int = 0) -> dict[str, Any] | None:
    """Llama 3.1's parameters that give these dividers of the frequencies, None if none do.

    Between the ends the divider d of frequency f mixes 1 and the factor s: (1/d - 1/s) / (1 - 1/s) =
    (original f / 2 pi - low) / (high - low), a straight line in f. Its slope and its zero are all there is to know: the
    three parameters may be scaled together, so ``original`` is free to choose.

    Args:
        dividers: one for each pair of dimensions, frequencies falling.
        base: of the rotary positions.
        turned: how many dimensions of a head are turned.
        original: the trained context, if it is known.
    """
    original = original or 8192  # of every Llama 3
    factor = max(dividers)
    candidates = [(1.0, 4.0)]
    turns = [original * base ** (-2 * i / turned) / (2 * math.pi) for i in range(turned // 2)]
    points = [
        (turn, (1 / divider - 1 / factor) / (1 - 1 / factor))
        for turn, divider in zip(turns, dividers, strict=True)
        if 1.0 < divider < factor
    ]
    if len(points) >= 2:
        (x0, y0), (x1, y1) = points[0], points[-1]
        width = (x0 - x1) / (y0 - y1) if y0 != y1 else math.inf
        low = x0 - y0 * width
        candidates.append((float(f"{low:.4g}"), float(f"{low + width:.4g}")))
        candidates.append((low, low + width))
    for low, high in candidates:
        if 0 < low < high and _is_llama3(dividers, turns, factor, low, high):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    return None


def _is_llama3(dividers: Sequence[float], turns: Sequence[float], factor: float, low: float, high: float) -> bool:
    found = llama3_dividers(turns, factor, low, high)
    return all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(found, dividers, strict=True))


def llama3_dividers(turns: Sequence[float], factor: float, low: float, high: float) -> list[float]:
    """What Llama 3.1 divides each frequency by.

    Args:
        turns: how often each pair of dimensions turns within the original context.
        factor, low, high: ``factor``, ``low_freq_factor`` and ``high_freq_factor``.
    """
    mixed = [min(max((turn - low) / (high - low), 0.0), 1.0) for turn in turns]
    return [1 / ((1 - share) / factor + share) for share in mixed]


def _float32(value: float) -> float:
    found: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return found


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
