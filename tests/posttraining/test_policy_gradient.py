"""GRPO and PPO from their parts: what an answer teaches, and what the loss makes of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from danlu.data.prompts import Prompt
from danlu.models.causal_lm import CausalLM
from danlu.models.heads import RewardModel
from danlu.models.load import load_model
from danlu.posttraining.config import AlignConfig
from danlu.posttraining.experience import Experience, Lesson
from danlu.posttraining.grpo import GroupExperience
from danlu.posttraining.policy_loss import PolicyLoss
from danlu.posttraining.ppo import ActorCritic, CriticExperience
from danlu.posttraining.reward_watch import RewardWatch
from danlu.posttraining.rollouts import RolloutEngine
from danlu.posttraining.verifiers import Judgement, Sample
from danlu.tokenizer.tokenizer import Tokenizer


class Judge:
    """Verifiers with a rule of the test's own."""

    def __init__(self, rule: Callable[[Sample], float | None]) -> None:
        self.rule = rule

    def judge(self, samples: Sequence[Sample]) -> list[Judgement]:
        scores = [self.rule(sample) for sample in samples]
        return [Judgement(score, {"rule": score}, None if score is not None else "no idea") for score in scores]


def likes_e(sample: Sample) -> float:
    return sample.answer.count("e") / max(1, len(sample.answer))


@pytest.fixture
def model(model_folder: Path) -> CausalLM:
    model = load_model(model_folder)
    with torch.no_grad():
        model.head.weight[list(Tokenizer.load(model_folder).stop_ids)] = model.head.weight[100].clone()
    return model


@pytest.fixture
def make(model: CausalLM, model_folder: Path) -> Callable[..., tuple[Experience, PolicyLoss]]:
    tokenizer = Tokenizer.load(model_folder)
    messages = [[{"role": "user", "content": f"question {i}"}] for i in range(6)]
    prompts = [
        Prompt(one, {"number": i}, f"row {i}", None, tokenizer.encode_chat(one, add_generation_prompt=True))
        for i, one in enumerate(messages)
    ]

    def made(rule: Callable[[Sample], float | None] = likes_e, **options: Any) -> tuple[Experience, PolicyLoss]:
        given = {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 12, "reward": ("x",), "method": "grpo"}
        config = AlignConfig(model=model_folder, data=model_folder, out=model_folder, **{**given, **options})
        engine = RolloutEngine(model, tokenizer, context=128)
        judge: Any = Judge(rule)
        if config.method == "grpo":
            rows: Experience = GroupExperience(
                config, model, engine, judge, prompts,
                aggregation=config.settings()["aggregate"], reference=None, seed=0,
            )  # fmt: skip
            return rows, PolicyLoss(config, model, kl=config.kl)
        torch.manual_seed(0)
        pair = ActorCritic(model, load_model(model_folder, RewardModel, new_head=True))
        rows = CriticExperience(config, pair, engine, judge, prompts, aggregation="token", reference=None, seed=0)
        return rows, PolicyLoss(config, model, values=pair.values)

    return made


def gradient(model: CausalLM) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for p in model.parameters():
        p.grad = None
    return found


@pytest.mark.parametrize("variant", ["grpo", "dapo", "dr-grpo", "rloo", "reinforce++"])
def test_the_first_step_has_no_loss_but_a_gradient(variant: Any, make: Any, model: CausalLM) -> None:
    rows, loss = make(variant=variant)
    batch = rows.next(rows.answers_per_step)
    assert rows.on_policy
    assert all(lesson.old is None for lesson in batch.lessons)
    total = loss(batch) / batch.n_targets
    total.backward()
    # Of equal lengths the advantages cancel; of unequal ones they do where answers weigh the same.
    if variant == "grpo":
        assert abs(total.item()) < 1e-6
    assert torch.nn.utils.get_total_norm(gradient(model)) > 1e-4
    numbers = loss.take_numbers()
    assert numbers["rollout_mismatch"] < 1e-5
    assert numbers["clipped"] == 0
    assert numbers["entropy"] > 0
    assert rows.numbers["reward"] is not None


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_micro_batches_give_the_same_gradient(aggregate: Any, make: Any, model: CausalLM) -> None:
    rows, loss = make(aggregate=aggregate)
    batch = rows.next(rows.answers_per_step)
    (loss(batch) / batch.n_targets).backward()
    whole = gradient(model)
    for micro in batch.split(3):
        (loss(micro) / batch.n_targets).backward()
    for one, other in zip(gradient(model), whole, strict=True):
        torch.testing.assert_close(one, other, atol=max(1e-6, 3e-6 * float(other.abs().max())), rtol=1e-5)


def test_answers_that_are_learned_from_twice_know_who_drew_them(make: Any) -> None:
    rows, _ = make(passes=2, minibatches=2)
    assert not rows.on_policy
    seen: list[Lesson] = []
    for _ in range(4):
        batch = rows.next(rows.answers_per_step)
        assert len(batch.lessons) == 8
        seen += batch.lessons
    assert rows.draws == 1
    assert len({id(lesson) for lesson in seen}) == 16
    for lesson in seen:
        assert lesson.old is not None
        torch.testing.assert_close(lesson.old, lesson.rollout, atol=1e-5, rtol=0)  # the ratio starts at 1
    rows.next(rows.answers_per_step)
    assert rows.draws == 2


def test_what_a_nat_costs_moves_towards_its_target_and_is_told(make: Any, model: CausalLM) -> None:
    """A policy that has not moved yet is nearer than it might be: KL gets cheaper."""
    rows, _ = make(method="ppo", kl=0.1, kl_target=5.0)
    rows.reference = lambda: nullcontext(model)
    rows.next(rows.answers_per_step)
    assert rows.numbers["kl_weight"] == rows.state()["kl"] < 0.1
    fixed, _ = make(method="ppo", kl=0.1)
    fixed.next(fixed.answers_per_step)
    assert "kl_weight" not in fixed.numbers


def test_a_saved_position_is_exact(make: Any) -> None:
    rows, _ = make(passes=2, minibatches=2)
    rows.next(8)
    state = json.loads(json.dumps(rows.state()))
    wanted = [rows.next(8) for _ in range(5)]
    other, _ = make(passes=2, minibatches=2)
    other.restore(state)
    for batch in wanted:
        found = other.next(8)
        for one, two in zip(found.lessons, batch.lessons, strict=True):
            assert list(one.example[0]) == list(two.example[0])
            for field in dataclasses.fields(Lesson):
                first, second = getattr(one, field.name), getattr(two, field.name)
                if isinstance(first, torch.Tensor):
                    assert torch.equal(first, second)


def test_prompts_that_teach_nothing_are_drawn_anew(make: Any) -> None:
    rows, _ = make(lambda sample: likes_e(sample) if "question 3" in str(sample.prompt) else 1.0, resample=True)
    rows.next(rows.answers_per_step)
    assert rows.numbers["prompts_drawn"] > 4
    assert all(abs(lesson.advantages[0]) > 0 for lesson in rows.next(16).lessons)


def test_answers_that_cannot_be_judged_are_counted_and_teach_nothing(make: Any, capsys: Any) -> None:
    turns = iter(range(1000))
    rows, _ = make(lambda sample: None if next(turns) % 4 == 0 else likes_e(sample))
    batch = rows.next(rows.answers_per_step)
    assert len(batch.lessons) == 12
    assert rows.numbers["not_judged"] == 0.25
    # Each group is compared with its own three.
    assert abs(sum(float(lesson.advantages[0]) for lesson in batch.lessons)) < 1e-4


def test_ppo_pays_kl_in_the_reward_and_whitens(make: Any, model: CausalLM) -> None:
    rows, loss = make(method="ppo", passes=2)
    batch = rows.next(rows.answers_per_step)
    flat = torch.cat([lesson.advantages for lesson in batch.lessons])
    assert abs(flat.mean()) < 1e-5
    assert abs(flat.var() - 1) < 1e-4
    for lesson in batch.lessons:
        assert lesson.values is not None
        assert lesson.returns is not None
        assert len(lesson.returns) == len(lesson.values) == len(lesson.advantages)
    assert loss.kl == 0
    (loss(batch) / batch.n_targets).backward()
    critic = [p.grad for p in rows.pair.critic.parameters() if p.grad is not None]
    assert torch.nn.utils.get_total_norm(critic) > 0
    assert loss.take_numbers()["value_loss"] > 0


def test_a_gamed_reward_is_suspected() -> None:
    watch = RewardWatch()
    watch.observe([0.1, 0.2] * 20, [0.8, 0.9] * 20)
    watch.observe([0.5, 0.6] * 20, [0.81, 0.9] * 20)
    assert watch.suspicion is None
    watch.observe([0.5, 0.6] * 20, [0.3, 0.4] * 20)
    assert watch.suspicion is None  # it did not gain by it
    watch.observe([0.9, 0.95] * 20, [0.3, 0.4] * 20)
    assert watch.suspicion is not None


def test_what_the_watch_has_seen_is_saved_with_the_position(make: Any) -> None:
    (rows, _), (other, _) = make(), make()
    rows.watch, other.watch = RewardWatch(), RewardWatch()
    rows.watch.observe([0.1, 0.2] * 20, [0.8, 0.9] * 20)
    other.restore(json.loads(json.dumps(rows.state())))
    for watch in (rows.watch, other.watch):
        watch.observe([0.9, 0.95] * 20, [0.3, 0.4] * 20)
    assert rows.watch.suspicion == other.watch.suspicion is not None
