"""Answers that a model writes to prompts, through the engine: the teacher's, to be learned from as they stand, or the
student's, for the teacher to correct."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from danlu import console, files
from danlu.data.packed_examples import Example
from danlu.engine.config import SamplingParams
from danlu.engine.engine import Engine
from danlu.engine.engine_config import EngineConfig
from danlu.engine.request import Completion
from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.tokenizer.tokenizer import Tokenizer

PART = 256
"""Prompts whose answers are written into one file."""


class Writer:
    """Writes answers, each seeded by its prompt's number, so that they depend on nothing else.

    Args:
        model: a model folder; or a model that is trained, whose weights are taken anew for each call.
        row_len: tokens that an example has room for, its last one not counted.
        answer_tokens: of an answer, at most.
        temperature: 0 is greedy.
    """

    def __init__(
        self,
        model: Path | CausalLM,
        tokenizer: Tokenizer,
        *,
        row_len: int,
        answer_tokens: int,
        temperature: float,
        seed: int,
        device: str,
    ) -> None:
        self.model, self.tokenizer, self.row_len, self.seed = model, tokenizer, row_len, seed
        self.answer_tokens, self.temperature = answer_tokens, temperature
        self.config = EngineConfig(context=row_len + 1, device=device)
        self.engine: Engine | None = None

    def examples(self, prompts: Sequence[Sequence[int]], number: int) -> list[Example]:
        """Prompts with answers, of which the answers are learned; a prompt without room for one is left out."""
        answered = zip(*self.write(prompts, number), strict=True)
        return [example_of(prompt, completion) for prompt, completion in answered]

    def write(self, prompts: Sequence[Sequence[int]], number: int) -> tuple[list[Sequence[int]], list[Completion]]:
        """The prompts with room for an answer, and their answers.

        Args:
            number: of the call, for the seeds.

        Raises:
            DanluError: an answer could not be written.
        """
        if self.engine is None:
            self.engine = Engine(self.model, self.config, self.tokenizer)
        elif isinstance(self.model, CausalLM):
            self.engine.update(self.model)
        asked = [prompt for prompt in prompts if 0 < len(prompt) < self.row_len]
        seeds = np.random.default_rng((self.seed, number)).integers(2**62, size=len(asked)).tolist()
        params = [
            SamplingParams(
                max_new_tokens=min(self.answer_tokens, self.row_len - len(prompt)), temperature=self.temperature,
                seed=seed,
            )
            for prompt, seed in zip(asked, seeds, strict=True)
        ]  # fmt: skip
        found = self.engine.generate(asked, params)
        for generation in found:
            if generation.error is not None:
                raise DanluError(f"an answer could not be written: {generation.error}")
        return list(asked), [generation.completions[0] for generation in found]

    def close(self) -> None:
        """Free what the engine holds."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None


def example_of(prompt: Sequence[int], completion: Completion) -> Example:
    """Prompt and answer as one example; the token that ended the answer is learned too."""
    answer = list(completion.token_ids)
    if completion.stop_token is not None:
        answer.append(completion.stop_token.token_id)
    return [*prompt, *answer], [False] * len(prompt) + [True] * len(answer)


def teacher_answers(out: Path, writer: Writer, prompts: Sequence[Sequence[int]]) -> list[Example]:
    """An example for each prompt with room for an answer, kept in `answers-00000.jsonl` and so on: what is there is not
    written again.

    Raises:
        DanluError: no prompt has room, or a file is not what was written.
    """
    examples: list[Example] = []
    with console.progress("the teacher answers", total=len(prompts), unit="prompts") as advance:
        for number, start in enumerate(range(0, len(prompts), PART)):
            path = out / f"answers-{number:05d}.jsonl"
            part = prompts[start : start + PART]
            if not path.exists():
                lines = [
                    {
                        "prompt": writer.tokenizer.decode(prompt),
                        "completion": completion.text,
                        "finish_reason": completion.finish_reason,
                        "prompt_ids": list(prompt),
                        "ids": example_of(prompt, completion)[0],
                    }
                    for prompt, completion in zip(*writer.write(part, number), strict=True)
                ]
                files.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            examples += _read(path)
            advance(len(part))
    if not examples:
        raise DanluError(f"{out}: no prompt leaves room for an answer; raise seq_len")
    return examples


def _read(path: Path) -> list[Example]:
    found: list[Example] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            line = json.loads(text)
            ids, n_prompt = [int(i) for i in line["ids"]], len(line["prompt_ids"])
        except (ValueError, KeyError, TypeError) as error:
            raise DanluError(f"{path}:{number}: is not what was written ({error}); delete the file") from error
        if len(ids) > n_prompt:
            found.append((ids, [False] * n_prompt + [True] * (len(ids) - n_prompt)))
    return found
