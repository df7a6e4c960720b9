"""A reward model at work: scores of answers, and the best of several."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from danlu.config import validate
from danlu.data.packed_examples import PackedExamples
from danlu.data.preferences import Messages
from danlu.engine.config import SamplingParams
from danlu.engine.engine import Engine
from danlu.engine.engine_config import EngineConfig
from danlu.engine.request import prompt_ids
from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.models.heads import RewardModel
from danlu.posttraining.preferences import Group, batch_of, encode_answer
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training.logprobs import hidden_at_targets

BATCH_TOKENS = 4096
"""Tokens of a forward pass."""

RewardOf = Callable[[Sequence[Messages | str], Sequence[str]], Sequence[float | None]]
"""Prompts and an answer to each -> what the answers are worth; None: that cannot be told."""


def check_decoder(model: RewardModel, path: Path) -> None:
    """
    Raises:
        DanluError: it is an encoder, which reads a score somewhere else.
    """
    if not model.config.causal or model.shape.pool != "last" or model.shape.pooler is not None:
        raise DanluError(f"{path}: is an encoder; a reward model of answers is made of a decoder")


def scored(group: Group) -> Group:
    """The group with examples for :func:`scores_of`: all tokens are read, and something is found at the last."""
    examples = tuple(([*ids, 0], [False] * len(ids) + [True]) for ids, _ in group.examples)
    return dataclasses.replace(group, examples=examples)


def scores_of(model: RewardModel, packed: PackedExamples) -> Tensor:
    """What a reward model gives the examples of :func:`scored` groups, (examples,) fp32: the same as ``model.score`` of
    each alone."""
    scores: Tensor = model.head(hidden_at_targets(model, packed))
    return scores.squeeze(-1)


@torch.no_grad()
def score_answers(
    model: RewardModel, tokenizer: Tokenizer, prompts: Sequence[Messages | str], answers: Sequence[str]
) -> list[float]:
    """Rewards of answers, each read to the token that ends it.

    Args:
        prompts: of each answer: messages, or a text that the answer goes on with.

    Raises:
        DanluError: a prompt does not fit the chat template, or prompt and answer not the context.
    """
    groups: list[Group] = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        said: Messages | str = answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
        ids, mask = encode_answer(tokenizer, prompt, said, apart=True)
        if len(ids) > model.config.context:
            raise DanluError(
                f"answer {i + 1}: has {len(ids)} tokens with its prompt; the reward model reads {model.config.context}"
            )
        groups.append(scored(Group(((ids, mask),), (), True, None, f"answer {i + 1}")))
    if not groups:
        return []
    model.eval()
    batch = batch_of(groups, tokenizer.pad_id).to(model.device)
    micro_rows = max(1, BATCH_TOKENS // batch.room)
    return torch.cat([scores_of(model, micro.packed) for micro in batch.split(micro_rows)]).tolist()


@dataclass(frozen=True)
class Best:
    """The answer of several that got the highest reward.

    Attributes:
        texts, rewards: of all answers, in the order they were drawn.
    """

    text: str
    reward: float
    texts: list[str]
    rewards: list[float | None]


def best_of(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Messages | str],
    n: int,
    reward: RewardOf,
    params: SamplingParams | None = None,
) -> list[Best]:
    """Draw ``n`` answers to each prompt and take the one with the highest reward, the first of equal ones.

    Args:
        reward: a function, or a reward model's: ``partial(score_answers, reward_model, its_tokenizer)``.
        params: of the answers; default a temperature of 1. Each prompt has a seed of its own that follows from theirs.

    Raises:
        DanluError: a prompt that does not fit, or all answers to one for which no reward can be told.
    """
    params = dataclasses.replace(params or SamplingParams(temperature=1.0), n=n)
    seed = params.seed or 0
    each = [validate(dataclasses.replace(params, seed=(seed + i) % 2**63)) for i in range(len(prompts))]
    ids = [_ids(tokenizer, prompt) for prompt in prompts]
    if not ids:
        return []
    context = min(model.config.context, max(map(len, ids)) + params.max_new_tokens)
    engine = Engine(model, EngineConfig(max_running=min(64, n * len(ids)), context=context), tokenizer)
    try:
        generations = engine.generate(ids, each)
    finally:
        engine.close()
    for generation in generations:
        if generation.error is not None:
            raise DanluError(generation.error)
    texts = [[completion.text for completion in generation.completions] for generation in generations]
    asked = [prompt for prompt in prompts for _ in range(n)]
    found = list(reward(asked, [text for group in texts for text in group]))
    return [_best(group, found[i * n : (i + 1) * n], i) for i, group in enumerate(texts)]


def _best(texts: list[str], rewards: list[float | None], number: int) -> Best:
    known = [(-r, i) for i, r in enumerate(rewards) if r is not None and math.isfinite(r)]
    if not known:
        raise DanluError(f"prompt {number + 1}: none of its {len(texts)} answers could be judged")
    least, i = min(known)
    return Best(texts[i], -least, texts, rewards)


def _ids(tokenizer: Tokenizer, prompt: Messages | str) -> list[int]:
    if isinstance(prompt, str):
        return prompt_ids(tokenizer, prompt)
    return tokenizer.encode_chat(prompt, add_generation_prompt=True)
