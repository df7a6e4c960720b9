"""Options of whatever trains an adapter instead of all weights. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from danlu.config import option
from danlu.errors import DanluError

ALL_LINEAR = "all-linear"
DEFAULT_RANK = 16
SCALE = 2.0
"""Of the update, where no alpha is given: twice, as is usual (alpha = 2 x rank), whatever the rank."""

Kind = Literal["lora", "dora"]


AdapterStart = Literal["auto", "zero", "error"]
"""What the update of an adapter begins as, see :func:`danlu.adapters.training.begin_adapter`."""


@dataclass(frozen=True)
class AdapterShape:
    """What an adapter is made of.

    Attributes:
        kind: LoRA, ``W + s B A`` (Hu et al. 2021, arXiv:2106.09685), or DoRA, the same with its rows scaled to a
            learned length (Liu et al. 2024, arXiv:2402.09353).
        rank: rows of A and columns of B; None: chosen by ``budget``, else 16.
        alpha: ``s`` is alpha / rank, or alpha / sqrt(rank) with ``rslora``; None: what makes ``s`` 2.
        rslora: see above (Kalajdzievski 2023, arXiv:2312.03732).
        dropout: of the input of A, while training.
        targets: modules under their Hugging Face names: the last parts of a name (``q_proj``), a regular expression of
            whole names, or ``all-linear``, every linear layer but the head. Empty: chosen by ``budget``, else
            all-linear.
        budget: largest share of the model's weights that is trained, such as 0.001.
        token_ids: tokens whose rows in embedding and head are trained, too.
    """

    kind: Kind = "lora"
    rank: int | None = None
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    budget: float | None = None
    token_ids: tuple[int, ...] = ()

    def alpha_for(self, rank: int) -> float:
        """The alpha of a module of this rank."""
        if self.alpha is not None:
            return self.alpha
        return SCALE * (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """The same, as verbs take it."""

    adapter: Literal["none", "lora", "dora", "qlora"] = option(
        "none",
        "Train a small update of frozen weights instead of all weights; the output is a folder in PEFT's layout. "
        "qlora: lora with quantize=4bit.",
    )
    rank: int | None = option(None, "Rank of the adapter; default 16, or what the budget allows.", ge=1, le=4096)
    alpha: float | None = option(
        None,
        "The adapter's update counts alpha / rank (rslora: alpha / sqrt(rank)) times; default: what makes that 2.",
        gt=0,
        le=1e6,
    )
    rslora: bool = option(False, "Scale the adapter by the square root of its rank, which keeps large ranks stable.")
    dropout: float = option(0.0, "Dropout of the adapter's inputs.", ge=0, lt=1)
    targets: tuple[str, ...] = option(
        (),
        "Modules that get an adapter, by the end of their Hugging Face names (q_proj), a regular expression of whole "
        "names, or all-linear; default all-linear, or what the budget allows.",
    )
    budget: str | None = option(
        None,
        "Largest share of the weights that is trained, such as 0.1%: it chooses targets (as many as get rank 1: all "
        "linear layers, those of the attention, or queries and values) and the largest rank.",
    )
    new_tokens: tuple[str, ...] = option(
        (),
        "Tokens whose embeddings are trained with the adapter, and that are read as such in the rows; unknown ones are "
        "added to the tokenizer.",
    )
    quantize: Literal["none", "4bit"] = option(
        "none",
        "Keep the frozen weights in 4 bits while the adapter is trained (QLoRA), a quarter of their memory: those that "
        "were unpacked from a 4-bit file (Q4_0, Q4_1) in its own blocks, which loses nothing, others in NF4 with "
        "double quantization.",
    )

    def adapter_problems(self) -> list[str]:
        """What cannot be right between these options."""
        found = []
        if self.adapter == "none":
            for name in ("rank", "alpha", "rslora", "dropout", "targets", "budget", "new_tokens", "quantize"):
                if getattr(self, name) != AdapterOptions.__dataclass_fields__[name].default:
                    found.append(f"{name} is for adapters; add adapter=lora or adapter=dora")
            return found
        if self.budget is not None:
            try:
                parse_share(self.budget)
            except DanluError as error:
                found.append(f"budget: {error}")
            if self.rank is not None:
                found.append("rank and budget are both given; the budget chooses the rank")
        if ALL_LINEAR in self.targets and len(self.targets) > 1:
            found.append(f"targets: {ALL_LINEAR} stands alone")
        if any(not target for target in self.targets):
            found.append("targets: an empty name")
        if len(set(self.new_tokens)) < len(self.new_tokens) or not all(self.new_tokens):
            found.append("new_tokens: a token is empty or comes twice")
        return found

    @property
    def in_4_bits(self) -> bool:
        """Whether the frozen weights are kept in 4 bits."""
        return self.adapter == "qlora" or self.quantize == "4bit"

    def adapter_shape(self, token_ids: tuple[int, ...] = ()) -> AdapterShape:
        """The adapter asked for; ``token_ids`` are those of ``new_tokens``."""
        assert self.adapter != "none"
        return AdapterShape(
            "dora" if self.adapter == "dora" else "lora",
            self.rank, self.alpha, self.rslora, self.dropout, self.targets,
            None if self.budget is None else parse_share(self.budget), token_ids,
        )  # fmt: skip


def parse_share(text: str) -> float:
    """``"0.1%"`` or ``"0.001"`` as a number.

    Raises:
        DanluError: it is no share between 0 and 1.
    """
    number = text.strip()
    try:
        share = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise DanluError(f"{text!r} is no share of the weights; write 0.1% or 0.001")
    return share
