"""Recomputed blocks: the values and gradients of the blocks themselves, and freed memory goes back between them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from danlu import hardware
from danlu.models.causal_lm import CausalLM
from danlu.nn.config import ModelConfig, Rope
from danlu.nn.recompute import recomputed


def test_values_and_gradients_are_those_of_the_blocks() -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)) for _ in range(3)]
    x = torch.randn(4, 8, requires_grad=True)
    kept = again = x
    for block in blocks:
        kept, again = block(kept), recomputed(block, again)
    assert torch.equal(kept, again)
    weights = [x, *(p for block in blocks for p in block.parameters())]
    grad = torch.randn_like(kept)
    for one, other in zip(
        torch.autograd.grad(kept, weights, grad), torch.autograd.grad(again, weights, grad), strict=True
    ):
        assert torch.equal(one, other)


def test_a_model_gives_back_between_its_blocks_also_where_nothing_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"n_layers": 3, "dim": 16, "n_heads": 1, "n_kv_heads": 1, "head_dim": 16, "ffn_dim": 16, "context": 8}
    model = CausalLM(ModelConfig(vocab_size=10, rope=Rope(), **shape)).eval()
    model.gradient_checkpointing = True
    given_back = []
    monkeypatch.setattr(hardware, "return_freed_memory", lambda: given_back.append(1))
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    assert len(given_back) == 3


RESIDENT = """
import torch
from danlu import hardware

def resident():
    text = open("/proc/self/status").read()
    return int(text.split("VmRSS:")[1].split()[0]) // 1024

hardware.keep_freed_memory()
blocks = [torch.ones(2**19) for _ in range(100)]  # 200 MiB in blocks of 2
above = torch.ones(2**19)  # what lies behind them keeps the heap from shrinking by itself
del blocks
kept = resident()
hardware.return_freed_memory()
print(kept - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", RESIDENT], check=True, stdout=subprocess.PIPE, text=True)
    assert int(done.stdout) > 150
