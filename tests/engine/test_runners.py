"""Which runner a model gets, and that answers do not depend on it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from danlu.engine.config import SamplingParams
from danlu.engine.engine import Engine
from danlu.engine.engine_config import EngineConfig
from danlu.engine.native_runner import NativeRunner
from danlu.engine.torch_runner import TorchRunner
from danlu.errors import DanluError
from danlu.kernels import native
from danlu.models.causal_lm import CausalLM
from danlu.models.load import load_model
from danlu.nn.config import ModelConfig, Rope

GREEDY = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)
SHAPE: dict[str, Any] = {
    "vocab_size": 90, "n_layers": 2, "dim": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 96,
    "context": 128,
}  # fmt: skip
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6] * 9, [5]]

needs_kernels = pytest.mark.skipif(native.choose()[0] is None, reason=f"no native kernels: {native.choose()[1]}")


def random_model(seed: int = 0, **options: Any) -> CausalLM:
    torch.manual_seed(seed)
    model = CausalLM(ModelConfig(**{**SHAPE, "rope": Rope(), **options}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def answers(model: Any, **options: Any) -> list[list[int]]:
    with Engine(model, EngineConfig(**options)) as engine:
        return [generation.completions[0].token_ids for generation in engine.generate(PROMPTS, GREEDY)]


@needs_kernels
def test_native_and_torch_give_the_same_answers() -> None:
    model = random_model()
    with Engine(model) as engine, Engine(model, EngineConfig(kernels="torch")) as other:
        assert isinstance(engine.runner, NativeRunner)
        assert isinstance(other.runner, TorchRunner)
    assert answers(model) == answers(model, kernels="torch") == answers(model, threads=1)


@needs_kernels
def test_what_has_no_kernel_runs_on_torch_or_is_refused() -> None:
    model = random_model(gated=False)
    with Engine(model) as engine:
        assert isinstance(engine.runner, TorchRunner)
    for options, message in (
        ({"kernels": "native"}, "kernels=native: .* without gate"),
        ({"weights": "int8"}, "weights=int8: .* without gate"),
    ):
        with pytest.raises(DanluError, match=message):
            Engine(model, EngineConfig(**options))
    for options, message in (({"kv_dtype": "fp16"}, "fp16"), ({"block_size": 8}, "not 8")):
        with pytest.raises(DanluError, match=message):
            Engine(random_model(), EngineConfig(kernels="native", **options))


@needs_kernels
def test_the_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "off")
    with Engine(random_model()) as engine:
        assert isinstance(engine.runner, TorchRunner)
    monkeypatch.setenv(native.VARIABLE, "sse9")
    with pytest.raises(DanluError, match="DANLU_KERNELS=sse9"):
        Engine(random_model())


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_new_weights_make_new_answers(kernels: str) -> None:
    """And nothing that was cached for the old ones is used."""
    first, second = random_model(0), random_model(1)
    with Engine(first, EngineConfig(kernels=kernels)) as engine:
        old = [g.completions[0].token_ids for g in engine.generate(PROMPTS, GREEDY)]
        engine.update(second)
        new = [g.completions[0].token_ids for g in engine.generate(PROMPTS, GREEDY)]
        engine.check()
        engine.submit(PROMPTS[0], GREEDY)
        with pytest.raises(DanluError, match="requests are running"):
            engine.update(first)
    assert old == answers(first, kernels=kernels)
    assert new == answers(second, kernels=kernels) != old


@needs_kernels
@pytest.mark.slow
def test_packed_weights_are_as_good_as_the_unpacked_ones(smollm2: Path) -> None:
    """Perplexity of a real 4-bit file on a real text, activations rounded to 8 bits. Measured on 153,450 tokens of
    Python: 0.29 % (standard error 0.02) above that of the unpacked weights in fp32; the text here is shorter."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    with Engine(smollm2) as engine:
        assert isinstance(engine.runner, NativeRunner)
        assert engine.tokenizer is not None
        ids = engine.tokenizer.encode(text)[:2048]
        found = [token.logprob for token in engine.score([ids])[0] if token is not None]
    model = load_model(smollm2)
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids]))[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(ids[1:])[:, None]).mean()
    ratio = torch.exp(expected - sum(found) / len(found))
    assert abs(ratio - 1) < 0.008


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kernels", [pytest.param("native", marks=needs_kernels), "torch"])
def test_memory_of_the_cache_is_taken_when_it_fills_or_at_once(kernels: Any) -> None:
    with Engine(random_model(), EngineConfig(kernels=kernels)) as engine:
        blocks = [(64 << 20) // engine.runner.block_bytes(0)]
        ctypes.CDLL(None).malloc_trim(0)  # or it could come from what other tests have freed
        before = resident()
        engine.runner.allocate(blocks)
        as_it_fills = resident() - before
        engine.runner.allocate(blocks, reserve=True)
        at_once = resident() - before
    assert as_it_fills < 16 << 20
    assert at_once > 48 << 20
