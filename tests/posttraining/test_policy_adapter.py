"""GRPO and PPO with adapters: the engine writes with what is trained, and the reference is the model without it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from crashes import crash
from danlu.adapters.config import AdapterShape
from danlu.adapters.lora import attach
from danlu.adapters.open import open_adapted
from danlu.adapters.wrapper import disabled
from danlu.data.packed_examples import pack_examples
from danlu.data.prompts import Prompt
from danlu.engine.config import SamplingParams
from danlu.engine.native_runner import NativeRunner, why_not
from danlu.engine.torch_runner import TorchRunner
from danlu.errors import Problems
from danlu.formats.card import Card
from danlu.models.causal_lm import CausalLM
from danlu.models.heads import RewardModel
from danlu.posttraining.align import align
from danlu.posttraining.config import AlignConfig
from danlu.posttraining.reward_watch import RewardWatch
from danlu.posttraining.rollouts import Rollout, RolloutEngine
from danlu.quantization.packed_linear import quantize_linears
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training import checkpoint
from danlu.training.logprobs import target_logprobs
from danlu.training.metrics import read_metrics
from random_lm import random_lm

TOKENS = list(range(5, 25))
NO_TEXT: Any = None


def adapted(shape: AdapterShape, *, quantize: bool = False, tied: bool = False) -> CausalLM:
    """A random model in the midst of learning an adapter."""
    model = random_lm(320, context=128, n_layers=1, tie_embeddings=tied)
    if quantize:
        quantize_linears(model)
    attach(model, shape)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".b"):
                p.normal_(std=0.1, generator=generator)
    return model.train()


def drawn(model: CausalLM, tokenizer: Tokenizer) -> tuple[object, list[Rollout]]:
    """What ran the model, and its answers."""
    engine = RolloutEngine(model, tokenizer, context=128)
    prompt = Prompt([], {}, "", NO_TEXT, TOKENS)
    groups = engine.draw([prompt], SamplingParams(n=4, temperature=1.0, max_new_tokens=20), seed=3)
    engine.close()
    return engine._engine.runner, groups[0]


def recomputed(model: CausalLM, rollouts: list[Rollout]) -> torch.Tensor:
    packed = pack_examples([one.example for one in rollouts])
    with torch.no_grad():
        logps_bt, _ = target_logprobs(model, packed)
    return logps_bt[packed.mask_bt]


@pytest.mark.parametrize(
    ("shape", "options", "native"),
    [
        (AdapterShape(rank=4), {}, True),
        (AdapterShape("dora", rank=4), {"quantize": True}, True),
        (AdapterShape(rank=4, token_ids=(7, 9)), {"tied": True}, True),
        (AdapterShape(rank=4, targets=("q_proj", "lm_head")), {"tied": True}, False),
    ],
    ids=["lora", "dora on 4 bits", "rows of tokens", "a tied head"],
)
def test_answers_are_drawn_from_the_model_with_its_adapter(
    shape: AdapterShape, options: dict[str, bool], native: bool, model_folder: Path
) -> None:
    model = adapted(shape, **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runner, rollouts = drawn(model, Tokenizer.load(model_folder))
    assert isinstance(runner, NativeRunner if native and why_not(model.config) is None else TorchRunner)
    found = torch.tensor([number for one in rollouts for number in one.logprobs])
    torch.testing.assert_close(found, recomputed(model, rollouts), atol=1e-5, rtol=0)
    with disabled(model):
        assert (found - recomputed(model, rollouts)).abs().max() > 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_is_not_rounded_into_weights_of_half_precision(model_folder: Path) -> None:
    model = adapted(AdapterShape(rank=4))
    for name, p in model.named_parameters():
        if ".adapters." not in name:
            p.data = p.data.bfloat16()
    assert isinstance(drawn(model, Tokenizer.load(model_folder))[0], TorchRunner)


@pytest.fixture
def config(model_folder: Path, tmp_path: Path) -> AlignConfig:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"say {i}"}) for i in range(40)))
    return AlignConfig(
        method="grpo", model=model_folder, data=prompts, out=tmp_path / "out", reward=("regex=[aeiou]",),
        prompts_per_step=3, group_size=4, max_new_tokens=5, max_prompt=64, steps=5, passes=2, kl=0.05, adapter="lora",
        rank=4, lr_scale=100, schedule="constant", warmup_steps=0, heldout_share=0.2, threads=1, log_to=(),
        checkpoint_every=2, precision="fp32", device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_a_resumed_run_ends_with_the_same_adapter(method: Any, config: AlignConfig) -> None:
    more = {"method": method} if method == "grpo" else {"method": method, "adapter": "dora", "quantize": "4bit"}
    straight, broken = (
        dataclasses.replace(config, out=config.out / name, **more)  # type: ignore[arg-type]
        for name in ("straight", "broken")
    )
    align(straight)
    crash(lambda: align(broken), at_step=3)
    saved = load_file(checkpoint.list_checkpoints(broken.out)[-1] / "state.safetensors")
    trained = [name for name in saved if name.startswith("model.")]
    assert all(".adapters." in name or name == "model.critic.head.weight" for name in trained)
    align(broken)
    folders = [""] if method == "grpo" else ["", "critic"]
    for folder in folders:
        first, second = (load_file(c.out / folder / "adapter_model.safetensors") for c in (straight, broken))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    lines = read_metrics(straight.out / "metrics.jsonl")
    assert [line["reward"] for line in lines] == [line["reward"] for line in read_metrics(broken.out / "metrics.jsonl")]
    assert lines[0]["kl"] < 1e-9 < lines[-1]["kl"]  # the adapter begins as nothing, and the reference has none
    assert all(line["rollout_mismatch"] < 1e-5 for line in lines[::2])  # the first time an answer is learned from
    card = Card.load(straight.out)
    assert card.kind == "adapter"
    assert card.details["adapter"]["quantize"] == straight.quantize
    model, _ = open_adapted(straight.out)
    if method == "ppo":
        critic, _ = open_adapted(straight.out / "critic", RewardModel)
        assert critic.head.weight.shape == (1, model.config.dim)
        assert Card.load(straight.out / "critic").details["adapter"]["quantize"] == "4bit"


@pytest.mark.parametrize("at_step", [1, 3], ids=["before the first checkpoint", "behind it"])
def test_the_watch_over_the_reward_is_resumed_too(
    at_step: int, config: AlignConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, dict[str, Any]]] = []
    observe = RewardWatch.observe

    def told(self: RewardWatch, rewards: list[float], others: list[float]) -> None:
        is_first = self.state()["best"] is None
        observe(self, rewards, others if is_first else [number - 1 for number in others])
        seen.append((is_first, self.state()))

    monkeypatch.setattr(RewardWatch, "observe", told)
    options = {"heldout_reward": ("regex=[xyz]",), "heldout_every": 1, "passes": 1, "kl": 0.0}
    straight, broken = (dataclasses.replace(config, out=config.out / name, **options) for name in ("a", "b"))  # type: ignore[arg-type]
    align(straight)
    wanted = list(seen)
    seen.clear()
    crash(lambda: align(broken), at_step=at_step)
    align(broken)
    assert [is_first for is_first, _ in seen] == [True] + [False] * (len(seen) - 1)
    assert seen[-1] == wanted[-1]


def test_what_adapters_cannot_do_here_is_refused(config: AlignConfig) -> None:
    wrong = dataclasses.replace(config, dropout=0.1, new_tokens=("<call>",), seq_len=256)
    with pytest.raises(Problems) as caught:
        align(wrong)
    assert [text.split(" ")[0] for text in caught.value.problems] == ["seq_len", "dropout", "new_tokens"]
