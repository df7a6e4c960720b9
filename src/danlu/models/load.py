"""Model folders and GGUF files in, model folders out."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor, nn

from danlu import files
from danlu.errors import DanluError
from danlu.formats.gguf_blocks import PackedTensor
from danlu.formats.gguf_file import GGUFFile
from danlu.formats.safetensors_files import save_safetensors
from danlu.formats.weights import Weights, open_weights
from danlu.models.causal_lm import CausalLM
from danlu.models.encoder_decoder import EncoderDecoder
from danlu.models.families import qwen3
from danlu.models.family import Family, Task, family_for, family_of
from danlu.models.gguf import HFView, from_gguf
from danlu.models.hf_config import HFConfig
from danlu.models.names import Rule, rules
from danlu.models.transformer import Transformer
from danlu.nn.config import EncoderDecoderConfig, ModelConfig

if TYPE_CHECKING:
    from danlu.tokenizer.tokenizer import Tokenizer

Model = Transformer | EncoderDecoder
M = TypeVar("M", bound=Model)

LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""How the oldest BERT checkpoints, made with TensorFlow, name their norms."""


@overload
def load_model(
    path: str | Path, *, device: str | torch.device = ..., dtype: torch.dtype | None = ..., new_head: bool = ...
) -> CausalLM: ...
@overload
def load_model(
    path: str | Path,
    kind: type[M],
    *,
    device: str | torch.device = ...,
    dtype: torch.dtype | None = ...,
    new_head: bool = ...,
    **options: Any,
) -> M: ...
def load_model(
    path: str | Path,
    kind: type[Any] = CausalLM,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    new_head: bool = False,
    **options: Any,
) -> Any:
    """Open a model.

    Weights that are stored in ``dtype`` are not copied but mapped from the file, which is read as they are used.

    Args:
        path: a model folder (`config.json` and safetensors) or a GGUF file.
        kind: what to open it as, such as :class:`CausalLM` or one of `models/heads.py`.
        dtype: the weights are converted to it; None keeps the stored one.
        new_head: a model without a head of this kind, or with one for another number of labels, gets a fresh one (for
            fine-tuning) instead of an error.
        options: passed to the head: ``labels`` and the like.

    Raises:
        DanluError: not a model, a family or a feature that is not known, or weights that do not fit the config.
    """
    path = Path(path)
    weights, content = _open(path)
    where = str(path / "config.json" if path.is_dir() else path)
    family = family_for(content, where)
    task: Task = kind.task
    if task not in ("embedding", *family.heads):
        raise DanluError(f"{where}: models of type {family.model_type} have no head for {task.replace('_', ' ')}")
    config = _read_config(family, content, where, weights)
    if isinstance(config, EncoderDecoderConfig) != (task == "seq2seq"):
        raise DanluError(f"{where}: is an encoder-decoder; it opens as EncoderDecoder, and whole only")
    with torch.device("meta"):  # no memory is spent before the weights are known to fit the config
        try:
            model = kind.build(config, family, content, **options)
        except DanluError as error:
            raise DanluError(f"{where}: {error}") from None
    _fill(model, family, weights, dtype, new_head, _names_of_another_head(family, task, content))
    model.hf_config = dict(content)
    if path.is_dir() and (path / "generation_config.json").is_file():
        model.generation_config = files.read_json_object(path / "generation_config.json")
    return model.to(device).requires_grad_(True).eval()


def _open(path: Path) -> tuple[Weights, dict[str, Any]]:
    """The weights under Hugging Face names, and the content of `config.json`."""
    if not path.exists():
        raise DanluError(f"{path}: no such model folder")
    if (path / "checkpoints").exists() and not (path / "config.json").exists():
        raise DanluError(f"{path}: is being trained: run the same command again to finish it")
    if (path / "adapter_config.json").exists():
        raise DanluError(f"{path}: is an adapter; make a model of it first: danlu merge BASE {path} --out OUT")
    if path.is_dir() and not (path / "config.json").exists() and not any(path.glob("*.gguf")):
        raise DanluError(f"{path}: is not a model folder (no config.json)")
    weights = open_weights(path)
    if isinstance(weights, GGUFFile):
        return from_gguf(weights)
    folder = weights.path.parent
    if not (folder / "config.json").exists():
        raise DanluError(f"{folder}: is not a model folder (no config.json)")
    return weights, files.read_json_object(folder / "config.json")


def tasks_of(path: str | Path) -> frozenset[Task]:
    """What the family of a model folder or GGUF file has heads for."""
    path = Path(path)
    return frozenset(family_for(_open(path)[1], str(path)).heads)


def read_config(path: str | Path) -> ModelConfig:
    """The shape of a model folder or GGUF file; its weights are not read.

    Raises:
        DanluError: as :func:`load_model`.
    """
    path = Path(path)
    weights, content = _open(path)
    config = _read_config(family_for(content, str(path)), content, str(path), weights)
    if isinstance(config, EncoderDecoderConfig):
        raise DanluError(f"{path}: is an encoder-decoder; expected a model of one stack")
    return config


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """The `config.json` of a model folder, or what it would be of a GGUF file."""
    return _open(Path(path))[1]


def stored_weights(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor | PackedTensor]]:
    """A causal model's shape and its weights as they are stored, for kernels that compute on them: by our names,
    matrices of a GGUF file in its blocks, everything else mapped. A tied head is left out.

    Raises:
        DanluError: as :func:`load_model`.
    """
    path = Path(path)
    weights, content = _open(path)
    where = str(path / "config.json" if path.is_dir() else path)
    family = family_for(content, where)
    config = _read_config(family, content, where, weights)
    if isinstance(config, EncoderDecoderConfig) or "causal_lm" not in family.heads:
        raise DanluError(f"{where}: is no causal language model")
    with torch.device("meta"):
        model = CausalLM.build(config, family, content)
    stored = {_current_name(name): name for name in weights.infos}
    prefix = family.prefix if any(name.startswith(family.prefix) for name in stored) else ""
    found: dict[str, Tensor | PackedTensor] = {}
    for rule in _rules(model, family, prefix):
        if all(name in found or (name == "head.weight" and config.tie_embeddings) for name in rule.ours):
            continue
        if absent := [name for name in rule.theirs if name not in stored]:
            raise DanluError(f"{weights.path}: has no tensor {absent[0]}")
        names = [stored[name] for name in rule.theirs]
        blocks = weights.packed(names[0]) if isinstance(weights, HFView) and len(names) == 1 else None
        if blocks is None:
            found.update(zip(rule.ours, rule.to_ours([weights.tensor(name) for name in names]), strict=True))
            continue
        for name, rows in zip(rule.ours, rule.to_ours([blocks.data]), strict=True):
            found[name] = PackedTensor(blocks.kind, (rows.shape[0], blocks.shape[1]), rows)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, value in found.items():
        if tuple(value.shape) != shapes[name]:
            raise DanluError(
                f"{weights.path}: {name} has shape {tuple(value.shape)}; the config asks for {shapes[name]}"
            )
    return config, found


def _read_config(
    family: Family, content: Mapping[str, Any], where: str, weights: Weights
) -> ModelConfig | EncoderDecoderConfig:
    hf = HFConfig(content, where, frozenset(weights.infos))
    config = family.read(hf)
    hf.finish(family.harmless)
    if problems := config.problems():
        raise hf.error("; ".join(problems))
    return config


def _rules(model: Model, family: Family, prefix: str) -> Iterator[Rule]:
    """Every line of the family's table that this model has tensors for."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    config = model.config if isinstance(model, Transformer) else model.config.decoder
    yield from rules(family.names, config, shapes, prefix)
    yield from rules(family.heads.get(model.task, {}), config, shapes)


def _names_of_another_head(family: Family, task: Task, content: Mapping[str, Any]) -> set[str]:
    """Tensors of the head that a checkpoint has by its architecture, if that is not the head asked for: families call
    the weights of several heads alike, `classifier.weight` say."""
    architectures = content.get("architectures")
    listed = architectures if isinstance(architectures, list) else []
    known = [family.architectures[a] for a in listed if isinstance(a, str) and a in family.architectures]
    own = known[0] if known else task
    return set() if own == task else {str(theirs) for theirs in family.heads.get(own, {}).values()}


def _fill(
    model: Model, family: Family, weights: Weights, dtype: torch.dtype | None, new_head: bool, foreign: set[str]
) -> None:
    """Give every parameter of a model on the meta device its value from the file.

    Args:
        new_head: a head that is missing, or of another size, is left for :func:`_replace_parameters` to draw.
        foreign: names that mean something else in this file.

    Raises:
        DanluError: tensors are missing, left over, or of another shape.
    """
    stored = {_current_name(name): name for name in weights.infos}
    prefix = family.prefix if any(name.startswith(family.prefix) for name in stored) else ""
    expected = dict(model.named_parameters(remove_duplicate=False))
    values: dict[int, Tensor] = {}  # by the identity of the parameter: tied ones get one value
    missing: dict[int, str] = {}
    used: set[str] = set()
    head = {id(p) for p in model.head_parameters()}
    for rule in _rules(model, family, prefix):
        used.update(rule.theirs)
        parameters = [expected[name] for name in rule.ours]
        if all(id(p) in values for p in parameters):
            _check_copies(rule, [values[id(p)] for p in parameters], stored, weights)
            continue
        if absent := [name for name in rule.theirs if name not in stored or name in foreign]:
            missing.update({id(p): absent[0] for p in parameters})
            continue
        found = [weights.tensor(stored[name]) for name in rule.theirs]
        for name, p, tensor in zip(rule.ours, parameters, _to_ours(rule, found, weights), strict=True):
            if tensor.shape != p.shape:
                if new_head and id(p) in head:
                    continue
                raise DanluError(
                    f"{weights.path}: {rule.theirs[0]} has shape {tuple(found[0].shape)}; config.json asks for "
                    f"{tuple(p.shape)} ({name})"
                )
            if not tensor.is_floating_point():
                raise DanluError(
                    f"{weights.path}: {rule.theirs[0]} is {tensor.dtype}; quantized weights in safetensors are not "
                    "supported; use the unquantized model or a GGUF file"
                )
            values[id(p)] = tensor if dtype is None else tensor.to(dtype)

    missing = {key: name for key, name in missing.items() if key not in values and not (new_head and key in head)}
    if missing.keys() and missing.keys() <= head:
        raise DanluError(
            f"{weights.path}: lacks {min(missing.values())}: it is another kind of model, without a head for "
            f"{model.task.replace('_', ' ')}"
        )
    if missing:
        raise DanluError(
            f"{weights.path}: lacks {min(missing.values())} ({len(missing)} of {len(expected)} tensors are missing)"
        )
    surplus = [n for n in stored if n not in used and not _is_ignored(n, family, model, prefix)]
    if surplus:
        raise DanluError(
            f"{weights.path}: holds {min(surplus)}, which config.json has no place for ({len(surplus)} such tensors)"
        )
    _replace_parameters(model, values, dtype)


def _check_copies(rule: Rule, values: list[Tensor], stored: Mapping[str, str], weights: Weights) -> None:
    """A tied tensor may be stored again, if it is the same: training would have to know which of two counts."""
    if not all(name in stored for name in rule.theirs):
        return
    copies = _to_ours(rule, [weights.tensor(stored[name]) for name in rule.theirs], weights)
    if not all(torch.equal(copy.to(value.dtype), value) for copy, value in zip(copies, values, strict=True)):
        raise DanluError(
            f"{weights.path}: {rule.theirs[0]} is not the tensor that config.json ties it to; if it was trained apart, "
            'set "tie_word_embeddings": false'
        )


def _to_ours(rule: Rule, found: list[Tensor], weights: Weights) -> list[Tensor]:
    try:
        return rule.to_ours(found)
    except (RuntimeError, IndexError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in found[:3])
        raise DanluError(
            f"{weights.path}: {rule.theirs[0]} of shape {shapes} does not fit config.json ({error})"
        ) from error


def _current_name(name: str) -> str:
    for old, new in LEGACY.items():
        name = name.replace(old, new)
    return name


def _is_ignored(name: str, family: Family, model: Model, prefix: str) -> bool:
    """Whether a stored tensor may be left out: no weight at all, a copy of a tied one, or of a head not asked for."""
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in family.ignored):
        return True
    others = {str(theirs) for task, names in family.heads.items() if task != model.task for theirs in names.values()}
    tied = isinstance(model, Transformer) and model.config.tie_embeddings
    return name in others or (tied and name == "lm_head.weight")


def _replace_parameters(model: nn.Module, values: Mapping[int, Tensor], dtype: torch.dtype | None) -> None:
    """Put the values in place of the parameters; what has none (a new head) is drawn at random."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            if id(p) not in made:
                value = values.get(id(p))
                if value is None:
                    value = torch.zeros(p.shape, dtype=dtype or torch.float32, device="cpu")
                    if p.ndim > 1:
                        nn.init.normal_(value, std=0.02)
                    elif name == "weight":
                        nn.init.ones_(value)
                made[id(p)] = nn.Parameter(value, requires_grad=False)
            module._parameters[name] = made[id(p)]


def save_model(
    model: Model, folder: str | Path, tokenizer: Tokenizer | None = None, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write `config.json`, `generation_config.json`, the weights and the tokenizer's files, each atomically.

    The weights come last: a folder with weights is whole. A model made here is written in the Qwen3 layout, another in
    the layout it came in.

    Raises:
        DanluError: the model has adapters, or layers whose weights are quantized: neither has a place in this layout;
            or the disk is full.
    """
    _check_plain(model)
    path = Path(folder)
    files.require_space(path, dtype.itemsize * model.num_parameters(), "the model")
    content = model.hf_config
    if not content:
        if isinstance(model, EncoderDecoder):
            raise ValueError("an encoder-decoder is written in the layout that it was opened in, and this one was not")
        content = qwen3.write(model.config)
    family = family_of(content["model_type"])
    generation = dict(model.generation_config)
    name = str(dtype).removeprefix("torch.")
    content = {
        **content,
        **model.hf_fields(family),
        "dtype": name,
        "torch_dtype": name,
    }  # both names: old tools read the second
    if tokenizer is not None:
        tokenizer.save(path)
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        content.update(ids)
        generation.update(ids, eos_token_id=list(tokenizer.stop_ids))
    files.write_json(path / "config.json", content)
    # An encoder-decoder without this file is steered by config.json (forced tokens, ...), which it would override.
    if isinstance(model, CausalLM) or (isinstance(model, EncoderDecoder) and model.generation_config):
        files.write_json(path / "generation_config.json", generation)
    save_safetensors(path, checkpoint_tensors(model, family, dtype))


def _check_plain(model: Model) -> None:
    if any(".adapters." in name for name, _ in model.named_parameters()):
        raise DanluError(
            "a model with an adapter on it is no model folder; write the adapter alone (danlu.adapters.peft_folder: "
            "save_adapter), or put it into the weights first (danlu.adapters: lora.merge, then wrapper.unwrap)"
        )
    for name, module in model.named_modules():
        if hasattr(module, "to_linear"):
            raise DanluError(
                f"{name}: is a {type(module).__name__}, and a model folder holds floats; dequantize it first "
                "(danlu.quantization.packed_linear: dequantize_linears)"
            )


def checkpoint_tensors(model: Model, family: Family, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's tensors under the family's names, tied ones once."""
    state = dict(model.named_parameters(remove_duplicate=False))
    written: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for rule in _rules(model, family, family.prefix if model.task != "embedding" else ""):
        ours = [state[name] for name in rule.ours]
        if all(id(p) in written for p in ours):
            continue
        written.update(map(id, ours))
        parts = [p.detach().to("cpu", dtype) for p in ours]
        tensors.update(zip(rule.theirs, rule.to_theirs(parts), strict=True))
    return tensors
