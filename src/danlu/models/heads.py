"""What a stack is used for besides writing text: filling gaps, classifying sequences or tokens, finding answers, giving
a reward. Every head stands on an encoder as well as on a decoder; which tensors it is stored in, the family declares.

A fresh head on any model, to fine-tune::

    model = load_model(path, SequenceClassifier, new_head=True, labels=("spam", "ham"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danlu.errors import DanluError
from danlu.models.family import ClassifierShape
from danlu.models.transformer import Transformer
from danlu.nn.config import ModelConfig
from danlu.nn.linear import Head, Linear
from danlu.nn.mlp import ACTIVATIONS
from danlu.nn.norm import make_norm
from danlu.nn.pooling import pool

if TYPE_CHECKING:
    from danlu.models.family import Family, Task

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]
POOLERS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": F.relu}


class MaskedLM(Transformer):
    """Which token stands at each position, the masked ones above all (BERT, arXiv:1810.04805)."""

    task: ClassVar[Task] = "masked_lm"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.activation = ACTIVATIONS[config.transform_activation or config.activation]
        self.transform = Linear(config.dim, config.dim)
        self.transform_norm = make_norm(config)
        self.head = Head(config.dim, config.vocab_size, bias=True)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def head_parameters(self) -> list[nn.Parameter]:
        own = [*self.transform.parameters(), *self.transform_norm.parameters(), *self.head.parameters()]
        return [p for p in own if p is not self.embed.weight]

    def forward(self, ids_bt: Tensor, real_bt: Tensor | None = None, types_bt: Tensor | None = None) -> Tensor:
        """Logits of the token at each position, (batch, seq, vocab), fp32. Arguments as in
        :meth:`Transformer.hidden_states`."""
        x = self.hidden_states(ids_bt, real_bt=real_bt, types_bt=types_bt)
        return self.head(self.transform_norm(self.activation(self.transform(x))))  # type: ignore[no-any-return]

    def estimate_flops(self, seq_len: int) -> int:
        return super().estimate_flops(seq_len) + 6 * self.config.dim * (self.config.vocab_size + self.config.dim)


class SequenceClassifier(Transformer):
    """Labels or numbers for a whole sequence.

    Args:
        shape: how the family does it.
        labels: what each logit stands for.
        problem_type: what the logits mean; None: one is a number (regression), of several one holds.
    """

    task: ClassVar[Task] = "sequence_classification"

    def __init__(
        self,
        config: ModelConfig,
        shape: ClassifierShape,
        labels: Sequence[str],
        problem_type: ProblemType | None = None,
    ) -> None:
        super().__init__(config)
        self.shape, self.labels, self.problem_type = shape, tuple(labels), problem_type
        if shape.pooler is not None:
            self.pooler = Linear(config.dim, config.dim)
        self.head = Head(config.dim, len(self.labels), bias=shape.bias)

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        family: Family,
        content: Mapping[str, Any],
        labels: Sequence[str] | None = None,
        problem_type: ProblemType | None = None,
    ) -> Self:
        """With the labels and the problem type of `config.json`, unless others are given."""
        chosen = read_labels(content) if labels is None else check_labels(labels)
        return cls(config, family.classifier, chosen, read_problem_type(content, problem_type))

    def hf_fields(self, family: Family) -> dict[str, Any]:
        return {**super().hf_fields(family), **label_fields(self.labels), "problem_type": self.problem_type}

    def head_parameters(self) -> list[nn.Parameter]:
        pooler = () if self.shape.pooler is None else self.pooler.parameters()
        return [*pooler, *self.head.parameters()]

    def forward(self, ids_bt: Tensor, real_bt: Tensor | None = None, types_bt: Tensor | None = None) -> Tensor:
        """Logits, (batch, labels), fp32. They are taken from the first or last *real* token, as the family does it.

        Args:
            real_bt: False for padding, on either side; without it every token counts, padding too.
            types_bt: 0 for the first text of a pair, 1 for the second.
        """
        x = self.hidden_states(ids_bt, real_bt=real_bt, types_bt=types_bt)
        x = pool(x, real_bt, self.shape.pool)
        if self.shape.pooler is not None:
            x = POOLERS[self.shape.pooler](self.pooler(x))
        return self.head(x)  # type: ignore[no-any-return]

    def probabilities(self, logits_bl: Tensor) -> Tensor:
        """Of each label, by itself where several can hold at once; a regression's numbers stay as they are."""
        if self.problem_type == "multi_label_classification":
            return logits_bl.sigmoid()
        is_number = self.problem_type == "regression" or (self.problem_type is None and len(self.labels) == 1)
        return logits_bl if is_number else logits_bl.softmax(dim=-1)


class RewardModel(SequenceClassifier):
    """How good a text is, as one number (Ouyang et al. 2022, arXiv:2203.02155): a classifier with a single label."""

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        family: Family,
        content: Mapping[str, Any],
        labels: Sequence[str] | None = None,
        problem_type: ProblemType | None = None,
    ) -> Self:
        """Of a model without labels, or with one.

        Raises:
            DanluError: it has several, so it is no reward model.
        """
        if labels is None:
            labels = read_labels(content, default=1)
        if len(labels) != 1:
            raise DanluError(f"a reward model gives one number; this is a classifier with {len(labels)} labels")
        return super().build(config, family, content, labels, problem_type)

    def score(self, ids_bt: Tensor, real_bt: Tensor | None = None, types_bt: Tensor | None = None) -> Tensor:
        """Reward of each row, (batch,), fp32. Arguments as in :meth:`forward`."""
        return self(ids_bt, real_bt, types_bt).squeeze(-1)  # type: ignore[no-any-return]


class TokenClassifier(Transformer):
    """A label for each token: names, parts of speech.

    Args:
        labels: what each logit stands for.
    """

    task: ClassVar[Task] = "token_classification"

    def __init__(self, config: ModelConfig, labels: Sequence[str]) -> None:
        super().__init__(config)
        self.labels = tuple(labels)
        self.head = Head(config.dim, len(self.labels), bias=True)

    @classmethod
    def build(
        cls, config: ModelConfig, family: Family, content: Mapping[str, Any], labels: Sequence[str] | None = None
    ) -> Self:
        """With the labels of `config.json`, unless others are given."""
        return cls(config, read_labels(content) if labels is None else check_labels(labels))

    def hf_fields(self, family: Family) -> dict[str, Any]:
        return {**super().hf_fields(family), **label_fields(self.labels)}

    def head_parameters(self) -> list[nn.Parameter]:
        return [*self.head.parameters()]

    def forward(self, ids_bt: Tensor, real_bt: Tensor | None = None, types_bt: Tensor | None = None) -> Tensor:
        """Logits, (batch, seq, labels), fp32. Arguments as in :meth:`Transformer.hidden_states`."""
        return self.head(self.hidden_states(ids_bt, real_bt=real_bt, types_bt=types_bt))  # type: ignore[no-any-return]


class QuestionAnswering(Transformer):
    """Where in a text the answer stands: at which token it begins and at which it ends (SQuAD, arXiv:1606.05250)."""

    task: ClassVar[Task] = "question_answering"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.head = Head(config.dim, 2, bias=True)

    def hf_fields(self, family: Family) -> dict[str, Any]:
        # Two logits a token, whatever labels the model had before.
        return {**super().hf_fields(family), **label_fields(default_labels(2))}

    def head_parameters(self) -> list[nn.Parameter]:
        return [*self.head.parameters()]

    def forward(
        self, ids_bt: Tensor, real_bt: Tensor | None = None, types_bt: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits of the answer's first and of its last token, (batch, seq) each, fp32; padding has some too. Arguments
        as in :meth:`Transformer.hidden_states`."""
        start_end = self.head(self.hidden_states(ids_bt, real_bt=real_bt, types_bt=types_bt))
        return start_end[..., 0], start_end[..., 1]


def read_labels(content: Mapping[str, Any], default: int = 2) -> tuple[str, ...]:
    """The labels that a `config.json` names in ``id2label``, or numbers in ``num_labels``.

    Args:
        default: how many there are where it says nothing.

    Raises:
        DanluError: they are no labels for 0, 1, 2, ...
    """
    id2label = content.get("id2label")
    if id2label is None:
        number = content.get("num_labels")
        if number is None:
            return default_labels(default)
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number < 2**20:
            raise DanluError(f"num_labels is {number!r}; expected a whole number of at least 1")
        return default_labels(number)
    if not isinstance(id2label, dict) or set(map(str, id2label)) != {str(i) for i in range(len(id2label))}:
        raise DanluError("id2label must give a label for each of 0, 1, 2, ...")
    by_id = {str(i): label for i, label in id2label.items()}
    return check_labels([by_id[str(i)] for i in range(len(by_id))], where="id2label")


def check_labels(labels: Sequence[str], where: str = "labels") -> tuple[str, ...]:
    """Labels that can be told apart.

    Raises:
        DanluError: there are none, or two are the same, or one is no text.
    """
    if isinstance(labels, str) or not labels or not all(isinstance(label, str) for label in labels):
        raise DanluError(f"{where}: {labels!r}; expected one name for each label")
    if len(set(labels)) < len(labels):
        raise DanluError(f"{where}: {', '.join(labels)}; a label is named twice")
    return tuple(labels)


def default_labels(number: int) -> tuple[str, ...]:
    """The names of labels without one, as transformers gives them."""
    return tuple(f"LABEL_{i}" for i in range(number))


def label_fields(labels: Sequence[str]) -> dict[str, Any]:
    """The fields of `config.json` that name the labels."""
    numbered = dict(enumerate(labels))
    return {
        "id2label": {str(i): label for i, label in numbered.items()},
        "label2id": {label: i for i, label in numbered.items()},
        "num_labels": len(labels),
    }


def read_problem_type(content: Mapping[str, Any], given: str | None) -> ProblemType | None:
    """The problem type, as given or as `config.json` has it.

    Raises:
        DanluError: there is no such type.
    """
    value = content.get("problem_type") if given is None else given
    if value is not None and value not in get_args(ProblemType):
        raise DanluError(f"problem_type is {value!r}; expected {', '.join(get_args(ProblemType))}")
    return cast("ProblemType | None", value)
