"""Bytes and FLOPs of a model, in closed form.

What training keeps for the backward pass is counted as autograd keeps it in these models: the input of every product,
of every norm and of every activation function. Tests compare the sums with what autograd really saves and with the
peak of real runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from danlu.formats.model_facts import kv_cache_bytes
from danlu.nn.config import ModelConfig

BYTES_PER_WEIGHT = {"FP32": 4.0, "FP16/BF16": 2.0, "INT8": 1.0625, "INT4": 0.5625}
"""Integers with one 16-bit scale for every 32 weights, as GGUF's Q8_0 and Q4_0 store them."""

PREFILL_TOKENS = 512  # the engine reads a prompt in pieces of this size


@dataclass(frozen=True)
class Budget:
    """Bytes of one way to run a model. ``total`` is the peak, which need not be the sum: activations and gradients are
    not at their largest at the same time."""

    name: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    kv_cache: int
    total: int


def cache_bytes(config: ModelConfig, context: int, batch: int = 1, element_bytes: float = 2) -> int:
    """Keys and values of ``context`` tokens in every layer, as the engine keeps them: windowed layers keep all."""
    return kv_cache_bytes(
        config.n_layers, config.n_kv_heads, config.head_dim, context, element_bytes=element_bytes, batch=batch
    )


def inference(
    config: ModelConfig, parameters: int, form: str, context: int, batch: int = 1, compute_bytes: int | None = None
) -> Budget:
    """Generating with a prompt that fills the context; FP32 computes in 4 bytes, the others in 2.

    Args:
        form: a key of :data:`BYTES_PER_WEIGHT`.
    """
    c = compute_bytes or (4 if form == "FP32" else 2)
    tokens = batch * min(context, PREFILL_TOKENS)
    q, k, f = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim, _active_ffn(config)
    # Buffers of a step of the native kernels: the stream, a branch, queries, keys and values, what attention gives (and
    # its parts), the feed-forward's inner products, and the input of a product. torch holds no more at its widest.
    widest = 2 * config.dim + 3 * q + 2 * k + f + max(config.dim, q, f)
    activations = int(tokens * widest * c + 4 * batch * config.vocab_size)
    weights = int(parameters * BYTES_PER_WEIGHT[form])
    cache = cache_bytes(config, context, batch, c)
    return Budget(form, weights, 0, 0, activations, cache, weights + cache + activations)


Optimizer = Literal["adamw", "muon"]


def training(
    config: ModelConfig,
    parameters: int,
    *,
    name: str = "full, FP32",
    seq_len: int,
    batch: int = 1,
    precision: Literal["fp32", "bf16"] = "fp32",
    optimizer: Optimizer = "adamw",
    frozen_bytes: float | None = None,
    trained: int | None = None,
    checkpointing: bool = False,
    packed: bool = False,
) -> Budget:
    """One training step without accumulation.

    Args:
        frozen_bytes: bytes per frozen base weight, for adapters; None trains everything.
        trained: number of trained weights, for adapters.
        checkpointing: only the input of each block is kept, and one block at a time is computed again.
        packed: several documents share a row, which takes a mask.
    """
    trained = parameters if trained is None else trained
    weights = 4 * trained + (int(parameters * frozen_bytes) if frozen_bytes is not None else 0)
    gradients = 4 * trained
    embeddings = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    by_muon = max(trained - embeddings, 0) if optimizer == "muon" and frozen_bytes is None else 0
    states = 8 * (trained - by_muon) + 4 * by_muon
    tokens = seq_len * batch
    c = 4 if precision == "fp32" else 2
    block = tokens * block_activations(config, seq_len, c)
    kept = block + (config.n_layers - 1) * tokens * config.dim * c if checkpointing else config.n_layers * block
    if precision == "bf16" and frozen_bytes is None:
        kept += 2 * (parameters - embeddings)  # the 16-bit copy of each matrix that its product used
    if packed:
        kept += batch * seq_len**2 * c
    kept += tokens * config.dim * ((8 if config.norm == "rms" else 4) + c)  # the last norm, and the head's input
    head = tokens * config.vocab_size * (12 if precision == "fp32" else 14)  # logits, their softmax, its gradient
    activations = kept + head
    # The peak is where the backward pass begins, with everything kept and no gradient yet, or where it ends: all
    # gradients, and the first block with gradients of about half the size of what it kept.
    total = weights + states + max(activations, gradients + block * 3 // 2)
    return Budget(name, weights, gradients, states, activations, 0, total)


def block_activations(config: ModelConfig, seq_len: int, c: int) -> int:
    """Bytes that one block keeps for one token; ``c``: bytes of an activation. Norms compute in 4."""
    q, k = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    norms = {"pre": 2, "post": 2, "branch": 2, "sandwich": 4, "parallel": 1, "parallel_two_norms": 2}
    norm = 8 if config.norm == "rms" else 4  # its input and, for its weight, the normalised one; LayerNorm is fused
    kept = norms[config.arrangement] * config.dim * norm
    kept += 2 * config.dim * c  # what goes into the products: queries, keys and values; the feed-forward
    if config.qk_norm:
        kept += (q + k) * norm
    kept += (q + k + k + q) * c  # rotated queries and keys, values, the result
    if config.attention_softcap is not None:
        kept += 2 * 4 * config.n_heads * seq_len  # no fused kernel: tanh and softmax stay
    kept += (4 if config.gated else 2) * _active_ffn(config) * c
    if config.experts is not None:
        kept += 3 * config.experts.top_k * config.dim * c  # tokens sorted by expert, and their results
    return int(kept)


def lora_parameters(config: ModelConfig, rank: int) -> int:
    """Weights of adapters of this rank on every matrix of the blocks (Hu et al. 2021, arXiv:2106.09685)."""
    q, k, d, f = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim, config.dim, config.ffn_dim
    attention = (d + q) + 2 * (d + k) + (q + d)
    feed_forward = (3 if config.gated else 2) * (d + f)
    if config.experts is not None:
        feed_forward = config.experts.number * 3 * (d + config.experts.ffn_dim)
    return config.n_layers * rank * (attention + feed_forward)


def _active_ffn(config: ModelConfig) -> int:
    """Inner width of the feed-forward that a token passes through."""
    return config.ffn_dim if config.experts is None else config.experts.top_k * config.experts.ffn_dim
