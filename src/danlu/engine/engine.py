"""The engine: requests in, tokens out, all of them in the same steps.

    step -> scheduler.schedule -> runner.run -> answers.advance

A request's answers depend on its prompt, parameters and seed alone, whatever else runs beside it.
"""

from __future__ import annotations

import itertools
import secrets
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from danlu.config import validate
from danlu.engine.answers import Answers
from danlu.engine.batch import AdapterRunner, Runner, Source
from danlu.engine.beam import Beams, BeamSearch
from danlu.engine.blocks import BlockManager
from danlu.engine.config import SamplingParams
from danlu.engine.drafts import Draft, Drafter, ModelDrafter, NGramDrafter
from danlu.engine.engine_config import EngineConfig
from danlu.engine.grammar import Grammar
from danlu.engine.kv_memory import blocks_that_fit, longest_that_fits, most_blocks, rope_key
from danlu.engine.logit_rules import SequenceSampler
from danlu.engine.native_runner import NativeRunner, weights_in_use
from danlu.engine.request import COUNTS, Event, Generation, Prompt, Request, Task, Unit, require_known, token_ids
from danlu.engine.request import Sequence as Line
from danlu.engine.runners import open_draft_model, open_runner
from danlu.engine.scheduler import Plan, Scheduler, batch_of
from danlu.engine.seq2seq import NO_DEMANDS, Seq2Seq
from danlu.engine.torch_runner import TorchRunner, Writer
from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.models.encoder_decoder import EncoderDecoder
from danlu.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from danlu.engine.logprobs import TokenLogprobs

Pooling = Literal["mean", "last"]

DEFAULTS = EngineConfig()


@dataclass(frozen=True)
class EngineStats:
    """What an engine does now and has done. Blocks are those of the layers that see everything, or else the first."""

    running: int
    waiting: int
    blocks_used: int
    blocks_free: int
    blocks_cached: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    preemptions: int
    drafted: int
    accepted: int


class Engine:
    """Answers requests. One thread may use it at a time.

    An encoder-decoder reads a prompt with its encoder, and the answer is all that its decoder writes.

    Args:
        model: a model folder, a GGUF file or a name that `danlu pull` knows; a model in memory, whose weights are taken
            as they are now (:meth:`update`); or a runner.
        tokenizer: for a model in memory. Without one, prompts are token ids and answers have no text.

    Raises:
        DanluError: the model cannot be opened, or the cache does not fit the memory.
    """

    def __init__(
        self,
        model: str | Path | Writer | Runner,
        config: EngineConfig = DEFAULTS,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.config = validate(config)
        self.runner, self.tokenizer = open_runner(model, self.config, tokenizer)
        self._seq2seq = self._open_seq2seq()
        shape = self.runner.config
        if self._seq2seq is None:
            context = min(shape.context, self.config.context or shape.context)
        else:
            context = self._seq2seq.context(self.config.context)
        n_blocks = blocks_that_fit(self.runner, self.config, context)
        self.runner.allocate(n_blocks, reserve=self.config.kv_reserve)
        self.max_len = longest_that_fits(self.runner, n_blocks, context)
        """Tokens that prompt and answer can have together; of encoder-decoders, the start token and the answer."""
        blocks = BlockManager(
            self.runner.groups, n_blocks, self.runner.block_size, prefix_cache=self.config.prefix_cache
        )
        self._scheduler = Scheduler(blocks, self.config.step_tokens, self.config.max_running)
        self._answers = Answers(self._scheduler, self.tokenizer)
        self._draft_model = open_draft_model(self.config, self.tokenizer, shape.vocab_size)
        self._drafts = self.config.draft == "ngram" or self._draft_model is not None
        self._to_fail: list[tuple[Request, Exception]] = []
        self._numbers = itertools.count(1)
        self._n_steps = 0
        self._closed = False
        self._loads: dict[str, int] = {}  # adapters, and which load of this engine each was
        self._n_loads = itertools.count(1)
        self._news: list[Event] = []  # of requests that were submitted one by one
        self._inboxes: dict[str, list[Event]] = {}  # of the others

    @property
    def has_encoder(self) -> bool:
        """Whether an encoder reads the prompts, and the answers continue nothing."""
        return self._seq2seq is not None

    def _open_seq2seq(self) -> Seq2Seq | None:
        model = self.runner.model if isinstance(self.runner, TorchRunner) else None
        if not isinstance(model, EncoderDecoder):
            return None
        if self.config.draft_model is not None:
            raise DanluError(
                "draft_model: would guess answers of an encoder-decoder without what its encoder read; "
                "leave it out, or take draft=ngram"
            )
        return Seq2Seq.of(model)

    # ---------------------------------------------------------------------------------------------- requests

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        adapter: str | None = None,
    ) -> str:
        """Queue a prompt; returns the id of the request, whose news come out of :meth:`step`.

        Args:
            prompt: text (the start of a document; of encoder-decoders, what is to be answered) or token ids.
            adapter: one that :meth:`load_adapter` has loaded; None: the model as it is.

        Raises:
            DanluError: this can never run: the prompt is empty, unknown to the model or too long, parameters are
                impossible, the id is taken, the adapter is not loaded, the engine is closed.
        """
        return self.enqueue(self.prepare(prompt, params, request_id=request_id, adapter=adapter))

    def enqueue(self, request: Request) -> str:
        """Queue what :meth:`prepare` has made; as :meth:`submit` otherwise."""
        if self._closed:
            raise DanluError("the engine is closed; open another")
        if request.id in self._answers.requests or request.id in self._inboxes:
            raise DanluError(f"request_id: {request.id!r} is running already; take another")
        if request.salt != self._salt(request.adapter, request.max_len, request.source):
            raise DanluError(f"adapter: {request.adapter!r} was unloaded since the request was prepared")
        self._answers.add(request)
        return request.id

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
        *,
        task: Task = "generate",
        pooling: Pooling = "mean",
        request_id: str | None = None,
        adapter: str | None = None,
        which: str = "the prompt",
    ) -> Request:
        """The part of :meth:`submit` that takes time and changes nothing: tokens, grammars, what can never run. Other
        threads may do it while one is in :meth:`step`.

        Args:
            task: "score" only reads the prompt, for its log probabilities; "embed" reads it for a vector.
            pooling: of what a text is embedded: the mean over its tokens, or the last one.
            which: the prompt's name in errors.
        """
        params = validate(params)
        if request_id is None:
            request_id = f"request-{next(self._numbers)}"
        if adapter is not None and adapter not in self._loads:
            known = ", ".join(self.adapters) or "none"
            raise DanluError(f"adapter: there is none of the name {adapter!r}; loaded: {known}")
        source: Source | None = None
        if self._seq2seq is None:
            ids = self._ids(prompt, which, room=task == "generate")
        else:
            self._seq2seq.require_answer(task, params)
            source = self._seq2seq.source(token_ids(prompt, self.tokenizer, which, for_encoder=True), which)
            ids = [self._seq2seq.start_id]
        if params.stop and self.tokenizer is None:
            raise DanluError("stop: texts end an answer only where there is a tokenizer; use stop_ids")
        seed = secrets.randbelow(2**63) if params.seed is None else params.seed
        max_len = min(len(ids) + params.max_new_tokens, self.max_len) if task == "generate" else len(ids)
        request = Request(
            id=request_id,
            prompt_ids=ids,
            params=params,
            task=task,
            seed=seed,
            max_len=max_len,
            salt=self._salt(adapter, max_len, source),
            source=source,
            adapter=adapter,
            observes=(task == "embed" and pooling == "mean") or params.prompt_logprobs is not None,
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
        )
        line = Line(request, 0, list(ids), self._answers.stream_for(request))
        if task == "generate":
            line.sampler = self._sampler(params, ids, seed, max_len - len(ids))
            if params.beams > 1:
                self._require_room_for_beams(request)
                beams = Beams(params.beams, params.length_penalty, params.early_stopping)
                request.search = BeamSearch(beams, max_len - len(ids), line.sampler.stop_ids)
            elif self._drafts:
                line.drafter = self._drafter(request, seed)
        line.unit = Unit(request, [line])
        request.units.append(line.unit)
        return request

    def _salt(self, adapter: str | None, max_len: int, source: Source | None) -> tuple[object, ...]:
        """What is cached for a request depends on it: an adapter that is loaded again may be another."""
        load = None if adapter is None else self._loads.get(adapter)
        read = None if source is None else source.ids_s.tobytes()
        return adapter, load, rope_key(self.runner.config, max_len), read

    def _ids(self, prompt: Prompt, which: str, *, room: bool) -> list[int]:
        """The tokens of a prompt, all known to the model and not too many.

        Args:
            room: whether an answer must fit behind them.
        """
        ids = token_ids(prompt, self.tokenizer, which)
        context = self.runner.config.context
        if not ids:
            raise DanluError(f"{which}: is empty; start it with the tokenizer's bos_id")
        if len(ids) > context - room:
            raise DanluError(
                f"{which}: has {len(ids)} tokens, the model's context {context}, answer included; shorten it"
            )
        if len(ids) > self.max_len - room:
            raise DanluError(
                f"{which}: has {len(ids)} tokens, and {self.max_len} fit the cache, answer included; shorten it, or "
                "raise kv_memory and context"
            )
        require_known(ids, self.runner.config.vocab_size, which)
        return ids

    def _require_room_for_beams(self, request: Request) -> None:
        beams = request.params.beams
        if request.params.logprobs is not None:
            raise DanluError("logprobs: beam search keeps none of single tokens; leave it out, or ask for one beam")
        if beams > self.config.max_running:
            raise DanluError(
                f"beams: {beams} are more than run at the same time (max_running {self.config.max_running})"
            )
        blocks = self._scheduler.blocks
        needed = most_blocks(blocks.groups, blocks.block_size, request.max_len, self.config.step_tokens)
        if any(beams * n > pool.n_blocks for n, pool in zip(needed, blocks.pools, strict=True)):
            raise DanluError(
                f"beams: {beams} beams of {request.max_len} tokens do not fit the cache; "
                "raise kv_memory, or lower beams or max_new_tokens"
            )

    def _sampler(self, params: SamplingParams, ids: list[int], seed: int, limit: int) -> SequenceSampler:
        if params.best_of is not None and params.logprobs is None:
            params = replace(params, logprobs=0)  # the best are chosen by their log probabilities
        grammar: Grammar | None = None
        stop_ids: Sequence[int] = ()
        if self.tokenizer is not None:
            grammar, stop_ids = Grammar.compile(params, self.tokenizer), self.tokenizer.stop_ids
        elif params.structure is not None:
            raise DanluError(f"{params.structure}: there is no tokenizer to tell which tokens write it")
        vocab_size = self.runner.config.vocab_size
        demands = NO_DEMANDS if self._seq2seq is None else self._seq2seq.demands
        return SequenceSampler(
            params, ids, vocab_size, stop_ids, seed, grammar, self.tokenizer, demands=demands, limit=limit
        )

    def abort(self, request_id: str) -> None:
        """End a request at once, wherever it is; its last event says "abort". An unknown id is ignored: the request may
        just have ended by itself."""
        request = self._answers.requests.get(request_id)
        if request is not None:
            self._answers.cut(request, "abort")

    # ---------------------------------------------------------------------------------------------- steps

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` has something to do or to tell."""
        return bool(self._answers.requests or self._answers.events or self._news)

    def step(self) -> list[Event]:
        """Run the next tokens of all that runs; returns what has come of it. What belongs to a :meth:`generate` or
        :meth:`stream` that is under way goes there."""
        self._step()
        news, self._news = self._news, []
        return news

    @torch.inference_mode()
    def _step(self) -> None:
        answers = self._answers
        if answers.requests:
            plan = self._scheduler.schedule(self._draft if self._drafts else None)
            self._n_steps += 1
            try:
                logits_rv, hidden_rd = self._run(plan)
            except BaseException as error:  # also Ctrl-C: what the tables say is not in the cache
                for request in {piece.sequence.request for piece in (*plan.pieces, *plan.hidden)}:
                    answers.fail(request, error if isinstance(error, Exception) else type(error).__name__)
                if not isinstance(error, Exception):
                    raise
            else:
                answers.advance(plan, logits_rv, hidden_rd)
            for request, reason in self._to_fail:
                if request.id in answers.requests:
                    answers.fail(request, reason)
            self._to_fail.clear()
        events, answers.events = answers.events, []
        for event in events:
            self._inboxes.get(event.request_id, self._news).append(event)

    def _run(self, plan: Plan) -> tuple[Tensor | None, Tensor | None]:
        for group, pairs in enumerate(plan.copies):
            if pairs:
                self.runner.copy_blocks(group, pairs)
        hidden_rd = self.runner.hidden(batch_of(plan.hidden)) if plan.hidden else None
        logits_rv = self.runner.run(batch_of(plan.pieces)) if plan.pieces else None
        return logits_rv, hidden_rd

    def _drafter(self, request: Request, seed: int) -> Drafter:
        if self._draft_model is not None:
            return ModelDrafter(self._draft_model, request.max_len, seed)
        return NGramDrafter()

    def _draft(self, line: Line, k: int) -> Draft | None:
        """Guesses of what follows. Who fails to guess is ended after the step."""
        assert line.drafter is not None
        known = line.token_ids
        if self._seq2seq is not None and self._seq2seq.one_vocabulary:  # answers often copy from what was asked
            known = [*line.request.asked_ids, *known]
        try:
            return line.drafter.propose(known, min(k, self.config.draft_tokens), line.sampler)
        except Exception as error:
            self._to_fail.append((line.request, error))
            return None

    # ---------------------------------------------------------------------------------------------- whole answers

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        adapter: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        """Answer prompts, as many at a time as fit; the answers come in the order of the prompts.

        Args:
            params: one for all, or one for each prompt.
            adapter: as in :meth:`submit`, for all.
            progress: called with the number of prompts that have just been answered.

        Raises:
            DanluError: a prompt or its parameters can never run; nothing is run then. What goes wrong later ends one
                answer alone, whose ``error`` says why.
        """
        each = [validate(params)] * len(prompts) if isinstance(params, SamplingParams) else [*map(validate, params)]
        return self._answer(prompts, each, adapter=adapter, progress=progress)

    def score(self, prompts: Sequence[Prompt], adapter: str | None = None) -> list[list[TokenLogprobs | None]]:
        """Log probability of each token of each prompt, given those before it; None for the first."""
        params = SamplingParams(prompt_logprobs=0)
        found = self._answer(prompts, [params] * len(prompts), task="score", adapter=adapter)
        return [_without_error(generation).prompt_logprobs or [] for generation in found]

    def embed(self, prompts: Sequence[Prompt], pooling: Pooling = "mean", adapter: str | None = None) -> Tensor:
        """Final hidden states of prompts, (prompts, dim) fp32: the mean over all tokens, or the last token's."""
        params = [SamplingParams()] * len(prompts)
        found = self._answer(prompts, params, task="embed", pooling=pooling, adapter=adapter)
        pooled = [_without_error(generation).embedding for generation in found]
        vectors = [vector for vector in pooled if vector is not None]
        if len(vectors) < len(pooled):
            raise DanluError("the engine was closed before all texts were embedded")
        return torch.stack(vectors) if vectors else torch.empty(0, self.runner.config.dim)

    def stream(self, prompt: Prompt, params: SamplingParams, adapter: str | None = None) -> Generator[Event]:
        """Answer one prompt; its events as they come. Who stops to listen aborts it.

        Raises:
            DanluError: as :meth:`submit`.
        """
        return self._events([prompt], [validate(params)], [], adapter=adapter)

    def _answer(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        task: Task = "generate",
        pooling: Pooling = "mean",
        adapter: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        if len(params) != len(prompts):
            raise DanluError(
                f"there are {len(prompts)} prompts and {len(params)} sets of parameters; give one for each"
            )
        requests: list[Request] = []
        done: dict[str, Generation] = {}
        for event in self._events(prompts, params, requests, task, pooling, adapter):
            if event.generation is not None:
                done[event.request_id] = event.generation
                if progress is not None:
                    progress(1)
        return [done[request.id] for request in requests]

    def _events(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        requests: list[Request],
        task: Task = "generate",
        pooling: Pooling = "mean",
        adapter: str | None = None,
    ) -> Generator[Event]:
        """Submit prompts (entered into ``requests``) and run until all of them are done; their events."""
        inbox: list[Event] = []
        try:
            for number, (prompt, one) in enumerate(zip(prompts, params, strict=True), 1):
                which = f"prompt {number}" if len(prompts) > 1 else "the prompt"
                request = self.prepare(prompt, one, task=task, pooling=pooling, adapter=adapter, which=which)
                self.enqueue(request)
                requests.append(request)
                self._inboxes[request.id] = inbox
            n_open = len(requests)
            while n_open:
                self._step()
                events, inbox[:] = inbox[:], []
                n_open -= sum(event.generation is not None for event in events)
                yield from events
        finally:
            for request in requests:
                if self._answers.requests.get(request.id) is request:
                    self._answers.cut(request, "abort")
            own = {request.id for request in requests}
            self._answers.events = [event for event in self._answers.events if event.request_id not in own]
            for request in requests:
                del self._inboxes[request.id]

    # ---------------------------------------------------------------------------------------------- adapters

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded."""
        return tuple(self._loads)

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Read an adapter, a folder in PEFT's layout, to run beside the model: each request names the one it wants, or
        none, and all run in the same steps. Another thread may be in :meth:`step`, but not in here.

        Raises:
            DanluError: the name is taken, the adapter does not fit the model, or is of a kind that must be merged.
        """
        if name in self._loads:
            raise DanluError(f"adapter: {name!r} is loaded already; unload it first, or take another name")
        if not isinstance(self.runner, AdapterRunner):
            raise DanluError(f"adapter: a {type(self.runner).__name__} applies no adapters")
        self.runner.load_adapter(name, folder)
        self._loads[name] = next(self._n_loads)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            DanluError: it is not loaded, or requests use it.
        """
        if name not in self._loads:
            raise DanluError(f"adapter: {name!r} is not loaded")
        if n := sum(request.adapter == name for request in self._answers.requests.values()):
            raise DanluError(f"adapter: {n} requests use {name!r}; let them end, or abort them, before it is unloaded")
        del self._loads[name]
        assert isinstance(self.runner, AdapterRunner)
        self.runner.unload_adapter(name)

    # ---------------------------------------------------------------------------------------------- the whole

    def close(self) -> None:
        """End all requests with "abort", which :meth:`step` still tells, and free the cache."""
        if self._closed:
            return
        self._closed = True
        for request in list(self._answers.requests.values()):
            self._answers.cut(request, "abort")
        self.runner.allocate([0] * len(self.runner.groups))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, model: Writer) -> None:
        """Take the model's weights as they are now: between the steps of a trainer that samples from it. What was
        cached for the old ones is forgotten.

        Raises:
            DanluError: requests are running; their caches belong to the old weights.
        """
        if self._answers.requests:
            raise DanluError("update: requests are running; let them end, or abort them, before the weights change")
        if isinstance(self.runner, NativeRunner):
            assert isinstance(model, CausalLM)
            self.runner.update(weights_in_use(model))
        elif isinstance(self.runner, TorchRunner):
            self.runner.take(model)
        self._scheduler.blocks.forget_prefixes()

    def check(self) -> None:
        """Compare the accounts of all blocks with the tables of all requests.

        Raises:
            AssertionError: they disagree.
        """
        tables = []
        for request in self._answers.requests.values():
            for unit in request.units:
                tables += [line.table for line in unit.sequences if line.table is not None]
        self._scheduler.blocks.check(tables)

    @property
    def stats(self) -> EngineStats:
        """What it does now and has done."""
        counts = Counter(self._answers.counts)
        for request in self._answers.requests.values():
            counts.update(request.counts())
        pool = self._scheduler.blocks.pools[0]
        return EngineStats(
            running=sum(len(unit.sequences) for unit in self._scheduler.running),
            waiting=sum(len(unit.sequences) for unit in self._scheduler.waiting),
            blocks_used=pool.n_blocks - pool.n_free,
            blocks_free=pool.n_free,
            blocks_cached=pool.n_cached,
            steps=self._n_steps,
            **{field: counts[field] for field in COUNTS},
        )


def _without_error(generation: Generation) -> Generation:
    if generation.error is not None:
        raise DanluError(generation.error)
    return generation
