"""An adapter that begins with what 4 bits have lost of the weights below it, as far as its rank reaches.

Of all updates of rank r, the truncated singular value decomposition of ``(W - Q) S`` leaves the least error of the
layer's outputs, where S holds the magnitudes of its inputs, taken for uncorrelated (QERA-approx, Zhang et al. 2024,
arXiv:2410.06040; LQER, Zhang et al. 2024, arXiv:2402.02446). Of SmolLM2-135M, whose loss NF4 raises by 12.6 %, it gives
half back at rank 16; without S it gives nothing back (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from danlu.adapters.lora import LoRALinear, LowRank
from danlu.adapters.sites import Site
from danlu.models.transformer import Transformer
from danlu.nn.linear import Linear
from danlu.quantization.four_bits import from_file_blocks, unpack
from danlu.quantization.packed_linear import packed_linear

ROWS, LENGTH = 8, 512
"""Of the random tokens that inputs are measured with. Which features are large hardly depends on the text: training
data gives 0.7 points more of the 12.6."""

EXTRA = 8
"""Singular vectors sought beyond the rank, which makes those of the rank exact enough."""

Start = tuple[Tensor, list[Tensor]]
"""A (rank, in) and B of each layer of a site (out, rank), whose products are the update."""


@torch.no_grad()
def lost_in_4_bits(model: Transformer, chosen: Sequence[Site], rank: int, *, seed: int = 0) -> dict[str, Start]:
    """What 4 bits would lose of the layers at these sites, as updates of a rank, by the sites' names.

    Sites whose weights go back into the blocks of the file that they come from have lost nothing, and are left out.

    Args:
        model: not quantized yet; its weights may be mapped.
        chosen: those of them that a head has are left out: they are not quantized.
        seed: of the random tokens.

    Raises:
        DanluError: weights that are not finite.
    """
    quantized = [site for site in chosen if not site.is_head and _loses(model, site)]
    if not quantized:
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = _input_sizes(model, quantized)
        found: dict[str, Start] = {}
        for site in quantized:
            size = sizes[site.theirs]
            lost = torch.cat([_error(name, model.get_submodule(name)) for name in site.ours]) * size
            u, s, v = torch.svd_lowrank(lost, q=min(rank + EXTRA, *lost.shape), niter=4)
            root = s[:rank].sqrt()
            bs = (u[:, :rank] * root).split_with_sizes(list(site.out_features))
            found[site.theirs] = ((v[:, :rank] * root).T / size, list(bs))
    return found


@torch.no_grad()
def begin_with(model: nn.Module, chosen: Sequence[Site], starts: dict[str, Start], *, name: str = "default") -> None:
    """Set an adapter that is attached already to these updates."""
    for site in chosen:
        if site.theirs not in starts:
            continue
        a, bs = starts[site.theirs]
        for place, b in zip(site.ours, bs, strict=True):
            wrapper = model.get_submodule(place)
            assert isinstance(wrapper, LoRALinear)
            adapter = wrapper.adapters[name]
            assert isinstance(adapter, LowRank)
            adapter.a.copy_(a)
            adapter.b.copy_(b / adapter.scale)
            if adapter.magnitude is not None:
                adapter.magnitude.copy_(wrapper.norms(adapter))


def _loses(model: Transformer, site: Site) -> bool:
    layers = [model.get_submodule(name) for name in site.ours]
    plain = [layer for layer in layers if type(layer) is Linear]
    return len(plain) == len(layers) and any(from_file_blocks(layer.weight) is None for layer in plain)


def _error(name: str, layer: nn.Module) -> Tensor:
    assert isinstance(layer, Linear)
    return layer.weight.float() - unpack(packed_linear(name, layer).packed)


def _input_sizes(model: Transformer, chosen: Sequence[Site]) -> dict[str, Tensor]:
    """Root of the mean square of each input of the sites' layers, (in,) fp32, none 0."""
    squares = {site.theirs: torch.zeros(site.in_features, device=model.device) for site in chosen}

    def add(theirs: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares[theirs] += inputs[0].float().flatten(0, -2).square().sum(dim=0)

    hooks = [model.get_submodule(site.ours[0]).register_forward_pre_hook(partial(add, site.theirs)) for site in chosen]
    training = model.training
    length = min(LENGTH, model.config.context)
    try:
        model.eval()
        for _ in range(ROWS):
            model.hidden_states(torch.randint(model.config.vocab_size, (1, length), device=model.device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    sizes = {theirs: square.sqrt() / (ROWS * length) ** 0.5 for theirs, square in squares.items()}
    return {theirs: size.clamp(min=1e-3 * float(size.mean()) + 1e-30) for theirs, size in sizes.items()}
