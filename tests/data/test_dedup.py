"""Planted copies are found, different documents are not, and the estimates are as good as the theory says."""

from __future__ import annotations

import itertools
import random
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from danlu.data.dedup import Deduplicator, Duplicates, UnionFind
from danlu.data.minhash import estimate, jaccard, shingles, signature

WORDS = [f"{a}{b}{c}" for a in "bdgklmnprst" for b in "aeiou" for c in ("n", "r", "lo", "mi", "stan", "qua")]
CJK = [chr(code) for code in range(0x4E00, 0x4E00 + 2000)]


def document(seed: int, length: int, words: list[str] = WORDS) -> list[str]:
    return random.Random(seed).choices(words, k=length)


def edited(words: list[str], share: float, seed: int, vocabulary: list[str] = WORDS) -> list[str]:
    """``share`` of the words replaced, dropped or preceded by another, at random places."""
    rng = random.Random(seed)
    result = []
    for word in words:
        if rng.random() < share:
            result += [[rng.choice(vocabulary)], [], [rng.choice(vocabulary), word]][rng.randrange(3)]
        else:
            result.append(word)
    return result


def deduplicate(texts: list[str], **options: float) -> Duplicates:
    found = Deduplicator(**options)  # type: ignore[arg-type]
    for text in texts:
        found.add(text)
    return found.find(texts.__getitem__)


@pytest.mark.parametrize(("vocabulary", "glue"), [(WORDS, " "), (CJK, "")])
def test_recall_on_planted_near_duplicates(vocabulary: list[str], glue: str) -> None:
    originals = [document(i, 100 + 10 * i, vocabulary) for i in range(100)]
    copies = [edited(words, 0.02, 1000 + i, vocabulary) for i, words in enumerate(originals)]
    found = deduplicate([glue.join(words) for words in originals + copies])
    recall = float(np.mean(found.copy_of[100:] == np.arange(100)))
    assert recall >= 0.95
    assert (found.copy_of[:100] == np.arange(100)).all()
    assert found.n_exact + found.n_near == (found.copy_of != np.arange(200)).sum()


@pytest.mark.parametrize(("vocabulary", "glue"), [(WORDS, " "), (CJK, "")])
def test_no_false_positives(vocabulary: list[str], glue: str) -> None:
    texts = [glue.join(document(i, 30 + 5 * i, vocabulary)) for i in range(200)]
    found = deduplicate(texts)
    assert (found.copy_of == np.arange(200)).all()
    assert (found.group == np.arange(200)).all()


def test_what_is_removed_is_really_near_and_what_is_related_is_grouped() -> None:
    """Against the exact similarities of all pairs."""
    texts = []
    for i in range(40):
        words = document(i, 300)
        texts += [" ".join(words), *(" ".join(edited(words, share, i + 7)) for share in (0.01, 0.05, 0.1, 0.2))]
    found = deduplicate(texts)
    sets = [shingles(text) for text in texts]
    near, related, apart = [], [], []
    for i, j in itertools.combinations(range(len(texts)), 2):
        alike = jaccard(sets[i], sets[j])
        near += [(i, j)] if alike >= 0.8 else []
        related += [(i, j)] if alike >= 0.5 else []
        apart += [(i, j)] if alike < 0.2 else []
    assert near
    assert len(related) > len(near)
    assert all(found.copy_of[i] == found.copy_of[j] for i, j in near)
    for removed in np.flatnonzero(found.copy_of != np.arange(len(texts))):
        assert max(jaccard(sets[removed], sets[i]) for i in range(len(texts)) if i != removed) >= 0.8
    assert np.mean([found.group[i] == found.group[j] for i, j in related]) >= 0.98
    assert not any(found.group[i] == found.group[j] for i, j in apart if i // 5 != j // 5)


def test_exact_copies_but_for_white_space() -> None:
    texts = ["a b c", "x", "a  b\n c", "", "a b d", "  "]
    for near in (True, False):
        found = deduplicate(texts, near=near)
        assert found.copy_of.tolist() == [0, 1, 0, 3, 4, 3]
        assert (found.n_exact, found.n_near) == (2, 0)


def test_large_families_are_one_cluster() -> None:
    """More members than a bucket compares pair by pair."""
    base = document(0, 400)
    texts = [" ".join(edited(base, 0.01, i)) for i in range(150)] + [" ".join(document(9, 400))]
    found = deduplicate(texts)
    assert found.copy_of.tolist() == [0] * 150 + [150]


def test_the_threshold_decides() -> None:
    words = document(0, 500)
    texts = [" ".join(words), " ".join(edited(words, 0.08, 1))]
    alike = jaccard(shingles(texts[0]), shingles(texts[1]))
    assert 0.5 < alike < 0.8
    assert deduplicate(texts).n_near == 0
    assert deduplicate(texts, threshold=alike - 0.01).n_near == 1
    assert deduplicate(texts, threshold=alike + 0.01).n_near == 0


def test_estimates_have_the_standard_error_of_128_permutations() -> None:
    rng = np.random.default_rng(0)
    errors, expected = [], []
    for _ in range(400):
        universe = rng.integers(0, 1 << 32, 1500, np.uint32)
        common, other = int(rng.integers(0, 1000)), 500
        left = np.unique(universe[: common + other // 2])
        right = np.unique(np.concatenate((universe[:common], universe[common + other // 2 : common + other])))
        exact = jaccard(left, right)
        errors.append(float(estimate(signature(left), signature(right))) - exact)
        expected.append(exact * (1 - exact) / 128)
    assert abs(np.mean(errors)) < 0.006
    assert np.mean(np.square(errors)) == pytest.approx(np.mean(expected), rel=0.25)


def reference_shingles(text: str) -> set[tuple[str, ...]]:
    """What `shingles` should see, written plainly."""
    words = re.findall(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\W\u3040-\u30ff\u4e00-\u9fff]+", text.lower())
    n = min(3, len(words))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} if words else set()


chars = st.sampled_from("aAbZé9_ .,-\n\t你好世界のカ")


@example("の9のの", "")  # the order of words counts
@given(st.text(chars, max_size=60), st.text(chars, max_size=60))
def test_shingles_are_word_trigrams(left: str, right: str) -> None:
    a, b = reference_shingles(left), reference_shingles(right)
    assert len(shingles(left)) == len(a)
    expected = len(a & b) / len(a | b) if a | b else 1.0
    assert jaccard(shingles(left), shingles(right)) == expected


def test_shingles_of_a_long_text_do_not_depend_on_its_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(document(0, 20_000))
    whole = shingles(text)
    monkeypatch.setattr("danlu.data.minhash._SLICE", 10_000)
    assert jaccard(whole, shingles(text)) > 0.99


def test_shingles_do_not_change_between_runs() -> None:
    """Signatures may be kept: their values are part of the format."""
    golden = [176485894, 1477535627, 1830118938, 4162529354]
    assert shingles("The quick brown fox. 你好").tolist() == golden


def test_union_find_keeps_the_smallest() -> None:
    sets = UnionFind(6)
    for left, right in ((4, 5), (2, 4), (1, 2), (0, 3)):
        sets.union(left, right)
    assert sets.roots().tolist() == [0, 1, 1, 0, 1, 1]
