"""`adapter_config.json`: what PEFT says about an adapter besides its tensors.

Every field is honoured, known to change nothing once the adapter is trained, or refused by its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from danlu import files
from danlu.adapters.config import ALL_LINEAR, AdapterShape
from danlu.errors import DanluError

CONFIG = "adapter_config.json"

TASK_TYPES = {
    "causal_lm": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "seq2seq": "SEQ_2_SEQ_LM",
    "embedding": "FEATURE_EXTRACTION",
}
"""PEFT's names for our tasks."""

N = TypeVar("N", int, float)

_READ = {
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora",
    "target_modules", "rank_pattern", "alpha_pattern", "trainable_token_indices", "modules_to_save", "bias",
    "init_lora_weights",
}  # fmt: skip
_HARMLESS = {
    # Which modules were chosen, the tensors tell; Conv1D's layout we know from the model; the rest is about how the
    # adapter was made, or belongs to a switch that is refused.
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip
_HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that draw A and B alone; the others (PiSSA, OLoRA, CorDA, LoftQ, ...) change the base."""


@dataclass(frozen=True)
class PeftConfig:
    """What is known of an adapter.

    Attributes:
        base: name or path of the model it was trained on.
        task_type: as PEFT names it, if at all.
        shape: kind, rank, alpha, rslora and dropout; targets as PEFT has them.
        ranks, alphas: of modules that differ, by patterns of their names.
        token_ids: tokens with rows of their own, by the name of the module; "" is the embedding, whatever its name.
    """

    base: str | None
    task_type: str | None
    shape: AdapterShape
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    token_ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """Rank of a module, by its name in the base model."""
        assert self.shape.rank is not None
        return _by_pattern(self.ranks, module, self.shape.rank)

    def alpha_of(self, module: str) -> float:
        """Alpha of a module."""
        assert self.shape.alpha is not None
        return _by_pattern(self.alphas, module, self.shape.alpha)

    def names(self, module: str) -> bool:
        """Whether the targets name a module, as far as this can be told from names alone: a regular expression from
        outside is not run."""
        if self.shape.targets == (ALL_LINEAR,) or not all(re.fullmatch(r"[\w.]+", t) for t in self.shape.targets):
            return True
        return any(module == target or module.endswith(f".{target}") for target in self.shape.targets)


def is_adapter_folder(path: str | Path) -> bool:
    """Whether a path is an adapter in PEFT's layout."""
    return (Path(path) / CONFIG).is_file()


def read_peft_config(folder: str | Path) -> PeftConfig:
    """Read and check `adapter_config.json`.

    Raises:
        DanluError: there is none, or it asks for something that is not done here (named).
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise DanluError(f"{folder}: is not an adapter folder (no {CONFIG})")
    content = files.read_json_object(path)
    if content.get("peft_type") != "LORA":
        raise DanluError(f"{path}: peft_type is {content.get('peft_type')!r}; only LORA is supported")
    if content.get("bias", "none") != "none":
        raise DanluError(f"{path}: bias is {content['bias']!r}; adapters with trained biases are not supported")
    if (start := content.get("init_lora_weights", True)) not in _HARMLESS_STARTS:
        raise DanluError(
            f"{path}: init_lora_weights is {start!r}, which changes the base model, too; convert the adapter to plain "
            "LoRA with PEFT first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if refused := sorted(key for key in content.keys() - _READ - _HARMLESS if content[key]):
        raise DanluError(f"{path}: {refused[0]} is {content[refused[0]]!r}, which is not supported")
    return _Reader(content, path).config()


@dataclass(frozen=True)
class _Reader:
    content: dict[str, Any]
    path: Path

    def config(self) -> PeftConfig:
        shape = AdapterShape(
            kind="dora" if self._flag("use_dora") else "lora",
            rank=self._whole(self.content.get("r", 8), "r"),
            alpha=self._number(self.content.get("lora_alpha", 8), "lora_alpha"),
            rslora=self._flag("use_rslora"),
            dropout=self._number(self.content.get("lora_dropout", 0.0), "lora_dropout"),
            targets=self._names("target_modules"),
        )
        if not 0 <= shape.dropout < 1:
            raise self._wrong("lora_dropout", shape.dropout)
        return PeftConfig(
            base=self._text("base_model_name_or_path"),
            task_type=self._text("task_type"),
            shape=shape,
            ranks={key: self._whole(value, "rank_pattern") for key, value in self._patterns("rank_pattern").items()},
            alphas={
                key: self._number(value, "alpha_pattern") for key, value in self._patterns("alpha_pattern").items()
            },
            token_ids=self._token_ids(),
        )

    def _wrong(self, name: str, value: object) -> DanluError:
        return DanluError(f"{self.path}: {name} is {value!r}; this is no adapter that PEFT could have written")

    def _whole(self, value: Any, name: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise self._wrong(name, value)
        return value

    def _number(self, value: Any, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, value)
        try:
            number = float(value)
        except OverflowError:  # a whole number of hundreds of digits
            raise self._wrong(name, value) from None
        if not math.isfinite(number):
            raise self._wrong(name, value)
        return number

    def _flag(self, name: str) -> bool:
        value = self.content.get(name) or False
        if not isinstance(value, bool):
            raise self._wrong(name, value)
        return value

    def _text(self, name: str) -> str | None:
        value = self.content.get(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, value)
        return value or None

    def _names(self, name: str) -> tuple[str, ...]:
        value = self.content.get(name) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, value)
        return tuple(value)

    def _patterns(self, name: str) -> dict[str, Any]:
        """Regular expressions of module names, as they are usual; others could take for ever."""
        value = self.content.get(name) or {}
        if not isinstance(value, dict):
            raise self._wrong(name, value)
        for pattern in value:
            if not re.fullmatch(r"[\w.\\^$|*+?-]{1,300}", pattern) or sum(map(pattern.count, "*+?")) > 2:
                raise DanluError(
                    f"{self.path}: {name} has {pattern!r}; only names with up to two of * + ? are supported"
                )
            try:
                re.compile(pattern)
            except re.error as error:
                raise DanluError(f"{self.path}: {name}: {pattern!r} is no regular expression ({error})") from error
        return value

    def _token_ids(self) -> dict[str, tuple[int, ...]]:
        name = "trainable_token_indices"
        value = self.content.get(name) or {}
        by_module = {"": value} if isinstance(value, list) else value
        if not isinstance(by_module, dict):
            raise self._wrong(name, value)
        for ids in by_module.values():
            if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
                raise self._wrong(name, ids)
        return {module: tuple(ids) for module, ids in by_module.items() if ids}


def _by_pattern(values: Mapping[str, N], module: str, default: N) -> N:
    """As PEFT matches: the first pattern that the end of the name fits, from a dot on."""
    return next((value for key, value in values.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def peft_content(config: PeftConfig, *, transposed: bool, modules_to_save: list[str]) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    shape = config.shape
    return {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "base_model_name_or_path": config.base,
        "inference_mode": True,
        "r": shape.rank,
        "lora_alpha": _short(shape.alpha or 0.0),
        "use_rslora": shape.rslora,
        "use_dora": shape.kind == "dora",
        "lora_dropout": shape.dropout,
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": transposed,
        "target_modules": list(shape.targets),
        "rank_pattern": dict(config.ranks),
        "alpha_pattern": {name: _short(alpha) for name, alpha in config.alphas.items()},
        "modules_to_save": modules_to_save or None,
        "trainable_token_indices": {name: list(ids) for name, ids in config.token_ids.items()} or None,
    }


def _short(number: float) -> float:
    """A whole number as one, as PEFT declares alpha."""
    return int(number) if number == int(number) else number
