"""The planner against what autograd saves, what real runs take, and what is well known."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from danlu import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.models.config import model_config_for
from danlu.models.load import save_model
from danlu.nn.config import ModelConfig, Rope
from danlu.objectives.causal_lm import next_token_nll_sum
from danlu.planning import memory
from danlu.planning.config import PlanConfig
from danlu.planning.plan import machines, model_shape, plan

SHAPES = {
    "qwen3": model_config_for(2, 512, dim=128, n_kv_heads=1),
    "llama": ModelConfig(512, 2, 128, 4, 2, 32, 352, rope=Rope(), tie_embeddings=True),
    "gpt": ModelConfig(512, 2, 128, 4, 4, 32, 512, norm="layer", gated=False, activation="gelu_tanh"),
    "gemma": ModelConfig(512, 2, 128, 4, 2, 32, 256, rope=Rope(), arrangement="sandwich", attention_softcap=30.0),
    "phi": ModelConfig(512, 2, 128, 4, 4, 32, 512, rope=Rope(), arrangement="parallel", norm="layer", gated=False),
}


def saved_bytes(shape: ModelConfig, batch: int, seq_len: int) -> int:
    """What autograd keeps between forward and backward, parameters left out."""
    model = CausalLM(shape).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, shape.vocab_size, (batch, seq_len))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = next_token_nll_sum(model(ids), ids)
    del loss
    return sum(sizes.values())


@pytest.mark.parametrize("name", SHAPES)
def test_activations_are_what_autograd_saves(name: str) -> None:
    shape, batch, seq_len = SHAPES[name], 2, 128
    budget = memory.training(shape, 1, seq_len=seq_len, batch=batch)
    # At the peak the logits' softmax stands beside two gradients of its size; autograd itself saves one of the three.
    expected = budget.activations - 2 * 4 * batch * seq_len * shape.vocab_size
    assert saved_bytes(shape, batch, seq_len) == pytest.approx(expected, rel=0.05)


def peak_of(script: str, *arguments: str) -> int:
    """Bytes by which a run's resident memory peaks above its start, imports done.

    The C library is told to give freed memory back at once. Left alone, it keeps blocks of up to 32 MB for itself, and
    the same run was seen to take up to 1.65 times as much.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + script, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


PREAMBLE = """
import sys, threading, time, torch, torch._dynamo  # which optimizers import at their first step
from danlu.models.causal_lm import CausalLM
from danlu.models.config import model_config_for
from danlu.models.load import load_model, read_config
from danlu.engine.config import SamplingParams
from danlu.engine.engine import Engine
from danlu.engine.engine_config import EngineConfig
from danlu.engine.native_runner import NativeRunner, why_not
from danlu.objectives.causal_lm import next_token_nll_sum
from danlu.hardware import peak_memory_bytes
(torch.randn(512, 512) @ torch.randn(512, 512)).sum().item()
(torch.randn(64, 64, requires_grad=True) @ torch.randn(64, 64)).sum().backward()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
start = resident()
def report():
    print(peak_memory_bytes(torch.device("cpu")) - start)
"""

TRAIN = """
depth, dim, vocab, batch, seq_len, checkpointing = map(int, sys.argv[1:])
model = CausalLM(model_config_for(depth, vocab, dim=dim)).train()
model.init_weights()
model.gradient_checkpointing = bool(checkpointing)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
ids = torch.randint(0, vocab, (batch, seq_len))
for _ in range(2):
    next_token_nll_sum(model(ids), ids).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
report()
"""

GENERATE = """
prompt = [i % 8192 for i in range(int(sys.argv[2]))]
config = EngineConfig(max_running=1, context=len(prompt) + 4)
engine = Engine(NativeRunner.open(sys.argv[1]) if why_not(read_config(sys.argv[1])) is None
                else load_model(sys.argv[1]), config)
engine.generate([prompt], SamplingParams(max_new_tokens=4, temperature=0))
report()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "dim", "vocab", "batch", "seq_len", "checkpointing"),
    [
        (6, 512, 4096, 2, 512, 0),  # activations weigh most
        (10, 768, 2048, 1, 64, 0),  # weights, gradients and optimizer states do
        (8, 384, 1024, 4, 512, 1),
    ],
)
def test_training_takes_what_was_planned(
    depth: int, dim: int, vocab: int, batch: int, seq_len: int, checkpointing: int
) -> None:
    shape = model_config_for(depth, vocab, dim=dim)
    with torch.device("meta"):
        parameters = CausalLM(shape).num_parameters()
    planned = memory.training(shape, parameters, seq_len=seq_len, batch=batch, checkpointing=bool(checkpointing))
    measured = peak_of(TRAIN, *map(str, (depth, dim, vocab, batch, seq_len, checkpointing)))
    assert measured == pytest.approx(planned.total, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "dim", "prompt"), [(8, 768, 64), (6, 256, 6000), (4, 256, 16000)])
def test_inference_takes_what_was_planned(depth: int, dim: int, prompt: int, tmp_path: Path) -> None:
    shape = model_config_for(depth, 8192, dim=dim, context=32768)
    model = CausalLM(shape)
    model.init_weights()
    save_model(model, tmp_path)
    planned = memory.inference(shape, model.num_parameters(), "FP32", prompt + 4)
    assert peak_of(GENERATE, str(tmp_path), str(prompt)) == pytest.approx(planned.total, rel=0.15)


def test_well_known_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(PlanConfig(model="7B"))
    weights = {budget.name: budget.weights for budget in found.inference}
    assert weights["FP32"] == 28e9
    assert weights["FP16/BF16"] == 14e9
    assert "28.00 GB" in capsys.readouterr().out
    # Llama 2 7B: 0.5 MiB of cache a token in 16 bits; LoRA of rank 16 on all matrices trains 40 M weights.
    shape, _ = model_shape("7B")
    assert memory.cache_bytes(shape, 1) == 2 * 32 * 4096 * 2
    assert memory.lora_parameters(shape, 16) == 39_976_960
    assert found.flops_per_token == pytest.approx(2 * 7e9, rel=0.2)


def test_a_folder_is_planned_by_its_own_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = CausalLM(SHAPES["qwen3"])
    save_model(model, tmp_path)
    plan(PlanConfig(model=str(tmp_path), context=256, json=True))
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == model.num_parameters()
    assert found["inference"][0]["kv_cache"] == 2 * 2 * 1 * 64 * 256 * 4
    names = [entry["machine"] for entry in found["machines"]]
    for wanted in ("this CPU", "RTX 4090", "A100", "H100", "TPU", "Jetson AGX Orin"):
        assert any(wanted in name for name in names)


def test_only_active_experts_are_computed() -> None:
    from danlu.nn.config import Experts

    dense = SHAPES["llama"]
    sparse = dataclasses.replace(dense, experts=Experts(8, 2, 176))
    with torch.device("meta"):
        flops = {shape: CausalLM(shape).estimate_flops(64) for shape in (dense, sparse)}
    router = 6 * 2 * 8 * 128
    assert flops[sparse] == flops[dense] + router


@pytest.mark.parametrize("model", ["nowhere", "7Q", "99999T"])
def test_what_is_no_model_is_told(model: str) -> None:
    with pytest.raises(DanluError, match="model: "):
        plan(PlanConfig(model=model))


def test_every_machine_names_its_source() -> None:
    assert all(machine.source for machine in machines())
