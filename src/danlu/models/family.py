"""What a family declares about itself, and the registry by `model_type`."""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from danlu.errors import DanluError
from danlu.models.hf_config import HFConfig
from danlu.models.names import Names
from danlu.nn.config import EncoderDecoderConfig, ModelConfig

Task = Literal[
    "causal_lm", "masked_lm", "sequence_classification", "token_classification", "question_answering", "seq2seq",
    "embedding",
]  # fmt: skip


@dataclass(frozen=True)
class ClassifierShape:
    """How a family classifies a whole sequence: which token's hidden state it takes, the activation of the layer it
    passes it through (None: there is no such layer), and whether the projection has a bias."""

    pool: Literal["first", "last"] = "last"
    pooler: Literal["tanh", "relu"] | None = None
    bias: bool = False


@dataclass(frozen=True)
class Family:
    """A family of checkpoints.

    Attributes:
        model_type: as `config.json` names it.
        architectures: class names of `config.json`, and what their heads do.
        read: `config.json` -> our shape; reads every field that changes the computation.
        names: tensors of the stack, without ``prefix``.
        prefix: of the stack's names in a checkpoint with a head; one without a head has none.
        heads: tensors of each head, by its task; their names carry no prefix.
        classifier: how it classifies sequences.
        ignored: patterns (fnmatch) of tensors that are not weights: masks, positions, frequencies.
        harmless: fields of `config.json` that do not change the computation, in this family.
        write: our shape -> the fields of `config.json`, for families that models are made in.
    """

    model_type: str
    architectures: Mapping[str, Task]
    read: Callable[[HFConfig], ModelConfig | EncoderDecoderConfig]
    names: Names
    prefix: str = ""
    heads: Mapping[Task, Names] = field(default_factory=dict)
    classifier: ClassifierShape = ClassifierShape()
    ignored: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    write: Callable[[ModelConfig], dict[str, Any]] | None = None


# model_type -> the module in models/families that declares it
MODULES = {
    "bart": "bart",
    "bert": "bert",
    "bloom": "bloom",
    "distilbert": "distilbert",
    "falcon": "falcon",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "glm": "glm",
    "glm4": "glm",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "olmo2": "olmo2",
    "phi": "phi",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "RefinedWeb": "falcon",
    "RefinedWebModel": "falcon",
    "roberta": "roberta",
    "smollm3": "smollm3",
    "t5": "t5",
    "xlm-roberta": "roberta",
}


@functools.cache
def family_of(model_type: str) -> Family:
    """The family of a `model_type`.

    Raises:
        DanluError: it is not known; the message lists the known ones and the nearest.
    """
    if model_type not in MODULES:
        nearest = difflib.get_close_matches(model_type, MODULES, n=1, cutoff=0.4)
        hint = f"; the nearest is {nearest[0]}" if nearest else ""
        raise DanluError(f"models of type {model_type!r} cannot be opened{hint}; known: {', '.join(sorted(MODULES))}")
    module = importlib.import_module(f"danlu.models.families.{MODULES[model_type]}")
    family: Family = next(f for f in vars(module).values() if isinstance(f, Family) and f.model_type == model_type)
    return family


def family_for(content: Mapping[str, Any], where: str) -> Family:
    """The family of a `config.json`: by its `model_type`, or by its `architectures` where that is missing."""
    model_type = content.get("model_type")
    if model_type is None:
        architectures = content.get("architectures") or []
        found = [name for name in MODULES for a in architectures if a in family_of(name).architectures]
        if not found:
            raise DanluError(f"{where}: names neither a model_type nor a known architecture")
        model_type = found[0]
    if not isinstance(model_type, str):
        raise DanluError(f"{where}: model_type is {model_type!r}; expected a name")
    if isinstance(inner := content.get("text_config"), dict) and model_type not in MODULES:
        raise DanluError(
            f"{where}: {model_type} models take more than text, which is not supported; save the language model "
            f"({inner.get('model_type', 'text_config')}) alone in a folder of its own and open that"
        )
    try:
        return family_of(model_type)
    except DanluError as error:
        raise DanluError(f"{where}: {error}") from None
