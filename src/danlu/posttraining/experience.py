"""What a policy learns from: its own answers, judged. As a stream of batches for the training loop.

A draw answers some prompts, has the answers judged and turns the verdicts into advantages; it is learned from in one or
more steps, then comes the next draw, from the weights as they are by then.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from danlu import console
from danlu.data.packed_examples import Example, PackedExamples, n_tokens, pack_examples
from danlu.data.prompts import Prompt, PromptOrder
from danlu.engine.config import SamplingParams
from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.objectives.policy import overlong_penalty
from danlu.posttraining.policy_config import PolicyOptions
from danlu.posttraining.reward_watch import RewardWatch
from danlu.posttraining.rollouts import Rollout, RolloutEngine
from danlu.posttraining.verifiers import Judgement, Sample, Verifiers
from danlu.training.logprobs import target_logprobs
from danlu.training.metrics import Numbers

Aggregation = Literal["token", "sequence", "constant"]

Reference = Callable[[], AbstractContextManager[CausalLM]]

PACKED_TOKENS = 4096
"""Tokens of a forward pass that is not learned from."""

TRIES = 4
"""Draws for one step, where prompts teach nothing and others are drawn in their place."""


@dataclass(frozen=True)
class Judged:
    """A rollout and what it is worth; None: it could not be judged."""

    rollout: Rollout
    reward: float | None
    judgement: Judgement


@dataclass(frozen=True)
class Lesson:
    """An answer with all that its loss needs; each tensor has a number for each of its tokens, fp32.

    Attributes:
        rollout: log-probs by the engine that drew it.
        old: by the model that it was drawn from; None where it is learned from at once, by that very model.
        reference: by the model that training started from; None without KL.
        values, returns: by the critic, and what it should have said; None without one.
    """

    example: Example
    advantages: Tensor
    rollout: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None

    def as_json(self) -> dict[str, Any]:
        """Exactly: a number of 32 bits is a number of 64."""
        found: dict[str, Any] = {"ids": [int(i) for i in self.example[0]], "mask": [bool(m) for m in self.example[1]]}
        for name in TENSORS:
            tensor = getattr(self, name)
            found[name] = None if tensor is None else tensor.tolist()
        return found

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Lesson:
        """The reverse of :meth:`as_json`."""
        tensors = {
            name: None if content[name] is None else torch.tensor(content[name], dtype=torch.float32)
            for name in TENSORS
        }
        return cls((content["ids"], content["mask"]), **tensors)  # type: ignore[arg-type]


TENSORS = ("advantages", "rollout", "old", "reference", "values", "returns")


@dataclass(frozen=True)
class PolicyBatch:
    """Answers of one step (:class:`danlu.training.loop.StepBatch`).

    Attributes:
        aggregation, constant: what the loss is divided by; see :func:`danlu.objectives.policy.aggregate`.
    """

    lessons: list[Lesson]
    aggregation: Aggregation
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)

    @property
    def n_targets(self) -> int:
        """What the sum of the losses is divided by."""
        lengths = [len(lesson.advantages) for lesson in self.lessons]
        return sum(lengths) if self.aggregation == "token" else len(lengths)

    @property
    def n_tokens(self) -> int:
        """Tokens that the model reads; a prompt counts once for its answers."""
        return n_tokens([lesson.example for lesson in self.lessons])

    def split(self, rows: int) -> Iterator[PolicyBatch]:
        """Micro-batches of at most so many answers."""
        for start in range(0, len(self.lessons), rows):
            yield dataclasses.replace(self, lessons=self.lessons[start : start + rows])

    def to(self, device: torch.device) -> PolicyBatch:
        """The batch for a device."""
        return dataclasses.replace(self, device=device)

    def packed(self) -> PackedExamples:
        """The answers with their prompts, in rows."""
        return pack_examples([lesson.example for lesson in self.lessons]).to(self.device)

    def laid_out(self, name: str) -> Tensor | None:
        """A tensor of all lessons, (answers, longest), 0 behind the end of an answer; None where there is none."""
        found = [getattr(lesson, name) for lesson in self.lessons]
        return None if found[0] is None else pad_sequence(found, batch_first=True).to(self.device)


class Experience(ABC):
    """Batches made of the model's own answers (:class:`danlu.training.loop.Rows`).

    Args:
        prompts: to be answered, with their tokens.
        reference: opens the model that KL is measured to, which may be the same one with its adapter off; None: no KL.
    """

    def __init__(
        self,
        options: PolicyOptions,
        model: CausalLM,
        engine: RolloutEngine,
        verifiers: Verifiers,
        prompts: Sequence[Prompt],
        *,
        aggregation: Aggregation,
        reference: Reference | None,
        seed: int,
    ) -> None:
        self.options, self.model, self.engine, self.verifiers = options, model, engine, verifiers
        self.prompts, self.aggregation, self.reference, self.seed = prompts, aggregation, reference, seed
        self.order = PromptOrder(len(prompts), seed, difficulties(prompts, options.curriculum))
        self.draws = 0
        self.numbers: Numbers = {}
        """Of the last draw, for the log."""
        self.watch: RewardWatch | None = None
        """Over the rewards of this run; what it has seen is saved with the position."""
        self._left: list[list[Lesson]] = []
        self._warned = False

    # ---- the training loop's side

    @property
    def row_len(self) -> int:
        """Tokens of the longest prompt and answer."""
        return max(len(prompt.ids) for prompt in self.prompts) + self.options.max_new_tokens

    @property
    def rows_per_epoch(self) -> int:
        """Answers in a pass over the prompts."""
        return len(self.prompts) * self.options.group_size

    @property
    def answers_per_step(self) -> int:
        """Answers that one step learns from."""
        return max(1, self.options.prompts_per_step * self.options.group_size // self.options.minibatches)

    @property
    def on_policy(self) -> bool:
        """Every answer is learned from once, by the very weights that drew it."""
        return self.options.minibatches == self.options.passes == 1

    def next(self, n_rows: int) -> PolicyBatch:
        """The answers of the next step; ``n_rows`` is ``answers_per_step``."""
        if not self._left:
            lessons = self._lessons()
            for number in range(self.options.passes):
                rng = np.random.default_rng((self.seed, self.draws, number))
                parts = np.array_split(rng.permutation(len(lessons)), self.options.minibatches)
                # Answers to one prompt stay beside each other: it is read once for all of them.
                self._left += [[lessons[i] for i in sorted(part)] for part in parts if len(part)]
        return PolicyBatch(self._left.pop(0), self.aggregation)

    def state(self) -> dict[str, Any]:
        """Where it is, with the answers that are still to be learned from."""
        left = [[lesson.as_json() for lesson in lessons] for lessons in self._left]
        watch = None if self.watch is None else self.watch.state()
        return {
            "order": self.order.state(), "draws": self.draws, "left": left, "numbers": self.numbers, "watch": watch,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""
        self.order.restore(state["order"])
        self.draws, self.numbers = state["draws"], state["numbers"]
        self._left = [[Lesson.from_json(lesson) for lesson in lessons] for lessons in state["left"]]
        if self.watch is not None:
            self.watch.restore(state["watch"])

    # ---- a draw

    @abstractmethod
    def learn(self, groups: list[list[Judged]]) -> list[Lesson]:
        """What judged answers teach; those without a reward teach nothing."""

    def _lessons(self) -> list[Lesson]:
        groups: list[list[Judged]] = []
        wanted, n_drawn = self.options.prompts_per_step, 0
        before = self.order.state(), self.draws
        drawn: list[list[Judged]] = []
        for _ in range(TRIES if self.options.settings()["resample"] else 1):
            drawn = self._draw(wanted - len(groups))
            n_drawn += len(drawn)
            groups += [group for group in drawn if self._teaches(group)]
            if len(groups) >= wanted:
                break
        else:
            groups = groups or drawn
        lessons = self.learn(groups)
        if not lessons:
            self.order.restore(before[0])
            self.draws = before[1]
            raise DanluError(
                "no answer of this step could be judged: "
                + next((one.judgement.problem or "" for group in groups for one in group), "there was none")
                + ". Mend that and run the same command again"
            )
        self._tell(groups, n_drawn)
        return lessons

    def _teaches(self, group: Sequence[Judged]) -> bool:
        if not self.options.settings()["resample"]:
            return True
        return len({one.reward for one in group if one.reward is not None}) > 1

    def _draw(self, n: int) -> list[list[Judged]]:
        """Answers to the next prompts, judged."""
        options = self.options
        prompts = [self.prompts[i] for i in self.order.take(n)]
        params = SamplingParams(
            n=options.group_size, temperature=options.temperature, max_new_tokens=options.max_new_tokens
        )
        seed = int(np.random.default_rng((self.seed, self.draws)).integers(2**62))
        self.draws += 1
        return judge(self.engine.draw(prompts, params, seed=seed), self.verifiers, options)

    def score(self, model: CausalLM, rollouts: Sequence[Rollout]) -> list[Tensor]:
        """Log-probs of the tokens of each answer by a model, without gradient."""
        found: list[Tensor] = []
        each = max(1, PACKED_TOKENS // self.row_len)
        with torch.no_grad():
            for start in range(0, len(rollouts), each):
                packed = pack_examples([one.example for one in rollouts[start : start + each]]).to(model.device)
                logps_bt, _ = target_logprobs(model, packed, temperature=self.options.temperature)
                found += [row[:n].cpu() for row, n in zip(logps_bt.float(), packed.lengths_b.tolist(), strict=True)]
        return found

    def reference_scores(self, rollouts: Sequence[Rollout]) -> list[Tensor] | None:
        """The same by the reference; None where there is none."""
        if self.reference is None:
            return None
        with self.reference() as model:
            return self.score(model, rollouts)

    def _tell(self, groups: Sequence[Sequence[Judged]], n_drawn: int) -> None:
        answers = [one for group in groups for one in group]
        rewards = [one.reward for one in answers if one.reward is not None]
        n_unjudged = len(answers) - len(rewards)
        self.numbers = {
            "reward": statistics.fmean(rewards) if rewards else None,
            "reward_std": statistics.pstdev(rewards) if rewards else None,
            "answer_tokens": statistics.fmean(len(one.rollout.answer_ids) for one in answers),
            "cut_off": statistics.fmean(not one.rollout.ended for one in answers),
            "not_judged": n_unjudged / len(answers),
            "prompts_drawn": n_drawn,
            **parts(answers),
        }
        if n_unjudged and not self._warned:
            self._warned = True
            problem = next(one.judgement.problem for one in answers if one.reward is None)
            console.warn(f"{n_unjudged} of {len(answers)} answers could not be judged and teach nothing: {problem}")


def judge(groups: Sequence[Sequence[Rollout]], verifiers: Verifiers, options: PolicyOptions) -> list[list[Judged]]:
    """What each answer is worth: its verdict, less the penalties for length and for being cut off."""
    rollouts = [one for group in groups for one in group]
    samples = [Sample(one.prompt.text or one.prompt.messages, one.text, one.prompt.row) for one in rollouts]
    judgements = verifiers.judge(samples)
    penalties = torch.zeros(len(rollouts))
    if options.overlong_margin:
        lengths = torch.tensor([len(one.answer_ids) for one in rollouts])
        penalties += overlong_penalty(lengths, options.max_new_tokens, options.overlong_margin)
    penalties -= options.missing_eos_penalty * torch.tensor([float(not one.ended) for one in rollouts])
    judged = iter(
        Judged(rollout, None if judgement.score is None else judgement.score + penalty, judgement)
        for rollout, judgement, penalty in zip(rollouts, judgements, penalties.tolist(), strict=True)
    )
    return [[next(judged) for _ in group] for group in groups]


def parts(answers: Sequence[Judged]) -> Numbers:
    """The mean of each verifier's score, where there is more than one."""
    names = list(dict.fromkeys(name for one in answers for name in one.judgement.parts))
    if len(names) < 2:
        return {}
    found: Numbers = {}
    for name in names:
        scores = [score for one in answers if (score := one.judgement.parts.get(name)) is not None]
        found[f"reward_{name}"] = statistics.fmean(scores) if scores else None
    return found


def difficulties(prompts: Sequence[Prompt], field: str) -> list[float] | None:
    """The numbers that a curriculum goes by.

    Raises:
        DanluError: a row has none.
    """
    if not field:
        return None
    found = []
    for prompt in prompts:
        value = prompt.row.get(field)
        try:  # what `danlu synth` knows of a row is text
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise DanluError(f"{prompt.where}: field {field!r}, which the curriculum goes by, is no number: {value!r}")
        found.append(number)
    return found
