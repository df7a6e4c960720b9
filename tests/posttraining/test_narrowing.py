"""What a smaller student begins with: where nothing is lost by the cut, it does as its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from danlu.models.causal_lm import CausalLM
from danlu.models.heads import SequenceClassifier
from danlu.models.load import load_model
from danlu.models.transformer import Transformer
from danlu.posttraining.narrowing import gram, principal_directions
from danlu.posttraining.students import new_student

TINY: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "Qwen2Config": {"head_dim": None},  # biases
    "Qwen3Config": {"tie_word_embeddings": True},
    "Gemma2Config": {"query_pre_attn_scalar": 8, "sliding_window": 5},  # gains stored as their difference from one
    "GPT2Config": {"n_inner": 48, "intermediate_size": None, "num_key_value_heads": None, "head_dim": None},
}
IDS = torch.arange(40).view(2, 20) * 7 % 300


def teacher_of(folder: Path, name: str, **changes: Any) -> CausalLM:
    torch.manual_seed(0)
    sizes = {key: value for key, value in {**TINY, **changes}.items() if value is not None}
    reference = AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes))
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    reference.save_pretrained(folder)
    return load_model(folder)


def bert(folder: Path) -> SequenceClassifier:
    torch.manual_seed(0)
    sizes = {name: TINY[name] for name in TINY if name not in ("num_key_value_heads", "head_dim")}
    reference = AutoModelForSequenceClassification.from_config(transformers.BertConfig(**sizes, num_labels=3))
    reference.save_pretrained(folder)
    return load_model(folder, SequenceClassifier)


@torch.no_grad()
def assert_same(student: Transformer, teacher: Transformer) -> None:
    torch.testing.assert_close(student(IDS), teacher(IDS), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_the_same_shape_it_is_the_teacher(family: str, tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path / "teacher", family, **FAMILIES[family])
    assert_same(new_student(teacher, size=4, dim=32), teacher)


def test_an_encoder_of_the_same_shape_is_the_teacher(tmp_path: Path) -> None:
    teacher = bert(tmp_path / "bert")
    assert_same(new_student(teacher, size=4, dim=32), teacher)


@pytest.mark.parametrize("tied", [False, True])
def test_directions_that_hold_nothing_are_dropped_without_loss(tied: bool, tmp_path: Path) -> None:
    """A residual stream that stays in 16 of its 32 dimensions, whichever they are, is kept whole by 16. (Of a tied head
    and of other weights that read the stream no more is left than what they read of these.)"""
    teacher = teacher_of(tmp_path / "teacher", "Qwen3Config", tie_word_embeddings=tied, rms_norm_eps=1e-12)
    basis_dk = torch.linalg.qr(torch.randn(32, 16, generator=torch.Generator().manual_seed(1))).Q
    with torch.no_grad():
        teacher.embed.weight.copy_(teacher.embed.weight @ basis_dk @ basis_dk.T)
        for block in teacher.layers:
            for weight in (block.attention.o_proj.weight, block.mlp.down_proj.weight):
                weight.copy_(basis_dk @ basis_dk.T @ weight)
            block.attention_norm.weight.fill_(1.3)  # a gain for each feature is no longer one in other directions
            block.mlp_norm.weight.fill_(0.7)
        teacher.norm.weight.fill_(1.1)
    assert_same(new_student(teacher, size=4, dim=16, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48), teacher)


@pytest.mark.parametrize("family", ["LlamaConfig", "Gemma2Config", "GPT2Config"])
def test_heads_and_hidden_units_that_do_nothing_are_the_ones_to_go(family: str, tmp_path: Path) -> None:
    """Of each layer others: two query heads that share a key head, and half of the hidden units."""
    teacher = teacher_of(tmp_path / "teacher", family, **FAMILIES[family])
    with torch.no_grad():
        for layer, block in enumerate(teacher.layers):
            gone = slice(0, 16) if layer % 2 else slice(16, 32)
            block.attention.o_proj.weight[:, gone] = 0
            block.mlp.down_proj.weight[:, layer % 2 :: 2] = 0
    if family == "GPT2Config":  # here the width of a head follows from their number
        assert_same(new_student(teacher, ffn_dim=24), teacher)
    else:
        assert_same(new_student(teacher, n_heads=2, n_kv_heads=1, head_dim=8, ffn_dim=24), teacher)


def test_layers_come_from_where_they_were(tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path / "teacher", "LlamaConfig")
    student = new_student(teacher, size=2, dim=32)  # the first and the last
    for mine, theirs in ((0, 0), (1, 3)):
        a, b = student.layers[mine].state_dict(), teacher.layers[theirs].state_dict()
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_no_directions_keep_more(tmp_path: Path) -> None:
    """No k numbers a row keep more of a table than its k largest singular values do."""
    table = bert(tmp_path / "bert").embed.weight.detach()
    directions = principal_directions(gram(table), 16).float()
    torch.testing.assert_close(directions.T @ directions, torch.eye(16), atol=1e-5, rtol=0)
    lost = (table - table @ directions @ directions.T).square().sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(table)[16:].square().sum())


def test_a_narrower_encoder_keeps_most_of_what_its_teacher_says(tmp_path: Path) -> None:
    """Post-norm with means taken off and biases: nothing is exact here, but it is far from chance."""
    teacher = bert(tmp_path / "bert")
    with torch.no_grad():
        for block in teacher.layers:
            block.post_attention_norm.bias.normal_(0, 0.1)
        teacher.embed.weight[:, 16:] *= 0.1
        cut, drawn = (new_student(teacher, dim=24, n_heads=3, ffn_dim=48, init=init) for init in ("teacher", "random"))
        wanted = teacher(IDS)
        assert (cut(IDS) - wanted).square().sum() < 0.5 * (drawn(IDS) - wanted).square().sum()
