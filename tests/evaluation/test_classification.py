"""Metrics against scikit-learn, scipy's definitions and seqeval."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.data.tagged import entities, is_scheme
from danlu.evaluation.baselines import (
    majority,
    majority_multi,
    mean_number,
    tags_by_word,
    tfidf,
    tfidf_multi,
    tfidf_number,
)
from danlu.evaluation.classification import (
    binary_log_loss,
    classification_report,
    entity_report,
    log_loss,
    multi_label_report,
    regression_report,
)

sklearn_metrics = pytest.importorskip("sklearn.metrics")
LABELS = ("a", "b", "c", "never")
answers = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=30)


@settings(max_examples=30, deadline=None)
@given(answers)
def test_labels_against_sklearn(pairs: list[tuple[str, str]]) -> None:
    true, predicted = [t for t, _ in pairs], [p for _, p in pairs]
    found = classification_report(true, predicted, LABELS)
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(true, predicted))
    expected = sklearn_metrics.f1_score(true, predicted, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(expected)
    p, r, f, n = sklearn_metrics.precision_recall_fscore_support(true, predicted, labels=LABELS, zero_division=0)
    for i, label in enumerate(LABELS):
        scores = found["per_class"].get(label, {"precision": 0, "recall": 0, "f1": 0, "support": 0})
        assert [*scores.values()] == pytest.approx([p[i], r[i], f[i], n[i]])
    assert found["confusion"] == sklearn_metrics.confusion_matrix(true, predicted, labels=LABELS).tolist()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sets(st.sampled_from("abc")), st.sets(st.sampled_from("abc"))), min_size=1, max_size=20))
def test_several_labels_against_sklearn(pairs: list[tuple[set[str], set[str]]]) -> None:
    def table(which: int) -> np.ndarray:
        return np.array([[label in pair[which] for label in "abc"] for pair in pairs], dtype=int)

    found = multi_label_report([t for t, _ in pairs], [p for _, p in pairs], "abc")
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(table(0), table(1)))
    micro = sklearn_metrics.f1_score(table(0), table(1), average="micro", zero_division=0)
    assert found["micro_f1"] == pytest.approx(micro)
    each = sklearn_metrics.f1_score(table(0), table(1), average=None, zero_division=0)
    for i, label in enumerate("abc"):
        assert found["per_class"].get(label, {"f1": 0})["f1"] == pytest.approx(each[i])


def test_numbers_against_numpy_and_sklearn() -> None:
    rng = np.random.default_rng(0)
    true = rng.integers(0, 9, 60).astype(float)  # with ties
    predicted = true + rng.normal(size=60).round(1)
    found = regression_report(true.tolist(), predicted.tolist())
    assert found["mse"] == pytest.approx(sklearn_metrics.mean_squared_error(true, predicted))
    assert found["mae"] == pytest.approx(sklearn_metrics.mean_absolute_error(true, predicted))
    assert found["r2"] == pytest.approx(sklearn_metrics.r2_score(true, predicted))
    assert found["pearson"] == pytest.approx(np.corrcoef(true, predicted)[0, 1])
    stats = pytest.importorskip("scipy.stats")
    assert found["spearman"] == pytest.approx(stats.spearmanr(true, predicted).statistic)
    assert regression_report([1.0, 1.0], [2.0, 3.0])["pearson"] == 0


def test_losses_against_sklearn() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 20)
    true = rng.integers(0, 3, 20)
    assert log_loss(p, true.tolist()) == pytest.approx(sklearn_metrics.log_loss(true, p, labels=[0, 1, 2]))
    yes = (rng.random((20, 3)) < 0.4).astype(float)
    expected = np.mean([sklearn_metrics.log_loss(yes[:, i], p[:, i], labels=[0, 1]) for i in range(3)])
    assert binary_log_loss(p, yes) == pytest.approx(expected)
    assert np.isfinite(log_loss(np.array([[0.0, 1.0]]), [0]))


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-X I-X O", [("X", 0, 1)]),
        ("B-X B-X", [("X", 0, 0), ("X", 1, 1)]),
        ("I-X I-Y", [("X", 0, 0), ("Y", 1, 1)]),  # begins without B-, changes its type
        ("O I-X", [("X", 1, 1)]),
        ("S-X E-X O", [("X", 0, 0), ("X", 1, 1)]),
        ("B-X I-X E-X I-X", [("X", 0, 2), ("X", 3, 3)]),
        ("U-X B-Y L-Y", [("X", 0, 0), ("Y", 1, 2)]),
    ],
)
def test_entities(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == expected
    assert is_scheme([*tags.split(), "B-X"])


def test_what_is_no_scheme() -> None:
    assert not is_scheme(["NOUN", "VERB", "O"])
    assert not is_scheme(["O"])
    assert not is_scheme(["B-X", "NOUN"])


def test_entity_scores_by_hand() -> None:
    """Three there, two claimed, one with both ends right."""
    found = entity_report([["B-X", "I-X", "O", "B-Y"], ["B-X"]], [["B-X", "O", "O", "B-Y"], ["O"]])
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx((1 / 2, 1 / 3, 0.4))
    assert found["per_class"]["X"]["f1"] == 0
    assert found["per_class"]["Y"]["f1"] == 1
    assert found["macro_f1"] == 0.5


@pytest.mark.parametrize("marks", ["BI", "BIES"])
def test_entities_against_seqeval(marks: str) -> None:
    seqeval = pytest.importorskip("seqeval.metrics")
    rng, pool = random.Random(0), ["O", *(f"{mark}-{kind}" for mark in marks for kind in "XY")]
    for _ in range(300):
        true = [[rng.choice(pool) for _ in range(rng.randint(1, 8))] for _ in range(3)]
        predicted = [[rng.choice(pool) for _ in sentence] for sentence in true]
        if any(map(entities, true + predicted)):
            found = entity_report(true, predicted)
            assert found["f1"] == pytest.approx(seqeval.f1_score(true, predicted, zero_division=0))
            expected = seqeval.f1_score(true, predicted, average="macro", zero_division=0)
            assert found["macro_f1"] == pytest.approx(expected)


def test_baselines() -> None:
    texts = ["red apple", "green apple", "fast car", "slow car"] * 5
    known = [0, 0, 1, 1] * 5
    common = majority([0, 0, 1], [0, 1, 1, 1], ("a", "b"))
    assert common["accuracy"] == 0.25
    assert common["loss"] == pytest.approx(-(np.log(2 / 3) + 3 * np.log(1 / 3)) / 4)
    linear = tfidf(texts, known, ["an apple", "the car"], [0, 1], ("a", "b", "untrained"))
    assert linear["accuracy"] == 1
    assert linear["loss"] < 0.3

    yes = np.array([[1.0, 0.0, 0.0] if k == 0 else [0.0, 1.0, 0.0] for k in known])  # one label is never there
    two = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert tfidf_multi(texts, yes, ["an apple", "the car"], two, ("a", "b", "c"))["accuracy"] == 1
    assert majority_multi(yes, two, ("a", "b", "c"))["micro_f1"] == 0

    assert mean_number([1.0, 3.0], [2.0, 4.0])["mse"] == 2
    assert tfidf_number(texts, [float(k) for k in known], ["an apple", "the car"], [0.0, 1.0])["mse"] < 0.1

    common_tag, by_word = tags_by_word([(["a", "b", "a"], ["X", "O", "O"]), (["a"], ["X"])], [["a", "b", "new"]])
    assert common_tag in ("X", "O")
    assert by_word == [["X", "O", common_tag]]
