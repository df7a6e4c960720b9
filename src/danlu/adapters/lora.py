"""LoRA and DoRA around linear layers that stay as they are: attach, compute, merge.

    y = W x + s B A x                      LoRA (Hu et al. 2021, arXiv:2106.09685)
    y = m (W + s B A) x / ||W + s B A||    DoRA (Liu et al. 2024, arXiv:2402.09353); the norm is that of each row

Any module with ``in_features``, ``out_features`` and ``forward(x)`` can be the base; one without a ``weight`` of floats
(4 bits, say) has ``to_linear()``.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.adapters import token_rows
from danlu.adapters.config import AdapterShape
from danlu.adapters.sites import Site, choose, linear_modules, whole_head
from danlu.adapters.wrapper import Wrapper, activate, wrappers
from danlu.errors import DanluError
from danlu.models.load import Model
from danlu.models.transformer import Transformer
from danlu.nn.linear import Head, product
from danlu.nn.moe import MoE


class LowRank(nn.Module):
    """The trained part: ``a`` (rank, in), ``b`` (out, rank) and, of DoRA, ``magnitude`` (out,), all fp32.

    Args:
        a: may be shared with other layers.
        alpha: see :class:`~danlu.adapters.config.AdapterShape`, as the rest.
    """

    def __init__(
        self, a: nn.Parameter, b: Tensor, alpha: float, *, rslora: bool, dropout: float, magnitude: Tensor | None
    ) -> None:
        super().__init__()
        self.a, self.b = a, nn.Parameter(b)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.alpha, self.rslora, self.dropout = alpha, rslora, dropout
        self.scale = alpha / (math.sqrt(self.rank) if rslora else self.rank)

    @property
    def rank(self) -> int:
        return len(self.a)

    def forward(self, x: Tensor) -> Tensor:
        """``s B A x`` in the dtype of ``x``."""
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        return product(product(x, self.a), self.b) * self.scale

    def delta(self) -> Tensor:
        """``s B A``, (out, in) fp32."""
        return self.scale * (self.b.detach().float() @ self.a.detach().float())


class LoRALinear(Wrapper):
    """A linear layer with low-rank updates.

    Adapters compute in the dtype of the input, as :class:`~danlu.nn.linear.Linear` does, and keep their own; their
    gradient comes back in it.
    """

    base_sq: Tensor | None

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.in_features, self.out_features = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
        self.register_buffer("base_sq", None, persistent=False)  # ||W||^2 of each row, for DoRA
        # While merged: by how much DoRA stretched the rows, and the quantized layer that a plain one stands for.
        self.stretch: Tensor | None = None
        self.packed: list[nn.Module] = []

    @property
    def bias(self) -> Tensor | None:
        """The layer's own bias."""
        bias = getattr(self.base, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def add(self, name: str, adapter: LowRank) -> None:
        """Give the layer an adapter."""
        if adapter.magnitude is not None and self.base_sq is None:
            self.base_sq = stored_weight(self.base).square().sum(dim=1)
        self.adapters[name] = adapter.to(next(t.device for t in (*self.base.parameters(), *self.base.buffers())))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        adapter = self._adapter()
        if adapter is None or self.merged:
            return y
        update: Tensor = adapter(x).to(y.dtype)
        if adapter.magnitude is None:
            return y + update
        scale: Tensor = (adapter.magnitude / self.norms(adapter)).to(y.dtype)
        if self.bias is None:
            return (y + update) * scale
        bias = self.bias.to(y.dtype)
        return (y - bias + update) * scale + bias

    @torch.no_grad()
    def norms(self, adapter: LowRank) -> Tensor:
        """||W + s B A|| of each row. Taken for a constant in the backward pass, as section 4.3 of the paper proposes.

        Written out, so that no second matrix of the size of W is made:
        ``||w||^2 + 2 s (A w) . b + s^2 b (A A^T) b`` for a row w of W and b of B.
        """
        assert self.base_sq is not None
        a, b = adapter.a.float(), adapter.b.float()
        projected: Tensor = self.base(a)
        if self.bias is not None:
            projected = projected - self.bias.to(a.dtype)
        cross = (projected.T * b).sum(dim=1)
        own = ((b @ (a @ a.T)) * b).sum(dim=1)
        return (self.base_sq + 2 * adapter.scale * cross + adapter.scale**2 * own).clamp(min=0).sqrt()

    # ---- merging

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        weight, adapter = stored_weight(self.base), self._adapter()
        if adapter is not None and not self.merged:
            weight = weight + adapter.delta()
            if adapter.magnitude is not None:
                weight *= (adapter.magnitude / weight.norm(dim=1))[:, None]
        return weight.to(_float_dtype(self.base), copy=True)

    @torch.no_grad()
    def merge(self) -> None:
        adapter = self._adapter()
        if adapter is None or self.merged:
            return
        merged = nn.Parameter(self.effective_weight(), requires_grad=False)
        if adapter.magnitude is not None:
            self.stretch = adapter.magnitude / (stored_weight(self.base) + adapter.delta()).norm(dim=1)
        if not _is_plain(self.base):
            self.packed = [self.base]
            self.base = self.base.to_linear()  # type: ignore[operator]
        self.base.weight = merged  # a new one: the old may be that of a tied embedding, too
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Exact up to the rounding of the weight's dtype; a quantized layer comes back as it was."""
        adapter = self._adapter()
        if adapter is None or not self.merged:
            return
        self.merged = False
        if self.packed:
            self.base = self.packed.pop()
            return
        weight = stored_weight(self.base)
        if adapter.magnitude is not None:
            assert self.stretch is not None
            weight = weight / self.stretch[:, None]
        self.base.weight = nn.Parameter((weight - adapter.delta()).to(self.weight.dtype), requires_grad=False)

    def _adapter(self) -> LowRank | None:
        if self.active is None:
            return None
        adapter = self.adapters[self.active]
        assert isinstance(adapter, LowRank)
        return adapter


def stored_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer, (out, in) fp32; of a quantized one, what it computes with."""
    weight = layer.weight if _is_plain(layer) else layer.to_linear().weight  # type: ignore[operator]
    assert isinstance(weight, Tensor)
    return weight.detach().float()


def _is_plain(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "weight", None), nn.Parameter)


def _float_dtype(layer: nn.Module) -> torch.dtype:
    weight = getattr(layer, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) else torch.float32


# ---- on a whole model


def attach(model: Model, shape: AdapterShape, *, name: str = "default", seed: int = 0) -> AdapterShape:
    """Give a model a fresh adapter and make it the active one; nothing else stays trainable, but for a head that a
    language model does not have (of a classifier or reward model), which is trained whole.

    A is uniform within 1/sqrt(in), as PEFT draws it, B is zero: the model computes what it did.

    Returns:
        The shape, with rank, alpha and targets as they were chosen.

    Raises:
        DanluError: no such target, too small a budget, or something that cannot have an adapter.
    """
    check_name(model, name)
    shape, chosen = choose(model, shape)
    rank = shape.rank
    assert rank is not None
    alpha = shape.alpha_for(rank)
    generator = torch.Generator().manual_seed(seed)
    for site in chosen:
        bound = site.in_features**-0.5
        a = torch.empty(rank, site.in_features).uniform_(-bound, bound, generator=generator)
        bs = [torch.zeros(n, rank) for n in site.out_features]
        add(model, site, name, a, bs, alpha=alpha, shape=shape)
    if shape.token_ids:
        token_rows.begin(model, shape.token_ids, name=name)
    train_only(model, name)
    return dataclasses.replace(shape, alpha=alpha)


def check_name(model: Model, name: str) -> None:
    """Whether a model can have another adapter of this name.

    Raises:
        ValueError: it has one, or this is no name.
    """
    if not name.isidentifier():
        raise ValueError(f"{name!r} cannot name an adapter")
    if any(name in wrapper.adapters for wrapper in wrappers(model).values()):
        raise ValueError(f"the model already has an adapter {name!r}")


def add(
    model: Model,
    site: Site,
    name: str,
    a: Tensor,
    bs: list[Tensor],
    *,
    alpha: float,
    shape: AdapterShape,
    magnitudes: list[Tensor] | None = None,
) -> None:
    """Wrap the layers of one site. They share ``a``; DoRA begins with the ``magnitudes`` given, or with the lengths
    that the rows have.

    Raises:
        DanluError: the site is a head that does more than multiply, or its model has two stacks.
    """
    if site.is_head:
        _check_head(model, site)
    shared = nn.Parameter(a)
    for i, (place, b) in enumerate(zip(site.ours, bs, strict=True)):
        wrapper = model.get_submodule(place)
        if not isinstance(wrapper, LoRALinear):
            wrapper = LoRALinear(wrapper)
            wrapper.is_tied = place == "head" and _is_tied(model)
            model.set_submodule(place, wrapper)
        magnitude = None
        if shape.kind == "dora":
            magnitude = stored_weight(wrapper.base).norm(dim=1) if magnitudes is None else magnitudes[i]
        low_rank = LowRank(
            shared, b, alpha, rslora=shape.rslora, dropout=shape.dropout, magnitude=magnitude
        )  # fmt: skip
        wrapper.add(name, low_rank.train(model.training))


def _check_head(model: Model, site: Site) -> None:
    head = model.get_submodule(site.ours[0])
    layer = head.base if isinstance(head, LoRALinear) else head
    if not isinstance(model, Transformer):
        raise DanluError(f"{site.theirs}: the head of a model of two stacks cannot have an adapter")
    if isinstance(layer, Head) and (layer.scale is not None or layer.softcap is not None):
        raise DanluError(f"{site.theirs}: a head that scales or caps its logits cannot have an adapter")


def _is_tied(model: Model) -> bool:
    return isinstance(model, Transformer) and model.config.tie_embeddings


def train_only(model: Model, name: str) -> None:
    """Make one adapter the active one, and nothing else trainable, but for a head that is trained whole."""
    model.requires_grad_(False)
    for wrapper in wrappers(model).values():
        if name in wrapper.adapters:
            wrapper.adapters[name].requires_grad_(True)
    for p in whole_head(model).values():
        p.requires_grad_(True)
    activate(model, name)


def adapted(model: nn.Module) -> list[LoRALinear]:
    """The layers that have an adapter of any name."""
    return [wrapper for wrapper in wrappers(model).values() if isinstance(wrapper, LoRALinear)]


def merge(model: Model) -> None:
    """Put the active adapter into the weights, which then compute the same alone. A head with an adapter of its own is
    no longer tied to the embedding (`config.json` says so, too)."""
    for wrapper in wrappers(model).values():
        wrapper.merge()
    _set_tied(model, before=True)


def unmerge(model: Model) -> None:
    """The reverse of :func:`merge`."""
    for wrapper in wrappers(model).values():
        wrapper.unmerge()
        wrapper.merged = False
    _set_tied(model, before=False)


def _set_tied(model: Model, *, before: bool) -> None:
    """Where an adapter of a tied head was merged (``before``: it still counts as tied), or taken out again."""
    head = getattr(model, "head", None)
    if not isinstance(model, Transformer) or not isinstance(head, Wrapper) or not head.is_tied or head.shares_weight:
        return
    model.config = dataclasses.replace(model.config, tie_embeddings=not before)
    if model.hf_config:
        model.hf_config = {**model.hf_config, "tie_word_embeddings": not before}
    if not before:
        head.base.weight = model.embed.weight


def training_flops(model: Model, seq_len: int) -> int:
    """FLOPs of training on one token, as ``model.estimate_flops`` counts them, but 4 and not 6 for a frozen weight,
    which gets no gradient, and with the weights that are quantized."""
    flops = model.estimate_flops(seq_len)
    for layer in linear_modules(model).values():
        if isinstance(layer, LoRALinear):
            layer = layer.base
        n = int(layer.in_features) * int(layer.out_features)  # type: ignore[arg-type]
        if not _is_plain(layer):
            flops += 4 * n
        elif not layer.weight.requires_grad:
            flops -= 2 * n
    for module in model.modules():
        if isinstance(module, MoE) and not module.down_proj.requires_grad:
            flops -= (
                2 * (module.gate_up_proj.numel() + module.down_proj.numel()) * module.top_k // len(module.down_proj)
            )
    return flops
