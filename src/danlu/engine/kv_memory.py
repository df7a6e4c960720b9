"""How many blocks the cache gets, and how long a sequence they can hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from danlu.engine.batch import KVGroup, Runner
from danlu.engine.engine_config import EngineConfig
from danlu.errors import DanluError
from danlu.hardware import total_memory_bytes
from danlu.nn.config import ModelConfig

MIB = 1 << 20


def most_blocks(groups: Sequence[KVGroup], block_size: int, n_tokens: int, step_tokens: int) -> list[int]:
    """Blocks of each group that one sequence has at most on its way to ``n_tokens``, if a step adds at most
    ``step_tokens``: windowed groups need the window, what a step adds, and the ends of blocks at both sides."""
    whole = -(-n_tokens // block_size)
    return [
        whole if group.window is None else min(whole, -(-(group.window + step_tokens) // block_size) + 2)
        for group in groups
    ]


def blocks_that_fit(runner: Runner, config: EngineConfig, context: int) -> list[int]:
    """Blocks of each group: as many as ``max_running`` sequences of ``context`` tokens can use, or what memory allows.

    Raises:
        DanluError: the memory does not hold a single short sequence.
    """
    one = most_blocks(runner.groups, runner.block_size, context, config.step_tokens)
    sizes = [runner.block_bytes(g) for g in range(len(one))]
    # Windowed groups always hold one whole sequence; how long it may be is then up to the others.
    least = [n if group.window is not None else min(n, 2) for n, group in zip(one, runner.groups, strict=True)]
    memory = _memory(runner, config)
    left = memory - sum(n * size for n, size in zip(least, sizes, strict=True))
    if left < 0:
        raise DanluError(
            f"kv_memory: {memory // MIB} MiB are too little; the cache of one short sequence takes "
            f"{(memory - left) // MIB + 1} MiB; give more, or a smaller context or step_tokens"
        )
    wanted = [config.max_running * n - few for n, few in zip(one, least, strict=True)]
    share = min(1.0, left / max(1, sum(n * size for n, size in zip(wanted, sizes, strict=True))))
    return [few + int(share * n) for few, n in zip(least, wanted, strict=True)]


def _memory(runner: Runner, config: EngineConfig) -> int:
    """Bytes that the cache may take."""
    if config.kv_memory is not None:
        return config.kv_memory * MIB
    free = torch.cuda.mem_get_info(runner.device)[0] if runner.device.type == "cuda" else total_memory_bytes()
    return int(config.kv_share * free)


def longest_that_fits(runner: Runner, n_blocks: Sequence[int], context: int) -> int:
    """Tokens of the longest sequence that the cache holds when it is alone."""
    full = [n for n, group in zip(n_blocks, runner.groups, strict=True) if group.window is None]
    return min(context, *(n * runner.block_size for n in full)) if full else context


def rope_key(config: ModelConfig, length: int) -> tuple[int, ...]:
    """What a cached key depends on beside its position: two rotary scalings look at the length that a sequence may
    grow to (`nn/rope.py`). Sequences of equal key can share their cache."""
    found = []
    for rope in (config.rope, config.local_rope):
        scaling = rope.scaling if rope is not None else None
        if scaling is not None and scaling.kind == "dynamic":
            found.append(max(length, config.context))
        elif scaling is not None and scaling.kind == "longrope":
            found.append(int(length > scaling.original_context))
    return tuple(found)
