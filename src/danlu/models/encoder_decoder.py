"""A model that reads one sequence and writes another: translation, summaries, answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from danlu.models.transformer import Memory, Transformer
from danlu.nn.block import Block
from danlu.nn.config import EncoderDecoderConfig
from danlu.nn.kv_cache import KVCache
from danlu.nn.linear import Head

if TYPE_CHECKING:
    from danlu.models.family import Family, Task


class EncoderDecoder(nn.Module):
    """The Transformer as it was first drawn (Vaswani et al. 2017, arXiv:1706.03762): an encoder that looks both ways,
    a decoder that looks back and at the encoder, and a head over the vocabulary.

    ``shared`` is the embedding of tokens where both have the same. The rest is as in :class:`Transformer`.
    """

    task: ClassVar[Task] = "seq2seq"

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        self.config = config
        self.hf_config: dict[str, Any] = {}
        self.generation_config: dict[str, Any] = {}
        self.encoder = Transformer(config.encoder)
        self.decoder = Transformer(config.decoder)
        if config.shared_embeddings:
            self.shared = self.encoder.embed = self.decoder.embed
        decoder = config.decoder
        self.head = Head(decoder.dim, decoder.vocab_size, decoder.head_bias, decoder.head_scale, decoder.logit_softcap)
        if decoder.tie_embeddings:
            self.head.weight = self.decoder.embed.weight

    @classmethod
    def build(cls, config: EncoderDecoderConfig, family: Family, content: Mapping[str, Any]) -> Self:
        """A model of this kind for a family's shape; ``content`` is the `config.json`."""
        return cls(config)

    def hf_fields(self, family: Family) -> dict[str, Any]:
        """What `config.json` says of this model beyond what it was opened with."""
        return {"architectures": [name for name, task in family.architectures.items() if task == self.task][:1]}

    def head_parameters(self) -> list[nn.Parameter]:
        """The weights that belong to the head alone."""
        return [p for p in self.head.parameters() if p is not self.decoder.embed.weight]

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        return self.decoder.dtype

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Dtype of activations and matrix products; None: that of the weights."""
        return self.decoder.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        self.encoder.compute_dtype = self.decoder.compute_dtype = dtype

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training runs each block again in the backward pass instead of keeping its activations."""
        return self.decoder.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = on

    def encode(self, ids_bs: Tensor, real_bs: Tensor | None = None) -> Memory:
        """Read the source: keys and values for each layer of the decoder, computed once for all its steps.

        Args:
            ids_bs: (batch, source) token ids.
            real_bs: False for padding, on either side. Models whose learned positions count padding (BART) want it on
                the right. A row without a real token has nothing to look at, and gives NaN.
        """
        hidden_bsd = self.encoder.hidden_states(ids_bs, real_bt=real_bs)
        keys_values = []
        for block in self.decoder.layers:
            assert isinstance(block, Block)
            keys_values.append(block.cross_attention.keys_values(hidden_bsd))
        return Memory(keys_values, real_bs)

    def decode(
        self, ids_bt: Tensor, memory: Memory, cache: KVCache | None = None, *, real_bt: Tensor | None = None
    ) -> Tensor:
        """Logits of the next target token after each position, (batch, target, vocab), fp32.

        Args:
            ids_bt: target tokens so far, from ``config.decoder_start_id`` on; with a cache, those not yet in it.
            cache: made for ``config.decoder``; excludes ``real_bt``.
            real_bt: False for padding.
        """
        return self.head(self.decoder.hidden_states(ids_bt, cache=cache, real_bt=real_bt, memory=memory))  # type: ignore[no-any-return]

    def forward(
        self,
        ids_bs: Tensor,
        decoder_ids_bt: Tensor,
        *,
        real_bs: Tensor | None = None,
        decoder_real_bt: Tensor | None = None,
    ) -> Tensor:
        """Logits, (batch, target, vocab), fp32. Arguments as in :meth:`encode` and :meth:`decode`."""
        return self.decode(decoder_ids_bt, self.encode(ids_bs, real_bs), real_bt=decoder_real_bt)

    def num_parameters(self) -> int:
        """Number of weights; shared and tied ones count once."""
        return sum(p.numel() for p in self.parameters())

    def estimate_flops(self, seq_len: int) -> int:
        """FLOPs of training on one source token and one target token, where both sequences have ``seq_len`` tokens;
        counted as in :meth:`Transformer.estimate_flops`."""
        decoder = self.config.decoder
        cross = 12 * decoder.n_layers * decoder.n_heads * decoder.head_dim * seq_len
        head = 6 * decoder.vocab_size * decoder.dim
        return self.encoder.estimate_flops(seq_len) + self.decoder.estimate_flops(seq_len) + cross + head
