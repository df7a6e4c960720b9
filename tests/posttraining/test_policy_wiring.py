"""GRPO and PPO as `danlu align` puts them together, beside the same written out answer by answer, token by token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from danlu.data.prompts import Prompt
from danlu.engine.config import SamplingParams
from danlu.models.causal_lm import CausalLM
from danlu.models.load import load_model
from danlu.posttraining.config import AlignConfig
from danlu.posttraining.experience import Experience, Lesson, judge
from danlu.posttraining.policy import _method, _reference
from danlu.posttraining.policy_loss import PolicyLoss
from danlu.posttraining.rollouts import RolloutEngine
from danlu.posttraining.verifiers import Judgement, Sample
from danlu.tokenizer.tokenizer import Tokenizer

TEMPERATURE = 0.7
Made = tuple[Experience, PolicyLoss, CausalLM]


class Likes:
    """Verifiers that like one letter; they remember what they said."""

    def __init__(self) -> None:
        self.said: list[float] = []

    def judge(self, samples: list[Sample]) -> list[Judgement]:
        self.said = [sample.answer.count("e") / max(1, len(sample.answer)) for sample in samples]
        return [Judgement(score, {"e": score}, None) for score in self.said]


def shaken(model: CausalLM, by: float) -> CausalLM:
    """Its weights, each a little off."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * p.std(correction=0) * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture
def made(model_folder: Path) -> Iterator[Callable[..., Made]]:
    """Rows and loss as the verb makes them, and the model; the reference is another model."""
    engines = []

    def make(**options: Any) -> Made:
        tokenizer, model = Tokenizer.load(model_folder), load_model(model_folder)
        chats = [[{"role": "user", "content": f"question {i}"}] for i in range(4)]
        prompts = [
            Prompt(chat, {}, f"row {i}", None, tokenizer.encode_chat(chat, add_generation_prompt=True))
            for i, chat in enumerate(chats)
        ]
        given = {
            "prompts_per_step": 4, "group_size": 4, "max_new_tokens": 12, "reward": ("x",), "passes": 2,
            "temperature": TEMPERATURE, "kl": 0.3, "precision": "fp32",
        }  # fmt: skip
        config = AlignConfig(model=model_folder, data=model_folder, out=model_folder, **{**given, **options})
        engine = RolloutEngine(model, tokenizer, context=128)
        engines.append(engine)
        likes: Any = Likes()
        rows, loss, _ = _method(config, model, engine, likes, prompts)
        other = shaken(load_model(model_folder), 0.2)
        rows.reference = lambda: nullcontext(other)
        return rows, loss, model

    yield make
    for engine in engines:
        engine.close()


def logprobs(model: CausalLM, lesson: Lesson) -> torch.Tensor:
    """Of the answer's tokens, at the temperature that they were drawn at."""
    ids, mask = torch.tensor([lesson.example[0]]), torch.tensor(lesson.example[1])
    logits = model(ids)[0, :-1].float() / TEMPERATURE
    found = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return found[mask[1:]]


def surrogate(now: torch.Tensor, lesson: Lesson, low: float, high: float) -> torch.Tensor:
    """The clipped loss of each token, corrected for an engine that computes something else."""
    assert lesson.old is not None
    ratio = (now - lesson.old).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    correction = (lesson.old - lesson.rollout).exp().clamp(max=2.0)
    return -torch.minimum(ratio * lesson.advantages, clipped * lesson.advantages) * correction


def test_the_loss_of_grpo(made: Callable[..., Made]) -> None:
    """Of a policy that has moved, drawn by an engine that is off: DAPO's clip, k3 to the reference, all at the
    temperature of the answers."""
    rows, loss, model = made(variant="dapo", resample=False, method="grpo")
    batch = rows.next(rows.answers_per_step)
    noise = torch.Generator().manual_seed(0)
    lessons = [
        dataclasses.replace(one, rollout=one.rollout + 0.3 * torch.randn(len(one.rollout), generator=noise))
        for one in batch.lessons
    ]
    shaken(model, 0.1)
    wanted, ratios = 0.0, []
    for lesson in lessons:
        now = logprobs(model, lesson).detach()
        assert lesson.reference is not None
        assert lesson.old is not None
        apart = lesson.reference - now
        wanted += float((surrogate(now, lesson, 0.2, 0.28) + 0.3 * (apart.exp() - apart - 1)).sum())
        ratios.append(((now - lesson.old).exp(), lesson.advantages))
    found = loss(dataclasses.replace(batch, lessons=lessons))
    assert float(found) == pytest.approx(wanted, rel=1e-4)
    assert any(bool(((ratio > 1.28) & (advantages > 0)).any()) for ratio, advantages in ratios)
    assert any(bool(((ratio < 0.8) & (advantages < 0)).any()) for ratio, advantages in ratios)


def test_the_loss_of_ppo(made: Callable[..., Made]) -> None:
    """No KL in it, although there is a reference: that is paid in the reward. The critic's values are clipped."""
    rows, loss, model = made(method="ppo", value_clip=0.1, value_weight=0.5)
    batch = rows.next(rows.answers_per_step)
    pair: Any = rows.pair  # type: ignore[attr-defined]
    shaken(model, 0.1)
    shaken(pair.critic, 0.1)
    wanted = 0.0
    for lesson in batch.lessons:
        assert lesson.values is not None
        assert lesson.returns is not None
        ids, mask = torch.tensor([lesson.example[0]]), torch.tensor(lesson.example[1])
        with torch.no_grad():
            now = logprobs(model, lesson)
            values = pair.critic.head(pair.critic.hidden_states(ids)).float()[0, :-1, 0][mask[1:]]
        near = lesson.values + (values - lesson.values).clamp(-0.1, 0.1)
        errors = torch.maximum((values - lesson.returns) ** 2, (near - lesson.returns) ** 2) / 2
        wanted += float((surrogate(now, lesson, 0.2, 0.2) + 0.5 * errors).sum())
    assert float(loss(batch)) == pytest.approx(wanted, rel=1e-4)


def test_what_ppo_learns_from(made: Callable[..., Made]) -> None:
    """KL is paid token by token, the reward comes last; returns are of the advantages before they are whitened."""
    rows, _, model = made(method="ppo", gamma=0.9, gae_lambda=0.8)
    lessons = rows.next(rows.answers_per_step).lessons
    likes: Any = rows.verifiers
    raw: list[torch.Tensor] = []
    for lesson, score in zip(lessons, likes.said, strict=True):
        assert lesson.old is not None
        assert lesson.values is not None
        assert lesson.reference is not None
        assert lesson.returns is not None
        torch.testing.assert_close(lesson.old, logprobs(model, lesson).detach(), atol=2e-5, rtol=0)
        torch.testing.assert_close(lesson.old, lesson.rollout, atol=2e-5, rtol=0)
        rewards = (-0.3 * (lesson.old - lesson.reference)).tolist()
        rewards[-1] += score
        values, advantages, after = [*lesson.values.tolist(), 0.0], [], 0.0
        for t in reversed(range(len(rewards))):
            after = rewards[t] + 0.9 * values[t + 1] - values[t] + 0.9 * 0.8 * after
            advantages.insert(0, after)
        raw.append(torch.tensor(advantages))
        torch.testing.assert_close(lesson.returns, raw[-1] + lesson.values, atol=1e-4, rtol=1e-4)
    flat = torch.cat(raw)
    for lesson, advantages_t in zip(lessons, raw, strict=True):
        whitened = (advantages_t - flat.mean()) / math.sqrt(float(flat.var()) + 1e-8)
        torch.testing.assert_close(lesson.advantages, whitened, atol=1e-3, rtol=1e-3)


def test_rewards_less_what_length_costs(made: Callable[..., Made]) -> None:
    rows, _, _ = made(method="grpo", overlong_margin=8, missing_eos_penalty=0.5)
    groups = rows.engine.draw(rows.prompts, SamplingParams(n=4, max_new_tokens=12), seed=0)
    # Some that ended by themselves, of all lengths.
    cut = [
        [dataclasses.replace(one, answer_ids=one.answer_ids[: 3 * n + 3], ended=n < 3) for n, one in enumerate(group)]
        for group in groups
    ]
    for group in judge(cut, rows.verifiers, rows.options):
        for n, one in enumerate(group):
            assert one.judgement.score is not None
            cost = (0, 0.25, 0.625, 1 + 0.5)[n]
            assert one.reward == pytest.approx(one.judgement.score - cost)


def test_the_reference_does_not_learn(model_folder: Path) -> None:
    """Nor has it dropout: it is asked with all its weights."""
    config = AlignConfig(model=model_folder, data=model_folder, out=model_folder, method="grpo", reward=("x",), kl=0.1)
    model = load_model(model_folder).train()
    with _reference(config, model)() as reference:
        assert reference is not model
        assert not reference.training
        assert not any(p.requires_grad for p in reference.parameters())
    assert model.training
