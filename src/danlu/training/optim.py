"""Muon for the matrices of the blocks, AdamW for embeddings, head and norms.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the nearest
orthogonal
matrix: every direction is learned at the same speed, which at small scale reaches a loss in about half the steps AdamW
needs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from danlu.models.load import Model
from danlu.models.transformer import Transformer

# Polar Express (Amsel et al. 2025, arXiv:2505.16932): the best odd quintic for each step, for singular values in [1e-3,
# 1].
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
BETAS = (0.8, 0.95)
"""AdamW's, beside Muon."""
_SAFETY = 1.01  # keeps singular values inside the interval of convergence under rounding


def orthogonalize(g_bmn: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest orthogonal matrices (U V^T of the SVD), approximately: singular values end within about 0.7 to 1.2.

    Args:
        g_bmn: (batch, rows, cols), any scale.
        dtype: dtype of the products; bf16 suffices where the hardware has it.
    """
    x: Tensor = g_bmn.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the Gram matrix of the short side is the cheap one
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * _SAFETY + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        a, b, c = a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, Nesterov look-ahead, orthogonalisation, cautious weight decay.

    Matrices of one shape are stacked and treated as one batch. The step is scaled by sqrt(max(1, rows / cols)) so that
    one learning rate fits all shapes. Weight decay acts only where it agrees with the update (Chen et al. 2025,
    arXiv:2510.12402).

    Args:
        dtype: dtype of the orthogonalisation products.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients that are there."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                rows, cols = shape[-2:]
                grads = torch.stack([p.grad for p in params])  # type: ignore[misc]
                for p in params:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(momenta, list(grads.unbind()), 1 - group["momentum"])
                update = grads.lerp(torch.stack(momenta), group["momentum"])
                matrices = update.flatten(0, -3)  # a mixture's experts are one parameter and many matrices
                update = orthogonalize(matrices, self.dtype).to(params[0].dtype).view_as(update)
                scale = group["lr"] * max(1.0, rows / cols) ** 0.5
                for p, u in zip(params, update.unbind(), strict=True):
                    if group["weight_decay"]:
                        p.mul_(1 - group["lr"] * group["weight_decay"] * (u * p > 0))
                    p.add_(u, alpha=-scale)


def build_optimizers(
    model: Model,
    *,
    optimizer: str,
    matrix_lr: float,
    embed_lr: float,
    head_lr: float,
    norm_lr: float,
    weight_decay: float,
    muon_dtype: torch.dtype,
    betas: tuple[float, float] = BETAS,
) -> list[torch.optim.Optimizer]:
    """Optimizers over all weights of the model that are not frozen; each group carries its peak rate and decay as
    ``initial_lr``, ``initial_decay``. ``betas`` are AdamW's."""
    stacks = [module for module in model.modules() if isinstance(module, Transformer)]
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for stack in stacks for p in stack.layers.parameters() if p.ndim >= 2 and p.requires_grad]
    vectors = [p for p in trained if p.ndim == 1]
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    inner = {id(p) for p in matrices}
    embeddings = [p for p in trained if id(p) in tables]
    # What is left are the layers behind the stack; a tied head is an embedding.
    head = [p for p in trained if p.ndim >= 2 and id(p) not in tables | inner]
    adam_groups = [
        {"params": embeddings, "lr": embed_lr, "weight_decay": 0.0},
        {"params": vectors, "lr": norm_lr, "weight_decay": 0.0},
    ]
    if head:
        adam_groups.append({"params": head, "lr": head_lr, "weight_decay": 0.0})
    optimizers: list[torch.optim.Optimizer] = []
    if optimizer == "adamw":
        adam_groups.insert(0, {"params": matrices, "lr": matrix_lr, "weight_decay": weight_decay})
    else:
        optimizers.append(Muon(matrices, lr=matrix_lr, weight_decay=weight_decay, dtype=muon_dtype))
    optimizers.append(torch.optim.AdamW(adam_groups, betas=betas, eps=1e-10, fused=True))
    for built in optimizers:
        for group in built.param_groups:
            group["initial_lr"], group["initial_decay"] = group["lr"], group["weight_decay"]
    return optimizers
