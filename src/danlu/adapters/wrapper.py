"""What an adapter puts in place of a layer: the frozen layer, and the adapters that it has by name.

One adapter at most is active. Which one is the same in the whole model: :func:`activate` and :func:`disabled` switch
all wrappers together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Wrapper(nn.Module, ABC):
    """A layer with adapters.

    Attributes:
        base: the layer, frozen.
        adapters: by name.
        active: the one that is computed with; None: the layer alone.
        merged: the active one is in the weights of the layer.
        is_tied: the layer is a head whose weight is that of the embedding.
        shares_weight: and so is its adapter, which is merged there.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.merged = False
        self.is_tied = self.shares_weight = False

    @property
    def weight(self) -> Tensor:
        """The layer's own weight: what asks a layer for its device or dtype asks this."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @abstractmethod
    def effective_weight(self) -> Tensor:
        """The weight with the active adapter in it, in the layer's dtype; a copy."""

    @abstractmethod
    def merge(self) -> None:
        """Put the active adapter into the layer's weight."""

    @abstractmethod
    def unmerge(self) -> None:
        """The reverse of :meth:`merge`."""


def wrappers(model: nn.Module) -> dict[str, Wrapper]:
    """The wrapped layers of a model, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Wrapper)}


def active_adapter(model: nn.Module) -> str | None:
    """The name of the adapter that a model computes with."""
    return next((wrapper.active for wrapper in wrappers(model).values() if wrapper.active is not None), None)


def activate(model: nn.Module, name: str | None) -> None:
    """Compute with the adapter of this name, or, with None, with the base model alone.

    Raises:
        ValueError: an adapter is merged, or there is none of this name.
    """
    found = wrappers(model).values()
    if any(wrapper.merged for wrapper in found):
        raise ValueError("an adapter is merged into the weights; unmerge it first")
    if name is not None and not any(name in wrapper.adapters for wrapper in found):
        raise ValueError(f"the model has no adapter {name!r}")
    for wrapper in found:
        wrapper.active = name if name is not None and name in wrapper.adapters else None


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model alone, for as long as the block runs: the reference of DPO, PPO and GRPO. A head that is trained
    whole has no base, and stays."""
    before = active_adapter(model)
    activate(model, None)
    try:
        yield
    finally:
        activate(model, before)


def plain_name(name: str) -> str:
    """The name that a parameter has in the model without wrappers."""
    return name.replace(".base.", ".")


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".adapters." in name


@torch.no_grad()
def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights under their plain names with the active adapter in them, for whatever computes without wrappers, such
    as the engine's kernels. What no adapter changes is not copied; quantized layers are dequantized. A head tied to the
    embedding is left out, unless it has an adapter of its own."""
    found = {plain_name(name): p.detach() for name, p in model.named_parameters() if not is_adapter(name)}
    for name, module in model.named_modules():
        if isinstance(module, Wrapper):
            if not module.shares_weight:
                found[f"{name}.weight"] = module.effective_weight()
        elif hasattr(module, "to_linear") and not name.endswith(".base"):
            found[f"{name}.weight"] = module.to_linear().weight
    return found


def unwrap(model: nn.Module) -> None:
    """Take all wrappers away; what is merged stays in the weights, what is not is gone."""
    for name, wrapper in wrappers(model).items():
        model.set_submodule(name, wrapper.base)
