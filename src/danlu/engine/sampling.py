"""How the next token is chosen: pure functions on logits, in the order in which they are applied.

    penalties -> temperature -> top-k -> top-p -> min-p -> draw

This is the order of transformers' `generate`, and each step gives what the transformers processor of that name gives.
A parameter is one number for all rows or a tensor (batch,) with one for each, so that requests with different wishes
share a batch. Whatever the filters are told, the most likely token survives them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from danlu.engine.config import SamplingParams
from danlu.errors import DanluError

__all__ = ["Sampler", "SamplingParams", "apply_penalties", "min_p", "sample", "sanitize", "temper", "top_k", "top_p"]

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them would overflow."""

_LARGEST = 1e30  # no logit is this large; penalties and the lowest temperature keep it finite in fp32


def _column(value: float | Tensor, like_bv: Tensor) -> Tensor:
    """One number, or one for each row, as something that broadcasts over (batch, vocab)."""
    return torch.as_tensor(value, device=like_bv.device).reshape(-1, 1)


def sanitize(logits_bv: Tensor) -> Tensor:
    """Logits as fp32 with NaN as -inf (never drawn) and +inf as a very large number.

    Raises:
        DanluError: a row has no number at all: the model is damaged.
    """
    logits_bv = logits_bv.float().nan_to_num(nan=-torch.inf, posinf=_LARGEST, neginf=-torch.inf)
    logits_bv = torch.where(logits_bv == -torch.inf, logits_bv, logits_bv.clamp(-_LARGEST, _LARGEST))
    if bool((logits_bv == -torch.inf).all(dim=-1).any()):
        raise DanluError(
            "the model's output is not a number (NaN); its weights are damaged or its training diverged; take another"
        )
    return logits_bv


def apply_penalties(
    logits_bv: Tensor,
    prompt_bv: Tensor,
    counts_bv: Tensor,
    *,
    repetition_penalty: float | Tensor = 1.0,
    frequency_penalty: float | Tensor = 0.0,
    presence_penalty: float | Tensor = 0.0,
) -> Tensor:
    """Make tokens that were used less likely.

    Args:
        prompt_bv: (batch, vocab) bool, True for the tokens of the prompt.
        counts_bv: (batch, vocab) int, how often the answer has used each token so far.
        repetition_penalty: CTRL (Keskar et al. 2019, arXiv:1909.05858): for tokens of prompt and answer, positive
            logits are divided by it and negative ones multiplied.
        frequency_penalty: OpenAI: ``logit -= frequency_penalty * count``; the answer alone counts.
        presence_penalty: OpenAI: ``logit -= presence_penalty * (count > 0)``.
    """
    used_bv = counts_bv > 0
    repetition = _column(repetition_penalty, logits_bv)
    penalised = torch.where(logits_bv > 0, logits_bv / repetition, logits_bv * repetition)
    logits_bv = torch.where(prompt_bv | used_bv, penalised, logits_bv)
    return (
        logits_bv - _column(frequency_penalty, logits_bv) * counts_bv - _column(presence_penalty, logits_bv) * used_bv
    )


def temper(logits_bv: Tensor, temperature: float | Tensor) -> Tensor:
    """Divide by the temperature; greedy rows (below ``GREEDY_BELOW``) are left as they are."""
    column = _column(temperature, logits_bv)
    return logits_bv / torch.where(column < GREEDY_BELOW, 1.0, column)


def top_k(logits_bv: Tensor, k: int | Tensor) -> Tensor:
    """Keep the ``k`` largest logits (and those equal to the k-th), set the others to -inf (Fan et al. 2018,
    arXiv:1805.04833); 0 keeps all."""
    vocab = logits_bv.shape[-1]
    k_b1 = _column(k, logits_bv).long()
    k_b1 = torch.where(k_b1 == 0, vocab, k_b1).clamp(max=vocab)
    largest = int(torch.where(k_b1 == vocab, 1, k_b1).max())
    values = logits_bv.topk(largest, dim=-1).values
    threshold_b1 = values.gather(-1, k_b1.clamp(max=largest).expand(len(values), 1) - 1)
    return logits_bv.masked_fill((logits_bv < threshold_b1) & (k_b1 < vocab), -torch.inf)


def top_p(logits_bv: Tensor, p: float | Tensor) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751): keep the fewest most likely tokens whose probabilities
    sum to at least ``p``, and at least one; 1 keeps all."""
    p_b1 = _column(p, logits_bv)
    ascending, order = logits_bv.sort(dim=-1)
    drop = (ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p_b1) & (p_b1 < 1)
    drop[:, -1] = False
    return logits_bv.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


def min_p(logits_bv: Tensor, p: float | Tensor) -> Tensor:
    """Drop tokens less likely than ``p`` times the likeliest (Nguyen et al. 2024, arXiv:2407.01082); 0 keeps all."""
    probs = logits_bv.softmax(dim=-1)
    return logits_bv.masked_fill(probs < _column(p, logits_bv) * probs.amax(dim=-1, keepdim=True), -torch.inf)


def sample(logits_bv: Tensor, temperature: float | Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw one token id a row, (batch,); the most likely one where the temperature is 0.

    An exponential race: ``argmax(log p_i - log E_i)`` with ``E_i ~ Exp(1)`` is distributed as ``p`` (the Gumbel-max
    trick) and needs no normalisation. Each row's noise comes from its own generator, so that its draw does not depend
    on its neighbours.
    """
    greedy_b = _column(temperature, logits_bv).expand(len(logits_bv), 1)[:, 0] < GREEDY_BELOW
    race_bv = logits_bv.clone()
    for row, (greedy, generator) in enumerate(zip(greedy_b.tolist(), generators, strict=True)):
        if not greedy:
            noise = torch.empty(logits_bv.shape[-1], device=generator.device).exponential_(generator=generator)
            race_bv[row] -= noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_().to(logits_bv.device)
    return race_bv.argmax(dim=-1)


class Sampler:
    """The sampling parameters of a batch, with the token counts and random generators they need.

    Args:
        params: one for each row.
        prompts: the prompt's token ids of each row.
        vocab_size: width of the logits.
    """

    def __init__(
        self, params: Sequence[SamplingParams], prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device
    ) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=device)

        self.temperature = column([p.temperature for p in params])
        self.top_k = column([p.top_k for p in params])
        self.top_p = column([p.top_p for p in params])
        self.min_p = column([p.min_p for p in params])
        self.repetition_penalty = column([p.repetition_penalty for p in params])
        self.frequency_penalty = column([p.frequency_penalty for p in params])
        self.presence_penalty = column([p.presence_penalty for p in params])
        self.generators = [_generator(p.seed) for p in params]
        # (batch, vocab) counters are kept only where some penalty reads them
        self.penalised = any(p.repetition_penalty != 1 or p.frequency_penalty or p.presence_penalty for p in params)
        shape = (len(params), vocab_size) if self.penalised else (len(params), 0)
        self.prompt_bv = torch.zeros(shape, dtype=torch.bool, device=device)
        self.counts_bv = torch.zeros(shape, dtype=torch.int32, device=device)
        if self.penalised:
            for row, prompt in enumerate(prompts):
                self.prompt_bv[row, torch.tensor(prompt, device=device)] = True

    def __call__(self, logits_bv: Tensor) -> Tensor:
        """The next token of each row, (batch,)."""
        logits_bv = sanitize(logits_bv)
        if self.penalised:
            logits_bv = apply_penalties(
                logits_bv,
                self.prompt_bv,
                self.counts_bv,
                repetition_penalty=self.repetition_penalty,
                frequency_penalty=self.frequency_penalty,
                presence_penalty=self.presence_penalty,
            )
        logits_bv = temper(logits_bv, self.temperature)
        if bool(self.top_k.any()):
            logits_bv = top_k(logits_bv, self.top_k)
        if bool((self.top_p < 1).any()):
            logits_bv = top_p(logits_bv, self.top_p)
        if bool(self.min_p.any()):
            logits_bv = min_p(logits_bv, self.min_p)
        ids_b = sample(logits_bv, self.temperature, self.generators)
        if self.penalised:
            self.counts_bv[torch.arange(len(ids_b), device=ids_b.device), ids_b] += 1
        return ids_b

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        index = torch.tensor(rows, dtype=torch.long, device=self.temperature.device)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[index])
        self.generators = [self.generators[row] for row in rows]


def _generator(seed: int | None) -> torch.Generator:
    """A generator on the CPU, so that a seed means the same draw on every device."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
