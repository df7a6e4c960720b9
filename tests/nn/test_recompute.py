"""Recomputed blocks: the values and gradients of the blocks themselves, and freed memory goes back between them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

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
