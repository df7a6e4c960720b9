"""The other side of `posttraining.py`: TRL's trainers on the same data, one optimizer step for each line of the input.

Runs in any environment that has trl; it knows nothing of danlu. The first argument is JSON: the settings of
`posttraining_tasks.py`. Everything that slows TRL down on a CPU is off (gradient checkpointing, saving, progress bars).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, TextIO

import torch
from datasets import Dataset
from posttraining_reward import for_trl
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

Settings = dict[str, Any]


class Turns(TrainerCallback):
    """Waits for a line before each step, and tells when it is done how long it took.

    The clock starts when the examples of the step are there, and stops before anything is logged.
    """

    def __init__(self, out: TextIO, opened: dict[str, Any], rollout_seconds: list[float]) -> None:
        self.out, self.opened, self.rollout_seconds = out, opened, rollout_seconds
        self.begin = self.seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._say(self.opened)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not sys.stdin.readline():
            raise SystemExit
        self.rollout_seconds.clear()
        self.begin = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.begin

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        told = {name: logs[name] for name in ("loss", "grad_norm")}
        self._say({"seconds": self.seconds, "rollout_seconds": sum(self.rollout_seconds), **told})

    def _say(self, content: dict[str, Any]) -> None:
        print(json.dumps(content), file=self.out, flush=True)


def open_sft(settings: Settings) -> tuple[SFTTrainer, dict[str, Any]]:
    """Padded: batches of ``micro_batch`` examples. Packed: rows of ``seq_len`` tokens, one at a time (TRL lays the rows
    of a batch end to end, and without FlashAttention the whole of it attends to the whole)."""
    packed = settings["variant"] == "packed"
    rows = [json.loads(line) for line in Path(settings["tokens"]).read_text().splitlines()]
    how = SFTConfig(
        **common(settings, rows_per_pass=len(rows), micro_batch=1 if packed else settings["micro_batch"]),
        max_length=settings["seq_len"], packing=packed, packing_strategy="bfd",
    )  # fmt: skip
    trainer = SFTTrainer(model=settings["model"], args=how, train_dataset=Dataset.from_list(rows))
    return trainer, {"rows": len(trainer.train_dataset)}


class TimedReference(DPOTrainer):
    """Times the reference's log-probabilities where they are computed before the first step: each batch twice, of which
    the second time counts, as the first pass of a process makes what later ones find."""

    reference_seconds = 0.0

    def compute_ref_log_probs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
        if not self.is_in_train:
            super().compute_ref_log_probs(model, inputs)
        begin = time.perf_counter()
        found = super().compute_ref_log_probs(model, inputs)
        if not self.is_in_train:
            self.reference_seconds += time.perf_counter() - begin
        return found


def open_dpo(settings: Settings) -> tuple[DPOTrainer, dict[str, Any]]:
    """Precomputed: the reference is asked before the first step. Online: at each step."""
    rows = [json.loads(line) for line in Path(settings["tokens"]).read_text().splitlines()]
    how = DPOConfig(
        **common(settings, rows_per_pass=len(rows), micro_batch=settings["micro_batch"]),
        max_length=settings["seq_len"], beta=0.1, loss_type=["sigmoid"],
        precompute_ref_log_probs=settings["variant"] == "precomputed",
        precompute_ref_batch_size=settings["micro_batch"],
    )  # fmt: skip
    trainer = TimedReference(model=settings["model"], args=how, train_dataset=Dataset.from_list(rows))
    ids = [
        [one["prompt_ids"] + one["chosen_ids"], one["prompt_ids"] + one["rejected_ids"]]
        for one in trainer.train_dataset
    ]
    return trainer, {"reference_seconds": trainer.reference_seconds, "ids": ids}


class TimedRollouts(GRPOTrainer):
    """Times the drawing of answers."""

    rollout_seconds: list[float]

    def _generate_single_turn(self, *given: Any, **more: Any) -> Any:
        begin = time.perf_counter()
        found = super()._generate_single_turn(*given, **more)
        self.rollout_seconds.append(time.perf_counter() - begin)
        return found


def open_grpo(settings: Settings) -> tuple[GRPOTrainer, dict[str, Any]]:
    """Answers by `transformers.generate`; or those that are given, each prompt's in their order."""
    rows = [json.loads(line) for line in Path(settings["data"]).read_text().splitlines()]
    generation = {"min_new_tokens": settings["new_tokens"]} if settings["fixed_length"] else None
    how = GRPOConfig(
        **common(settings, rows_per_pass=len(rows) * settings["group_size"], micro_batch=settings["group_size"]),
        num_generations=settings["group_size"], max_completion_length=settings["new_tokens"],
        num_iterations=settings["passes"], generation_kwargs=generation, temperature=1.0, top_p=1.0, top_k=0,
        beta=0.0, epsilon=0.2, loss_type="grpo", scale_rewards="group",
    )  # fmt: skip
    trainer = TimedRollouts(
        model=settings["model"], reward_funcs=for_trl, args=how, train_dataset=Dataset.from_list(rows),
        rollout_func=given_answers(Path(settings["rollouts"])) if settings["rollouts"] else None,
    )  # fmt: skip
    trainer.rollout_seconds = []
    return trainer, {}


def given_answers(file: Path) -> Any:
    """What TRL calls in place of its own generation."""
    rollouts = json.loads(file.read_text())

    def answers(prompts: list[list[dict[str, str]]], trainer: GRPOTrainer) -> dict[str, Any]:
        left = defaultdict(list)
        for one in rollouts:
            left[one["messages"][-1]["content"]].append(one)
        found = [left[prompt[-1]["content"]].pop(0) for prompt in prompts]
        for prompt, one in zip(prompts, found, strict=True):
            ids = trainer.processing_class.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            assert ids == one["prompt_ids"], "the two read different tokens from a prompt"
        answer_ids = [one["answer_ids"] for one in found]
        # Asked for, and looked at with vLLM only.
        return {"prompt_ids": [one["prompt_ids"] for one in found], "completion_ids": answer_ids,
                "logprobs": [[0.0] * len(ids) for ids in answer_ids]}  # fmt: skip

    return answers


def common(settings: Settings, *, rows_per_pass: int, micro_batch: int) -> dict[str, Any]:
    """What all methods are told. A step is a pass over the rows."""
    beta1, beta2 = settings["betas"]
    return {
        "output_dir": settings["out"], "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": -(-rows_per_pass // micro_batch), "max_steps": 1_000_000,
        "learning_rate": settings["rate"], "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0,
        "adam_beta1": beta1, "adam_beta2": beta2, "adam_epsilon": 1e-10, "max_grad_norm": 1e9,
        "model_init_kwargs": {"dtype": "float32"}, "bf16": settings["precision"] == "bf16", "use_cpu": True,
        "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none", "logging_steps": 1,
        "disable_tqdm": True, "seed": 0,
    }  # fmt: skip


OPEN = {"sft": open_sft, "dpo": open_dpo, "grpo": open_grpo}


def own_stdout() -> TextIO:
    """Standard output for our lines alone; whatever a library prints goes to standard error."""
    ours = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return ours


def main() -> None:
    """Train until the input ends."""
    out, settings = own_stdout(), json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    try:
        trainer, opened = OPEN[settings["method"]](settings)
        trainer.add_callback(Turns(out, opened, getattr(trainer, "rollout_seconds", [])))
        trainer.train()
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)
        raise


if __name__ == "__main__":
    main()
