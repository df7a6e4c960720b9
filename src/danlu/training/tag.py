"""`danlu finetune --task tag`: a tag for each word: named entities (BIO), parts of speech."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from danlu.data.labelled import Columns, read_split, sorted_labels
from danlu.data.packing import IGNORE
from danlu.data.padded import Example, PaddedBatch
from danlu.data.tagged import TagRow, is_scheme, tag_rows
from danlu.engine.classify import encode_pieces, tag_words
from danlu.errors import DanluError
from danlu.evaluation.baselines import Scores, tags_by_word
from danlu.evaluation.classification import classification_report, entity_report
from danlu.models.heads import TokenClassifier
from danlu.models.load import load_model
from danlu.objectives.classification import label_nll_sum
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training.config import FinetuneConfig
from danlu.training.labels import known_labels, order_of
from danlu.training.task import Report, Task


def prepare_tag(config: FinetuneConfig, tokenizer: Tokenizer) -> Task:
    """Read the words and their tags, and open the model with a head for them. The loss falls on the first token of
    each word; sentences that are too long are learned in pieces.

    Raises:
        DanluError: a row that cannot be used, an unknown tag, or tags with nothing to tell apart.
    """
    columns = Columns(config.text_column, "", config.label_column)
    share = 0.1 if config.heldout_share is None else config.heldout_share
    train, held_out = read_split(
        tag_rows(config.label_names), config.data, config.heldout, columns, share=share, on_error=config.on_error
    )
    labels = _labels(config, train, held_out)
    model = load_model(config.model, TokenClassifier, new_head=True, labels=labels)
    longest = min(config.seq_len, model.config.context)
    examples, held_out_examples = (
        [example for row in rows for example in _examples(row, tokenizer, labels, longest)]
        for rows in (train, held_out)
    )
    if not examples:
        raise DanluError(f"{config.data}: no word has a token of this tokenizer")

    def loss_sum(batch: PaddedBatch) -> Tensor:
        return label_nll_sum(model(batch.ids, batch.real), batch.targets)

    def report() -> Report:
        return _report(model, tokenizer, train, held_out, longest)

    return Task(model, examples, held_out_examples, loss_sum, report)


def _labels(config: FinetuneConfig, train: Sequence[TagRow], held_out: Sequence[TagRow]) -> tuple[str, ...]:
    found = {tag for row in train for tag in row.tags}
    if config.heldout is None:
        found |= {tag for row in held_out for tag in row.tags}
    if is_scheme(found):  # an entity of two words may come in new texts, if not here
        found |= {"O", *(f"I-{tag[2:]}" for tag in found if tag[:2] == "B-")}
    if len(found | set(config.label_names)) < 2:
        raise DanluError(f"{config.data}: all words have the tag {', '.join(found)!r}; there is nothing to tell apart")
    labels = order_of(sorted_labels(found), config.label_names, known_labels(config.model, "token_classification"))
    for row in (*train, *held_out):
        for tag in row.tags:
            if tag not in labels:
                raise DanluError(
                    f"{row.where}: unknown tag {tag!r}; the rows to learn from have {', '.join(labels[:20])}"
                )
    return labels


def _examples(row: TagRow, tokenizer: Tokenizer, labels: Sequence[str], max_length: int) -> list[Example]:
    try:
        pieces = list(encode_pieces(tokenizer, row.words, max_length))
    except DanluError as error:
        raise DanluError(f"{row.where}: {error}") from error
    return [
        Example(ids, [IGNORE if word is None else labels.index(row.tags[word]) for word in firsts])
        for ids, firsts in pieces
    ]


def _report(
    model: TokenClassifier, tokenizer: Tokenizer, train: Sequence[TagRow], held_out: Sequence[TagRow], max_length: int
) -> Report:
    tagged = tag_words(model, tokenizer, [row.words for row in held_out], max_length=max_length)
    answers = [[tag for tag, _ in sentence] for sentence in tagged]
    true = [list(row.tags) for row in held_out]
    common, by_word = tags_by_word([(row.words, row.tags) for row in train], [row.words for row in held_out])
    candidates = {
        "this model": answers,
        "majority": [[common] * len(row.words) for row in held_out],
        "commonest tag of the word": by_word,
    }
    compared: dict[str, Scores] = {}
    reports: dict[str, dict[str, Any]] = {}
    scheme = is_scheme(model.labels)
    for who, tags in candidates.items():
        words = classification_report(
            [tag for sentence in true for tag in sentence], [tag for sentence in tags for tag in sentence], model.labels
        )
        reports[who] = entity_report(true, tags) if scheme else words
        scores = {name: value for name, value in reports[who].items() if isinstance(value, float)}
        compared[who] = {**scores, "accuracy": words["accuracy"]}
    scores = compared["this model"]
    per_class = reports["this model"]["per_class"]
    metrics: dict[str, Any] = {f"heldout_{name}": value for name, value in scores.items()}
    metrics |= {"baselines": {who: s for who, s in compared.items() if who != "this model"}, "per_class": per_class}
    mistakes = [
        {"where": row.where, "words": list(row.words), "true": t, "predicted": p}
        for row, t, p in zip(held_out, true, answers, strict=True)
        if t != p
    ]
    return Report(metrics, compared, per_class, {"labels": list(model.labels), "mistakes": mistakes[:20]})
