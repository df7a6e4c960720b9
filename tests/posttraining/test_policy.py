"""`danlu align --method grpo|ppo` from end to end, with a model that learns in seconds."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from danlu.errors import DanluError, Problems
from danlu.formats.card import Card
from danlu.models.load import load_model
from danlu.posttraining.align import align
from danlu.posttraining.config import AlignConfig
from danlu.training.metrics import read_metrics


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"say {i}", "number": i}) for i in range(40)))
    return path


@pytest.fixture
def config(model_folder: Path, prompts: Path, tmp_path: Path) -> AlignConfig:
    return AlignConfig(
        method="grpo", model=model_folder, data=prompts, out=tmp_path / "out", reward=("regex=[aeiou]",),
        prompts_per_step=6, group_size=6, max_new_tokens=6, max_prompt=64, steps=12, matrix_lr=1e-2, embed_lr=1e-2,
        head_lr=1e-2, norm_lr=1e-2, schedule="constant", warmup_steps=0, heldout_share=0.2, threads=1, log_to=(),
        checkpoint_every=2, precision="fp32",
    )  # fmt: skip


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_the_reward_rises(method: Any, config: AlignConfig) -> None:
    more: dict[str, Any] = {"kl": 0.01, "passes": 2, "minibatches": 2} if method == "ppo" else {}
    steps = 12 if method == "grpo" else 32
    out = align(dataclasses.replace(config, method=method, steps=steps, **more))
    lines = read_metrics(out / "metrics.jsonl")
    rewards = [line["reward"] for line in lines]
    third = len(rewards) // 3
    assert sum(rewards[-third:]) > sum(rewards[:third]) + 0.1 * third, rewards
    assert all(line["rollout_mismatch"] < 1e-4 for line in lines)
    card = Card.load(out)
    assert card.metrics["heldout_reward"] > card.metrics["heldout_reward_before"]
    assert card.details["samples"][0]["answer"]
    load_model(out)  # a model folder like any other
    assert (out / "critic").exists() == (method == "ppo")


def test_a_killed_run_ends_with_the_same_bits(config: AlignConfig) -> None:
    config = dataclasses.replace(config, passes=2, minibatches=2, steps=10, checkpoint_every=3)
    straight = align(dataclasses.replace(config, out=config.out / "straight"))
    killed = dataclasses.replace(config, out=config.out / "killed")
    options = " ".join(f"{field.name}={getattr(killed, field.name)!r}," for field in dataclasses.fields(killed))
    code = (
        "from pathlib import Path, PosixPath; from danlu.posttraining.align import align; "
        f"from danlu.posttraining.config import AlignConfig; align(AlignConfig({options}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    log = killed.out / "metrics.jsonl"
    while (not log.exists() or len(log.read_text().splitlines()) < 5) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    assert process.wait() != 0
    align(killed)
    first, second = load_model(straight).state_dict(), load_model(killed.out).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    rewards = [[line["reward"] for line in read_metrics(out / "metrics.jsonl")] for out in (straight, killed.out)]
    assert rewards[0] == rewards[1]
    samples = [(out / "samples.jsonl").read_text() for out in (straight, killed.out)]
    assert samples[0] == samples[1]


def test_what_cannot_be_is_said_at_once(config: AlignConfig) -> None:
    for options, message in (
        ({"reward": ()}, "reward: grpo needs"),
        ({"group_size": 1}, "group_size"),
        ({"loss": "ipo"}, "loss is for method=dpo"),
        ({"gamma": 0.9}, "gamma is for method=ppo"),
        ({"method": "ppo", "variant": "dapo"}, "variant is for method=grpo"),
        ({"method": "dpo"}, "reward is for method=grpo or ppo"),
        ({"kl_target": 3.0, "method": "ppo"}, "kl_target moves the weight"),
    ):
        with pytest.raises(Problems, match=message):
            align(dataclasses.replace(config, **options))  # type: ignore[arg-type]
    for options, message in (
        ({"reward": ("nothing-like-this",)}, "not known"),
        ({"max_new_tokens": 5000}, "more than the context"),
        ({"curriculum": "hardness"}, "hardness"),
    ):
        with pytest.raises(DanluError, match=message):
            align(dataclasses.replace(config, **options))  # type: ignore[arg-type]
    assert not config.out.exists() or not any(config.out.iterdir())
