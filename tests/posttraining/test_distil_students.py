"""Students out of teachers: copied layers, fresh models of the same family, and token ids that must mean the same."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from distil_folders import config, untrained_folder
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from danlu.errors import DanluError, Problems
from danlu.models.causal_lm import CausalLM
from danlu.models.heads import SequenceClassifier
from danlu.models.load import load_model, save_model
from danlu.models.transformer import Transformer
from danlu.posttraining.distil import distil
from danlu.posttraining.students import (
    new_student,
    require_same_tokens,
    spaced_layers,
    with_layers,
)
from danlu.tokenizer.tokenizer import Tokenizer

TINY: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.arange(40).view(2, 20) * 7 % 300


def folder_of(folder: Path, name: str, kind: Any = AutoModelForCausalLM, **changes: Any) -> Path:
    """A random model of transformers."""
    torch.manual_seed(0)
    options = {key: value for key, value in {**TINY, **changes}.items() if value is not None}
    reference = kind.from_config(getattr(transformers, name)(**options))
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    reference.save_pretrained(folder)
    return folder


@given(st.integers(1, 60), st.data())
def test_kept_layers_are_spread_and_hold_both_ends(n_layers: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, n_layers))
    layers = spaced_layers(n_layers, kept)
    assert len(set(layers)) == kept
    assert list(layers) == sorted(layers)
    assert layers[0] == 0
    assert kept == 1 or layers[-1] == n_layers - 1
    gaps = [b - a for a, b in itertools.pairwise(layers)]
    assert not gaps or max(gaps) - min(gaps) <= 1


FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "Qwen3Config": {"head_dim": 16},
    "Gemma2Config": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5},  # windows in every other layer
    "GPT2Config": {"n_inner": None, "intermediate_size": None, "num_key_value_heads": None},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_some_layers_opens_in_transformers(family: str, tmp_path: Path) -> None:
    """Its logits are those of the teacher's model of transformers, with the other layers taken out of it."""
    teacher_path = folder_of(tmp_path / "teacher", family, **FAMILIES[family])
    teacher = load_model(teacher_path)
    save_model(with_layers(teacher, (0, 1, 3)), tmp_path / "student")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.config.num_hidden_layers == 3
    reference = AutoModelForCausalLM.from_pretrained(teacher_path)
    inner = reference.transformer.h if family == "GPT2Config" else reference.model.layers
    del inner[2]
    if family == "Gemma2Config":
        del reference.config.layer_types[2]
    reference.config.num_hidden_layers = 3
    with torch.no_grad():
        expected = reference(IDS, use_cache=False).logits
        torch.testing.assert_close(student(IDS, use_cache=False).logits, expected)
        torch.testing.assert_close(load_model(tmp_path / "student")(IDS), expected, atol=2e-5, rtol=1e-4)


def test_layers_that_would_change_are_refused(tmp_path: Path) -> None:
    teacher = load_model(folder_of(tmp_path / "smollm3", "SmolLM3Config"))
    assert teacher.config.nope_layers == (3,)
    with pytest.raises(DanluError, match="no layer 4; it has 4, numbered from 0 to 3"):
        with_layers(teacher, (0, 4))
    del teacher.hf_config["no_rope_layers"]  # now every fourth layer has no positions, whichever that is
    with pytest.raises(DanluError, match="layer 3 of the teacher would not be the same as layer 1"):
        with_layers(teacher, (0, 3))
    gpt2 = folder_of(tmp_path / "gpt2", "GPT2Config", scale_attn_by_inverse_layer_idx=True, **FAMILIES["GPT2Config"])
    with pytest.raises(DanluError, match="layer 2 of the teacher"):
        with_layers(load_model(gpt2), (0, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_student_keeps_the_proportions(family: str, tmp_path: Path) -> None:
    teacher = load_model(folder_of(tmp_path / "teacher", family, **FAMILIES[family]))
    student = new_student(teacher, size=2, dim=16)
    theirs, ours = teacher.config, student.config
    assert (ours.n_layers, ours.dim, ours.head_dim) == (2, 16, theirs.head_dim)
    assert ours.n_heads * 2 == theirs.n_heads
    assert ours.ffn_dim * theirs.dim == theirs.ffn_dim * ours.dim
    save_model(student, tmp_path / "student")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    with torch.no_grad():
        torch.testing.assert_close(student(IDS), reference(IDS).logits, atol=2e-5, rtol=1e-4)


def test_random_students_have_nothing_of_the_teacher(tmp_path: Path) -> None:
    teacher = load_model(folder_of(tmp_path / "teacher", "LlamaConfig"))
    student, again, other = (new_student(teacher, size=4, init="random", seed=seed) for seed in (3, 3, 4))
    drawn = {name: weight for name, weight in student.named_parameters() if "norm" not in name}
    assert not any(torch.equal(weight, teacher.get_parameter(name)) for name, weight in drawn.items())
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
    assert not torch.equal(student.embed.weight, other.embed.weight)
    wider = new_student(teacher, dim=512, n_heads=4, n_kv_heads=2)  # of which the teacher could give only parts
    assert wider.embed.weight.shape == (300, 512)


def test_impossible_students_are_refused(tmp_path: Path) -> None:
    llama = load_model(folder_of(tmp_path / "llama", "LlamaConfig"))
    with pytest.raises(DanluError, match="must be a multiple of n_kv_heads"):
        new_student(llama, n_heads=4, n_kv_heads=3)
    bert = load_model(_bert(tmp_path / "bert"), SequenceClassifier)
    with pytest.raises(DanluError, match=r"head_dim.* n_heads|head_dim=4|head_dim would become"):
        new_student(bert, dim=32, n_heads=8, head_dim=8)


def _bert(folder: Path) -> Path:
    sizes = {name: TINY[name] for name in TINY if name != "num_key_value_heads"}
    torch.manual_seed(0)
    reference = transformers.BertConfig(**sizes, num_labels=3)
    AutoModelForSequenceClassification.from_config(reference).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("how", ["layers", "new"])
def test_encoders_too(how: str, tmp_path: Path) -> None:
    teacher = load_model(_bert(tmp_path / "bert"), SequenceClassifier)
    student: Transformer = with_layers(teacher, (1, 3)) if how == "layers" else new_student(teacher, size=2, dim=16)
    assert isinstance(student, SequenceClassifier)
    assert student.labels == teacher.labels
    save_model(student, tmp_path / "student")
    reference = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    with torch.no_grad():
        torch.testing.assert_close(student(IDS), reference(IDS).logits, atol=1e-5, rtol=1e-4)


def test_ids_that_mean_something_else_are_refused(tmp_path: Path) -> None:
    mine, larger = (untrained_folder(tmp_path / str(size), vocab_size=size) for size in (310, 320))
    others = untrained_folder(tmp_path / "others", seed=9, vocab_size=310)
    with pytest.raises(DanluError, match="vocabulary of 320 tokens and the teacher one of 310"):
        require_same_tokens(Tokenizer.load(mine), Tokenizer.load(larger), larger)
    teacher, student = Tokenizer.load(mine), Tokenizer.load(others)
    wrong = [i for i in range(310) if teacher.decode_bytes([i]) != student.decode_bytes([i])]
    assert wrong
    with pytest.raises(DanluError, match=rf"{len(wrong)} of 310 token ids mean something else.*: {wrong[0]} \(b'"):
        require_same_tokens(teacher, student, others)
    require_same_tokens(teacher, Tokenizer.load(mine), mine)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "red blue"}\n')
    with pytest.raises(DanluError, match="token ids mean something else"):
        distil(config(mine, data, tmp_path / "out", keep_layers=None, student=others))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_layers": None}, "nothing says what the student is"),
        ({"size": 2}, "keep_layers and size says what the student is"),
        ({"keep_layers": None, "layers": ("2", "1")}, "must be in rising order"),
        ({"keep_layers": None, "layers": ("a",)}, "are no numbers of layers"),
        ({"teacher_top_k": 4, "on_policy": 0.5}, "exclude each other"),
        ({"jsd_beta": 0.3}, "jsd_beta is for divergence=jsd"),
        ({"answer_tokens": 3}, "answer_tokens is given, and nobody writes answers"),
        ({"method": "sequence", "temperature": 2.0}, "temperature is for method=logits"),
        ({"label_names": ("a",)}, "label_names is for task=classify, not causal"),
        ({"task": "classify", "on_policy": 0.5, "batch_tokens": 0}, "on_policy is for task=causal, not classify"),
        ({"init": "random"}, "init is for a new student"),
        ({"unlabelled": Path("texts.csv")}, "unlabelled is for task=classify, not causal"),
        ({"hidden_loss": "cosine"}, "no layers are compared"),
        ({"attention_weight": 1.0, "gradient_checkpointing": True}, "gradient_checkpointing keeps no hidden states"),
    ],
)
def test_options_that_cannot_be_right_together(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(Problems, match=message):
        distil(config(tmp_path, tmp_path, tmp_path / "out", **changes))


def test_layers_are_read_as_they_are_typed(tmp_path: Path) -> None:
    given = config(tmp_path, tmp_path, tmp_path, keep_layers=None, layers=("0,2", "3"))
    assert given.kept_layers == (0, 2, 3)
    assert given.problems() == []
    assert dataclasses.replace(given, layers=()).kept_layers == ()


def test_the_copies_are_whole(tmp_path: Path) -> None:
    teacher = load_model(folder_of(tmp_path / "teacher", "LlamaConfig", tie_word_embeddings=True))
    student = with_layers(teacher, range(4))
    assert isinstance(student, CausalLM)
    assert student.head.weight is student.embed.weight
    with torch.no_grad():
        assert torch.equal(student(IDS), teacher(IDS))
