"""A stack of transformer blocks with its embedding: what every model here is, under one head or another."""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from danlu.errors import DanluError
from danlu.nn import masks
from danlu.nn.block import Block
from danlu.nn.config import ModelConfig
from danlu.nn.documents import Documents
from danlu.nn.embedding import Embedding
from danlu.nn.kv_cache import KVCache
from danlu.nn.mlp import MLP
from danlu.nn.moe import MoE, Routing
from danlu.nn.norm import LayerNorm, RMSNorm, make_norm
from danlu.nn.paged import PagedStep
from danlu.nn.paged_memory import PagedMemory
from danlu.nn.recompute import recomputed
from danlu.nn.rope import RotaryEmbedding

if TYPE_CHECKING:
    from danlu.models.family import Family, Task


@dataclass
class Memory:
    """What the cross-attention of each layer looks at: the encoder's keys and values, and which are not padding."""

    keys_values: list[tuple[Tensor, Tensor]]
    real_bs: Tensor | None = None


class Transformer(nn.Module):
    """Token ids to hidden states.

    ``compute_dtype`` is the dtype of activations and matrix products; weights stay in their own dtype (fp32 master
    weights while training) and are cast where they are used. ``hf_config`` and ``generation_config`` are what a model
    was opened with, for writing it back.
    """

    task: ClassVar[Task] = "embedding"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        self.config = config
        self.hf_config: dict[str, Any] = {}
        self.generation_config: dict[str, Any] = {}
        self.compute_dtype: torch.dtype | None = None  # None: the dtype of the weights
        self.gradient_checkpointing = False
        self.embed = Embedding(config.vocab_size, config.dim)
        if config.learned_positions:
            self.embed_positions = Embedding(config.context + config.position_offset, config.dim)
        if config.token_types:
            self.embed_types = Embedding(config.token_types, config.dim)
        self.embed_norm = make_norm(config) if config.embed_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = make_norm(config) if config.final_norm else nn.Identity()
        if config.relative_buckets:
            self.relative_bias = masks.RelativeBias(config)
        # One table for all layers that turn alike: windowed layers may turn otherwise than the rest.
        ropes = {rope for layer in range(config.n_layers) if (rope := config.rope_of(layer)) is not None}
        self._ropes = sorted(ropes, key=repr)
        self.rotary = nn.ModuleList(RotaryEmbedding(rope, config.head_dim, config.context) for rope in self._ropes)

    @classmethod
    def build(cls, config: ModelConfig, family: Family, content: Mapping[str, Any]) -> Self:
        """A model of this kind for a family's shape; ``content`` is the `config.json`."""
        return cls(config)

    def hf_fields(self, family: Family) -> dict[str, Any]:
        """What `config.json` says of this model beyond what it was opened with."""
        names = [name for name, task in family.architectures.items() if task == self.task]
        return {"architectures": names[:1]}

    def head_parameters(self) -> list[nn.Parameter]:
        """The weights that belong to the head alone."""
        return []

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        return self.compute_dtype or self.embed.weight.dtype

    def hidden_states(
        self,
        ids_bt: Tensor,
        positions_bt: Tensor | None = None,
        segments_bt: Tensor | None = None,
        cache: KVCache | PagedStep | None = None,
        *,
        prefixes_bt: Tensor | None = None,
        real_bt: Tensor | None = None,
        types_bt: Tensor | None = None,
        memory: Memory | PagedMemory | None = None,
        routings: MutableSequence[Routing] | None = None,
        noise_bt: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states, (batch, seq, dim), in ``dtype``.

        Args:
            positions_bt: position of each token in its document; default 0, 1, 2, ...
            segments_bt: document number of each token; tokens attend only within their document. Default: one document
                a row.
            prefixes_bt: the document that each token's own goes on from, which lies before it in the row and is seen
                as well; by default its own. Positions then count on from it.
            cache: keys and values of earlier tokens; excludes the three above and ``real_bt``. A paged one brings the
                positions, and ``ids_bt`` is one row with the new tokens of all its sequences.
            real_bt: False for padding, on either side; positions count real tokens.
            types_bt: sentence number of each token, for encoders of pairs; default 0.
            memory: the encoder's side, for decoders with cross-attention.
            routings: a list that collects the decisions of each mixture of experts, for its losses.
            noise_bt: bound of the uniform noise that is added to each token's embedding (`training/neftune.py`).
        """
        t = ids_bt.shape[1]
        length: int | Tensor | None
        mask_of: dict[int | None, Tensor | Documents | None] = {}
        if isinstance(cache, PagedStep):
            self._check_length(cache.longest)
            positions_bt, length = cache.positions_bt, cache.max_lens_bt
        else:
            if positions_bt is None:
                positions_bt = self._positions(t, cache, real_bt)
            mask_of = self._masks(positions_bt, segments_bt, prefixes_bt, cache, real_bt)
            length = None if cache is None else cache.max_len
        rotations = {r: rotary(positions_bt, length) for r, rotary in zip(self._ropes, self.rotary, strict=True)}
        memory_mask = None
        if memory is not None and memory.real_bs is not None:
            memory_mask = masks.additive(memory.real_bs[:, None, None, :], self.dtype)

        x = self._embed(ids_bt, positions_bt, types_bt, noise_bt)
        for layer, block in enumerate(self.layers):
            rope = self.config.rope_of(layer)
            rotation = None if rope is None else rotations[rope]
            mask = mask_of.get(self.config.window_of(layer))
            attended = None if memory is None else memory.keys_values[layer]
            arguments = (x, rotation, mask, cache, attended, memory_mask)
            if self.gradient_checkpointing and cache is None:  # also where nothing is learned: it gives memory back
                decided: list[Routing] = []  # the second run, in the backward pass, adds to this list and no other
                x = recomputed(block, *arguments, decided)
                if routings is not None:
                    routings.extend(decided)
            else:
                x = block(*arguments, routings)
        if isinstance(cache, KVCache):
            cache.length += t
        return self.norm(x)  # type: ignore[no-any-return]

    def _positions(self, t: int, cache: KVCache | None, real_bt: Tensor | None) -> Tensor:
        """(batch or 1, seq) position of each token; padding gets 0."""
        self._check_length(t if cache is None else cache.length + t)
        if cache is not None:
            return cache.positions(t)
        if real_bt is not None and not self.config.count_padding:
            return (real_bt.long().cumsum(dim=1) - 1).clamp(min=0)
        return torch.arange(t, device=self.device)[None]

    def _check_length(self, length: int) -> None:
        if self.config.learned_positions and length > self.config.context:
            raise DanluError(
                f"a sequence of {length} tokens is longer than the model's table of {self.config.context} positions"
            )

    def position_bias(self, query_positions_bt: Tensor, key_positions_bs: Tensor) -> Tensor | None:
        """What positions add to the scores, (batch, heads, queries, keys): ALiBi, T5's relative bias or nothing."""
        if self.config.alibi:
            return masks.alibi_bias(self.config, query_positions_bt, key_positions_bs)
        if self.config.relative_buckets:
            return self.relative_bias.between(query_positions_bt, key_positions_bs)
        return None

    def _embed(
        self, ids_bt: Tensor, positions_bt: Tensor, types_bt: Tensor | None, noise_bt: Tensor | None = None
    ) -> Tensor:
        x: Tensor = self.embed(ids_bt).to(self.dtype)
        if self.config.embed_scale is not None:
            x = x * torch.tensor(self.config.embed_scale, dtype=x.dtype)  # rounded as the activations are
        if noise_bt is not None:
            x = x + torch.empty_like(x).uniform_(-1, 1) * noise_bt[..., None].to(x.dtype)
        if self.config.learned_positions:
            x = x + self.embed_positions(positions_bt + self.config.position_offset).to(x.dtype)
        if self.config.token_types:
            x = x + self.embed_types(torch.zeros_like(ids_bt) if types_bt is None else types_bt).to(x.dtype)
        return self.embed_norm(x)  # type: ignore[no-any-return]

    def _masks(
        self,
        positions_bt: Tensor,
        segments_bt: Tensor | None,
        prefixes_bt: Tensor | None,
        cache: KVCache | None,
        real_bt: Tensor | None,
    ) -> dict[int | None, Tensor | Documents | None]:
        """The additive mask of each window that occurs; None where plain (causal or full) attention says it all, and
        where causality within documents does, and the hardware computes that document by document: those."""
        config, t = self.config, positions_bt.shape[1]
        past = 0 if cache is None else cache.length
        real_bs = real_bt if cache is None else cache.real(t)
        bias: Tensor | None = None
        if config.alibi:
            keys_bs = positions_bt if cache is None else cache.key_positions(t)
            bias = masks.alibi_bias(config, positions_bt, keys_bs)
        elif config.relative_buckets:
            apart = prefixes_bt is not None
            bias = self.relative_bias.between(positions_bt, positions_bt) if apart else self.relative_bias(t, past + t)

        by_document = segments_bt is not None and config.causal and real_bs is None and bias is None
        by_document &= config.attention_softcap is None and positions_bt.device.type == "cpu"
        found: dict[int | None, Tensor | Documents | None] = {}
        for window in {config.window_of(layer) for layer in range(config.n_layers)}:
            cut = window is not None and window < past + t
            chunk = config.causal and past > 0 and t > 1  # SDPA's causal flag knows no keys from before
            if not cut and not chunk and bias is None and real_bs is None and segments_bt is None:
                found[window] = None
                continue
            if by_document and not cut:
                assert segments_bt is not None
                found[window] = Documents(segments_bt, prefixes_bt)
                continue
            in_row = window if segments_bt is None else None  # in packed rows, positions say what is near
            allowed = masks.visible(t, past + t, causal=config.causal, window=in_row, device=self.device)
            if real_bs is not None:
                allowed = allowed & masks.only_real(real_bs, t)
            if segments_bt is not None:
                allowed = allowed & masks.same_segment(segments_bt, prefixes_bt)
                if window is not None:
                    allowed = allowed & masks.within(window, positions_bt)
            mask = masks.additive(allowed if allowed.ndim == 4 else allowed[None, None], self.dtype)
            found[window] = mask if bias is None else mask + bias.to(mask.dtype)
        return found

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Uniform 1/sqrt(fan_in) input projections; output projections zero, so that every block starts as the
        identity; norms one, embeddings of standard deviation 1."""
        for block in self.layers:
            assert isinstance(block, Block)
            attention, mlp = block.attention, block.mlp
            inputs: list[Tensor] = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
            outputs: list[Tensor] = [attention.o_proj.weight]
            if isinstance(mlp, MoE):
                inputs += [mlp.router.weight, mlp.gate_up_proj]
                outputs.append(mlp.down_proj)
            else:
                inputs += [mlp.up_proj.weight] if isinstance(mlp, MLP) else [mlp.gate_proj.weight, mlp.up_proj.weight]
                outputs.append(mlp.down_proj.weight)
            for weight in inputs:
                bound = (3 / weight.shape[-1]) ** 0.5  # uniform with standard deviation 1/sqrt(fan_in)
                nn.init.uniform_(weight, -bound, bound, generator=generator)
            for weight in outputs:
                nn.init.zeros_(weight)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                nn.init.constant_(module.weight, 0.0 if module.offset else 1.0)
            elif isinstance(module, LayerNorm):
                nn.init.ones_(module.weight)
        nn.init.normal_(self.embed.weight, std=1.0, generator=generator)

    def num_parameters(self) -> int:
        """Number of weights; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def estimate_flops(self, seq_len: int) -> int:
        """FLOPs of training on one token: 6 per matmul weight (2 forward, 4 backward) plus 12 x heads x head_dim x seq
        a layer for attention over the full square (Chowdhery et al. 2022, arXiv:2204.02311, appendix B). Of a mixture
        of experts, those that are active count. The embedding look-up is free."""
        matrices = 0
        for block in self.layers:
            matrices += sum(p.numel() for p in block.parameters() if p.ndim == 2)
            experts = sum(p.numel() for p in block.parameters() if p.ndim == 3)
            if self.config.experts is not None:
                matrices += experts * self.config.experts.top_k // self.config.experts.number
        attention = 12 * self.config.n_layers * self.config.n_heads * self.config.head_dim * seq_len
        return 6 * matrices + attention
