"""Answers of encoder-decoder models: greedy, sampled, or found by beam search.

What the model's `generation_config.json` demands of every answer (how it begins and ends, n-grams that must not
repeat, a least length) is kept; how the answer is searched for is up to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from danlu.config import validate
from danlu.engine.beam import Beams, BeamSearch
from danlu.engine.generate import Completion, Prompt
from danlu.engine.logit_rules import Sampler
from danlu.engine.sampling import GREEDY_BELOW, SamplingParams, sanitize
from danlu.errors import DanluError
from danlu.models.encoder_decoder import EncoderDecoder
from danlu.nn.kv_cache import KVCache

if TYPE_CHECKING:
    from danlu.tokenizer.tokenizer import Tokenizer

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

ONE_BEAM = Beams()


@dataclass(frozen=True)
class Demands:
    """What a model asks of every answer. The start token counts as a token of it where n-grams are compared.

    Attributes:
        start_id: what the decoder begins with.
        first: each answer begins with one of these, if there are any.
        last: where an answer has one token left, it is one of these, if there are any.
        no_repeat_ngram: no n-gram of this size occurs twice in an answer; 0: any may.
        least: stop tokens are barred before this many tokens.
    """

    start_id: int
    stop_ids: frozenset[int]
    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    no_repeat_ngram: int = 0
    least: int = 0

    @classmethod
    def of(cls, model: EncoderDecoder, stop_ids: Sequence[int]) -> Demands:
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
        return cls(
            start_id=whole("decoder_start_token_id", model.config.decoder_start_id, vocab_size),
            stop_ids=frozenset(i for i in stop_ids if i < vocab_size),
            first=() if first is None else (first,),
            last=tuple(_whole("forced_eos_token_id", token_id, vocab_size) for token_id in last),
            no_repeat_ngram=whole("no_repeat_ngram_size", 0),
            least=whole("min_new_tokens", max(0, whole("min_length", 0) - 1)),  # that length counts the start token
        )

    def apply(self, scores_rv: Tensor, answers: Sequence[Sequence[int]], left: Sequence[int]) -> None:
        """Bar tokens, in place: their score becomes -inf; a forced token's becomes 0.

        Args:
            scores_rv: (rows, vocab) logits or log probabilities of the next token.
            answers: tokens of each row so far, without the start token.
            left: tokens that each row may still get.
        """
        for scores_v, answer, n_left in zip(scores_rv, answers, left, strict=True):
            if self.no_repeat_ngram:
                scores_v[repeating([self.start_id, *answer], self.no_repeat_ngram)] = -torch.inf
            if len(answer) < self.least:
                scores_v[list(self.stop_ids)] = -torch.inf
            forced = (self.last if n_left == 1 else ()) or (() if answer else self.first)
            if forced:
                scores_v.fill_(-torch.inf)
                scores_v[list(forced)] = 0


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


class Decoder:
    """Rows that advance one token at a time, each looking at its source.

    Args:
        sources: token ids of each source, none empty.
        max_tokens: steps that will be made at most.
    """

    def __init__(self, model: EncoderDecoder, sources: Sequence[Sequence[int]], max_tokens: int) -> None:
        longest = max(map(len, sources))
        ids_bs = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sources], device=model.device)
        lengths_b = torch.tensor([len(ids) for ids in sources], device=model.device)
        real_bs = torch.arange(longest, device=model.device) < lengths_b[:, None]
        self.model = model
        self._memory = model.encode(ids_bs, None if bool(real_bs.all()) else real_bs)
        self._cache = KVCache(model.config.decoder, len(sources), max_tokens, device=model.device, dtype=model.dtype)

    def step(self, ids: Sequence[int]) -> Tensor:
        """Logits, (rows, vocab), of what follows the newest token of each row."""
        ids_r1 = torch.tensor(ids, device=self.model.device)[:, None]
        return self.model.decode(ids_r1, self._memory, self._cache)[:, -1]

    def select(self, rows: Sequence[int]) -> None:
        """These rows, in this order; a row may be taken more than once."""
        index = torch.tensor(rows, dtype=torch.long, device=self.model.device)
        self._memory = self._memory.select(index)
        self._cache.select(index)


def generate_seq2seq(
    model: EncoderDecoder,
    tokenizer: Tokenizer,
    texts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    beams: Beams = ONE_BEAM,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Answer texts, many at a time.

    Args:
        texts: what the encoder reads: texts, which get the special tokens of the family, or token ids with them.
        params: one for all, or one for each text. A seed's draws are shared by texts that share the seed.
        beams: more than one: beam search, which needs a temperature of 0.
        batch_size: rows decoded together; each beam is a row.
        progress: called with the number of texts that have just been answered.

    Raises:
        DanluError: a text does not fit the model, parameters are out of bounds, or the model's generation_config.json
            demands what is not supported.
    """
    sources = [tokenizer.encode_for_encoder(text)[0] if isinstance(text, str) else list(text) for text in texts]
    each = [validate(params)] * len(sources) if isinstance(params, SamplingParams) else [validate(p) for p in params]
    if len(each) != len(sources):
        raise DanluError(f"there are {len(sources)} texts and {len(each)} sets of parameters; give one for each")
    for number, (source, p) in enumerate(zip(sources, each, strict=True), 1):
        _check(model, source, p, f"text {number}" if len(sources) > 1 else "the text", beams)
    demands = Demands.of(model, tokenizer.stop_ids)
    answers: dict[int, Completion] = {}
    by_length = sorted(range(len(sources)), key=lambda i: len(sources[i]))  # little padding in each batch
    n_texts = max(1, batch_size // beams.number)
    for start in range(0, len(sources), n_texts):
        batch = by_length[start : start + n_texts]
        inputs = [sources[i] for i in batch], [each[i] for i in batch]
        found = (
            _sample(model, tokenizer, demands, *inputs)
            if beams.number == 1
            else _beam_search(model, tokenizer, demands, *inputs, beams)
        )
        for place, completion in found:
            answers[batch[place]] = completion
            if progress is not None:
                progress(1)
    return [answers[i] for i in range(len(sources))]


def _check(model: EncoderDecoder, source: Sequence[int], params: SamplingParams, which: str, beams: Beams) -> None:
    encoder = model.config.encoder
    if not source:
        raise DanluError(f"{which}: is empty; an encoder needs at least one token")
    if encoder.learned_positions and len(source) > encoder.context:
        raise DanluError(
            f"{which}: has {len(source)} tokens; the model has positions for {encoder.context}; shorten it"
        )
    if not 0 <= min(source) <= max(source) < encoder.vocab_size:
        raise DanluError(
            f"{which}: has token ids outside the model's vocabulary of {encoder.vocab_size}; use the model's tokenizer"
        )
    penalties = params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty
    if beams.number > 1 and (params.temperature >= GREEDY_BELOW or penalties):
        raise DanluError("beam search takes the most likely answers: set temperature to 0 and penalties off")


def _limits(model: EncoderDecoder, params: Sequence[SamplingParams]) -> list[int]:
    """Tokens that each answer may have."""
    decoder = model.config.decoder
    return [min(p.max_new_tokens, decoder.context) if decoder.learned_positions else p.max_new_tokens for p in params]


@torch.inference_mode()
def _sample(
    model: EncoderDecoder,
    tokenizer: Tokenizer,
    demands: Demands,
    sources: list[list[int]],
    params: list[SamplingParams],
) -> Iterator[tuple[int, Completion]]:
    """(row, completion) in the order in which rows finish."""
    limits = _limits(model, params)
    decoder = Decoder(model, sources, max(limits))
    start = [demands.start_id]
    sampler = Sampler(params, [start] * len(sources), model.config.decoder.vocab_size)
    answers: list[list[int]] = [[] for _ in sources]
    rows, ids = list(range(len(sources))), start * len(sources)
    while rows:
        logits_rv = decoder.step(ids)
        demands.apply(logits_rv, [answers[row] for row in rows], [limits[row] - len(answers[row]) for row in rows])
        ids = sampler(logits_rv).tolist()
        staying = []
        for place, (row, token_id) in enumerate(zip(rows, ids, strict=True)):
            answers[row].append(token_id)
            full = len(answers[row]) == limits[row]
            stopped = token_id in demands.stop_ids or (
                params[row].stop and _until_stop(tokenizer.decode(answers[row], skip_special=True), params[row])[1]
            )
            if full or stopped:
                yield row, _completion(tokenizer, demands, answers[row], full, params[row])
            else:
                staying.append(place)
        if len(staying) < len(rows):
            rows, ids = [rows[place] for place in staying], [ids[place] for place in staying]
            decoder.select(staying)
            sampler.select(staying)


@torch.inference_mode()
def _beam_search(
    model: EncoderDecoder,
    tokenizer: Tokenizer,
    demands: Demands,
    sources: list[list[int]],
    params: list[SamplingParams],
    beams: Beams,
) -> Iterator[tuple[int, Completion]]:
    """(row, completion) in the order in which texts finish."""
    limits = _limits(model, params)
    decoder = Decoder(model, sources, max(limits))
    searches = [BeamSearch(beams, limit, demands.stop_ids) for limit in limits]
    texts = list(range(len(sources)))  # those still searched for; each has as many rows as answers that run
    ids = [demands.start_id] * len(sources)
    while texts:
        active = [searches[text] for text in texts]
        logprobs_rv = sanitize(decoder.step(ids)).log_softmax(dim=-1)
        answers = [answer.token_ids for search in active for answer in search.running]
        left = [search.limit - len(answer.token_ids) for search in active for answer in search.running]
        demands.apply(logprobs_rv, answers, left)
        rows, ids, staying = [], [], []
        first = 0
        for text, search in zip(texts, active, strict=True):
            end = first + len(search.running)
            moves = search.advance(logprobs_rv[first:end])
            if search.done:
                answer = search.finished[0].token_ids if search.finished else []
                yield text, _completion(tokenizer, demands, answer, len(answer) == limits[text], params[text])
            else:
                staying.append(text)
                rows += [first + parent for parent, _ in moves]
                ids += [token_id for _, token_id in moves]
            first = end
        texts = staying
        decoder.select(rows)


def _completion(
    tokenizer: Tokenizer, demands: Demands, answer: list[int], full: bool, params: SamplingParams
) -> Completion:
    """An answer as text. A stop token that was forced because the answer is full does not count as its end."""
    ended = bool(answer) and answer[-1] in demands.stop_ids
    ids = answer[:-1] if ended else answer
    text, cut = _until_stop(tokenizer.decode(ids, skip_special=True), params)
    return Completion(text, ids, "stop" if cut or (ended and not (full and demands.last)) else "length")


def _until_stop(text: str, params: SamplingParams) -> tuple[str, bool]:
    """The text before the stop string that is complete first, and whether there is one."""
    found = [(start + len(stop), start) for stop in params.stop if (start := text.find(stop)) >= 0]
    return (text[: min(found)[1]], True) if found else (text, False)
