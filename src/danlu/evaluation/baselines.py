"""What a model has to beat: the commonest answer, and a linear model over weighted words (TF-IDF)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from danlu.errors import MissingExtra
from danlu.evaluation.classification import (
    binary_log_loss,
    classification_report,
    log_loss,
    multi_label_report,
    regression_report,
)

Scores = dict[str, float]
Texts = Sequence[str]


def _kept(report: dict[str, Any], loss: float) -> Scores:
    """The figures of a report that baselines are compared by."""
    return {name: value for name, value in report.items() if isinstance(value, float)} | {"loss": loss}


def majority(train: Sequence[int], held_out: Sequence[int], labels: Sequence[str]) -> Scores:
    """Always the commonest label of the training rows; for the loss, each label as often as there."""
    counts = np.bincount(train, minlength=len(labels)) + 1e-9
    shares = np.tile(counts / counts.sum(), (len(held_out), 1))
    answer = labels[int(counts.argmax())]
    report = classification_report([labels[i] for i in held_out], [answer] * len(held_out), labels)
    return _kept(report, log_loss(shares, held_out))


def majority_multi(
    train: npt.NDArray[np.floating], held_out: npt.NDArray[np.floating], labels: Sequence[str]
) -> Scores:
    """Each label by itself: yes where most training rows have it. Arguments (rows, labels), 1 where a label holds."""
    shares = np.tile(train.mean(axis=0), (len(held_out), 1))
    report = multi_label_report(named(held_out, labels), named(shares, labels), labels)
    return _kept(report, binary_log_loss(shares, held_out))


def mean_number(train: Sequence[float], held_out: Sequence[float]) -> Scores:
    """Always the mean of the training rows."""
    report = regression_report(held_out, [float(np.mean(train))] * len(held_out))
    return dict(report)


def tfidf(train_texts: Texts, train: Sequence[int], texts: Texts, held_out: Sequence[int], labels: Texts) -> Scores:
    """Logistic regression on TF-IDF of words and pairs of words.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    _, linear = _sklearn()
    features, found = _features(train_texts, texts)
    model = linear.LogisticRegression(max_iter=1000, C=10.0).fit(features, train)
    probabilities = np.zeros((len(texts), len(labels)))
    probabilities[:, model.classes_] = model.predict_proba(found)  # a label may have no training row
    answers = [labels[i] for i in probabilities.argmax(axis=1)]
    report = classification_report([labels[i] for i in held_out], answers, labels)
    return _kept(report, log_loss(probabilities, held_out))


def tfidf_multi(
    train_texts: Texts,
    train: npt.NDArray[np.floating],
    texts: Texts,
    held_out: npt.NDArray[np.floating],
    labels: Texts,
) -> Scores:
    """One logistic regression a label. Errors as :func:`tfidf`."""
    _, linear = _sklearn()
    features, found = _features(train_texts, texts)
    probabilities = np.tile(train.mean(axis=0), (len(texts), 1))
    for i, column in enumerate(train.T):
        if 0 < column.mean() < 1:  # else there is nothing to tell apart
            model = linear.LogisticRegression(max_iter=1000, C=10.0).fit(features, column)
            probabilities[:, i] = model.predict_proba(found)[:, 1]
    report = multi_label_report(named(held_out, labels), named(probabilities, labels), labels)
    return _kept(report, binary_log_loss(probabilities, held_out))


def tfidf_number(train_texts: Texts, train: Sequence[float], texts: Texts, held_out: Sequence[float]) -> Scores:
    """Ridge regression on TF-IDF. Errors as :func:`tfidf`."""
    _, linear = _sklearn()
    features, found = _features(train_texts, texts)
    report = regression_report(held_out, linear.Ridge().fit(features, train).predict(found))
    return dict(report)


def tags_by_word(
    train: Sequence[tuple[Sequence[str], Sequence[str]]], held_out: Sequence[Sequence[str]]
) -> tuple[str, list[list[str]]]:
    """The commonest tag of all, and for each held-out sentence the tag that each word had most often in training (the
    commonest of all for a new word)."""
    by_word: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for words, tags in train:
        for word, tag in zip(words, tags, strict=True):
            by_word[word][tag] += 1
    every = sum(by_word.values(), Counter[str]())
    common = every.most_common(1)[0][0]
    best = {word: tags.most_common(1)[0][0] for word, tags in by_word.items()}
    return common, [[best.get(word, common) for word in words] for words in held_out]


def named(probabilities: npt.NDArray[np.floating], labels: Sequence[str]) -> list[list[str]]:
    """The labels whose probability is above one half, for each row."""
    return [[label for label, p in zip(labels, row, strict=True) if p > 0.5] for row in probabilities]


def _sklearn() -> tuple[Any, Any]:
    try:
        from sklearn import linear_model
        from sklearn.feature_extraction import text
    except ImportError as error:
        raise MissingExtra("scikit-learn", "tasks", "the TF-IDF baseline") from error
    return text, linear_model


def _features(train_texts: Texts, texts: Texts) -> tuple[Any, Any]:
    text, _ = _sklearn()
    # \w+ and not sklearn's \w\w+: in source code and Chinese one character is a word too.
    vectorizer = text.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+|[^\w\s]")
    return vectorizer.fit_transform(train_texts), vectorizer.transform(texts)
