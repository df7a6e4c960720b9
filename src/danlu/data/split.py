"""The train/held-out split: by document, never by chunk; related documents stay together; the same for the same
seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from danlu.errors import DanluError


def unit_hash(seed: int, purpose: str, key: str) -> float:
    """A pseudo-random number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{seed}\0{purpose}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def choose_heldout(
    kept: Sequence[int], group: NDArray[np.int64], key_of: Callable[[int], str], share: float, seed: int
) -> set[int]:
    """Which of the kept documents are held out.

    Groups of related documents are taken in the order of a seeded hash until ``share`` of the documents is held out;
    a group that would overshoot by more than a tenth stays in training.

    Args:
        kept: documents to split, in order.
        group: (n,) group of every document.
        key_of: name of a document that does not change when others come or go.
        share: share of the documents to hold out, 0 for none.

    Raises:
        DanluError: there are too few independent documents to have some on both sides.
    """
    if share == 0:
        return set()
    members: dict[int, list[int]] = {}
    for index in kept:
        members.setdefault(int(group[index]), []).append(index)
    wanted = max(1.0, share * len(kept))
    heldout: set[int] = set()
    order = sorted(members.values(), key=lambda found: unit_hash(seed, "heldout", key_of(found[0])))
    for found in order:
        if len(heldout) < wanted and len(heldout) + len(found) <= max(1.1 * wanted, 1):
            heldout.update(found)
    if not heldout and len(order) > 1:  # every group is larger than the share: one of the smallest
        smallest = min(len(found) for found in order)
        heldout.update(next(found for found in order if len(found) == smallest))
    if not heldout or len(heldout) == len(kept):
        count = f"{len(kept)} document{'s'[: len(kept) != 1]}, {len(members)} unrelated"
        raise DanluError(
            f"the corpus is too small to hold anything out ({count}); add documents, cut a single file into documents "
            "with --separator, or use all of it for training with --heldout 0"
        )
    return heldout
