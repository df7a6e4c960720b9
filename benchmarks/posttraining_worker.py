"""danlu's side of `posttraining.py`: the verbs `finetune` and `align`, one optimizer step for each line of the input.

The first argument is JSON: the settings of `posttraining_tasks.py`.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from danlu import AlignConfig, FinetuneConfig, align, finetune
from danlu.adapters.lora import training_flops
from danlu.engine.config import SamplingParams
from danlu.objectives.advantages import group_advantages
from danlu.posttraining import dpo, experience, grpo
from danlu.posttraining.rollouts import RolloutEngine
from danlu.training.loop import Trainer

Settings = dict[str, Any]

TRL_EPS = 1e-4
"""What TRL adds to the standard deviation of a group's rewards."""


class Turns:
    """Waits for a line before each step of any `Trainer`, and tells when it is done how long it took."""

    def __init__(self, out: TextIO, settings: Settings) -> None:
        self.out, self.settings = out, settings
        self.opened: dict[str, Any] | None = {}
        self.rollout_seconds = 0.0
        self.rollouts: list[dict[str, Any]] = []
        self._step = Trainer._step
        Trainer._step = lambda trainer: self.step(trainer)  # type: ignore[method-assign]

    def step(self, trainer: Trainer) -> tuple[float, float, float]:
        """A step, when it is asked for."""
        if self.opened is not None:
            flops = training_flops(trainer.model, self.settings["mean_tokens"])
            self._say({"flops_per_token": flops, "compiled": trainer.compiled, **self.opened})
            self.opened = None
        if not sys.stdin.readline():
            raise SystemExit
        self.rollout_seconds, self.rollouts = 0.0, []
        begin = time.perf_counter()
        loss, grad_norm, rate = self._step(trainer)
        told: dict[str, Any] = {"loss": loss, "grad_norm": grad_norm, "rollout_seconds": self.rollout_seconds}
        self._say({"seconds": time.perf_counter() - begin, **told, "rollouts": self.rollouts})
        return loss, grad_norm, rate

    def _say(self, content: dict[str, Any]) -> None:
        print(json.dumps(content), file=self.out, flush=True)


def run_sft(settings: Settings, turns: Turns) -> None:
    """Rows of ``seq_len`` tokens; answers carry the loss. Compiled where a long run is, when ``timed``."""
    finetune(
        FinetuneConfig(
            **common(settings), seq_len=settings["seq_len"], batch_tokens=settings["rows"] * settings["seq_len"],
            compile="auto" if settings["timed"] else "never",
        )
    )  # fmt: skip


def run_dpo(settings: Settings, turns: Turns) -> None:
    """The log-probabilities of the reference are computed first, as always."""
    compute_logps = dpo.compute_logps

    def timed(*given: Any, **more: Any) -> torch.Tensor:
        compute_logps(*given, **more)  # the first pass of a process makes what later ones find
        begin = time.perf_counter()
        found = compute_logps(*given, **more)
        assert turns.opened is not None
        turns.opened["reference_seconds"] = time.perf_counter() - begin
        return found

    judged = dpo.read_groups

    def read(*given: Any, **more: Any) -> Any:
        found = judged(*given, **more)
        assert turns.opened is not None
        turns.opened["ids"] = [[list(ids) for ids, _ in group.examples] for group in found.train]
        return found

    dpo.compute_logps, dpo.read_groups = timed, read
    align(AlignConfig(**common(settings), method="dpo", seq_len=settings["seq_len"], batch_size=settings["rows"]))


def run_grpo(settings: Settings, turns: Turns) -> None:
    """Answers by the engine. To be compared with TRL's, a group's advantages are divided by what they are there."""
    draw = RolloutEngine.draw

    def timed(*given: Any, **more: Any) -> Any:
        begin = time.perf_counter()
        found = draw(*given, **more)
        turns.rollout_seconds += time.perf_counter() - begin
        turns.rollouts += [
            {"messages": one.prompt.messages, "prompt_ids": one.prompt.ids, "answer_ids": one.answer_ids}
            for group in found
            for one in group
        ]
        return found

    RolloutEngine.draw = timed  # type: ignore[method-assign]
    if settings["fixed_length"]:
        longest = settings["new_tokens"]
        experience.SamplingParams = functools.partial(SamplingParams, min_new_tokens=longest)  # type: ignore
    grpo.group_advantages = functools.partial(group_advantages, eps=TRL_EPS)
    align(
        AlignConfig(
            **common(settings), method="grpo", reward=("posttraining_reward:for_danlu",),
            prompts_per_step=settings["rows"], group_size=settings["group_size"],
            max_new_tokens=settings["new_tokens"], passes=settings["passes"], clip_low=0.2, heldout_prompts=0,
        )
    )  # fmt: skip


def common(settings: Settings) -> dict[str, Any]:
    """What all verbs are told."""
    rates = dict.fromkeys(("matrix_lr", "embed_lr", "head_lr", "norm_lr"), settings["rate"])
    return {
        "model": Path(settings["model"]), "data": Path(settings["data"]), "out": Path(settings["out"]),
        "steps": 1_000_000, "optimizer": "adamw", **rates, "schedule": "constant", "warmup_steps": 0,
        "precision": settings["precision"], "threads": settings["threads"], "device": "cpu", "heldout_share": 0.0,
        "skip_sigma": 0.0, "keep_checkpoints": 1, "checkpoint_every": 1_000_000, "log_to": (), "overwrite": True,
    }  # fmt: skip


RUN: dict[str, Callable[[Settings, Turns], None]] = {"sft": run_sft, "dpo": run_dpo, "grpo": run_grpo}


def own_stdout() -> TextIO:
    """Standard output for our lines alone; whatever a library prints goes to standard error."""
    ours = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return ours


def main() -> None:
    """Train until the input ends."""
    out, settings = own_stdout(), json.loads(sys.argv[1])
    # Verifiers run in processes of their own, which must find the reward too.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    try:
        RUN[settings["method"]](settings, Turns(out, settings))
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)
        raise


if __name__ == "__main__":
    main()
