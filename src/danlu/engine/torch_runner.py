"""Runs the batches of the engine with torch: every model that writes, on every device, through a paged cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.adapters.lora import stored_weight
from danlu.adapters.wrapper import wrappers
from danlu.engine.adapters import Update, read_updates
from danlu.engine.batch import Batch, Ints, kv_groups
from danlu.engine.sources import SourceMemories
from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.models.encoder_decoder import EncoderDecoder
from danlu.nn.paged import PagedKV, PagedStep

Writer = CausalLM | EncoderDecoder

KV_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


class TorchRunner:
    """A :class:`danlu.engine.batch.Runner` for a model in memory. Its weights are read at each run: who trains them
    between two runs has to do nothing. (A source is encoded once: its memory is of the weights of that moment.)

    Of an encoder-decoder, ``config`` and the cache are the decoder's; each sequence of a batch has a source.

    Adapters are applied by hooks, which are there during a run alone: to the model they do nothing. (The lengths that
    DoRA scales rows to are those of the weights when it is loaded, or the model is taken.)

    Attributes:
        adapters: by name.

    Args:
        block_size: tokens a block.
        kv_dtype: of the cached keys and values; "int8" has a scale for each token and head. Default: as the activations
            are.

    Raises:
        DanluError: no such dtype, or no such block size.
    """

    def __init__(
        self,
        model: Writer,
        *,
        block_size: int = 16,
        kv_dtype: torch.dtype | Literal["int8"] | None = None,
    ) -> None:
        dtype = torch.int8 if kv_dtype == "int8" else kv_dtype or model.dtype
        if dtype not in KV_DTYPES:
            raise DanluError(
                f"keys and values cannot be kept as {str(dtype).removeprefix('torch.')}; "
                "float32, float16, bfloat16 and int8 are possible"
            )
        if block_size < 1:
            raise DanluError(f"block_size is {block_size}; a block holds at least one token")
        self.device = model.device
        self.adapters: Mapping[str, Mapping[str, _LayerUpdate]] = {}
        self._updates: dict[str, dict[str, Update]] = {}  # the same, as they were read
        self.take(model)
        self.config = self._stack.config
        self.groups, self.block_size = kv_groups(self.config), block_size
        self._kv = PagedKV(self.config, [group.layers for group in self.groups], block_size, dtype, self.device)

    def take(self, model: Writer) -> None:
        """Run this model, of the same shape, from now on."""
        self.model = model
        self._stack = model.decoder if isinstance(model, EncoderDecoder) else model
        self._sources = SourceMemories(model) if isinstance(model, EncoderDecoder) else None
        for name in self._updates:
            self._apply(name)

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Read an adapter in PEFT's layout, LoRA or DoRA; batches may name it from then on.

        Raises:
            DanluError: it does not fit the model, or the model is an encoder-decoder, or has adapters of its own.
        """
        if isinstance(self.model, EncoderDecoder):
            raise DanluError(f"{folder}: adapters of encoder-decoders are not applied here; merge it (danlu merge)")
        if wrappers(self.model):
            raise DanluError(f"{folder}: the model in memory has adapters of its own; merge them first")
        self._updates[name] = read_updates(folder, self.model.config, self.model.hf_config)
        self._apply(name)

    def _apply(self, name: str) -> None:
        own = {
            place: _LayerUpdate.of(update, self.model.get_submodule(place), self.model.dtype)
            for place, update in self._updates[name].items()
        }
        self.adapters = {**self.adapters, name: own}

    def unload_adapter(self, name: str) -> None:
        """Forget it."""
        self.adapters = {other: own for other, own in self.adapters.items() if other != name}
        del self._updates[name]

    def block_bytes(self, group: int) -> int:
        """Memory of one block of a group, all its layers, keys and values."""
        return self._kv.block_bytes(group)

    @torch.inference_mode()
    def allocate(self, n_blocks: Sequence[int], *, reserve: bool = False) -> None:
        """Make room for so many blocks in each group, and one more for the runner itself; what was cached is lost."""
        self._kv.allocate(n_blocks, reserve=reserve)

    @torch.inference_mode()
    def copy_blocks(self, group: int, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy each (source, target) block of a group."""
        self._kv.copy_blocks(group, pairs)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Store the keys and values of the batch's tokens; logits at ``logits_at``, (rows, vocab) fp32."""
        x_rd = self._rows(batch)
        with self._adapted(batch, of_sequences(batch)[batch.logits_at], head=True):
            return self.model.head(x_rd)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def hidden(self, batch: Batch) -> Tensor:
        """The same run, but the final hidden states at ``logits_at``, (rows, dim) fp32."""
        return self._rows(batch).float()

    def _rows(self, batch: Batch) -> Tensor:
        """Final hidden states at ``logits_at``, in the dtype of the activations."""
        stack = self._stack
        step = PagedStep(
            self._kv, batch.starts_s, batch.positions_t, batch.tables, batch.rope_lengths_s, stack.dtype,
            stack.position_bias,
        )  # fmt: skip
        memory = None if self._sources is None else self._sources.of(step, batch.sources)
        ids_bt = torch.from_numpy(batch.ids_t).to(self.device)[None]
        with self._adapted(batch, of_sequences(batch), head=False):
            x_btd = stack.hidden_states(ids_bt, cache=step, memory=memory)
        return x_btd[0].index_select(0, torch.from_numpy(batch.logits_at).to(self.device))

    @contextmanager
    def _adapted(self, batch: Batch, sequence_r: Ints, *, head: bool) -> Iterator[None]:
        """Have the model, or its head, apply the adapters of a batch.

        Args:
            sequence_r: whose each row of the activations is.
        """
        rows_of: dict[str, Tensor] = {}
        for name in set(batch.adapters) - {None}:
            assert name is not None
            if name not in self.adapters:
                raise DanluError(f"the adapter {name!r} is asked for, and is not loaded")
            with_it = np.array([one == name for one in batch.adapters])
            rows_of[name] = torch.from_numpy(np.flatnonzero(with_it[sequence_r])).to(self.device)
        places: dict[str, list[tuple[Tensor, _LayerUpdate]]] = {}
        for name, rows in rows_of.items():
            for place, update in self.adapters[name].items():
                if (place == "head") == head:
                    places.setdefault(place, []).append((rows, update))
        with ExitStack() as hooks:
            for place, updates in places.items():
                hook = self.model.get_submodule(place).register_forward_hook(_hook(updates))
                hooks.callback(hook.remove)
            yield


def of_sequences(batch: Batch) -> Ints:
    """The sequence that each token of a batch belongs to, (tokens,)."""
    return np.repeat(np.arange(batch.n_sequences, dtype=np.int32), np.diff(batch.starts_s))


class _LayerUpdate(NamedTuple):
    """An :class:`Update` where it is computed: on the model's device and in the dtype of its activations.

    Attributes:
        stretch: of DoRA, m / ||W + B A||, (out,).
    """

    a: Tensor
    b: Tensor
    stretch: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, update: Update, layer: nn.Module, dtype: torch.dtype) -> _LayerUpdate:
        weight, stretch = stored_weight(layer), None
        a, b = update.a.to(weight.device), update.b.to(weight.device)
        if update.magnitude is not None:
            stretch = (update.magnitude.to(weight.device) / (weight + b @ a).norm(dim=1)).to(dtype)
        return cls(a.to(dtype), b.to(dtype), stretch)

    def __call__(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output with the update, in the dtype of ``y``."""
        y = y + F.linear(F.linear(x, self.a), self.b).to(y.dtype)
        if self.stretch is None:
            return y
        if not isinstance(layer.bias, Tensor):
            return y * self.stretch
        bias = layer.bias.to(y.dtype)  # which DoRA leaves as it is
        return (y - bias) * self.stretch + bias


def _hook(updates: Sequence[tuple[Tensor, _LayerUpdate]]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = inputs[0]
        for rows, update in updates:
            y.index_copy_(-2, rows, update(layer, x.index_select(-2, rows), y.index_select(-2, rows)))
        return y

    return add
