"""A table of vectors."""

from __future__ import annotations

from torch import nn


class Embedding(nn.Embedding):
    """As torch has it, but nothing is drawn on the meta device, where models are laid out before they are loaded: torch
    imports its compiler, 1.5 s, to find out that there is nothing to draw."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()
