"""A frozen linear layer in 4 bits, and putting it in place of a model's own: the base that QLoRA's adapters sit on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from danlu.errors import DanluError
from danlu.formats.gguf_blocks import PackedTensor
from danlu.formats.mapped import forget
from danlu.models.load import Model
from danlu.nn.linear import Linear, product
from danlu.nn.moe import MoE
from danlu.quantization.four_bits import FourBits, pack, unpack


class PackedLinear(nn.Module):
    """``y = x W^T + b`` in the dtype of ``x``, with W in 4 bits and frozen: it is unpacked for each product, and again
    for the gradient of ``x``.

    State: the tensors of ``packed`` by their names; ``bias`` as in the layer that it replaces. A cast of the module to
    another dtype leaves all but the bias as it is.
    """

    def __init__(self, packed: FourBits, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self._type: Callable[..., FourBits] = type(packed)
        self._constants: dict[str, Any] = {}
        for field in dataclasses.fields(packed):
            value = getattr(packed, field.name)
            if value is None or isinstance(value, Tensor):
                self.register_buffer(field.name, value)
            else:
                self._constants[field.name] = value
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, block: int = 64, double: bool = True) -> Self:
        """Pack a layer, whose weight is left as it is.

        Raises:
            DanluError: as :func:`pack`.
        """
        return cls(pack(linear.weight, block=block, double=double), linear.bias)

    @property
    def packed(self) -> FourBits:
        """The weight as it is stored, (out_features, in_features)."""
        return self._type(**self._constants, **self._buffers)

    @property
    def kind(self) -> str:
        """NF4, or the type of the file that the weight comes from."""
        packed = self.packed
        return packed.kind if isinstance(packed, PackedTensor) else "NF4"

    def to_linear(self, dtype: torch.dtype = torch.float32) -> Linear:
        """The layer with the unpacked weight, in ``dtype`` and frozen: what adapters are merged into."""
        with torch.device("meta"):
            linear = Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(unpack(self.packed, dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _Product.apply(x, bias, self.packed)  # type: ignore[no-any-return,no-untyped-call]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.kind}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Behind ``.to()``, ``.half()`` and their like. Scales rounded to a half would move every weight."""
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            applied = self._buffers[name]
            if applied is not None and applied.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(applied.device)
        return self


class _Product(torch.autograd.Function):
    """Written out because autograd would keep the unpacked weight for the gradient of ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: FourBits) -> Tensor:
        ctx.packed = packed
        return product(x, unpack(packed, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x = product(grad_y, unpack(ctx.packed, grad_y.dtype).T) if ctx.needs_input_grad[0] else None
        grad_bias = grad_y.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None


def quantize_linears(
    model: nn.Module, *, keep: Sequence[str] = ("head",), block: int = 64, double: bool = True
) -> None:
    """Put the linear layers of a model into 4 bits, in place and one after the other: as soon as a layer is packed
    nothing here holds its wide weight any more, and if that is mapped from a file, its pages are given back.

    Embeddings, norms and heads stay as they are, and so does what belongs to a head (``model.head_parameters()``). What
    is left of the model is not frozen by this.

    Args:
        model: any module with :class:`danlu.nn.linear.Linear` layers.
        keep: layers that stay, by name or part of one: ``o_proj``, ``layers.0``, ``layers.3.mlp``.
        block, double: as in :func:`pack`.

    Raises:
        DanluError: nothing to quantize, a name in ``keep`` that the model does not have, a mixture of experts, or
            weights that are not finite (layers before that one are packed by then).
    """
    for pattern in keep:
        if pattern != "head" and not any(_is_part(pattern, name) for name, _ in model.named_modules()):
            raise DanluError(f"keep: no layer is called {pattern}")
    of_head = {id(p) for p in model.head_parameters()} if isinstance(model, Model) else set()
    # Names alone: a list of the modules would hold all their weights until the end.
    names = []
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            raise DanluError(f"{name}: the experts of a mixture cannot be in 4 bits; train on the model as it is")
        kept = any(_is_part(pattern, name) for pattern in keep)
        if type(module) is Linear and not kept and id(module.weight) not in of_head:
            names.append(name)
    if not names:
        raise DanluError("the model has no linear layer to put into 4 bits")
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear)
        model.set_submodule(name, packed_linear(name, linear, block=block, double=double))
        forget(linear.weight)
        del linear


def packed_linear(name: str, linear: Linear, *, block: int = 64, double: bool = True) -> PackedLinear:
    """A layer of this name in 4 bits.

    Raises:
        DanluError: weights that are not finite, with the name.
    """
    try:
        return PackedLinear.from_linear(linear, block=block, double=double)
    except DanluError as error:
        raise DanluError(f"{name}.weight: {error}") from None


def dequantize_linears(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Put plain linear layers in place of those in 4 bits, one after the other: the model that was computed with all
    along, as it can be saved. Frozen."""
    for name in [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]:
        packed = model.get_submodule(name)
        assert isinstance(packed, PackedLinear)
        model.set_submodule(name, packed.to_linear(dtype))


def _is_part(pattern: str, name: str) -> bool:
    """Whether the dotted name has these components somewhere, one after the other."""
    return f".{pattern}." in f".{name}."
