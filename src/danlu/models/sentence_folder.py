"""The folder of an embedder as sentence-transformers lays it out: a model folder with `modules.json`, which lists what
happens to a text; a folder for each module that has settings; lengths and prompts in two more files at the top.

    modules.json                        Transformer, Pooling, then any number of Dense and Normalize
    sentence_bert_config.json           max_seq_length, do_lower_case
    config_sentence_transformers.json   prompts, default_prompt_name, similarity_fn_name
    1_Pooling/config.json, 2_Dense/config.json, 2_Dense/model.safetensors
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F
from torch import Tensor

from danlu import files
from danlu.errors import DanluError
from danlu.formats.safetensors_files import save_safetensors
from danlu.formats.weights import open_weights
from danlu.models.hf_config import HFConfig
from danlu.nn.pooling import Pool

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
LENGTHS = "sentence_bert_config.json"

POOLINGS: dict[str, Pool] = {"cls": "first", "lasttoken": "last", "mean": "mean", "max": "max"}
POOLING_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""How older folders say it: a flag for each pooling instead of one name."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.nn.modules.activation.Tanh": torch.tanh,
    "torch.nn.modules.activation.ReLU": F.relu,
    "torch.nn.modules.activation.GELU": F.gelu,
    "torch.nn.modules.linear.Identity": lambda x: x,
}


@dataclass(frozen=True)
class DenseSettings:
    """A projection of the pooled vector.

    Attributes:
        activation: a key of :data:`ACTIVATIONS`.
        path: the module's folder inside the embedder's.
    """

    n_in: int
    n_out: int
    bias: bool = True
    activation: str = "torch.nn.modules.activation.Tanh"
    path: str = ""


@dataclass(frozen=True)
class SentenceSettings:
    """What an embedder does besides running its stack.

    Attributes:
        pooling: how states become one vector.
        steps: what happens to the vector: a projection, or None for normalising it to length 1.
        max_length: tokens of a text that are read; None: as many as the stack was made for.
        prompts: texts that are put in front of texts, by the name of their purpose.
        default_prompt: the one that is used when none is named.
        lower_case: texts are lowered before they are cut into tokens.
        similarity: how vectors are compared: cosine, dot, euclidean or manhattan.
        dim: width of the states that are pooled; None: that of the stack.
    """

    pooling: Pool
    steps: tuple[DenseSettings | None, ...] = ()
    max_length: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    lower_case: bool = False
    similarity: str = "cosine"
    dim: int | None = None

    def prompt(self, name: str | None) -> str:
        """The text to put in front.

        Raises:
            DanluError: there is no prompt of this name.
        """
        name = self.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            raise DanluError(f"the embedder has no prompt {name!r}; it has {', '.join(sorted(self.prompts)) or 'none'}")
        return self.prompts[name]


def read_settings(path: Path) -> tuple[SentenceSettings, Path]:
    """An embedder's settings, and the folder of its stack.

    Raises:
        DanluError: a file is broken, or asks for something that is not known.
    """
    modules = _read_modules(path)
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or {"Transformer", "Pooling"} & set(kinds[2:]):
        raise DanluError(
            f"{path / MODULES}: lists {', '.join(kinds)}; expected Transformer, Pooling, then Dense or Normalize"
        )
    folder = path / modules[0][1]
    pooling, dim = _read_pooling(_config(path / modules[1][1] / "config.json"))
    steps = tuple(None if kind == "Normalize" else _read_dense(path, place) for kind, place in modules[2:])
    max_length, lower_case = _read_lengths(folder)
    prompts, default, similarity = _read_prompts(path)
    width = dim
    for step in steps:
        if step is not None:
            if step.n_in != width:
                raise DanluError(f"{path / step.path}: takes vectors of {step.n_in} numbers, but is given {width}")
            width = step.n_out
    settings = SentenceSettings(
        pooling, steps, max_length, prompts, default, lower_case=lower_case, similarity=similarity, dim=dim
    )
    return settings, folder


def dense_weights(path: Path, settings: DenseSettings) -> dict[str, Tensor]:
    """The tensors of a projection, by name.

    Raises:
        DanluError: they are missing, a pickle, or of another shape.
    """
    weights = open_weights(path / settings.path)
    expected: dict[str, tuple[int, ...]] = {"linear.weight": (settings.n_out, settings.n_in)}
    if settings.bias:
        expected["linear.bias"] = (settings.n_out,)
    found = {name: info.shape for name, info in weights.infos.items()}
    if found != expected:
        raise DanluError(f"{weights.path}: holds {found}; config.json asks for {expected}")
    return {name: weights.tensor(name) for name in expected}


def write_settings(
    settings: SentenceSettings, path: Path, dim: int, max_length: int, weights: Sequence[Mapping[str, Tensor] | None]
) -> None:
    """Write everything but the stack and its tokenizer.

    Args:
        dim: width of the stack.
        max_length: as the embedder has it.
        weights: of each step that has any.
    """
    files.write_json(path / LENGTHS, {"max_seq_length": max_length, "do_lower_case": settings.lower_case})
    content = {
        "model_type": "SentenceTransformer",
        "prompts": dict(settings.prompts),
        "default_prompt_name": settings.default_prompt,
        "similarity_fn_name": settings.similarity,
    }
    files.write_json(path / PROMPTS, content)
    name = next(theirs for theirs, ours in POOLINGS.items() if ours == settings.pooling)
    flags = {flag: mode == name for mode, flag in POOLING_FLAGS.items()}
    files.write_json(path / "1_Pooling" / "config.json", {"word_embedding_dimension": dim, **flags})
    places = [("Transformer", ""), ("Pooling", "1_Pooling")]
    for number, (step, tensors) in enumerate(zip(settings.steps, weights, strict=True), start=2):
        kind = "Normalize" if step is None else "Dense"
        places.append((kind, f"{number}_{kind}"))
        if step is not None and tensors is not None:
            folder = path / f"{number}_{kind}"
            shape = {"in_features": step.n_in, "out_features": step.n_out, "bias": step.bias}
            files.write_json(folder / "config.json", {**shape, "activation_function": step.activation})
            save_safetensors(folder, tensors)
    listed = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, place) in enumerate(places)
    ]
    files.write_json(path / MODULES, listed)


def _read_modules(path: Path) -> list[tuple[str, str]]:
    """(kind, folder) of each module."""
    where = path / MODULES
    content = files.read_json(where)
    if not isinstance(content, list) or not all(isinstance(module, dict) for module in content):
        raise DanluError(f"{where}: must hold a list of modules")
    modules = []
    for module in content:
        kind, place = module.get("type"), module.get("path")
        if not isinstance(kind, str) or not isinstance(place, str):
            raise DanluError(f"{where}: every module must have a type and a path")
        if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts or "\\" in place or "\0" in place:
            raise DanluError(f"{where}: the path {place!r} leads out of the folder")
        name = kind.rpartition(".")[2]
        known = ("Transformer", "Pooling", "Dense", "Normalize")
        if not kind.startswith("sentence_transformers.") or name not in known:
            raise DanluError(f"{where}: module {kind!r} is not supported; known: {', '.join(known)}")
        modules.append((name, place))
    return modules


def _config(path: Path) -> HFConfig:
    return HFConfig(files.read_json_object(path), str(path))


def _read_pooling(hf: HFConfig) -> tuple[Pool, int]:
    dim = hf.integer(hf.spelling("embedding_dimension", "word_embedding_dimension"))
    # A prompt that is not pooled would have to be found again among the tokens.
    hf.only("include_prompt", True)
    flags = [mode for mode, flag in POOLING_FLAGS.items() if hf.flag(flag)]
    modes = hf.get("pooling_mode", flags or ["mean"])
    hf.finish()
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in list(POOLINGS):
        raise hf.error(f"pooling is {modes}, which is not supported; supported is one of {', '.join(POOLINGS)}")
    return POOLINGS[modes[0]], dim


def _read_dense(path: Path, place: str) -> DenseSettings:
    hf = _config(path / place / "config.json")
    for key in ("module_input_name", "module_output_name"):
        hf.only(key, "sentence_embedding")
    hf.only("use_residual", False)
    hf.only("activation_function", *ACTIVATIONS)
    settings = DenseSettings(
        hf.integer("in_features"), hf.integer("out_features"), hf.flag("bias", True),
        hf.get("activation_function", DenseSettings.activation), place,
    )  # fmt: skip
    hf.finish()
    return settings


def _read_lengths(folder: Path) -> tuple[int | None, bool]:
    """Tokens of a text that are read, and whether texts are lowered."""
    max_length, lower_case = None, False
    own = sorted(folder.glob("sentence_*_config.json"))  # old folders name their own family instead
    if own:
        hf = _config(folder / LENGTHS if (folder / LENGTHS) in own else own[0])
        max_length, lower_case = hf.integer("max_seq_length", None), hf.flag("do_lower_case")
        hf.only("transformer_task", "feature-extraction")
        hf.only("module_output_name", "token_embeddings")
        hf.only("modality_config", {"text": {"method": "forward", "method_output_name": "last_hidden_state"}})
        hf.finish(harmless=("unpad_inputs",))
    if max_length is None and (folder / "tokenizer_config.json").is_file():
        limit = _config(folder / "tokenizer_config.json").get("model_max_length")
        if type(limit) is int and 0 < limit < 2**31:  # "no limit" is written as a huge number
            max_length = limit
    return max_length, lower_case


def _read_prompts(path: Path) -> tuple[dict[str, str], str | None, str]:
    """Prompts, the name of the default one, and how vectors are compared."""
    if not (path / PROMPTS).is_file():
        return {}, None, "cosine"
    hf = _config(path / PROMPTS)
    hf.only("model_type", "SentenceTransformer")
    hf.only("truncate_dim")
    hf.only("similarity_fn_name", "cosine", "dot", "euclidean", "manhattan")
    prompts, default = hf.get("prompts", {}), hf.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise hf.error("prompts must map names to texts")
    if default is not None and default not in list(prompts):
        raise hf.error(f"default_prompt_name is {default!r}, which is not among the prompts")
    similarity = hf.get("similarity_fn_name", "cosine")
    hf.finish(harmless=("__version__",))
    return {name: text or "" for name, text in prompts.items()}, default, similarity
