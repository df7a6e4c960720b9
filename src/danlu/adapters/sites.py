"""Where adapters can sit: the linear layers of a model under their Hugging Face names, and how targets and a budget
choose among them.

A family may store several of our layers as one of theirs (Phi-3's ``qkv_proj``). PEFT then has one A for them all and a
B with their rows stacked. So do we: such layers share an A and have a B each, which is the same function and the same
number of weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from danlu.adapters.config import ALL_LINEAR, DEFAULT_RANK, AdapterShape
from danlu.errors import DanluError
from danlu.models.family import Family, family_of
from danlu.models.load import Model
from danlu.models.names import Rule, rules
from danlu.nn.config import EncoderDecoderConfig
from danlu.nn.linear import Head
from danlu.nn.moe import MoE

OWN_HEAD = ("sequence_classification", "token_classification", "question_answering")
"""Tasks whose heads are trained whole beside an adapter: they are small, and mostly fresh."""


@dataclass(frozen=True)
class Site:
    """A linear layer as Hugging Face names it.

    Attributes:
        theirs: its name there, such as ``model.layers.0.self_attn.q_proj``.
        ours: the names here of the layers it consists of, in the order of its rows.
        is_head: it belongs to the head; ``all-linear`` leaves it out.
    """

    theirs: str
    ours: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    is_head: bool
    rule: Rule

    def split(self, rows: Tensor) -> list[Tensor]:
        """What belongs to the rows of their weight, (all outputs, ...), cut into ours."""
        if rows.ndim == 1:
            return [part.flatten() for part in self.split(rows[:, None])]
        return self.rule.to_ours([rows.T if self.rule.transposed else rows])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The reverse of :meth:`split`."""
        if parts[0].ndim == 1:
            return self.join([part[:, None] for part in parts]).flatten()
        joined = self.rule.to_theirs(list(parts))[0]
        return joined.T if self.rule.transposed else joined


def family_of_model(model: Model) -> Family:
    """The family in whose layout a model is written."""
    return family_of(model.hf_config.get("model_type", "qwen3"))


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that multiplies by a matrix, by its name; what an adapter wraps is left out, the wrapper is not."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inner = name.endswith(".base") and name.removesuffix(".base") in found
        if not inner and isinstance(getattr(module, "in_features", None), int):
            found[name] = module
    return found


def sites(model: Model) -> list[Site]:
    """The linear layers that can have an adapter, as the family's table orders them.

    A mixture's experts and routers are none, and neither is the last layer of a head that is trained whole.
    """
    family = family_of_model(model)
    mixtures = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, MoE))
    modules = {
        name: module
        for name, module in linear_modules(model).items()
        if not name.startswith(mixtures or ("\0",)) and not (name == "head" and model.task in OWN_HEAD)
    }
    shapes = {f"{name}.weight": (module.out_features, module.in_features) for name, module in modules.items()}
    config = model.config.decoder if isinstance(model.config, EncoderDecoderConfig) else model.config
    prefix = family.prefix if model.task != "embedding" else ""
    lines = (
        *rules(family.names, config, shapes, prefix),  # type: ignore[arg-type]  # (the layers' own ints)
        *rules(family.heads.get(model.task, {}), config, shapes),  # type: ignore[arg-type]
    )
    of_head = {id(p) for p in model.head_parameters()}
    return [_site(rule, modules, of_head) for rule in lines]


def _site(rule: Rule, modules: dict[str, nn.Module], of_head: set[int]) -> Site:
    ours = tuple(name.removesuffix(".weight") for name in rule.ours)
    layers = [modules[name] for name in ours]
    is_head = ours == ("head",) or any(id(p) in of_head for p in layers[0].parameters())
    theirs = rule.theirs[0].removesuffix(".weight")
    outputs = tuple(int(layer.out_features) for layer in layers)  # type: ignore[arg-type]
    return Site(theirs, ours, int(layers[0].in_features), outputs, is_head, rule)  # type: ignore[arg-type]


def whole_head(model: Model) -> dict[str, nn.Parameter]:
    """The weights of a head that is trained whole beside an adapter; a layer of it that has an adapter is not."""
    if model.task not in OWN_HEAD:
        return {}
    of_head = {id(p) for p in model.head_parameters()}
    wrapped = (".base.", ".adapters.")
    return {
        name: p
        for name, p in model.named_parameters()
        if id(p) in of_head and not any(part in name for part in wrapped)
    }


def choose(model: Model, shape: AdapterShape) -> tuple[AdapterShape, list[Site]]:
    """The sites that a shape names, and the shape with its rank and targets.

    With a budget, the rank is the largest that it allows. Without targets it also chooses them: of all linear layers,
    those of the attention, and queries and values, the first that get a rank of at least 1, because at the same number
    of weights more matrices learn more than larger ranks (Hu et al. 2021, table 5).

    Raises:
        DanluError: a target that no layer has, or a budget that is too small.
    """
    every = [site for site in sites(model) if not (site.is_head and model.task in OWN_HEAD)]
    if shape.budget is None:
        shape = replace(shape, rank=shape.rank or DEFAULT_RANK, targets=shape.targets or (ALL_LINEAR,))
        chosen = matching(model, every, shape.targets)
    else:
        shape, chosen = _within_budget(model, every, shape)
    largest = min(min(site.in_features, sum(site.out_features)) for site in chosen)
    assert shape.rank is not None
    if shape.rank > largest:
        raise DanluError(f"rank {shape.rank} is more than the smallest chosen matrix has ({largest}); lower it")
    return shape, chosen


def matching(model: Model, every: Sequence[Site], targets: Sequence[str]) -> list[Site]:
    """The sites that targets name, in the order of the model.

    Raises:
        DanluError: a target matches nothing; the message lists what there is.
    """
    chosen: dict[str, Site] = {}
    for target in targets:
        matches = _matcher(target)
        found = [site for site in every if matches(site)]
        if not found:
            known = ", ".join(sorted({site.theirs.rpartition(".")[2] for site in every}))
            experts = "; a mixture's experts cannot have adapters" if _has_experts(model) else ""
            raise DanluError(f"targets: no linear layer is called {target!r}; there are {known}{experts}")
        chosen.update((site.theirs, site) for site in found)
    return [site for site in every if site.theirs in chosen]


def _matcher(target: str) -> Callable[[Site], bool]:
    if target == ALL_LINEAR:
        return lambda site: not site.is_head
    if re.fullmatch(r"[\w.]+", target):
        return lambda site: site.theirs == target or site.theirs.endswith(f".{target}")
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise DanluError(f"targets: {target!r} is neither a name nor a regular expression ({error})") from error
    return lambda site: pattern.fullmatch(site.theirs) is not None


def _has_experts(model: Model) -> bool:
    return any(isinstance(module, MoE) for module in model.modules())


def _within_budget(model: Model, every: Sequence[Site], shape: AdapterShape) -> tuple[AdapterShape, list[Site]]:
    assert shape.budget is not None
    total = n_weights(model)
    allowed = int(shape.budget * total)
    if shape.targets:
        candidates = [(shape.targets, matching(model, every, shape.targets))]
    else:
        candidates = [(_names(found, every), found) for found in _narrower_and_narrower(every) if found]
    fixed = len(shape.token_ids) * _token_width(model)
    for targets, found in candidates:
        each = sum(site.in_features + sum(site.out_features) for site in found)
        lengths = sum(sum(site.out_features) for site in found) if shape.kind == "dora" else 0
        rank = (allowed - fixed - lengths) // each
        if rank >= 1:
            most = min(min(site.in_features, sum(site.out_features)) for site in found)
            return replace(shape, rank=min(rank, most), targets=targets), found
    least = each + lengths + fixed
    raise DanluError(
        f"budget: {shape.budget:.3g} of {total:,} weights is {allowed:,}; an adapter of rank 1 on "
        f"{', '.join(targets)} has {least:,} ({least / total:.2%})"
    )


def _narrower_and_narrower(every: Sequence[Site]) -> Iterator[list[Site]]:
    yield [site for site in every if not site.is_head]
    attention = [site for site in every if any("attention." in name for name in site.ours)]
    yield attention
    yield [site for site in attention if any(name.endswith(("q_proj", "v_proj")) for name in site.ours)]


def _names(found: Sequence[Site], every: Sequence[Site]) -> tuple[str, ...]:
    """Targets that match these sites and no others."""
    if list(found) == [site for site in every if not site.is_head]:
        return (ALL_LINEAR,)
    return shortest_names(found, every)


def shortest_names(found: Sequence[Site], every: Sequence[Site]) -> tuple[str, ...]:
    """The last parts of the sites' names where these match no other site, else whole names."""
    endings = sorted({site.theirs.rpartition(".")[2] for site in found})
    if len([site for site in every if site.theirs.rpartition(".")[2] in endings]) == len(found):
        return tuple(endings)
    return tuple(site.theirs for site in found)


def n_weights(model: nn.Module) -> int:
    """Weights of a model, quantized ones too; those of adapters are left out."""
    n = sum(p.numel() for name, p in model.named_parameters() if ".adapters." not in name)
    for layer in model.modules():
        is_leaf = next(layer.children(), None) is None
        if is_leaf and isinstance(getattr(layer, "in_features", None), int) and not _has_weight(layer):
            n += int(layer.in_features) * int(layer.out_features)  # type: ignore[arg-type]
    return n


def _has_weight(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "weight", None), nn.Parameter)


def _token_width(model: Model) -> int:
    """Trained numbers of one token: a row of the embedding, and one of a head of its own."""
    head = getattr(model, "head", None)
    assert not isinstance(model.config, EncoderDecoderConfig)
    return model.config.dim * (1 if model.config.tie_embeddings or not isinstance(head, Head) else 2)
