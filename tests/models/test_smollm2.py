"""The real SmolLM2-135M-Instruct, a Q4_1 GGUF file, against llama.cpp and transformers.

The tokens of llama.cpp are recorded in `smollm2_greedy.json` by `benchmarks/gguf_reference.py`.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from danlu.engine.generate import generate_text
from danlu.engine.sampling import SamplingParams
from danlu.models.causal_lm import CausalLM
from danlu.models.convert import convert
from danlu.models.convert_config import ConvertConfig
from danlu.models.load import load_model
from danlu.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

REFERENCE = Path(__file__).parent / "smollm2_greedy.json"


@pytest.fixture(scope="module")
def folder(smollm2: Path) -> Path:
    return smollm2.parent


@pytest.fixture(scope="module")
def model(folder: Path) -> CausalLM:
    return load_model(folder)


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    content = json.loads(REFERENCE.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


@pytest.fixture(scope="module")
def continuations(model: CausalLM, folder: Path, reference: dict[str, Any]) -> list[list[int]]:
    return greedy(model, folder, reference, "prompts")


def greedy(model: CausalLM, folder: Path, reference: dict[str, Any], which: str) -> list[list[int]]:
    """Ours of all prompts of a list, decoded together; each ends with its stop token."""
    prompts = [row["ids"] for row in reference[which]]
    params = SamplingParams(max_new_tokens=reference["tokens"], temperature=0.0, ignore_eos=True)
    tokenizer = Tokenizer.load(folder)
    found = [completion.token_ids for completion in generate_text(model, tokenizer, prompts, params)]
    ends = [next((i for i, token in enumerate(ids) if token in tokenizer.stop_ids), len(ids)) for ids in found]
    return [ids[: end + 1] for ids, end in zip(found, ends, strict=True)]


def test_prompts_are_tokenized_as_recorded(folder: Path, reference: dict[str, Any]) -> None:
    tokenizer = Tokenizer.load(folder)
    for row in reference["prompts"]:
        if isinstance(row["prompt"], str):
            assert tokenizer.encode(row["prompt"]) == row["ids"][1:]
        else:
            assert tokenizer.encode_chat(row["prompt"], add_generation_prompt=True) == row["ids"]


def test_greedy_continuations_are_those_of_llama_cpp(continuations: list[list[int]], reference: dict[str, Any]) -> None:
    """From the same weights in fp32."""
    rows = reference["prompts"]
    assert len(rows) == 20
    assert sum(ours == row["f32"] for ours, row in zip(continuations, rows, strict=True)) >= 19


def test_greedy_continuations_are_those_of_llama_cpp_from_the_4_bit_file(
    model: CausalLM, folder: Path, reference: dict[str, Any]
) -> None:
    """On prompts that llama.cpp continues alike whatever the order of its sums."""
    rows = reference["steady"]
    assert len(rows) == 20
    ours = greedy(model, folder, reference, "steady")
    assert sum(one == row["q4_1"] for one, row in zip(ours, rows, strict=True)) >= 19


def test_llama_cpps_rounding_turns_near_ties_only(
    model: CausalLM, continuations: list[list[int]], reference: dict[str, Any]
) -> None:
    """From the 4-bit file llama.cpp rounds activations to 8 bits, which moves its logits (standard deviation 7) by 0.2:
    where it first goes another way than in fp32, its token is hardly less likely to us than ours."""
    alike = 0
    for ours, row in zip(continuations, reference["prompts"], strict=True):
        theirs = row["q4_1"]
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if place is None:
            alike += 1
            continue
        with torch.inference_mode():
            logits = model(torch.tensor([row["ids"] + ours[:place]]))[0, -1]
        assert logits[ours[place]] - logits[theirs[place]] < 1.0
    assert alike >= 10


def test_perplexity_is_that_of_transformers(model: CausalLM, folder: Path, tmp_path: Path) -> None:
    """On the standard library's textwrap, of the dequantised model as `danlu convert` writes it."""
    out = convert(ConvertConfig(source=folder, out=tmp_path / "hf", dtype="f32"))
    reference = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    text = Path(textwrap.__file__).read_text(encoding="utf-8")
    ids = torch.tensor([Tokenizer.load(folder).encode(text)[:512]])
    with torch.no_grad():
        ours, theirs = perplexity(model(ids), ids), perplexity(reference(ids).logits, ids)
    assert 1.5 < theirs < 20
    assert abs(ours / theirs - 1) < 5e-3


def perplexity(logits: Tensor, ids: Tensor) -> float:
    return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).exp().item()
