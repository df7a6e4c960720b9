"""Adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`, written and read exactly, also
where a family stores several of our layers as one of its own."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from danlu import files
from danlu.adapters import token_rows
from danlu.adapters.config import AdapterShape
from danlu.adapters.lora import LoRALinear, LowRank, add, check_name, train_only
from danlu.adapters.peft_config import CONFIG, TASK_TYPES, PeftConfig, peft_content, read_peft_config
from danlu.adapters.sites import Site, family_of_model, shortest_names, sites, whole_head
from danlu.adapters.token_rows import TokenRows
from danlu.adapters.wrapper import active_adapter, wrappers
from danlu.errors import DanluError
from danlu.formats.safetensors_files import SafetensorsWeights
from danlu.models.causal_lm import CausalLM
from danlu.models.load import Model
from danlu.models.names import Rule, rules
from danlu.nn.config import EncoderDecoderConfig

if TYPE_CHECKING:
    from danlu.tokenizer.tokenizer import Tokenizer

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE = ".base_layer.weight"
"""Ends the name of a weight of the base model itself."""

_PART = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")


# ---- writing


def save_adapter(model: Model, folder: str | Path, base: str | Path | None, tokenizer: Tokenizer | None = None) -> None:
    """Write the active adapter of a model, the weights last: a folder with weights is whole.

    Args:
        base: name or path of the base model, by which whoever opens the adapter finds it.
        tokenizer: written beside it, for adapters that bring tokens of their own.

    Raises:
        DanluError: the disk is full, or the folder cannot be written.
    """
    path, name = Path(folder), active_adapter(model)
    if name is None:
        raise ValueError("the model has no active adapter")
    content, tensors = peft_tensors(model, name, None if base is None else str(base))
    files.require_space(path, sum(t.numel() * t.itemsize for t in tensors.values()), "the adapter")
    if tokenizer is not None:
        tokenizer.save(path)
    files.write_json(path / CONFIG, content)
    with files.atomic_path(path / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def peft_tensors(model: Model, name: str, base: str | None) -> tuple[dict[str, object], dict[str, Tensor]]:
    """An adapter as PEFT has it: the content of its config, and its tensors by their names there."""
    every = sites(model)
    found = [(site, parts) for site in every if (parts := _parts(model, site, name))]
    tensors: dict[str, Tensor] = {}
    for site, parts in found:
        tensors[f"{site.theirs}.lora_A.weight"] = parts[0].a
        tensors[f"{site.theirs}.lora_B.weight"] = site.join([part.b for part in parts])
        if parts[0].magnitude is not None:
            lengths = [part.magnitude for part in parts if part.magnitude is not None]
            tensors[f"{site.theirs}.lora_magnitude_vector"] = site.join(lengths)
    token_ids: dict[str, tuple[int, ...]] = {}
    for place, rows in _token_rows(model, name).items():
        module = _their_name(model, place)
        token_ids[module] = tuple(rows.ids.tolist())
        tensors[f"{module}.token_adapter.trainable_tokens_delta"] = rows.rows
    head = _head_tensors(model)
    tensors |= head
    config = _config(model, every, found, base, token_ids)
    transposed = any(site.rule.transposed for site, _ in found)
    content = peft_content(config, transposed=transposed, modules_to_save=_modules_to_save(model, list(head)))
    # A copy of each, since safetensors refuses what shares memory.
    return content, {PREFIX + key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}


def _parts(model: Model, site: Site, name: str) -> list[LowRank]:
    layers = [model.get_submodule(place) for place in site.ours]
    return [
        part
        for layer in layers
        if isinstance(layer, LoRALinear) and name in layer.adapters
        if isinstance(part := layer.adapters[name], LowRank)
    ]


def _token_rows(model: Model, name: str) -> dict[str, TokenRows]:
    """By our name of the layer; a head that shares the embedding's is left out."""
    return {
        place: rows
        for place, wrapper in wrappers(model).items()
        if name in wrapper.adapters and not wrapper.shares_weight
        if isinstance(rows := wrapper.adapters[name], TokenRows)
    }


def _config(
    model: Model,
    every: list[Site],
    found: list[tuple[Site, list[LowRank]]],
    base: str | None,
    token_ids: dict[str, tuple[int, ...]],
) -> PeftConfig:
    first = found[0][1][0]
    rank = Counter(parts[0].rank for _, parts in found).most_common(1)[0][0]
    alpha = Counter(parts[0].alpha for _, parts in found).most_common(1)[0][0]
    chosen = [site for site, _ in found]
    # Experts may be called like layers that have an adapter, and they have none.
    names = tuple(s.theirs for s in chosen) if _has_mixture(model) else shortest_names(chosen, every)
    return PeftConfig(
        base=base,
        task_type=TASK_TYPES.get(model.task),
        shape=AdapterShape(
            kind="lora" if first.magnitude is None else "dora",
            rank=rank, alpha=alpha, rslora=first.rslora, dropout=first.dropout, targets=names,
        ),
        ranks={site.theirs: parts[0].rank for site, parts in found if parts[0].rank != rank},
        alphas={site.theirs: parts[0].alpha for site, parts in found if parts[0].alpha != alpha},
        token_ids=token_ids,
    )  # fmt: skip


def _has_mixture(model: Model) -> bool:
    return not isinstance(model.config, EncoderDecoderConfig) and model.config.experts is not None


def _head_rules(model: Model) -> list[Rule]:
    """The lines of the head that is trained whole, if there is one."""
    shapes = {name: tuple(p.shape) for name, p in whole_head(model).items()}
    if not shapes:
        return []
    family = family_of_model(model)
    assert not isinstance(model.config, EncoderDecoderConfig)
    return [
        *rules(family.names, model.config, shapes, family.prefix),
        *rules(family.heads.get(model.task, {}), model.config, shapes),
    ]


def _head_tensors(model: Model) -> dict[str, Tensor]:
    parameters = whole_head(model)
    found: dict[str, Tensor] = {}
    for rule in _head_rules(model):
        parts = [parameters[name].detach() for name in rule.ours]
        found.update(zip(rule.theirs, rule.to_theirs(parts), strict=True))
    return found


def _modules_to_save(model: Model, tensors: list[str]) -> list[str]:
    """The modules of the head as PEFT wraps them: a head with layers of its own (RoBERTa's) is wrapped in one."""
    prefix = family_of_model(model).prefix
    modules = [name.rpartition(".")[0] if name.startswith(prefix) else name.partition(".")[0] for name in tensors]
    return list(dict.fromkeys(modules))


def _their_name(model: Model, place: str) -> str:
    """Hugging Face's name of the embedding or head."""
    family = family_of_model(model)
    assert isinstance(model, CausalLM)
    shapes = {f"{place}.weight": (model.config.vocab_size, model.config.dim)}
    lines = [
        *rules(family.names, model.config, shapes, family.prefix),
        *rules(family.heads["causal_lm"], model.config, shapes),
    ]
    return lines[0].theirs[0].removesuffix(".weight")


# ---- reading


@dataclass(frozen=True)
class LowRankTensors:
    """What a folder holds for one module: ``a`` (rank, in), ``b`` (out, rank) and, of DoRA, ``magnitude`` (out,)."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None


def read_low_rank(folder: str | Path) -> dict[str, LowRankTensors]:
    """The low-rank tensors of an adapter folder, by the module's name in the base model.

    Raises:
        DanluError: there are none, or one lacks its other half.
    """
    tensors, path = _read_tensors(folder), Path(folder) / WEIGHTS
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if found := _PART.fullmatch(key):
            parts.setdefault(found[1], {})[found[2]] = tensor.float()
    if not parts:
        raise DanluError(f"{path}: holds no LoRA tensors")
    result = {}
    for module, own in parts.items():
        a, b = own.get("lora_A.weight"), own.get("lora_B.weight")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise DanluError(f"{path}: the tensors of {module} are no pair of A and B")
        result[module] = LowRankTensors(a, b, own.get("lora_magnitude_vector"))
    return result


def _read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of an adapter folder, by their names in the base model."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        pickled = (Path(folder) / "adapter_model.bin").is_file()
        raise DanluError(
            f"{folder}: has no {WEIGHTS}"
            + ("; adapter_model.bin is a pickle, which could run code: save it as safetensors" if pickled else "")
        )
    weights = SafetensorsWeights(path)
    tensors = {key.removeprefix(PREFIX): weights.tensor(key) for key in weights.infos}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise DanluError(f"{path}: {key} is {tensor.dtype}; an adapter's tensors are floats")
    return tensors


def load_adapter(model: Model, folder: str | Path, *, name: str = "default") -> PeftConfig:
    """Put an adapter folder onto its base model and make it the active adapter; it alone is trainable.

    Returns:
        What its config says.

    Raises:
        DanluError: it is for another base (a module or shape does not fit), incomplete, or holds something that is not
            supported (named). The model is as it was.
    """
    check_name(model, name)
    config = read_peft_config(folder)
    tensors = _read_tensors(folder)
    _Loader(model, config, Path(folder) / WEIGHTS, name, tensors).load()
    train_only(model, name)
    return config


class _Loader:
    """One adapter, while it is put in place; what was used is taken out of ``tensors``."""

    def __init__(self, model: Model, config: PeftConfig, path: Path, name: str, tensors: dict[str, Tensor]) -> None:
        self.model, self.config, self.path, self.name, self.tensors = model, config, path, name, tensors

    def load(self) -> None:
        by_name = {site.theirs: site for site in sites(self.model)}
        modules = {found[1]: None for key in self.tensors if (found := _PART.fullmatch(key))}
        if not modules:
            raise DanluError(f"{self.path}: holds no LoRA tensors")
        plans = []
        for module in modules:
            if module not in by_name:
                raise self._other_base(module)
            if not self.config.names(module):
                raise DanluError(f"{self.path}: holds tensors for {module}, which target_modules does not name")
            plans.append((by_name[module], *self._low_rank(by_name[module])))
            self._check_base(by_name[module])
        head = self._head()
        tokens = self._tokens()
        if self.tensors:
            raise DanluError(
                f"{self.path}: holds {min(self.tensors)}, which is not supported or has no place in this model"
            )
        # Everything fits; only now is the model touched.
        for site, a, bs, magnitudes in plans:
            alpha = self.config.alpha_of(site.theirs)
            add(self.model, site, self.name, a, bs, alpha=alpha, shape=self.config.shape, magnitudes=magnitudes)
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for place, value in head.items():
                parameters[place].copy_(value)
        if tokens:
            assert isinstance(self.model, CausalLM)
            token_rows.enlarge(self.model, 1 + max(max(ids) for ids, _ in tokens.values()))
            token_rows.attach(self.model, name=self.name, embed=tokens.get("embed"), head=tokens.get("head"))

    def _other_base(self, module: str) -> DanluError:
        if "expert" in module or re.search(r"\.w[123]$", module):
            return DanluError(f"{self.path}: {module}: adapters of a mixture's experts are not supported")
        return DanluError(
            f"{self.path}: has an update of {module}, and this base model has no such linear layer; it was made for "
            f"{self.config.base or 'another model'}"
        )

    def _low_rank(self, site: Site) -> tuple[Tensor, list[Tensor], list[Tensor] | None]:
        rank = self.config.rank_of(site.theirs)
        a = self._take(f"{site.theirs}.lora_A.weight", (rank, site.in_features))
        n_out = sum(site.out_features)
        b = self._take(f"{site.theirs}.lora_B.weight", (n_out, rank))
        bs = [part.contiguous() for part in site.split(b)]
        if self.config.shape.kind != "dora":
            return a, bs, None
        magnitude = self._take(f"{site.theirs}.lora_magnitude_vector", (n_out,))
        return a, bs, [part.contiguous() for part in site.split(magnitude)]

    def _check_base(self, site: Site) -> None:
        """PEFT stores the head's own weight beside an update of it, in case that tokens were added to the base."""
        key = f"{site.theirs}{BASE}"
        stored = self.tensors.pop(key, None)
        if stored is None:
            return
        weight = self.model.get_submodule(site.ours[0]).weight
        assert isinstance(weight, Tensor)
        stored, weight = stored.to(weight.device), weight.detach()
        if stored.shape != weight.shape or not (
            torch.equal(stored.to(weight.dtype), weight) or torch.equal(weight.to(stored.dtype), stored)
        ):
            raise DanluError(
                f"{self.path}: {key} is not what this base model has there, so the adapter is for another "
                "one; merge it in PEFT (merge_and_unload) with the model that it was trained on"
            )

    def _take(self, key: str, shape: tuple[int, ...]) -> Tensor:
        if key not in self.tensors:
            raise DanluError(f"{self.path}: lacks {key}")
        tensor = self.tensors.pop(key)
        if tuple(tensor.shape) != shape:
            raise DanluError(
                f"{self.path}: {key} has shape {tuple(tensor.shape)}; with this base model and {CONFIG} it must be "
                f"{shape}; the adapter was made for {self.config.base or 'another model'}"
            )
        if not bool(tensor.isfinite().all()):
            raise DanluError(f"{self.path}: {key} holds numbers that are not finite; train the adapter again")
        return tensor.to(torch.float32, copy=True)

    def _head(self) -> dict[str, Tensor]:
        """The head that was trained whole, by our names."""
        parameters = whole_head(self.model)
        found: dict[str, Tensor] = {}
        for rule in _head_rules(self.model):
            if any(name in self.tensors for name in rule.theirs):
                shapes = [tuple(parameters[name].shape) for name in rule.ours]
                parts = rule.to_ours([self._take(theirs, s) for theirs, s in zip(rule.theirs, shapes, strict=True)])
                found.update(zip(rule.ours, parts, strict=True))
        return found

    def _tokens(self) -> dict[str, tuple[list[int], Tensor]]:
        """Tokens with rows of their own, in the embedding and in the head, by our name of the layer. A whole table that
        was trained is one with a row for each token."""
        found: dict[str, tuple[list[int], Tensor]] = {}
        if not isinstance(self.model, CausalLM):
            return found
        for place in ("embed", "head"):
            module = _their_name(self.model, place)
            ids = self._ids_of(module, place)
            rows = self.tensors.pop(f"{module}.token_adapter.trainable_tokens_delta", None)
            table = self.tensors.pop(f"{module}.weight", None)
            if (rows is None) != (not ids) or (rows is not None and (table is not None or len(rows) != len(ids))):
                raise DanluError(f"{self.path}: the rows of {module} are not those of trainable_token_indices")
            if table is not None:
                rows, ids = table, list(range(len(table)))
            if rows is None:
                continue
            if (
                rows.ndim != 2
                or rows.shape[1] != self.model.config.dim
                or (table is not None and len(rows) < self._vocab)
            ):
                raise DanluError(f"{self.path}: {module} has {tuple(rows.shape)}, which does not fit the base model")
            found[place] = ids, rows.to(torch.float32, copy=True)
        return found

    @property
    def _vocab(self) -> int:
        assert isinstance(self.model, CausalLM)
        return self.model.config.vocab_size

    def _ids_of(self, module: str, place: str) -> list[int]:
        given = self.config.token_ids
        if place == "embed" and "" in given:
            return list(given[""])
        return next((list(ids) for key, ids in given.items() if key and f".{module}".endswith(f".{key}")), [])
