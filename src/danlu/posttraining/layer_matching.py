"""Hidden states and attention maps of a student's layers beside those of its teacher's (TinyBERT, Jiao et al. 2019,
arXiv:1909.10351; DistilBERT, Sanh et al. 2019, arXiv:1910.01108). They are watched from outside, by hooks; the models
know nothing of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from danlu.errors import DanluError
from danlu.models.transformer import Transformer
from danlu.nn.attention import Attention
from danlu.nn.linear import Linear
from danlu.nn.rope import apply_rope
from danlu.objectives.distillation import attention_loss, hidden_loss
from danlu.posttraining.distil_config import DistilConfig


@dataclass
class Seen:
    """What was watched in one forward pass, by layer: the output of the block, (batch, seq, dim), and what its
    attention was called with."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    attended: dict[int, tuple[Attention, tuple[Any, ...]]] = field(default_factory=dict)

    def scores(self, layer: int) -> Tensor:
        """Attention scores before mask and softmax, (batch, heads, seq, seq) fp32."""
        attention, (x_btd, rotation, *_) = self.attended[layer]
        q, (k, _) = attention.queries(x_btd), attention.keys_values(x_btd)
        if rotation is not None:
            q, k = apply_rope(q, rotation, attention.interleaved), apply_rope(k, rotation, attention.interleaved)
        k = k.repeat_interleave(attention.n_heads // attention.n_kv_heads, dim=1)
        scores = attention.scale * (q @ k.transpose(-2, -1)).float()
        cap = attention.softcap
        return scores if cap is None else cap * torch.tanh(scores / cap)


@contextmanager
def watching(model: Transformer, layers: set[int], *, attention: bool) -> Iterator[Seen]:
    """What passes through these layers while the context is open."""
    seen = Seen()

    def see_hidden(layer: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            seen.hidden[layer] = output

        return hook

    def see_attention(layer: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            assert isinstance(module, Attention)
            seen.attended[layer] = (module, arguments)

        return hook

    with ExitStack() as hooks:
        for layer in layers:
            block = model.layers[layer]
            hooks.callback(block.register_forward_hook(see_hidden(layer)).remove)
            if attention:
                inner = block.attention
                assert isinstance(inner, Attention)
                hooks.callback(inner.register_forward_pre_hook(see_attention(layer)).remove)
        yield seen


def visible_pairs(segments_bt: Tensor, *, causal: bool) -> Tensor:
    """Which positions a position sees, (batch, seq, seq) bool: those of its own segment, and, where the model is
    causal, no later ones.

    Args:
        segments_bt: (batch, seq), below 0 for padding.
    """
    same = (segments_bt[:, :, None] == segments_bt[:, None, :]) & (segments_bt >= 0)[:, :, None]
    return same.tril() if causal else same


def spread_map(student_layers: int, teacher_layers: int) -> dict[int, int]:
    """Each layer of the student beside one of the teacher's, evenly spread, the last beside the last (TinyBERT's
    uniform strategy)."""
    return {i: max(0, round((i + 1) * teacher_layers / student_layers) - 1) for i in range(student_layers)}


class LayerMatching(nn.Module):
    """The loss between layers, and the projections that it needs where the student is of another width. They are
    trained with the student, and left behind when it is saved.

    Args:
        layer_map: layer of the student -> layer of the teacher; empty: :func:`spread_map`.
        hidden_weight, attention_weight: of the two parts; 0 leaves one out.

    Raises:
        DanluError: there is no such layer, or the heads are not as many.
    """

    def __init__(
        self,
        student: Transformer,
        teacher: Transformer,
        layer_map: Mapping[int, int],
        *,
        hidden_weight: float,
        hidden_kind: Literal["mse", "cosine"],
        attention_weight: float,
        seed: int,
    ) -> None:
        super().__init__()
        mine, theirs = student.config, teacher.config
        self.layer_map = dict(layer_map) or spread_map(mine.n_layers, theirs.n_layers)
        self.hidden_weight, self.hidden_kind, self.attention_weight = hidden_weight, hidden_kind, attention_weight
        for who, layers, n_layers in (
            ("student", self.layer_map.keys(), mine.n_layers), ("teacher", self.layer_map.values(), theirs.n_layers),
        ):  # fmt: skip
            if strange := [layer for layer in layers if not 0 <= layer < n_layers]:
                raise DanluError(f"layer_map: the {who} has no layer {strange[0]}; it has 0 to {n_layers - 1}")
        if attention_weight and mine.n_heads != theirs.n_heads:
            raise DanluError(
                f"attention_weight: the student has {mine.n_heads} heads and the teacher {theirs.n_heads}; attention "
                "maps are compared head by head: give n_heads, or compare hidden states alone"
            )
        self.projections = nn.ModuleDict()
        if hidden_weight and mine.dim != theirs.dim:
            generator = torch.Generator().manual_seed(seed)
            for layer in self.layer_map:
                projection = Linear(mine.dim, theirs.dim, bias=False)
                nn.init.normal_(projection.weight, std=mine.dim**-0.5, generator=generator)
                self.projections[str(layer)] = projection

    @contextmanager
    def watching(self, student: Transformer, teacher: Transformer) -> Iterator[tuple[Seen, Seen]]:
        """What passes through the compared layers of both while the context is open."""
        attention = self.attention_weight > 0
        with (
            watching(student, {*self.layer_map}, attention=attention) as mine,
            watching(teacher, {*self.layer_map.values()}, attention=attention) as theirs,
        ):
            yield mine, theirs

    def forward(self, mine: Seen, theirs: Seen, visible_bts: Tensor) -> Tensor:
        """The loss of each position, (batch, seq) fp32: a mean over layers, features, heads and what a position sees.

        Args:
            mine, theirs: what was seen of student and teacher in the same batch.
            visible_bts: which positions each position sees, (batch, seq, seq) bool.
        """
        total = torch.zeros(visible_bts.shape[:2], device=visible_bts.device)
        for layer, other in self.layer_map.items():
            if self.hidden_weight:
                hidden = mine.hidden[layer]
                if self.projections:
                    hidden = self.projections[str(layer)](hidden)
                total = total + self.hidden_weight * hidden_loss(hidden, theirs.hidden[other], self.hidden_kind)
            if self.attention_weight:
                with torch.no_grad():
                    wanted = theirs.scores(other)
                total = total + self.attention_weight * attention_loss(mine.scores(layer), wanted, visible_bts)
        return total / len(self.layer_map)


def layer_matching(config: DistilConfig, student: Transformer, teacher: Transformer) -> LayerMatching | None:
    """As a config has it; None where no layers are compared."""
    if not config.compares_layers:
        return None
    return LayerMatching(
        student, teacher, config.layer_map, hidden_weight=config.hidden_weight, hidden_kind=config.hidden_loss,
        attention_weight=config.attention_weight, seed=config.seed,
    )  # fmt: skip
