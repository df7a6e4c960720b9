"""Runs batches on the CPU with the native kernels: a whole step in one call, on weights that stay packed."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from danlu.adapters.peft_config import read_peft_config
from danlu.adapters.wrapper import effective_weights, wrappers
from danlu.engine.adapters import Update, read_updates
from danlu.engine.batch import Batch, kv_groups
from danlu.engine.packed import Arena, Matrix, huge_pages, pack
from danlu.errors import DanluError
from danlu.formats.gguf_blocks import PackedTensor, dequantize
from danlu.kernels import native
from danlu.models.causal_lm import CausalLM
from danlu.models.load import read_hf_config, stored_weights
from danlu.nn.config import ModelConfig, Rope
from danlu.nn.rope import frequencies

Weights = Mapping[str, Tensor | PackedTensor]
Floats = npt.NDArray[np.float32]

MATRICES = {
    "q": "attention.q_proj",
    "k": "attention.k_proj",
    "v": "attention.v_proj",
    "o": "attention.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = {
    "attention_norm": "attention_norm",
    "mlp_norm": "mlp_norm",
    "post_attention_norm": "post_attention_norm",
    "post_mlp_norm": "post_mlp_norm",
    "q_norm": "attention.q_norm",
    "k_norm": "attention.k_norm",
}


def why_not(config: ModelConfig) -> str | None:
    """Why the kernels cannot run a model of this shape here; None where they can."""
    path, reason = native.choose()
    if path is None:
        return reason
    missing = {
        "LayerNorm": config.norm != "rms" or not config.final_norm or config.embed_norm,
        f"{config.arrangement} blocks": config.arrangement not in ("pre", "sandwich", "branch"),
        "a feed-forward network without gate": not config.gated,
        "a mixture of experts": config.experts is not None,
        "positions in the scores": config.alibi is not None or config.relative_buckets > 0,
        "learned positions": config.learned_positions,
        "attention in both directions": not config.causal or config.cross_attention or config.token_types > 0,
        f"heads of {config.head_dim}, no multiple of {native.TILE} up to {native.MOST_HEAD_DIM}": (
            config.head_dim % native.TILE > 0 or config.head_dim > native.MOST_HEAD_DIM
        ),
        f"{config.n_heads // config.n_kv_heads} query heads a key head": config.n_heads // config.n_kv_heads > 256,
    }
    found = [what for what, is_so in missing.items() if is_so]
    return None if not found else f"no kernel for {', '.join(found)}"


def weights_in_use(model: CausalLM) -> dict[str, Tensor]:
    """What a model multiplies with: matrices rounded to its compute dtype, its active adapter put into them.

    With an adapter they stay as wide as they are stored: what it adds may be less than their rounding.
    """
    found, dtype = effective_weights(model), model.compute_dtype
    if dtype is None or wrappers(model):
        return found
    return {name: weight.to(dtype) if weight.ndim == 2 else weight for name, weight in found.items()}


class NativeRunner:
    """See :class:`danlu.engine.batch.Runner`.

    Args:
        weights: by our names, floats or the blocks of a GGUF file. They are copied; :meth:`update` copies others.
        kv_dtype: of the cache; auto: fp32 beside fp32 weights, else bf16.
        weight_dtype: what float matrices are turned into: int8 (Q8_0), int4 (Q4_1), or none: kept.
        threads: default as torch has them.
        only_copy: the weights are for this runner alone; see :func:`danlu.engine.packed.pack`.
        hf_config: tells the model's `config.json`, by which the names in an adapter are understood.

    Attributes:
        adapters: by name.

    Raises:
        DanluError: the kernels are not there or do not cover the model; see :func:`why_not`.
    """

    block_size = native.TILE
    device = torch.device("cpu")

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        kv_dtype: Literal["auto", "fp32", "bf16", "int8"] = "auto",
        weight_dtype: Literal["int8", "int4"] | None = None,
        threads: int | None = None,
        only_copy: bool = False,
        hf_config: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        if reason := why_not(config):
            raise DanluError(f"the native kernels cannot run this model: {reason}")
        library, (self.path, _) = native.library(), native.choose()
        assert library is not None
        assert self.path is not None
        self._library = library
        self.config, self.groups = config, kv_groups(config)
        self.threads = threads or torch.get_num_threads()
        self._blocks = None if weight_dtype is None else {"int8": "Q8_0", "int4": "Q4_1"}[weight_dtype]
        self._ropes = _Ropes(config)
        self._step: int | None = None
        self.adapters: Mapping[str, _Adapter] = {}
        self._hf_config = hf_config
        self._caches: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]] = []
        self._build(weights, only_copy=only_copy)
        if kv_dtype == "auto":
            kv_dtype = "fp32" if self._matrices[0].kind == "F32" else "bf16"
        self.kv_dtype = kv_dtype
        self._open()

    @classmethod
    def open(cls, path: str | Path, **options: Any) -> NativeRunner:
        """A model folder or GGUF file, its weights as they are stored."""
        return cls(*stored_weights(path), **options, only_copy=True, hf_config=partial(read_hf_config, path))

    @classmethod
    def of(cls, model: CausalLM, **options: Any) -> NativeRunner:
        """A model in memory, see :func:`weights_in_use`."""
        return cls(model.config, weights_in_use(model), hf_config=model.hf_config.copy, **options)

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights; each step reads those of the layers and the head once."""
        return sum(matrix.n_bytes for matrix in self._matrices)

    def update(self, weights: Weights) -> None:
        """Take other weights for the same shape: between the steps of a trainer that samples from its model."""
        self.close()
        self._build(weights)
        self._open()

    def close(self) -> None:
        """Ends the threads."""
        if self._step is not None:
            self._library.danlu_close(self._step)
            self._step = None

    def __del__(self) -> None:
        if getattr(self, "_step", None) is not None:
            self.close()

    # ---- the protocol

    def block_bytes(self, group: int) -> int:
        return 2 * len(self.groups[group].layers) * self.config.n_kv_heads * self._head_bytes()

    def _head_bytes(self) -> int:
        """Keys or values of one head in one block."""
        values = native.TILE * self.config.head_dim
        return {"fp32": 4 * values, "bf16": 2 * values, "int8": values + 4 * native.TILE}[self.kv_dtype]

    def allocate(self, n_blocks: Sequence[int], *, reserve: bool = False) -> None:
        width = self.config.n_kv_heads * self._head_bytes()
        shapes = [(n, len(group.layers), width) for group, n in zip(self.groups, n_blocks, strict=True)]
        self._caches = [
            (huge_pages(math.prod(shape)).reshape(shape), huge_pages(math.prod(shape)).reshape(shape))
            for shape in shapes
        ]
        if reserve:
            for memory in (one for pair in self._caches for one in pair):
                memory.reshape(-1)[:: mmap.PAGESIZE] = 0
        self._cache_structs = (native.Cache * len(self.groups))(
            *(native.Cache(k.ctypes.data, v.ctypes.data, k.shape[1]) for k, v in self._caches)
        )

    def copy_blocks(self, group: int, pairs: Sequence[tuple[int, int]]) -> None:
        for stored in self._caches[group]:
            for source, target in pairs:
                stored[target] = stored[source]

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Read an adapter in PEFT's layout; batches may name it from then on. It stays in fp32.

        Raises:
            DanluError: it does not fit the model, or is DoRA: that needs the rows of the sum, which packed weights have
                only once it is merged.
        """
        if read_peft_config(folder).shape.kind == "dora":
            raise DanluError(
                f"{folder}: is a DoRA adapter, which the native kernels do not apply; merge it (danlu merge), or run "
                "the model on torch (kernels=torch)"
            )
        found = read_updates(folder, self.config, self._hf_config())
        self.adapters = {**self.adapters, name: _Adapter(found, self.config.n_layers)}

    def unload_adapter(self, name: str) -> None:
        """Forget it."""
        self.adapters = {other: adapter for other, adapter in self.adapters.items() if other != name}

    def run(self, batch: Batch) -> Tensor:
        logits = torch.empty(len(batch.logits_at), self.config.vocab_size)
        self._run(batch, logits=logits)
        return logits

    def hidden(self, batch: Batch) -> Tensor:
        hidden = torch.empty(len(batch.logits_at), self.config.dim)
        self._run(batch, hidden=hidden)
        return hidden

    def _run(self, batch: Batch, logits: Tensor | None = None, hidden: Tensor | None = None) -> None:
        cos, sin, rotated = self._ropes(batch)
        tables = [np.ascontiguousarray(table) for table in batch.tables]
        widths = np.array([table.shape[1] for table in tables], np.int32)
        struct = native.Batch(
            n_tokens=len(batch.ids_t),
            n_sequences=batch.n_sequences,
            n_rows=len(batch.logits_at),
            prompt_from=batch.prompt_from,
            ids=batch.ids_t.ctypes.data,
            positions=batch.positions_t.ctypes.data,
            starts=batch.starts_s.ctypes.data,
            rows=batch.logits_at.ctypes.data,
            tables=_pointers(tables),
            table_widths=widths.ctypes.data,
            cos=_pointers(cos),
            sin=_pointers(sin),
            rotated=rotated.ctypes.data,
            caches=self._cache_structs,
            logits=None if logits is None else logits.data_ptr(),
            hidden=None if hidden is None else hidden.data_ptr(),
            adapters=self._adapters_of(batch),
        )
        if not self._library.danlu_run(self._step, ctypes.byref(struct)):
            raise DanluError(f"out of memory in a step of {len(batch.ids_t)} tokens; lower the token budget")

    def _adapters_of(self, batch: Batch) -> ctypes.Array[Any] | None:
        """A pointer for each sequence, null for those without an adapter; None where all are."""
        if not any(batch.adapters):
            return None
        found = (ctypes.POINTER(native.Adapter) * batch.n_sequences)()
        for sequence, name in enumerate(batch.adapters):
            if name is not None and name not in self.adapters:
                raise DanluError(f"the adapter {name!r} is asked for, and is not loaded")
            if name is not None:
                found[sequence] = ctypes.pointer(self.adapters[name].struct)
        return found

    # ---- the model as the kernels see it

    def _open(self) -> None:
        self._model.cache_kind = native.CACHE_KINDS.index(self.kv_dtype)
        self._step = self._library.danlu_open(ctypes.byref(self._model), self.threads)
        if not self._step:
            raise DanluError("the native kernels could not start their threads; give fewer threads")

    def _build(self, weights: Weights, *, only_copy: bool = False) -> None:
        config = self.config
        self._only_copy = only_copy
        self._matrices: list[Matrix] = []
        self._arena = Arena()
        self._vectors: list[Floats] = []
        head = "embed" if config.tie_embeddings else "head"
        embed = self._matrix(weights, "embed")
        layers = (native.Layer * config.n_layers)(*(self._layer(weights, i) for i in range(config.n_layers)))
        self._model = native.Model(
            layers=layers,
            embed=embed,
            head=embed if config.tie_embeddings and not config.head_bias else self._matrix(weights, head, "head"),
            norm=self._vector(weights, "norm.weight", config.norm_offset),
            n_layers=config.n_layers,
            dim=config.dim,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            ffn_dim=config.ffn_dim,
            activation=native.ACTIVATIONS.index(config.activation),
            qk_norm=native.QK_NORMS.index(config.qk_norm),
            norm_eps=config.norm_eps,
            attention_softcap=config.attention_softcap or 0,
            logit_softcap=config.logit_softcap or 0,
            embed_scale=config.embed_scale or 1,
            head_scale=config.head_scale or 1,
        )
        self._layers = layers  # the model points to it

    def _layer(self, weights: Weights, i: int) -> native.Layer:
        config, prefix = self.config, f"layers.{i}."
        group = next(g for g, group in enumerate(self.groups) if i in group.layers)
        rope = config.rope_of(i)
        layer = native.Layer(
            scale=(config.attention_scale or config.head_dim**-0.5) / (i + 1 if config.attention_scale_by_layer else 1),
            group=group,
            layer_in_group=self.groups[group].layers.index(i),
            window=config.window_of(i) or 0,
            rope=-1 if rope is None else self._ropes.ropes.index(rope),
            interleaved=rope is not None and rope.interleaved,
        )
        for field, name in MATRICES.items():
            setattr(layer, field, self._matrix(weights, prefix + name))
        for field, name in NORMS.items():
            setattr(layer, field, self._vector(weights, f"{prefix}{name}.weight", config.norm_offset))
        return layer

    def _matrix(self, weights: Weights, name: str, bias_of: str | None = None) -> native.Weight:
        matrix = pack(weights[f"{name}.weight"], self._arena, self._blocks, only_copy=self._only_copy)
        self._matrices.append(matrix)
        bias = self._array(weights, f"{bias_of or name}.bias")
        return matrix.as_weight(bias)

    def _vector(self, weights: Weights, name: str, offset: bool) -> int | None:
        array = self._array(weights, name)
        if array is None:
            return None
        if offset:  # stored as the difference from one
            array += 1
        return array.ctypes.data

    def _array(self, weights: Weights, name: str) -> Floats | None:
        value = weights.get(name)
        if value is None:
            return None
        if isinstance(value, PackedTensor):
            value = dequantize(value.data, value.kind, value.shape)
        array: Floats = value.detach().float().numpy().copy()
        self._vectors.append(array)
        return array


def _pointers(arrays: Sequence[npt.NDArray[np.generic]]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))


class _Adapter:
    """An adapter as the kernels see it.

    Attributes:
        struct: points into memory that this object holds.
    """

    def __init__(self, updates: Mapping[str, Update], n_layers: int) -> None:
        arena, self._matrices = Arena(), list[Matrix]()
        layers = (native.AdapterLayer * n_layers)()
        fields = {name: field for field, name in MATRICES.items()}
        self.struct = native.Adapter(layers=layers, rank=max(len(update.a) for update in updates.values()))
        for place, update in updates.items():
            a, b = pack(update.a, arena), pack(update.b, arena)
            self._matrices += [a, b]
            packed = native.LowRank(a.as_weight(), b.as_weight())
            if place == "head":
                self.struct.head = packed
            else:
                _, layer, name = place.split(".", 2)
                setattr(layers[int(layer)], fields[name], packed)


class _Ropes:
    """cos and sin of a batch's positions, for each kind of rotation that occurs."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        found = {rope for layer in range(config.n_layers) if (rope := config.rope_of(layer)) is not None}
        self.ropes = sorted(found, key=repr)
        self._known: dict[tuple[int, int], tuple[Floats, float]] = {}
        self._rotated = np.array([rope.dim or config.head_dim for rope in self.ropes], np.int32)

    def __call__(self, batch: Batch) -> tuple[list[Floats], list[Floats], npt.NDArray[np.int32]]:
        cos, sin = [], []
        for number, rope in enumerate(self.ropes):
            if rope.scaling is not None and rope.scaling.kind in ("dynamic", "longrope"):
                lengths = np.repeat(batch.rope_lengths_s, np.diff(batch.starts_s))
                each = {n: self._frequencies(number, rope, n) for n in set(batch.rope_lengths_s.tolist())}
                angles = batch.positions_t[:, None].astype(np.float32) * np.stack(
                    [each[n][0] for n in lengths.tolist()]
                )
                factor = next(iter(each.values()))[1]
            else:
                inverse, factor = self._frequencies(number, rope, 0)
                angles = batch.positions_t[:, None].astype(np.float32) * inverse
            cos.append(np.cos(angles) * np.float32(factor))
            sin.append(np.sin(angles) * np.float32(factor))
        return cos, sin, self._rotated

    def _frequencies(self, number: int, rope: Rope, length: int) -> tuple[Floats, float]:
        key = (number, length)
        if key not in self._known:
            inverse, factor = frequencies(rope, self.config.head_dim, self.config.context, length)
            self._known[key] = (inverse.numpy(), factor)
        return self._known[key]
