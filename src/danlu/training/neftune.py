"""NEFTune (Jain et al. 2023, arXiv:2310.05914): noise on the embeddings while a model is fine-tuned. Answers
become longer and better liked where there are few examples to learn from."""

from __future__ import annotations

from torch import Tensor


def noise_amplitude(segments_bt: Tensor, dim: int, alpha: float) -> Tensor:
    """``alpha / sqrt(L d)``, (batch, seq) fp32: the bound of the uniform noise on each feature of each token, of which
    the whole sequence then gets a length of about ``alpha / sqrt(3)``. Padding gets 0.

    L is the length of the token's own document, as the paper has it, and not of the row that it is packed into: packed
    and alone, a document gets the same noise.

    Args:
        segments_bt: document number of each token, from 0 and below seq; -1 for padding.
        dim: width of the embedding.
    """
    slots = segments_bt + 1
    lengths = slots.new_zeros(len(slots), slots.shape[1] + 1).scatter_add_(
        1, slots, slots.new_ones(()).expand_as(slots)
    )
    amplitude = alpha * (lengths.gather(1, slots) * dim).float().rsqrt()
    return amplitude.masked_fill(segments_bt < 0, 0)
