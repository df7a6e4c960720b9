"""What the engine says of its answers is what the trainer computes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from danlu.data.packed_examples import pack_examples
from danlu.data.prompts import Prompt
from danlu.engine.config import SamplingParams
from danlu.models.causal_lm import CausalLM
from danlu.models.load import load_model
from danlu.posttraining.rollouts import Rollout, RolloutEngine
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training.logprobs import target_logprobs


@pytest.fixture
def model(model_folder: Path) -> CausalLM:
    model = load_model(model_folder)
    with torch.no_grad():  # it ends now and then
        model.head.weight[list(Tokenizer.load(model_folder).stop_ids)] = model.head.weight[100].clone()
    return model


@pytest.fixture
def prompts(model_folder: Path) -> list[Prompt]:
    tokenizer = Tokenizer.load(model_folder)
    found = []
    for text in ("def f(x):", "丹炉", "a longer prompt, which asks for more of everything"):
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.encode_chat(messages, add_generation_prompt=True)
        found.append(Prompt(messages, {}, "", None, ids))
    return found


def recomputed(model: CausalLM, rollouts: list[Rollout], temperature: float) -> list[list[float]]:
    packed = pack_examples([one.example for one in rollouts])
    with torch.no_grad():
        logps_bt, _ = target_logprobs(model, packed, temperature=temperature)
    return [row[:n].tolist() for row, n in zip(logps_bt, packed.lengths_b.tolist(), strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_trainers(
    model: CausalLM, prompts: list[Prompt], model_folder: Path, temperature: float
) -> None:
    tokenizer = Tokenizer.load(model_folder)
    engine = RolloutEngine(model, tokenizer, context=256)
    params = SamplingParams(n=8, temperature=temperature, max_new_tokens=40)
    before = engine.draw(prompts, params, seed=5)
    assert before == engine.draw(prompts, params, seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    trained = {name: parameter.clone() for name, parameter in model.named_parameters()}
    groups = engine.draw(prompts, params, seed=5)
    assert all(torch.equal(parameter, trained[name]) for name, parameter in model.named_parameters())
    assert groups != before  # the weights are taken as they are at each draw
    engine.close()
    rollouts = [one for group in groups for one in group]
    assert [len(group) for group in groups] == [8, 8, 8]
    assert any(one.ended for one in rollouts)
    assert any(not one.ended for one in rollouts)
    for one, logps in zip(rollouts, recomputed(model, rollouts, temperature), strict=True):
        # What logits differ by is divided by the temperature, too.
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(logps), atol=1e-5 / temperature, rtol=0)
        assert (one.answer_ids[-1] in tokenizer.stop_ids) == one.ended
        assert len(one.answer_ids) == 40 or one.ended
        ids, mask = one.example
        assert list(ids) == [*one.prompt.ids, *one.answer_ids]
        assert sum(mask) == len(one.answer_ids)
