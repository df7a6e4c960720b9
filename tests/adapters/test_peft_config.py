"""What an adapter folder says is honoured or refused by name, and damaged or foreign ones are errors for people."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import randomize, save_random
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from danlu.adapters.config import AdapterShape
from danlu.adapters.lora import attach
from danlu.adapters.peft_config import PeftConfig, peft_content, read_peft_config
from danlu.adapters.peft_folder import load_adapter, save_adapter
from danlu.errors import DanluError
from danlu.models.load import load_model

Change = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter for it."""
    root = tmp_path_factory.mktemp("made")
    base = save_random(root / "base", "llama")
    model = load_model(base)
    attach(model, AdapterShape("dora", rank=2, targets=("q_proj", "v_proj")))
    randomize(model)
    save_adapter(model, root / "adapter", base)
    return base, root / "adapter"


@pytest.fixture
def change(made: tuple[Path, Path], tmp_path: Path) -> Change:
    """The adapter with other fields in its config, or other tensors."""

    def changed(tensors: Callable[[dict[str, torch.Tensor]], Any] | None = None, **fields: Any) -> Path:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made[1], folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        if tensors is not None:
            content = load_file(folder / "adapter_model.safetensors")
            tensors(content)
            save_file(content, folder / "adapter_model.safetensors")
        return folder

    return changed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("bias", "lora_only"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("layer_replication", [[0, 1], [0, 2]]),
        ("lora_bias", True),
        ("target_parameters", ["mlp.experts.down_proj"]),
        ("use_qalora", True),
        ("megatron_config", {"a": 1}),
        ("alora_invocation_tokens", [1]),
        ("arrow_config", {"top_k": 3}),
        ("a_field_of_tomorrow", 7),
        ("r", 0),
        ("r", True),
        ("r", "8"),
        ("r", 3),
        ("lora_alpha", "nan"),
        ("lora_alpha", float("inf")),
        ("lora_dropout", 1.5),
        ("use_dora", "yes"),
        ("use_dora", False),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", ["q_proj"]),
        ("rank_pattern", {"(a+)+$": 4}),
        ("rank_pattern", {"v_proj": 0}),
        ("rank_pattern", ["v_proj"]),
        ("alpha_pattern", {"[": 4}),
        ("trainable_token_indices", [1, 2]),
        ("trainable_token_indices", [-1]),
        ("trainable_token_indices", {"embed_tokens": 1}),
        ("base_model_name_or_path", 7),
    ],
)
def test_what_is_not_done_here_is_refused_by_name(
    change: Change, made: tuple[Path, Path], field: str, value: Any
) -> None:
    model = load_model(made[0])
    before = dict(model.named_parameters())
    folder = change(**{field: value})
    names = {
        "r": r"\br is|lora_A",
        "use_dora": "use_dora|lora_magnitude",
    }
    with pytest.raises(DanluError, match=names.get(field, field)) as caught:
        load_adapter(model, folder)
    assert str(folder) in str(caught.value)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}


def test_what_changes_nothing_is_taken(change: Change, made: tuple[Path, Path]) -> None:
    folder = change(
        init_lora_weights="gaussian", fan_in_fan_out=True, layers_to_transform=[0, 1], inference_mode=False,
        peft_version="0.1", revision="main", lora_bias=False, megatron_config=None, a_field_of_tomorrow=None,
    )  # fmt: skip
    load_adapter(load_model(made[0]), folder)


def test_an_adapter_for_another_base_is_told_so(made: tuple[Path, Path], tmp_path: Path) -> None:
    for family, options, message in [
        ("gpt2", {}, "has no such linear layer"),
        ("llama", {"num_hidden_layers": 1}, r"layers\.1.*has no such linear layer"),
        ("llama", {"num_attention_heads": 8, "head_dim": 8}, r"lora_B.* has shape \(32, 2\).*must be \(64, 2\)"),
    ]:  # fmt: skip
        model = load_model(save_random(tmp_path / f"{family}{len(options)}{message[:3]}", family, **options))
        with pytest.raises(DanluError, match=message) as caught:
            load_adapter(model, made[1])
        assert str(made[0]) in str(caught.value)


def test_tensors_that_do_not_belong_together(change: Change, made: tuple[Path, Path]) -> None:
    first = "base_model.model.model.layers.0.self_attn.q_proj"

    def expert(t: dict[str, torch.Tensor]) -> None:
        t["base_model.model.model.layers.0.block_sparse_moe.experts.1.w1.lora_A.weight"] = torch.zeros(2, 32)

    cases: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = [
        (lambda t: t.pop(f"{first}.lora_B.weight"), r"lacks .*layers\.0\.self_attn\.q_proj\.lora_B"),
        (lambda t: t.update({f"{first}.lora_B.bias": torch.zeros(32)}), "lora_B.bias, which is not supported"),
        (lambda t: t.update({f"{first}.lora_embedding_A": torch.zeros(2, 8)}), "lora_embedding_A"),
        (lambda t: t.update({f"{first}.lora_A.weight": torch.zeros(2, 32).long()}), "int64"),
        (lambda t: t.clear(), "no LoRA tensors"),
        (expert, "experts are not supported"),
    ]
    for mutate, message in cases:
        with pytest.raises(DanluError, match=message):
            load_adapter(load_model(made[0]), change(mutate))


def test_no_pickle_is_opened(change: Change, made: tuple[Path, Path]) -> None:
    folder = change()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(DanluError, match="pickle"):
        load_adapter(load_model(made[0]), folder)
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(DanluError, match="adapter_model"):
        load_adapter(load_model(made[0]), folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


FIELDS = peft_content(PeftConfig(None, None, AdapterShape(rank=1, alpha=1.0)), transposed=False, modules_to_save=[])


@given(fields=st.dictionaries(st.sampled_from(sorted(FIELDS)), JSON, max_size=4))
@settings(max_examples=60, deadline=None)
def test_no_config_is_a_traceback(tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **fields}))
    with contextlib.suppress(DanluError):
        config = read_peft_config(folder)
        assert config.rank_of("model.layers.0.self_attn.q_proj") >= 1
        assert config.alpha_of("x") == config.alpha_of("x")
