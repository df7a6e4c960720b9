"""How good labels, tags and numbers are: accuracy, precision, recall, F1, confusions, entities, correlations.

All take what is true and what was predicted, and return plain numbers for cards and tables. A ratio without cases
(precision of a label that was never predicted) is 0, as scikit-learn has it by default.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from danlu.data.tagged import entities


def classification_report(true: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """One label a row.

    Returns:
        ``accuracy``; ``macro_f1``, the mean over labels that occur in either; ``per_class``: label -> precision,
        recall, f1, support; ``confusion``: row: true, column: predicted, in the order of ``labels``.
    """
    place = {label: i for i, label in enumerate(labels)}
    confusion = np.zeros((len(labels), len(labels)), dtype=np.int64)
    for t, p in zip(true, predicted, strict=True):
        confusion[place[t], place[p]] += 1
    hits = np.diag(confusion)
    support, predictions = confusion.sum(axis=1), confusion.sum(axis=0)
    per_class = {
        label: _scores(int(hits[i]), int(predictions[i]), int(support[i]))
        for i, label in enumerate(labels)
        if support[i] or predictions[i]
    }
    return {
        "accuracy": float(hits.sum() / max(1, len(true))),
        "macro_f1": _mean([scores["f1"] for scores in per_class.values()]),
        "per_class": per_class,
        "confusion": confusion.tolist(),
    }


def multi_label_report(
    true: Sequence[Collection[str]], predicted: Sequence[Collection[str]], labels: Sequence[str]
) -> dict[str, Any]:
    """Any number of labels a row.

    Returns:
        ``accuracy``: rows whose labels are all right; ``micro_f1`` over all decisions; ``macro_f1``, ``per_class`` as
        in :func:`classification_report`.
    """
    hits, predictions, support = Counter[str](), Counter[str](), Counter[str]()
    right = 0
    for t, p in zip(true, predicted, strict=True):
        right += set(t) == set(p)
        hits.update(set(t) & set(p))
        predictions.update(set(p))
        support.update(set(t))
    per_class = {
        label: _scores(hits[label], predictions[label], support[label])
        for label in labels
        if support[label] or predictions[label]
    }
    return {
        "accuracy": right / max(1, len(true)),
        "micro_f1": _scores(hits.total(), predictions.total(), support.total())["f1"],
        "macro_f1": _mean([scores["f1"] for scores in per_class.values()]),
        "per_class": per_class,
    }


def regression_report(true: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """Numbers: ``mse``, ``mae``, ``r2`` (share of the variance that is explained), ``pearson``, ``spearman``. Where
    all numbers are the same, the last three are 0."""
    t, p = np.asarray(true, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    mse = float(np.mean((t - p) ** 2))
    variance = float(np.var(t))
    return {
        "mse": mse,
        "mae": float(np.mean(np.abs(t - p))),
        "r2": 1 - mse / variance if variance else 0.0,
        "pearson": _correlation(t, p),
        "spearman": _correlation(_ranks(t), _ranks(p)),
    }


def entity_report(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Entities: right are those whose type, first and last word are all right (as in seqeval).

    Args:
        true, predicted: the tags of each sentence.

    Returns:
        ``precision``, ``recall``, ``f1`` over all entities; ``macro_f1``, the mean over types; ``per_class``.
    """
    hits, predictions, support = Counter[str](), Counter[str](), Counter[str]()
    for t, p in zip(true, predicted, strict=True):
        there, claimed = set(entities(t)), set(entities(p))
        hits.update(kind for kind, _, _ in there & claimed)
        predictions.update(kind for kind, _, _ in claimed)
        support.update(kind for kind, _, _ in there)
    kinds = sorted(predictions | support)
    per_class = {kind: _scores(hits[kind], predictions[kind], support[kind]) for kind in kinds}
    whole = _scores(hits.total(), predictions.total(), support.total())
    return {
        **{name: whole[name] for name in ("precision", "recall", "f1")},
        "macro_f1": _mean([scores["f1"] for scores in per_class.values()]),
        "per_class": per_class,
    }


def log_loss(probabilities: npt.NDArray[np.floating], true: Sequence[int]) -> float:
    """Mean of ``-log p(true)`` in nats; probabilities (rows, labels) are kept off 0 by the smallest fp32 step."""
    chosen = np.asarray(probabilities, dtype=np.float64)[np.arange(len(true)), np.asarray(true)]
    return float(-np.log(np.clip(chosen, np.finfo(np.float32).eps, 1)).mean())


def binary_log_loss(probabilities: npt.NDArray[np.floating], true: npt.NDArray[np.floating]) -> float:
    """Mean over rows and labels of the nats of each yes-or-no decision; both arguments (rows, labels)."""
    p = np.clip(np.asarray(probabilities, dtype=np.float64), np.finfo(np.float32).eps, 1 - np.finfo(np.float32).eps)
    return float(-(true * np.log(p) + (1 - true) * np.log(1 - p)).mean())


def _scores(hits: int, predictions: int, support: int) -> dict[str, float]:
    return {
        "precision": hits / predictions if predictions else 0.0,
        "recall": hits / support if support else 0.0,
        "f1": 2 * hits / (predictions + support) if predictions + support else 0.0,
        "support": support,
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _correlation(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    a, b = a - a.mean(), b - b.mean()
    spread = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / spread if spread else 0.0


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks from 0; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts + 1) / 2)[place], dtype=np.float64)
