"""danlu inspect: what is told of models of all layouts, and the size of their caches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from danlu.errors import DanluError
from danlu.formats.config import InspectConfig
from danlu.formats.gguf_write import GGUFTensor, write_gguf
from danlu.formats.inspect import describe, inspect
from danlu.formats.model_facts import facts_from_gguf, facts_from_hf, kv_cache_bytes
from danlu.formats.safetensors_files import save_safetensors

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6, **TINY}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}},
        "added_tokens": [{"content": "<|im_end|>"}, {"content": "a"}],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    tensors = {"embed": torch.zeros(64, 32), "norm": torch.zeros(32, dtype=torch.bfloat16), "w": torch.zeros(8, 8)}
    save_safetensors(tmp_path, tensors, max_shard_bytes=8000)
    return tmp_path


def test_what_is_told_of_a_folder(model: Path) -> None:
    found = describe(model)
    assert (found["format"], found["architecture"], found["n_tensors"]) == ("safetensors", "Qwen3ForCausalLM", 3)
    assert (found["parameters"], found["bytes"]) == (64 * 32 + 32 + 64, 4 * 64 * 33 + 64)
    assert found["dtypes"] == {
        "F32": {"tensors": 2, "parameters": 64 * 33, "bytes": 4 * 64 * 33},
        "BF16": {"tensors": 1, "parameters": 32, "bytes": 64},
    }
    assert found["model"] == {
        "n_layers": 4,
        "dim": 32,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 16,
        "ffn_dim": 48,
        "vocab_size": 64,
        "context": 128,
        "rope_base": 1e6,
    }
    assert found["tokenizer"] == {"kind": "BPE, byte-level", "vocab_size": 3, "chat_template": True}
    assert found["memory"] == {"weights": found["bytes"], "context": 128, "kv_cache": 2 * 4 * 2 * 16 * 128 * 2}
    assert [tensor["name"] for tensor in found["tensors"]] == ["embed", "w", "norm"]
    assert found["tensors"][0] == {"name": "embed", "dtype": "F32", "shape": [64, 32], "bytes": 8192}
    json.dumps(found)


def test_the_printed_page(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(InspectConfig(model, tensors=2))
    told = capsys.readouterr().out
    for expected in (
        f"Qwen3ForCausalLM  {model}",
        "2,144 parameters in 8.3 KB, 31.76 bits each, safetensors",
        "KV cache, 128 tokens  64.0 KB a sequence",
        "64 x 32",
        "BPE, byte-level",
        "... and 1 more; list them with --tensors all",
    ):
        assert expected in told
    inspect(InspectConfig(model, tensors="all", context=64))
    told = capsys.readouterr().out
    assert "KV cache, 64 tokens  32.0 KB" in told
    assert "more;" not in told


def test_json_and_the_command_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(InspectConfig(model, json=True, tensors=1))
    assert json.loads(capsys.readouterr().out) == found
    assert len(found["tensors"]) == 1


@pytest.mark.slow
def test_a_real_gguf(smollm2: Path) -> None:
    found = describe(smollm2.parent)
    assert (found["architecture"], found["format"], found["parameters"]) == ("llama", "gguf", 134_515_008)
    assert {dtype: entry["tensors"] for dtype, entry in found["dtypes"].items()} == {"Q4_1": 210, "Q8_0": 1, "F32": 61}
    assert found["tokenizer"] == {"kind": "BPE, byte-level", "vocab_size": 49152, "chat_template": True}
    assert (found["model"]["n_layers"], found["model"]["head_dim"], found["model"]["context"]) == (30, 64, 8192)
    assert found["memory"]["kv_cache"] == 2 * 30 * 3 * 64 * 8192 * 2


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("llama", {}),
        ("qwen3", {"head_dim": 16}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}),
        ("gemma2", {"sliding_window": 8, "head_dim": 16}),
        ("gemma3_text", {"sliding_window": 8, "head_dim": 16, "sliding_window_pattern": 3}),
        ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 128}),
    ],
)
def test_the_cache_has_the_size_that_transformers_fills(model_type: str, more: dict[str, Any]) -> None:
    """Its sliding layers keep one position less: the current one comes on top."""
    own = {} if model_type == "gpt2" else TINY
    written = {"model_type": model_type, "vocab_size": 64, **own, **more}
    config = AutoConfig.for_model(**written)
    tokens = 40
    net = AutoModelForCausalLM.from_config(config)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        net(torch.zeros(1, tokens, dtype=torch.long), past_key_values=cache)
    cells = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    windows = [layer for layer in cache.layers if layer.keys.shape[2] < tokens]
    cells += sum(2 * layer.keys.shape[1] * layer.keys.shape[3] for layer in windows)
    for content in (written, config.to_dict()):  # as people write it, and with all that transformers adds
        assert facts_from_hf(json.loads(json.dumps(content))).kv_cache_bytes(tokens) == 2 * cells


def test_the_closed_form_of_the_cache() -> None:
    assert kv_cache_bytes(32, 8, 128, 131072) == 16 * 2**30  # Llama 3.1 8B at 128k tokens
    assert kv_cache_bytes(2, [1, 3], 10, 100, element_bytes=1, batch=5) == 2 * (1 + 3) * 10 * 100 * 5
    assert kv_cache_bytes(3, 1, 10, 100, windows=[None, 7, 0]) == 2 * 10 * (100 + 7) * 2
    assert kv_cache_bytes(3, 1, 10, 5, windows=[None, 7, 0]) == 2 * 10 * (5 + 5) * 2


def test_windows_and_layers_of_their_own_in_gguf() -> None:
    metadata = {
        "general.architecture": "gemma3",
        "gemma3.block_count": 6,
        "gemma3.embedding_length": 64,
        "gemma3.attention.head_count": 4,
        "gemma3.attention.head_count_kv": [1, 1, 1, 1, 1, 2],
        "gemma3.attention.key_length": 32,
        "gemma3.attention.sliding_window": 16,
    }
    assert facts_from_gguf(metadata).kv_cache_bytes(100) == 2 * 32 * (5 * 16 + 2 * 100) * 2
    metadata["gemma3.attention.sliding_window_pattern"] = [True, False] * 3
    assert facts_from_gguf(metadata).kv_cache_bytes(100) == 2 * 32 * (3 * 16 + 2 * 100 + 2 * 100) * 2


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"num_hidden_layers": "four"},
        {"num_hidden_layers": 2**62, "num_attention_heads": 1, "head_dim": 1},
        {"num_hidden_layers": 2, "num_attention_heads": 0, "hidden_size": 4},
        {"num_hidden_layers": -1, "num_attention_heads": True, "hidden_size": None},
        {"architectures": [3], "rope_parameters": [], "text_config": 7, "layer_types": [[], {}]},
        {"num_hidden_layers": 2, "num_attention_heads": [1, 2, 3], "hidden_size": 4, "sliding_window": "x"},
    ],
)
def test_odd_configs_tell_less_and_break_nothing(content: dict[str, Any]) -> None:
    assert facts_from_hf(content).kv_cache_bytes(100) is None


def test_encoders_and_latent_attention_have_no_such_cache(model: Path) -> None:
    assert facts_from_hf({"architectures": ["BertModel"], **TINY}).kv_cache_bytes(100) is None
    assert (
        facts_from_hf({"architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 8, **TINY}).kv_cache_bytes(9) is None
    )
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**content, "kv_lora_rank": 8}))
    assert describe(model)["memory"]["kv_cache"] is None
    with pytest.raises(DanluError, match="context=100 cannot be told"):
        describe(model, context=100)


def test_single_files_and_folders_without_a_config(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(InspectConfig(model / "model-00001-of-00002.safetensors"))
    assert (found["architecture"], found["tokenizer"], found["n_tensors"]) == (None, None, 1)
    assert "weights  " in capsys.readouterr().out
    for path in model.iterdir():
        if "model-" not in path.name and "index" not in path.name:
            path.unlink()
    assert describe(model)["tokenizer"] is None


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 10**5, "\x00"])
def test_damaged_files_around_the_weights_are_told(model: Path, name: str, content: str) -> None:
    (model / name).write_text(content)
    with pytest.raises(DanluError, match=name):
        describe(model)


def test_names_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = torch.zeros(1)
    write_gguf(
        tmp_path / "m.gguf",
        {"general.architecture": "\x1b[2J[bold]evil[/bold]", "tokenizer.ggml.model": "\x1b]0;t\x07"},
        [GGUFTensor("\x1b[31m[red]x[/red]", "F32", (1,), lambda: one)],
    )
    inspect(InspectConfig(tmp_path / "m.gguf"))
    told = capsys.readouterr().out
    assert not {"\x1b", "\x07"} & set(told)
    assert "[bold]evil[/bold]" in told
    assert "[red]x[/red]" in told


def test_inspecting_needs_no_torch(model: Path) -> None:
    write_gguf(model / "m.gguf", {}, [])
    program = (
        "import sys; from pathlib import Path; from danlu.formats.inspect import inspect\n"
        "from danlu.formats.config import InspectConfig\n"
        "for path in sys.argv[1:]: inspect(InspectConfig(Path(path)))\n"
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    paths = [str(model), str(model / "m.gguf")]
    subprocess.run([sys.executable, "-c", program, *paths], check=True, timeout=60, stdout=subprocess.DEVNULL)
