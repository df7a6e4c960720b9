"""`danlu align --method grpo|ppo` from end to end, with a model that learns in seconds."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from danlu.data.prompts import Prompt
from danlu.errors import DanluError, Problems
from danlu.formats.card import Card
from danlu.models.load import load_model, read_config
from danlu.posttraining import experience
from danlu.posttraining.align import align
from danlu.posttraining.config import AlignConfig
from danlu.posttraining.experience import Judged, judge
from danlu.posttraining.policy_loss import PolicyLoss
from danlu.posttraining.rollouts import longest_prompt
from danlu.posttraining.verifiers import Judgement
from danlu.training import checkpoint
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
        ({"max_new_tokens": 5000}, "has room for"),
        ({"curriculum": "hardness"}, "hardness"),
    ):
        with pytest.raises(DanluError, match=message):
            align(dataclasses.replace(config, **options))  # type: ignore[arg-type]
    assert not config.out.exists() or not any(config.out.iterdir())


def test_what_was_learned_outlives_a_verifier_that_fails(config: AlignConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step is drawn again when it is mended, and the run ends as one whose verifier never failed."""
    config = dataclasses.replace(config, steps=5, checkpoint_every=100)
    straight = align(dataclasses.replace(config, out=config.out / "straight"))
    broken = dataclasses.replace(config, out=config.out / "broken")
    calls = iter(range(100))

    def fails_at_the_fourth(*arguments: Any) -> list[list[Judged]]:
        judged = judge(*arguments)
        if next(calls) < 3:
            return judged
        problem = Judgement(None, {}, "it is away")
        return [[dataclasses.replace(one, reward=None, judgement=problem) for one in group] for group in judged]

    with monkeypatch.context() as patched:
        patched.setattr(experience, "judge", fails_at_the_fourth)
        with pytest.raises(DanluError, match=r"could be judged: it is away\. Mend that"):
            align(broken)
    assert [int(path.name.rpartition("-")[2]) for path in checkpoint.list_checkpoints(broken.out)] == [3]
    align(broken)
    first, second = load_model(straight).state_dict(), load_model(broken.out).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_critic_reads_what_the_model_writes(config: AlignConfig, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(config.model, other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    with pytest.raises(DanluError, match="has another tokenizer or chat template"):
        align(dataclasses.replace(config, method="ppo", critic=other))
    with pytest.raises(DanluError, match="another kind of model, without a head for"):
        align(dataclasses.replace(config, method="ppo", critic=config.model))


def test_prompts_are_as_long_as_the_context_leaves_them(config: AlignConfig) -> None:
    context = read_config(config.model).context
    assert longest_prompt(dataclasses.replace(config, max_prompt=None), context) == min(512, context - 6)
    assert longest_prompt(dataclasses.replace(config, max_prompt=10), context) == 10
    for options in ({"max_prompt": context}, {"max_prompt": None, "max_new_tokens": context}):
        with pytest.raises(DanluError, match="has room for; lower it"):
            longest_prompt(dataclasses.replace(config, **options), context)  # type: ignore[arg-type]


def test_a_curriculum_goes_by_numbers_that_are_text_too() -> None:
    prompts = [Prompt([], {"difficulty": value}, "row", None, []) for value in (3, 0.5, "29", "0.25")]
    assert experience.difficulties(prompts, "difficulty") == [3, 0.5, 29, 0.25]
    for value in (None, True, "hard", "nan", [1]):
        with pytest.raises(DanluError, match="is no number"):
            experience.difficulties([Prompt([], {"difficulty": value}, "row", None, [])], "difficulty")


def test_a_run_that_learns_nothing_is_no_success(config: AlignConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PolicyLoss, "__call__", lambda self, batch: self.model.head.weight.sum() * float("nan"))
    with pytest.raises(DanluError, match="every step was skipped"):
        align(dataclasses.replace(config, steps=2))
    assert not (config.out / "danlu.json").exists()
