"""How the next token is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from danlu.config import option

MOST_SEQUENCES, MOST_BEAMS, MOST_LOGPROBS, MOST_STRINGS, LONGEST_STRING = 128, 64, 100, 256, 1000
"""What one request may ask for: more would let it take the memory of all others."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is decoded. The defaults leave the model's own distribution as it is.

    Everything is applied in one order: bans, biases and penalties, then the temperature, then top-k, top-p, min-p and
    typical-p, each on what the one before left. There are two frequency penalties: ``frequency_penalty`` is OpenAI's,
    which takes ``penalty * count`` off the logit, so that each use divides the odds by the same factor;
    ``count_penalty`` is ``P = P0 / (1 + penalty * count)`` on the probability before the temperature, in which each
    further use weighs less than the one before.

    Args:
        json_schema: a mapping, or its JSON text.
    """

    max_new_tokens: int = option(256, "Stop after this many new tokens.", unit="tokens", ge=1)
    min_new_tokens: int = option(0, "Stop tokens are barred before this many new tokens.", unit="tokens", ge=0)
    temperature: float = option(1.0, "Divides the logits; 0 is greedy: always the most likely token.", ge=0, le=100)
    top_k: int = option(0, "Keep only the k most likely tokens; 0 keeps all.", ge=0)
    top_p: float = option(
        1.0, "Keep the fewest most likely tokens whose probabilities sum to p; 1 keeps all.", gt=0, le=1
    )
    min_p: float = option(
        0.0, "Drop tokens less likely than this share of the most likely one; 0 keeps all.", ge=0, le=1
    )
    typical_p: float = option(
        1.0,
        "Keep the tokens whose surprise is nearest to the mean surprise and whose probabilities sum to p; 1 keeps all.",
        gt=0,
        le=1,
    )
    repetition_penalty: float = option(
        1.0, "Divides positive and multiplies negative logits of tokens in prompt or answer; 1 is off.", ge=0.01, le=100
    )
    frequency_penalty: float = option(0.0, "Taken off a token's logit each time the answer used it.", ge=-2, le=2)
    presence_penalty: float = option(0.0, "Taken off a token's logit once the answer has used it.", ge=-2, le=2)
    count_penalty: float = option(
        0.0, "Divides a token's probability by 1 + penalty x the times the answer used it.", ge=0, le=1000
    )
    logit_bias: dict[int, float] = option(
        {}, "Added to the logits of tokens, as {token id: bias}; -100 all but bars a token.", ge=-100, le=100
    )
    allowed_tokens: tuple[int, ...] = option((), "Ids of the only tokens, beside stop tokens, that may be used.")
    banned_tokens: tuple[int, ...] = option((), "Ids of tokens that are never used.")
    banned_strings: tuple[str, ...] = option((), "Texts that never occur in the answer.")
    seed: int | None = option(None, "Makes sampling repeatable; none draws a new seed each time.", ge=0, lt=2**63)
    stop: tuple[str, ...] = option((), "Texts that end the answer; they are not part of it.")
    stop_ids: tuple[int, ...] = option((), "Ids of tokens that end the answer, beside the model's own.")
    ignore_eos: bool = option(False, "The model's own stop tokens do not end the answer.")
    n: int = option(1, "Answers to give.", ge=1, le=MOST_SEQUENCES)
    best_of: int | None = option(
        None, "Make so many answers and give the n of highest mean log-probability.", ge=1, le=MOST_SEQUENCES
    )
    beams: int = option(1, "Beams of beam search; 1: no search.", ge=1, le=MOST_BEAMS)
    length_penalty: float = option(
        1.0, "Beams are compared by log-probability / tokens^penalty: above 0 favours long answers.", ge=-10, le=10
    )
    early_stopping: bool = option(False, "Beam search ends with as many finished answers as beams.")
    logprobs: int | None = option(
        None, "Log-probabilities of the answer's tokens, with so many most likely ones.", ge=0, le=MOST_LOGPROBS
    )
    logprobs_temperature: float = option(
        1.0, "Log-probabilities of the answer are told as if the logits were divided by this.", gt=0, le=100
    )
    prompt_logprobs: int | None = option(
        None, "Log-probabilities of the prompt's tokens, with so many most likely ones.", ge=0, le=MOST_LOGPROBS
    )
    json_schema: str | dict[str, Any] | None = option(None, "The answer is JSON that this JSON schema admits.")
    regex: str | None = option(None, "The whole answer matches this regular expression.")
    choice: tuple[str, ...] = option((), "The answer is one of these texts.")
    grammar: str | None = option(None, "The answer follows this grammar, in Lark's syntax.")

    @property
    def structure(self) -> str | None:
        """The option that tells how the answer is built, if one does."""
        return next(iter(self._structures()), None)

    def problems(self) -> list[str]:
        """What no bound of a single field can tell."""
        return [*self._impossible_strings(), *self._impossible_ids(), *self._conflicts()]

    def _structures(self) -> list[str]:
        return [name for name in ("json_schema", "regex", "choice", "grammar") if getattr(self, name) not in (None, ())]

    def _impossible_strings(self) -> Iterator[str]:
        if "" in self.stop:
            yield "stop: an empty text would stop at once; leave it out"
        if "" in self.banned_strings:
            yield "banned_strings: an empty text is in every answer; leave it out"
        for name, texts in (("stop", self.stop), ("banned_strings", self.banned_strings)):
            if len(texts) > MOST_STRINGS or max(map(len, texts), default=0) > LONGEST_STRING:
                yield f"{name}: at most {MOST_STRINGS} texts of at most {LONGEST_STRING} characters can be watched for"
        for name in ("json_schema", "regex", "grammar"):
            if getattr(self, name) == "":
                yield f"{name}: is empty; leave it out"
        if "" in self.choice:
            yield "choice: an empty text is no answer; leave it out"

    def _impossible_ids(self) -> Iterator[str]:
        for name in ("logit_bias", "allowed_tokens", "banned_tokens", "stop_ids"):
            if any(token_id < 0 for token_id in getattr(self, name)):
                yield f"{name}: token ids are not negative"

    def _conflicts(self) -> Iterator[str]:
        given = self._structures()
        if len(given) > 1:
            yield f"{' and '.join(given)} are given together; an answer has one structure"
        if given and (self.min_new_tokens or self.ignore_eos):
            yield f"{given[0]}: the answer ends where its structure ends; leave out min_new_tokens and ignore_eos"
        if self.min_new_tokens > self.max_new_tokens:
            yield f"min_new_tokens ({self.min_new_tokens}) is more than max_new_tokens ({self.max_new_tokens})"
        if self.best_of is not None and self.best_of < self.n:
            yield f"best_of ({self.best_of}) is less than n ({self.n})"
        if self.beams > 1:
            if self.temperature > 0:
                yield "beams: beam search takes the most likely answers; set temperature to 0"
            if self.n > self.beams:
                yield f"n ({self.n}) is more than beams ({self.beams}), which is all that the search ends with"
            if self.best_of is not None:
                yield "best_of: beam search has its own ranking; leave it out"
            barred = [name for name, off in NOT_WITH_BEAMS.items() if getattr(self, name) != off]
            if barred:
                yield f"beams: beam search takes the model's own probabilities; leave out {', '.join(barred)}"


NOT_WITH_BEAMS = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "count_penalty": 0.0,
}
"""Options that beam search does not have, and the value with which each says nothing."""
