"""The AVX512 and AMX kernels where no CPU has them: their own source, compiled with emulated intrinsics, runs in place
of what this CPU would run. SIMDe has most intrinsics; the rest and the tiles are in `emulated.h`."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from danlu.engine.batch import Batch
from danlu.engine.native_runner import NativeRunner
from danlu.kernels import build, native
from danlu.models.causal_lm import CausalLM
from danlu.nn.config import ModelConfig, Rope
from packed_weights import packed
from random_adapters import merged, random_adapter

HEADER = Path(__file__).with_name("emulated.h")
AVX2 = next(known.flags for known in build.SETS if known.name == "avx2")

# 17 and 3 tiles of outputs: tiles that have no neighbour; 72 inputs: no whole block of 32.
FLOAT_SHAPE: dict[str, Any] = {"dim": 96, "n_heads": 6, "n_kv_heads": 3, "head_dim": 16, "ffn_dim": 72}
BLOCK_SHAPE: dict[str, Any] = {"dim": 256, "n_heads": 6, "n_kv_heads": 3, "head_dim": 16, "ffn_dim": 320}


def _why_not() -> str | None:
    if not native.paths().get("avx2"):
        return f"no native kernels to compare with: {native.choose()[1]}"
    tried = [str(build.compiler()), "-x", "c++", "-E", "-include", "simde/x86/avx512.h", "/dev/null"]
    return None if subprocess.run(tried, capture_output=True).returncode == 0 else "SIMDe (libsimde-dev) is missing"


pytestmark = pytest.mark.skipif(_why_not() is not None, reason=str(_why_not()))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("emulated")
    flags = (*AVX2, "-O0", "-Wno-psabi", "-include", str(HEADER))
    bf16 = (*flags, "-DEMULATE_BF16")
    own = {"avx512": flags, "avx512_bf16": bf16, "amx": (*bf16, "-DEMULATE_AMX")}

    def built(name: str) -> Path:
        return build.build_one(Path(build.__file__).parent, folder, f"{name}.so", own[name], "-DDANLU_AVX2")

    with ThreadPoolExecutor() as pool:
        return dict(zip(own, pool.map(built, own), strict=True))


def model_of(shape: dict[str, Any], dtype: torch.dtype = torch.float32) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(rope=Rope(), vocab_size=271, n_layers=1, context=512, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(0.15 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model.to(dtype).float().eval()


def run(
    runner: NativeRunner,
    sequences: Sequence[Tensor],
    steps: Sequence[int],
    answers: bool = False,
    adapters: tuple[str | None, ...] = (),
) -> Tensor:
    """Logits of sequences of the same length that begin together, so many in each step, read as prompts or as answers,
    each with its adapter; (token, vocabulary)."""
    length = len(sequences[0])
    per_sequence = -(-length // native.TILE)
    runner.allocate([per_sequence * len(sequences)])
    for memory in runner._caches[0]:
        memory[...] = 255  # NaN: blocks may hold anything before
    found, first = [], 0
    for n in steps:
        rows = range(first, first + n)
        batch = Batch(
            torch.cat([sequences[row] for row in rows]).numpy().astype(np.int32),
            np.tile(np.arange(length, dtype=np.int32), n),
            np.arange(n + 1, dtype=np.int32) * length,
            (np.arange(first * per_sequence, (first + n) * per_sequence, dtype=np.int32).reshape(n, -1),),
            np.arange(n * length, dtype=np.int32),
            np.full(n, length, np.int32),
            prompt_from=n * length if answers else 0,
            adapters=adapters[first : first + n],
        )
        found.append(runner.run(batch))
        first += n
    return torch.cat(found)


@pytest.mark.parametrize("name", ["avx512", "amx"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_8_bit_products_are_those_of_avx2(
    name: str, kind: str, libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each number of rows that has code of its own. Sequences of one token: where fp32's rounding decides between two
    codes of an activation, no other sequence sees it."""
    model = model_of(BLOCK_SHAPE)
    weights = packed(model, kind)
    steps = [1, 2, 3, 4, 5, 16, 31]
    ids = torch.arange(sum(steps))[:, None]
    found = {}
    for path in ("avx2", str(libraries[name])):
        monkeypatch.setenv(native.VARIABLE, path)
        found[path] = run(NativeRunner(model.config, weights, kv_dtype="fp32", threads=2), ids, steps, answers=True)
    expected, ours = found.values()
    worst = (ours - expected).abs().amax(dim=1) / expected.std()
    assert worst.median() < 1e-5
    assert worst.quantile(0.9) < 1e-4
    assert worst.max() < 0.1


@pytest.mark.parametrize("name", ["avx512", "amx"])
@pytest.mark.parametrize(("length", "n"), [(300, 1), (20, 7)])
def test_float_products_and_attention(
    name: str, length: int, n: int, libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 stays fp32, with tiles or without."""
    monkeypatch.setenv(native.VARIABLE, str(libraries[name]))
    model = model_of(FLOAT_SHAPE)
    ids = torch.randint(0, 271, (n, length))
    with torch.inference_mode():
        expected = model(ids).flatten(0, 1)
    assert (run(NativeRunner.of(model, threads=2), ids, [n]) - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("name", ["avx512", "avx512_bf16"])
@pytest.mark.parametrize(("length", "n"), [(301, 1), (21, 3), (1, 5)])
def test_attention_through_a_cache_in_bf16(
    name: str, length: int, n: int, libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in AVX2, but for the rounding of queries and weights where both factors are bf16. Heads of 80: four columns of
    blocks at once, and one that is left."""
    model = model_of({**FLOAT_SHAPE, "head_dim": 80})
    ids = torch.randint(0, 271, (n, length))
    found = {}
    for path in ("avx2", str(libraries[name])):
        monkeypatch.setenv(native.VARIABLE, path)
        found[path] = run(NativeRunner.of(model, threads=2, kv_dtype="bf16"), ids, [n])
    expected, ours = found.values()
    with torch.inference_mode():
        exact = model(ids).flatten(0, 1)
    assert 1e-4 < (expected - exact).abs().max() / exact.std() < 0.1
    worst = (ours - expected).abs().max() / exact.std()
    assert worst < 0.05 if name == "avx512_bf16" else worst < 1e-4


@pytest.mark.parametrize("name", ["avx512", "amx"])
@pytest.mark.parametrize("answers", [False, True])
def test_adapters(
    name: str, answers: bool, libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Beside products of one tile and of two, in fp32 whatever the weights are."""
    monkeypatch.setenv(native.VARIABLE, str(libraries[name]))
    model = model_of(FLOAT_SHAPE)
    targets = ("q_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "lm_head")
    folders = {f"rank {rank}": random_adapter(model, tmp_path / f"{rank}", rank, targets) for rank in (3, 20)}
    runner = NativeRunner.of(model, threads=2)
    for adapter, folder in folders.items():
        runner.load_adapter(adapter, folder)
    adapters = ("rank 3", "rank 3", None, "rank 20", "rank 3", None, "rank 20")
    ids = torch.randint(0, 271, (len(adapters), 20))
    found = run(runner, ids, [7], answers, adapters).unflatten(0, (7, 20))
    for logits, one, adapter in zip(found, ids, adapters, strict=True):
        with torch.inference_mode():
            expected = (model if adapter is None else merged(model, folders[adapter]))(one[None])[0]
        assert (logits - expected).abs().max() < 1e-4 * expected.std()


def rounded(x: Tensor) -> Tensor:
    """To bfloat16, as the kernel does it: ties, which sums of two fp16 numbers often are, away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x8000) & ~0xFFFF).view(torch.float32)


def in_bfloat16(model: CausalLM) -> None:
    """Its linear layers take rounded weights and inputs, and add in fp32."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(rounded(module.weight))
                module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))


@pytest.mark.parametrize("kind", ["BF16", "F16", "Q8_0", "Q4_0", "Q4_1"])
def test_many_rows_are_multiplied_in_bfloat16(
    kind: str, libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.VARIABLE, str(libraries["amx"]))
    if kind in ("BF16", "F16"):
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[kind]
        model = model_of(FLOAT_SHAPE, dtype)
        weights: Any = {name: p.to(dtype) if p.ndim > 1 else p for name, p in model.named_parameters()}
    else:
        model = model_of(BLOCK_SHAPE)
        weights = packed(model, kind)
    steps = [1, 16, 33, 48, 130]
    ids = torch.arange(sum(steps))[:, None]
    found = run(NativeRunner(model.config, weights, kv_dtype="fp32", threads=2), ids, steps)
    with torch.inference_mode():
        exact = model(ids)[:, 0]
        in_bfloat16(model)
        expected = model(ids)[:, 0]
    worst = (found - expected).abs().amax(dim=1) / expected.std()
    rounding = (exact - expected).abs().amax(dim=1).median() / expected.std()
    assert worst.median() < 1e-3 * rounding
    assert worst.max() < rounding
