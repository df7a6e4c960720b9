"""Answers that a model draws while it is trained: from the engine, with the log-probability of each token.

The engine multiplies with the very numbers that the trainer multiplies with: fp32 weights, or those rounded to bf16. In
fp32 both say the same of a token, to 1e-5 nats. In bf16 the trainer rounds activations too, which the native kernels do
not: how far the two are apart is watched in training, and corrected for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from danlu.data.packed_examples import Example
from danlu.data.prompts import Prompt
from danlu.engine.config import SamplingParams
from danlu.engine.engine import Engine
from danlu.engine.engine_config import EngineConfig
from danlu.engine.request import Completion
from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.tokenizer.tokenizer import Tokenizer

LONGEST_PROMPT = 512
"""Tokens, where nothing is said and the context has room."""


class Lengths(Protocol):
    """Options of what draws answers."""

    @property
    def max_prompt(self) -> int | None: ...
    @property
    def max_new_tokens(self) -> int: ...


def longest_prompt(options: Lengths, context: int) -> int:
    """Tokens of the longest prompt that is answered, by a model that reads ``context``.

    Raises:
        DanluError: with the longest answer it is more than the context.
    """
    prompt, answer = options.max_prompt, options.max_new_tokens
    if prompt is None:
        prompt = min(LONGEST_PROMPT, context - answer)
    if prompt < 1 or prompt + answer > context:
        together = "is" if options.max_prompt is None else f"and max_prompt ({prompt}) together are"
        raise DanluError(
            f"max_new_tokens ({answer}) {together} more than the context of the model ({context}) has room for; "
            "lower it"
        )
    return prompt


@dataclass(frozen=True)
class Rollout:
    """An answer that was drawn.

    Attributes:
        answer_ids: its tokens, with the stop token that ended it.
        logprobs: of each of them, in nats, at the temperature it was drawn at.
        ended: by itself, with a stop token; False: cut off at the longest answer.
    """

    prompt: Prompt
    text: str
    answer_ids: list[int]
    logprobs: list[float]
    ended: bool

    @property
    def example(self) -> Example:
        """Prompt and answer, of which the answer is learned, its stop token included."""
        n, n_answer = len(self.prompt.ids), len(self.answer_ids)
        return [*self.prompt.ids, *self.answer_ids], [False] * n + [True] * n_answer


class RolloutEngine:
    """Draws answers from a model as it is at the moment.

    Args:
        context: tokens of the longest prompt and answer.
        max_running: answers written at the same time.
    """

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, *, context: int, max_running: int = 64) -> None:
        self.model, self.tokenizer = model, tokenizer
        context = min(context, model.config.context)
        config = EngineConfig(max_running=max_running, step_tokens=max(512, max_running), context=context)
        self._engine = Engine(model, config, tokenizer)

    def draw(self, prompts: Sequence[Prompt], params: SamplingParams, *, seed: int) -> list[list[Rollout]]:
        """``params.n`` answers to each prompt, with the weights as they are now.

        Args:
            seed: the answers follow from it, the weights and the prompts.
        """
        self._engine.update(self.model)
        params = dataclasses.replace(params, logprobs=0, logprobs_temperature=params.temperature or 1.0)
        each = [dataclasses.replace(params, seed=(seed + i) % 2**63) for i in range(len(prompts))]
        generations = self._engine.generate([prompt.ids for prompt in prompts], each)
        return [
            [_rollout(prompt, completion) for completion in generation.completions]
            for prompt, generation in zip(prompts, generations, strict=True)
        ]

    def close(self) -> None:
        """Free the cache."""
        self._engine.close()


def _rollout(prompt: Prompt, completion: Completion) -> Rollout:
    tokens = [*(completion.logprobs or ())]
    if completion.stop_token is not None and completion.stop_token.logprobs is not None:
        tokens.append(completion.stop_token.logprobs)
    ids, logprobs = [one.token_id for one in tokens], [one.logprob for one in tokens]
    return Rollout(prompt, completion.text, ids, logprobs, completion.stop_token is not None)
