"""What the engine has to know of an encoder-decoder beside its decoder's shape: what its encoder can read, and what the
model's `generation_config.json` demands of every answer, however it is searched for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from danlu.engine.batch import Source
from danlu.engine.request import require_known
from danlu.errors import DanluError
from danlu.nn.config import EncoderDecoderConfig

if TYPE_CHECKING:
    from danlu.engine.config import SamplingParams
    from danlu.engine.request import Task
    from danlu.models.encoder_decoder import EncoderDecoder

# Demands of a generation_config.json that are not honoured, and the value with which each says nothing.
REFUSED = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_decoder_ids": None,
    "guidance_scale": 1.0,
    "num_beam_groups": 1,
    "penalty_alpha": 0.0,
    "sequence_bias": None,
    "suppress_tokens": None,
    "watermarking_config": None,
}


@dataclass(frozen=True)
class Demands:
    """What a model asks of every answer.

    Attributes:
        first: each answer begins with one of these, if there are any.
        last: where an answer has room for one token more, it is one of these, if there are any.
        no_repeat_ngram: no n-gram of this size occurs twice in an answer and what it begins behind; 0: any may.
        least: stop tokens are barred before this many tokens.
    """

    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    no_repeat_ngram: int = 0
    least: int = 0

    def forced(self, n: int, limit: int | None) -> tuple[int, ...]:
        """One of these comes behind the first ``n`` tokens of an answer that may have ``limit``; empty: any may."""
        return (self.last if n + 1 == limit else ()) or (self.first if n == 0 else ())


NO_DEMANDS = Demands()


@dataclass(frozen=True)
class Seq2Seq:
    """An encoder-decoder as the engine sees it.

    Attributes:
        start_id: what the decoder begins with. It is no part of an answer.
    """

    config: EncoderDecoderConfig
    start_id: int
    demands: Demands

    @classmethod
    def of(cls, model: EncoderDecoder) -> Seq2Seq:
        """Read from `generation_config.json`, or from `config.json`, where older models have these fields.

        Raises:
            DanluError: a field is not supported or not understood.
        """
        vocab_size = model.config.decoder.vocab_size
        fields = {**model.hf_config, **model.generation_config}

        def whole(name: str, default: int | None, below: int = 2**31) -> Any:
            value = fields.get(name)
            return default if value is None else _whole(name, value, below)

        for name, nothing in REFUSED.items():
            if fields.get(name) not in (None, nothing, [], {}):
                raise DanluError(f"generation_config.json: {name} is {fields[name]!r}, which is not supported")
        first = whole("forced_bos_token_id", None, vocab_size)
        if first is None and fields.get("force_bos_token_to_be_generated"):  # its name in the first BART checkpoints
            first = whole("bos_token_id", None, vocab_size)
        last = fields.get("forced_eos_token_id")
        last = last if isinstance(last, list) else [] if last is None else [last]
        demands = Demands(
            first=() if first is None else (first,),
            last=tuple(_whole("forced_eos_token_id", token_id, vocab_size) for token_id in last),
            no_repeat_ngram=whole("no_repeat_ngram_size", 0),
            least=whole("min_new_tokens", max(0, whole("min_length", 0) - 1)),  # that length counts the start token
        )
        return cls(model.config, whole("decoder_start_token_id", model.config.decoder_start_id, vocab_size), demands)

    @property
    def one_vocabulary(self) -> bool:
        """Whether an answer may have the tokens of its source."""
        return self.config.encoder.vocab_size == self.config.decoder.vocab_size

    def context(self, wanted: int | None) -> int:
        """Tokens that the start token and an answer can have together: one more than an answer, whose last token is
        never run. Only learned positions end; relative ones go on.

        Args:
            wanted: tokens of an answer; None: as many as the decoder was made for.
        """
        decoder = self.config.decoder
        longest = wanted or decoder.context
        return 1 + (min(longest, decoder.context) if decoder.learned_positions else longest)

    def require_answer(self, task: Task, params: SamplingParams) -> None:
        """Raises DanluError where something else than an answer is wanted."""
        wanted = "prompt_logprobs" if task == "generate" else task
        if task != "generate" or params.prompt_logprobs is not None:
            raise DanluError(
                f"{wanted}: an encoder-decoder answers its prompt, and tells neither probabilities nor a vector of it; "
                "take a model of one stack"
            )

    def source(self, ids: Sequence[int], which: str) -> Source:
        """What the encoder reads.

        Args:
            which: its name in errors.

        Raises:
            DanluError: the encoder cannot read it: there is nothing in it, too much, or unknown tokens.
        """
        encoder = self.config.encoder
        if not ids:
            raise DanluError(f"{which}: is empty; an encoder needs at least one token")
        if encoder.learned_positions and len(ids) > encoder.context:
            raise DanluError(
                f"{which}: has {len(ids)} tokens; the model has positions for {encoder.context}; shorten it"
            )
        require_known(ids, encoder.vocab_size, which)
        return Source(np.array(ids, dtype=np.int32))


def _whole(name: str, value: Any, below: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < below:
        raise DanluError(f"generation_config.json: {name} is {value!r}; expected a whole number below {below}")
    return value


def repeating(ids: Sequence[int], n: int) -> list[int]:
    """The tokens that would complete an n-gram which is in ``ids`` already."""
    if len(ids) < n:
        return []
    begun = list(ids[len(ids) - n + 1 :])
    return [ids[i + n - 1] for i in range(len(ids) - n + 1) if list(ids[i : i + n - 1]) == begun]
