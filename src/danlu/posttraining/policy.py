"""`danlu align --method grpo|ppo`: a model learns from its own answers, which verifiers or a reward model judge."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch

from danlu import console, files, hardware
from danlu.adapters import training as adapters
from danlu.adapters.sites import n_weights
from danlu.adapters.wrapper import disabled
from danlu.data.prompts import read_prompts
from danlu.errors import DanluError
from danlu.formats.card import Stage
from danlu.models.causal_lm import CausalLM
from danlu.models.heads import RewardModel
from danlu.models.load import Model, read_config
from danlu.posttraining.answer_log import AnswerLog, samples_of
from danlu.posttraining.config import AlignConfig
from danlu.posttraining.experience import Experience, Reference
from danlu.posttraining.grpo import GroupExperience
from danlu.posttraining.heldout_answers import HeldOutAnswers
from danlu.posttraining.judged import learning_rates, open_model
from danlu.posttraining.policy_loss import PolicyLoss
from danlu.posttraining.ppo import ActorCritic, CriticExperience
from danlu.posttraining.rollouts import RolloutEngine, longest_prompt
from danlu.posttraining.verifiers import Verifiers, model_folders
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training.loop import Trainer
from danlu.training.metrics import Numbers

RATE = 1e-5
"""Of AdamW at a width of 768, for all weights."""

ADAPTER_RATE = 1e-4


def learn_policy(config: AlignConfig) -> Path:
    """Train a model on its own answers to prompts, by GRPO or PPO, and write a model folder, or an adapter's.

    Each step answers ``prompts_per_step`` prompts ``group_size`` times with the weights as they are, has the answers
    judged and learns from them. Without steps, minutes or epochs, it makes one pass over the prompts. Where an adapter
    is trained, a critic has one too, and the model without its adapter is the reference: no second copy is kept.

    Returns:
        The new folder; PPO's critic is in a folder `critic` of it.

    Raises:
        DanluError: no usable prompt, a verifier that is not there, or no answer of a step that could be judged.
        KeyboardInterrupt: stopped by Ctrl-C; the run can be resumed by calling again.
    """
    stage = Stage.open(
        config.out, kind=adapters.kind_of_output(config), verb="align", config=config, inputs=_inputs(config),
        overwrite=config.overwrite,
    )  # fmt: skip
    if stage.finished:
        console.note(f"{config.out}: already made, nothing to do")
        return config.out
    with ExitStack() as open_things:
        with stage.preparing():
            max_prompt = longest_prompt(config, read_config(config.model).context)
            longest = max_prompt + config.max_new_tokens
            torch.manual_seed(config.seed)  # a fresh head of a critic is drawn from it
            model, tokenizer, details = open_model(config, CausalLM, Tokenizer.load(config.model))
            device = hardware.pick_device(config.device)  # where the engine finds it
            model.to(device).compute_dtype = hardware.DTYPES[hardware.pick_precision(config.precision, device)]
            train, held_out = read_prompts(
                config.data, tokenizer, longest=max_prompt, heldout=config.heldout,
                share=0.1 if config.heldout_share is None else config.heldout_share, on_error=config.on_error,
            )  # fmt: skip
            verifiers = open_things.enter_context(Verifiers.within(config, config.reward))
            others = None
            if config.heldout_reward:
                others = open_things.enter_context(Verifiers.within(config, config.heldout_reward))
            engine = RolloutEngine(
                model, tokenizer, context=longest, max_running=min(128, config.prompts_per_step * config.group_size)
            )
            open_things.callback(engine.close)
            rows, loss, trained = _method(config, model, engine, verifiers, train)
        measured = held_out[: config.heldout_prompts]
        answers = HeldOutAnswers(config, engine, verifiers, others, measured) if measured else None
        rows.watch = None if answers is None else answers.watch
        optimizer: Literal["muon", "adamw"] = "adamw" if config.optimizer == "auto" else config.optimizer
        trainer = Trainer(
            dataclasses.replace(config, compile="never", optimizer=optimizer),  # answers are of all lengths
            cast("Model", trained),  # a pair answers what is asked of a model
            rows,
            held_out=answers,
            rates=learning_rates(config, model, RATE, adapter=ADAPTER_RATE),
            batch_tokens=rows.answers_per_step * rows.row_len,
            default_epochs=1.0,
            loss_sum=loss,
            betas=(0.9, 0.999),
            step_numbers=lambda: {**rows.numbers, **loss.take_numbers()},
            stop_early=None if answers is None else answers.suspicion,
        )  # fmt: skip
        if answers is not None:
            answers.log = AnswerLog(config.out, lambda: trainer.progress.step)
        before = _first_measurement(config, answers, trainer)
        metrics = trainer.run()
    adapters.save_trained(model, config.out, config.model, tokenizer)
    if isinstance(trained, ActorCritic):
        critic = config.out / "critic"
        adapters.save_trained(trained.critic, critic, config.critic or config.model, tokenizer)
        dataclasses.replace(stage.card, details=trained.details).save(critic)
    metrics |= {f"{name}_before": value for name, value in before.items()}
    metrics |= {"parameters": n_weights(model), "prompts": len(train), "heldout_prompts": len(measured)}
    samples = [] if answers is None else samples_of(answers.last)
    stage.finish(metrics, {**trainer.details(), **details, "samples": samples})
    trainer.clean_up()
    return config.out


def _inputs(config: AlignConfig) -> dict[str, Path]:
    """All that the result depends on; reward models by the option that names them."""
    inputs = {"model": config.model, "data": config.data}
    inputs |= {role: path for role in ("heldout", "critic") if (path := getattr(config, role)) is not None}
    for role, specs in (("reward", config.reward), ("heldout reward", config.heldout_reward)):
        for number, path in enumerate(model_folders(specs)):
            inputs[role if number == 0 else f"{role} {number + 1}"] = path
    return inputs


def _method(
    config: AlignConfig, model: CausalLM, engine: RolloutEngine, verifiers: Verifiers, prompts: list[Any]
) -> tuple[Experience, PolicyLoss, CausalLM | ActorCritic]:
    """What the answers teach, the loss, and what is trained."""
    reference = _reference(config, model) if config.kl else None
    if config.method == "grpo":
        aggregation = config.settings()["aggregate"]
        rows: Experience = GroupExperience(
            config, model, engine, verifiers, prompts, aggregation=aggregation, reference=reference, seed=config.seed
        )
        return rows, PolicyLoss(config, model, kl=config.kl), model
    if (
        config.critic is not None
        and Tokenizer.load(config.critic).fingerprint != Tokenizer.load(config.model).fingerprint
    ):
        raise DanluError(
            f"{config.critic}: has another tokenizer or chat template than {config.model}; a critic reads the very "
            "tokens that the model writes"
        )
    start = dataclasses.replace(config, model=config.critic or config.model)
    critic, _, details = open_model(start, RewardModel, Tokenizer.load(config.model), new_head=config.critic is None)
    pair = ActorCritic(model, critic, details)
    rows = CriticExperience(
        config, pair, engine, verifiers, prompts, aggregation="token", reference=reference, seed=config.seed
    )
    return rows, PolicyLoss(config, model, values=pair.values), pair


def _reference(config: AlignConfig, model: CausalLM) -> Reference:
    """The model as it is now: the one that is trained without its adapter, or a copy."""
    if config.adapter != "none":

        @contextmanager
        def without_adapter() -> Iterator[CausalLM]:
            with disabled(model):
                yield model

        return without_adapter
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    return lambda: nullcontext(frozen)


def _first_measurement(config: AlignConfig, answers: HeldOutAnswers | None, trainer: Trainer) -> Numbers:
    """How the model answers before it learns; of a resumed run, as it was written down."""
    path = config.out / "checkpoints" / "before.json"
    if answers is None:
        return {}
    if path.exists():
        written = files.read_json(path)
        if answers.watch is not None:
            answers.watch.restore(written["watch"])
        found: Numbers = written["found"]
        return found
    found = trainer.measure_held_out()
    files.write_json(path, {"found": found, "watch": None if answers.watch is None else answers.watch.state()})
    return found
