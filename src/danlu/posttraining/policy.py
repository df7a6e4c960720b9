"""`danlu align --method grpo|ppo`: a model learns from its own answers, which verifiers or a reward model judge."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch

from danlu import console, files
from danlu.data.prompts import read_prompts
from danlu.errors import DanluError
from danlu.formats.card import Stage
from danlu.models.causal_lm import CausalLM
from danlu.models.heads import RewardModel
from danlu.models.load import Model, load_model, save_model
from danlu.posttraining.config import AlignConfig
from danlu.posttraining.experience import Experience, Judged
from danlu.posttraining.grpo import GroupExperience
from danlu.posttraining.heldout_answers import HeldOutAnswers
from danlu.posttraining.policy_loss import PolicyLoss
from danlu.posttraining.ppo import ActorCritic, CriticExperience
from danlu.posttraining.rollouts import RolloutEngine
from danlu.posttraining.verifiers import Verifiers
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training.loop import Trainer
from danlu.training.metrics import Numbers

RATE = 1e-5
"""Of AdamW at a width of 768, for all weights; a fresh critic's head learns ten times as fast."""

SAMPLES = 8
"""Held-out answers that the card keeps."""


def learn_policy(config: AlignConfig) -> Path:
    """Train a model on its own answers to prompts, by GRPO or PPO, and write a model folder.

    Each step answers ``prompts_per_step`` prompts ``group_size`` times with the weights as they are, has the answers
    judged and learns from them. Without steps, minutes or epochs, it makes one pass over the prompts.

    Returns:
        The new model folder.

    Raises:
        DanluError: no usable prompt, a verifier that is not there, or no answer of a step that could be judged.
        KeyboardInterrupt: stopped by Ctrl-C; the run can be resumed by calling again.
    """
    inputs = {"model": config.model, "data": config.data}
    stage = Stage.open(config.out, kind="model", verb="align", config=config, inputs=inputs, overwrite=config.overwrite)
    if stage.finished:
        console.note(f"{config.out}: already made, nothing to do")
        return config.out
    with ExitStack() as open_things:
        with stage.preparing():
            torch.manual_seed(config.seed)  # a fresh head of a critic is drawn from it
            model, tokenizer = load_model(config.model), Tokenizer.load(config.model)
            longest = config.max_prompt + config.max_new_tokens
            if longest > model.config.context:
                raise DanluError(
                    f"max_prompt ({config.max_prompt}) and max_new_tokens ({config.max_new_tokens}) together are more "
                    f"than the context of {config.model} ({model.config.context}); lower one"
                )
            train, held_out = read_prompts(
                config.data, tokenizer, longest=config.max_prompt, heldout=config.heldout,
                share=0.1 if config.heldout_share is None else config.heldout_share, on_error=config.on_error,
            )  # fmt: skip
            verifiers = open_things.enter_context(_open(config, config.reward))
            others = open_things.enter_context(_open(config, config.heldout_reward)) if config.heldout_reward else None
            engine = RolloutEngine(
                model, tokenizer, context=longest, max_running=min(128, config.prompts_per_step * config.group_size)
            )
            open_things.callback(engine.close)
            rows, loss, trained = _method(config, model, engine, verifiers, train)
        measured = held_out[: config.heldout_prompts]
        answers = HeldOutAnswers(config, engine, verifiers, others, measured) if measured else None
        optimizer: Literal["muon", "adamw"] = "adamw" if config.optimizer == "auto" else config.optimizer
        trainer = Trainer(
            dataclasses.replace(config, compile="never", optimizer=optimizer),  # answers are of all lengths
            cast("Model", trained),  # a pair answers what is asked of a model
            rows,
            held_out=answers,
            rates=_rates(config, model),
            batch_tokens=rows.answers_per_step * rows.row_len,
            default_epochs=1.0,
            loss_sum=loss,
            betas=(0.9, 0.999),
            step_numbers=lambda: {**rows.numbers, **loss.take_numbers()},
            stop_early=None if answers is None else answers.suspicion,
        )  # fmt: skip
        before = _first_measurement(config, answers, trainer)
        metrics = trainer.run()
        after = _samples(answers)
    save_model(model, config.out, tokenizer)
    if isinstance(trained, ActorCritic):
        save_model(trained.critic, config.out / "critic", tokenizer)
    metrics |= {f"{name}_before": value for name, value in before.items()}
    metrics |= {"prompts": len(train), "heldout_prompts": len(measured)}
    stage.finish(metrics, {**trainer.details(), "samples": after})
    trainer.clean_up()
    return config.out


def _open(config: AlignConfig, specs: tuple[str, ...]) -> Verifiers:
    return Verifiers.open(
        specs,
        seconds=config.sandbox_seconds,
        memory_mib=config.sandbox_memory,
        allow_weak_sandbox=config.allow_weak_sandbox,
    )


def _method(
    config: AlignConfig, model: CausalLM, engine: RolloutEngine, verifiers: Verifiers, prompts: list[Any]
) -> tuple[Experience, PolicyLoss, CausalLM | ActorCritic]:
    """What the answers teach, the loss, and what is trained."""
    reference = None
    if config.kl:
        frozen = copy.deepcopy(model).requires_grad_(False).eval()

        @contextmanager
        def reference() -> Iterator[CausalLM]:
            frozen.to(model.device).compute_dtype = model.compute_dtype
            yield frozen

    if config.method == "grpo":
        aggregation = config.settings()["aggregate"]
        rows: Experience = GroupExperience(
            config, model, engine, verifiers, prompts, aggregation=aggregation, reference=reference, seed=config.seed
        )
        return rows, PolicyLoss(config, model, kl=config.kl), model
    pair = ActorCritic(model, load_model(config.critic or config.model, RewardModel, new_head=config.critic is None))
    rows = CriticExperience(
        config, pair, engine, verifiers, prompts, aggregation="token", reference=reference, seed=config.seed
    )
    return rows, PolicyLoss(config, model, values=pair.values), pair


def _rates(config: AlignConfig, model: CausalLM) -> dict[str, float]:
    rate = (config.lr_scale or 1.0) * RATE * (model.config.dim / 768) ** -0.5
    return {
        "matrix_lr": config.matrix_lr or rate,
        "embed_lr": config.embed_lr or rate,
        "norm_lr": config.norm_lr or rate,
        "head_lr": config.head_lr or rate,
    }


def _first_measurement(config: AlignConfig, answers: HeldOutAnswers | None, trainer: Trainer) -> Numbers:
    """How the model answers before it learns; of a resumed run, as it was written down."""
    path = config.out / "checkpoints" / "before.json"
    if answers is None:
        return {}
    if path.exists():
        found: Numbers = files.read_json(path)
        return found
    found = trainer.measure_held_out()
    files.write_json(path, found)
    return found


def _samples(answers: HeldOutAnswers | None) -> list[dict[str, Any]]:
    """Some held-out answers of the last measurement, for the card."""
    if answers is None:
        return []
    return [_sample(group[0]) for group in answers.last[:SAMPLES]]


def _sample(one: Judged) -> dict[str, Any]:
    prompt = one.rollout.prompt
    return {
        "prompt": prompt.text or prompt.messages[-1]["content"],
        "answer": one.rollout.text,
        "reward": one.reward,
        "parts": one.judgement.parts,
        "problem": one.judgement.problem,
    }
