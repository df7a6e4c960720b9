"""Where a student comes from: its teacher with fewer layers, or a new model of the teacher's family in other numbers.

Both are written down as the teacher's `config.json` with some numbers changed, which the family then reads as it reads
any other: what it cannot say, or what would no longer fit, is refused. Teacher and student must mean the same by each
token id; whether they do is checked here too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.models.family import family_for
from danlu.models.hf_config import HFConfig
from danlu.models.load import load_model
from danlu.models.transformer import Transformer
from danlu.nn.config import ModelConfig
from danlu.posttraining.distil_config import DistilConfig
from danlu.posttraining.narrowing import cut_weights
from danlu.tokenizer.tokenizer import Tokenizer

S = TypeVar("S", bound=Transformer)

FIELDS = {
    "n_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "dim": ("hidden_size", "n_embd", "dim", "d_model"),
    "n_heads": ("num_attention_heads", "n_head", "n_heads"),
    "n_kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "ffn_dim": ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim"),
}
"""Numbers of a shape, and what families call them in `config.json`."""

BY_LAYER = ("layer_types", "no_rope_layers")
"""Fields of `config.json` that hold one value for each layer."""

STD = 0.02
"""Of the fresh weights of an encoder, as BERT's."""


def make_student(config: DistilConfig, teacher: S, tokenizer: Tokenizer, **options: Any) -> S:
    """The student that a config describes, before it has learned anything; fp32.

    Args:
        teacher: fp32, of the kind that the student is to be.
        tokenizer: the teacher's.
        options: of the head, for a student from a folder.

    Raises:
        DanluError: there is no such student, or token ids mean something else to it.
    """
    if config.student is not None:
        require_same_tokens(tokenizer, Tokenizer.load(config.student), config.student)
        student = load_model(config.student, type(teacher), **options)
        if student.config.vocab_size != teacher.config.vocab_size:
            raise DanluError(
                f"{config.student}: its embedding has {student.config.vocab_size:,} rows and the teacher's "
                f"{teacher.config.vocab_size:,}; probabilities are compared row by row"
            )
        return student
    if config.shape:
        return new_student(teacher, **config.shape, init=config.init, seed=config.seed)
    n_layers = teacher.config.n_layers
    if config.keep_layers is not None and config.keep_layers > n_layers:
        raise DanluError(f"keep_layers is {config.keep_layers}, and {config.teacher} has {n_layers} layers")
    kept = config.kept_layers or spaced_layers(n_layers, config.keep_layers or n_layers)
    return with_layers(teacher, kept)


def spaced_layers(n_layers: int, kept: int) -> tuple[int, ...]:
    """``kept`` of the layers 0, 1, ..., as evenly spread as can be, the first and the last among them; of one, the
    first."""
    if kept == 1:
        return (0,)
    return tuple(round(i * (n_layers - 1) / (kept - 1)) for i in range(kept))


def with_layers(teacher: S, kept: Sequence[int]) -> S:
    """A copy of the teacher with these of its layers, in this order (DistilBERT, Sanh et al. 2019, arXiv:1910.01108).

    Args:
        kept: numbers of the teacher's layers, from 0.

    Raises:
        DanluError: it has no such layer, or a layer would not be what it was at its new place.
    """
    n_layers = teacher.config.n_layers
    if strange := [layer for layer in kept if not 0 <= layer < n_layers]:
        raise DanluError(
            f"layers: the teacher has no layer {strange[0]}; it has {n_layers}, numbered from 0 to {n_layers - 1}"
        )
    student = _built(teacher, _content(teacher, {"n_layers": len(kept)}, kept))
    _require_same_layers(teacher.config, student.config, kept)
    theirs = dict(teacher.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, weight in student.named_parameters(remove_duplicate=False):
            weight.copy_(theirs[_of_layer(name, kept)])
    return student


def _of_layer(name: str, kept: Sequence[int]) -> str:
    """The teacher's name of a student's weight."""
    return re.sub(r"^layers\.(\d+)\.", lambda found: f"layers.{kept[int(found[1])]}.", name)


def _require_same_layers(teacher: ModelConfig, student: ModelConfig, kept: Sequence[int]) -> None:
    """Windows, positions, experts and scales of a layer may depend on its number."""
    for layer, origin in enumerate(kept):
        same = (
            teacher.window_of(origin) == student.window_of(layer)
            and teacher.rope_of(origin) == student.rope_of(layer)
            and teacher.has_experts(origin) == student.has_experts(layer)
            and (origin == layer or not teacher.attention_scale_by_layer)
        )
        if not same:
            raise DanluError(
                f"layers: layer {origin} of the teacher would not be the same as layer {layer} of the student, because "
                "this family's windows, positions, experts or scales follow the number of the layer; choose layers "
                "that keep their pattern"
            )


def new_student(
    teacher: S,
    *,
    size: int | None = None,
    dim: int | None = None,
    n_heads: int | None = None,
    n_kv_heads: int | None = None,
    head_dim: int | None = None,
    ffn_dim: int | None = None,
    init: Literal["teacher", "random"] = "teacher",
    seed: int = 0,
) -> S:
    """A new model of the teacher's family. What is not given keeps the teacher's proportions.

    Args:
        size: number of layers; the width is then 64 times as much, unless ``dim`` says otherwise. Default: as many
            layers as the teacher has.
        dim: width; default the teacher's, or that of ``size``.
        init: teacher: it begins with the teacher's weights, cut to its shape (:func:`cut_weights`), where it is not
            wider; random: with none.
        seed: of the random weights, which is what heads of another width begin with in any case.

    Raises:
        DanluError: there is no such model in this family.
    """
    theirs = teacher.config
    width = dim or (64 * size if size else theirs.dim)
    per_head = head_dim or theirs.head_dim
    heads = n_heads or max(1, round(theirs.n_heads * theirs.head_dim / theirs.dim * width / per_head))
    kv_heads = n_kv_heads or next(
        n for n in range(max(1, round(heads * theirs.n_kv_heads / theirs.n_heads)), 0, -1) if heads % n == 0
    )
    feed_forward = ffn_dim or max(8, round(width * theirs.ffn_dim / theirs.dim / 8) * 8)
    wanted = {
        "n_layers": size or theirs.n_layers, "dim": width, "n_heads": heads, "n_kv_heads": kv_heads,
        "head_dim": per_head, "ffn_dim": feed_forward,
    }  # fmt: skip
    changed = {name: number for name, number in wanted.items() if getattr(theirs, name) != number}
    layers = spaced_layers(theirs.n_layers, wanted["n_layers"])
    student = _built(teacher, _content(teacher, changed, layers))
    generator = torch.Generator().manual_seed(seed)
    if isinstance(student, CausalLM):
        student.init_weights(generator)
    else:
        _draw(student, generator)
    if init == "teacher" and width <= theirs.dim:
        cut_weights(teacher, student, layers)
    return student


def _draw(student: Transformer, generator: torch.Generator) -> None:
    for module in student.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=STD, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def _content(teacher: Transformer, changed: dict[str, int], layers: Sequence[int]) -> dict[str, Any]:
    """The teacher's `config.json` with other numbers, and, where it lists something for each layer, the entries of
    ``layers``."""
    content = dict(teacher.hf_config)
    for name, number in changed.items():
        content.update({field: number for field in FIELDS[name] if field in content})
    for field in BY_LAYER:
        if isinstance(values := content.get(field), list) and len(values) == teacher.config.n_layers:
            content[field] = [values[layer] for layer in layers]
    config = _read(content)
    # What no field says may follow from the others, as the width of a head does in many families.
    for name, number in changed.items():
        if getattr(config, name) != number:
            raise DanluError(
                f"student: models of type {content.get('model_type')} cannot have {name}={number} here (it comes out "
                f"as {getattr(config, name)}); leave it out, or change what it follows from"
            )
    for name in FIELDS:
        if name not in changed and getattr(config, name) != getattr(teacher.config, name):
            raise DanluError(
                f"student: in models of type {content.get('model_type')} {name} would become "
                f"{getattr(config, name)} with these numbers; give it too, or choose others"
            )
    return content


def _read(content: dict[str, Any]) -> ModelConfig:
    where = "student"
    family = family_for(content, where)
    hf = HFConfig(content, where)
    config = family.read(hf)
    hf.finish(family.harmless)
    assert isinstance(config, ModelConfig)
    if problems := config.problems():
        raise hf.error("; ".join(problems))
    return config


def _built(teacher: S, content: dict[str, Any]) -> S:
    student = type(teacher).build(_read(content), family_for(content, "student"), content)
    student.hf_config, student.generation_config = content, dict(teacher.generation_config)
    return student.eval()


def require_same_tokens(teacher: Tokenizer, student: Tokenizer, where: object) -> None:
    """Refuse a student to whom a token id means something else than to its teacher: probabilities are compared id by
    id.

    Args:
        where: the student's folder, for the error.
    """
    if teacher.fingerprint == student.fingerprint:
        return
    if teacher.vocab_size != student.vocab_size:
        raise DanluError(
            f"{where}: has a vocabulary of {student.vocab_size:,} tokens and the teacher one of "
            f"{teacher.vocab_size:,}; probabilities can be compared only where both have the same tokens: choose a "
            "student with the teacher's tokenizer, or make one from the teacher (keep_layers, size)"
        )
    strange = [i for i in range(teacher.vocab_size) if teacher.decode_bytes([i]) != student.decode_bytes([i])]
    if strange:
        shown = ", ".join(
            f"{i} ({teacher.decode_bytes([i])!r} for the teacher, {student.decode_bytes([i])!r} for the student)"
            for i in strange[:3]
        )
        raise DanluError(
            f"{where}: {len(strange):,} of {teacher.vocab_size:,} token ids mean something else to the student than to "
            f"the teacher: {shown}{', ...' if len(strange) > 3 else ''}; choose a student with the teacher's tokenizer"
        )
    for role in ("bos_id", "eos_id"):
        if getattr(teacher, role) != getattr(student, role):
            raise DanluError(
                f"{where}: {role} is {getattr(student, role)}, and the teacher's {getattr(teacher, role)}; texts would "
                "begin or end otherwise"
            )


def copied(model: S) -> S:
    """Another model of the same numbers and weights, to be trained apart."""
    other = type(model).build(model.config, family_for(model.hf_config, "student"), model.hf_config)
    other.load_state_dict(model.state_dict())
    other.hf_config, other.generation_config = model.hf_config, model.generation_config
    return other.eval()
