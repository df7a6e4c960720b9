"""From logits to news: the next token of each sequence, what it adds to the text, and whether that was the last."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from danlu.engine.beam import BeamSearch, beam_logprobs
from danlu.engine.logit_rules import sample_rows
from danlu.engine.logprobs import Sampled, logprobs_of
from danlu.engine.request import Completion, Event, FinishReason, Generation, Request, Unit
from danlu.engine.request import Sequence as Line
from danlu.engine.scheduler import Piece, Plan, Scheduler
from danlu.engine.speculative import verify
from danlu.engine.text_stream import TextStream
from danlu.errors import DanluError
from danlu.tokenizer.tokenizer import Tokenizer


class Answers:
    """All requests that are not done yet, and what each step makes of them.

    Args:
        tokenizer: None: answers are tokens without text.
    """

    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer | None) -> None:
        self.scheduler, self.blocks, self.tokenizer = scheduler, scheduler.blocks, tokenizer
        self.requests: dict[str, Request] = {}
        self.events: list[Event] = []
        """What has happened since it was last taken away."""
        self.counts: Counter[str] = Counter()
        """Of the requests that are done."""

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        self.requests[request.id] = request
        self.scheduler.add(request.units[0])

    def stream_for(self, request: Request) -> TextStream | None:
        """Text of a new answer."""
        if self.tokenizer is None:
            return None
        return TextStream(self.tokenizer, request.params.stop, begins_text=request.source is not None)

    def advance(self, plan: Plan, logits_rv: Tensor | None, hidden_rd: Tensor | None) -> None:
        """The step has been run: its logits and hidden states, in the order of the plan's pieces."""
        if hidden_rd is not None:
            self._pool(plan.hidden, hidden_rd)
        if logits_rv is None:
            return
        rows: list[int] = []
        lines: list[Line] = []
        row = 0
        for piece in plan.pieces:
            line, first = piece.sequence, row
            row += piece.n_rows
            request = line.request
            if request.id not in self.requests:  # an error ended it in this very step
                continue
            line.n_computed += piece.n
            if request.observes:
                self._observe(piece, logits_rv[first:row])
            if piece.draft is not None:
                self._verify(piece, logits_rv[first:row])
                continue
            assert line.table is not None
            self.blocks.commit(line.table, line.token_ids, line.n_computed)
            if not piece.completes:
                continue
            if request.task == "score":
                self._end(line, "stop")
            elif request.search is not None:
                if line is line.unit.sequences[-1]:
                    self._search(line.unit, logits_rv[row - len(line.unit.sequences) : row])
            else:
                for one in self._fork(line):
                    rows.append(row - 1)
                    lines.append(one)
        if lines:
            if rows != list(range(logits_rv.shape[0])):
                logits_rv = logits_rv[torch.tensor(rows, device=logits_rv.device)]
            for line, sampled in zip(lines, self._sample(logits_rv, lines), strict=True):
                if sampled is not None:
                    self._accept(line, [sampled])

    def _fork(self, line: Line) -> list[Line]:
        """The line itself and, behind the prompt that they share, those that answer it beside."""
        request = line.request
        if len(request.units) == request.n_answers:
            return [line]
        lines = [line]
        for index in range(1, request.n_answers):
            other = Line(request, index, list(line.token_ids), self.stream_for(request))
            other.sampler = line.sampler.fork(request.seed_of(index))
            other.unit = self.scheduler.split(line.unit, other)
            request.units.append(other.unit)
            lines.append(other)
        return lines

    def _sample(self, logits_rv: Tensor, lines: Sequence[Line]) -> Sequence[Sampled | None]:
        """The next token of each; None for those whose request ended with an error."""
        try:
            return sample_rows(logits_rv, [line.sampler for line in lines])
        except Exception as error:
            if len(lines) == 1:
                self.fail(lines[0].request, error)
                return [None]
        # One of them is to blame. Nothing was drawn yet: rules come before all draws.
        return [
            self._sample(logits_rv[i : i + 1], [line])[0] if line.finish_reason is None else None
            for i, line in enumerate(lines)
        ]

    def _verify(self, piece: Piece, logits_kv: Tensor) -> None:
        """Take those of the guessed tokens that are right, and the one behind them."""
        line, draft = piece.sequence, piece.draft
        assert draft is not None
        assert line.drafter is not None
        assert line.table is not None
        request = line.request
        try:
            chosen = verify(logits_kv, draft.ids, draft.probs_kv, line.sampler)
        except Exception as error:
            self.fail(request, error)
            return
        accepted = len(chosen) - 1
        line.drafter.length.observe(len(draft.ids), accepted)
        request.drafted += len(draft.ids)
        request.accepted += accepted
        line.n_computed += accepted
        ended = self._accept(line, chosen, told=True)
        if not ended:
            self.blocks.commit(line.table, line.token_ids, line.n_computed)

    def _accept(self, line: Line, chosen: Sequence[Sampled], *, told: bool = False) -> bool:
        """Append tokens to an answer; whether that ended it.

        Args:
            told: the sampler has accepted the tokens already.
        """
        request, stream = line.request, line.stream
        if request.first_token_at is None:
            request.first_token_at = time.perf_counter()
        text, n_before = "", len(line.token_ids)
        reason: FinishReason | None = None
        for sampled in chosen:
            token_id = sampled.token_id
            if not told:
                try:
                    line.sampler.accept(token_id)
                except Exception as error:
                    self.fail(request, error)
                    return True
            request.new_tokens += 1
            line.n_chosen += 1
            if sampled.logprobs is not None:
                line.logprob += sampled.logprobs.logprob
            if token_id in line.sampler.stop_ids:
                reason = "length" if line.sampler.forces_end(line.n_chosen) else "stop"
                line.stop_token = sampled
                break
            line.token_ids.append(token_id)
            if sampled.logprobs is not None:
                line.logprobs.append(sampled.logprobs)
            if stream is not None:
                text += stream.push(token_id)
            if (stream is not None and stream.stopped) or line.sampler.finished:
                reason = "stop"
                break
            if len(line.token_ids) >= request.max_len:
                reason = "length"
                break
        if text:
            line.text.append(text)
        if reason is not None:
            self._end(line, reason, text, n_before)
            return True
        if request.streams:
            self._tell(line, text, n_before)
        return False

    def _tell(
        self,
        line: Line,
        text: str,
        n_before: int,
        reason: FinishReason | None = None,
        generation: Generation | None = None,
    ) -> None:
        """News of tokens from the place ``n_before`` of the line on."""
        n_new = len(line.token_ids) - n_before
        logprobs = None
        if line.request.params.logprobs is not None:
            logprobs = line.logprobs[len(line.logprobs) - n_new :] if n_new else []
        ids = line.token_ids[n_before:]
        self.events.append(Event(line.request.id, line.index, text, ids, logprobs, reason, generation, line.stop_text))

    def _end(self, line: Line, reason: FinishReason, text: str = "", n_before: int | None = None) -> None:
        """The line has come to its end; so has its request, if all others have."""
        request = line.request
        line.finish_reason = reason
        if line.stream is not None and (tail := line.stream.finish()):
            line.text.append(tail)
            text += tail
        self.scheduler.remove(line.unit)
        request.finished.append(line)
        done = len(request.finished) == request.n_answers
        if not request.streams:
            if done:
                self._end_request(request, self._best(request))
            return
        if done:
            self._leave(request)
        self._tell(
            line,
            text,
            len(line.token_ids) if n_before is None else n_before,
            reason,
            self._generation(request) if done else None,
        )

    def _best(self, request: Request) -> list[Completion]:
        """The best n of those that were written, by their mean log probability."""
        ranked = sorted(request.finished, key=lambda line: -line.mean_logprob)
        return [line.completion() for line in ranked[: request.params.n]]

    def _generation(
        self, request: Request, completions: list[Completion] | None = None, error: str | None = None
    ) -> Generation:
        if completions is None:
            completions = [line.completion() for line in sorted(request.finished, key=lambda line: line.index)]
        embedding = request.pooled if error is None else None
        return Generation(request.asked_ids, completions, request.stats(), request.prompt_logprobs, error, embedding)

    def _end_request(self, request: Request, completions: list[Completion]) -> None:
        """Tell whole answers of which nothing was told before."""
        self._leave(request)
        generation = self._generation(request, completions)
        for index, one in enumerate(completions):
            last = generation if index == len(completions) - 1 else None
            self.events.append(
                Event(request.id, index, one.text, one.token_ids, one.logprobs, one.finish_reason, last, one.stop_text)
            )

    def _leave(self, request: Request) -> None:
        del self.requests[request.id]
        self.counts.update(request.counts())

    def fail(self, request: Request, error: Exception | str) -> None:
        """End a request for a reason of its own; the others are not touched."""
        if isinstance(error, Exception):
            error = str(error) if isinstance(error, DanluError) else f"{type(error).__name__}: {error}"
        self.cut(request, "error", error)

    def cut(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a request as it is: all blocks are free at once."""
        self._leave(request)
        cut: list[Line] = []
        tails: list[str] = []
        for unit in request.units:
            lines = [line for line in unit.sequences if line.finish_reason is None]
            if lines:
                self.scheduler.remove(unit)
            for line in lines[: 1 if request.search is not None else None]:
                line.finish_reason = reason
                tails.append("" if line.stream is None else line.stream.finish())
                line.text.append(tails[-1])
                cut.append(line)
        told = [*request.finished, *cut]
        if request.streams:
            told.sort(key=lambda line: line.index)
        else:  # there is no best of what was not finished
            told = cut = cut[: request.params.n]
        generation = self._generation(request, [line.completion() for line in told], error)
        for line, tail in zip(cut, tails, strict=False):
            last = generation if line is cut[-1] else None
            self._tell(line, tail, len(line.token_ids), reason, last)

    def _search(self, unit: Unit, logits_rv: Tensor) -> None:
        """Let all beams of a request take one more token: some fork, some die."""
        request = unit.request
        search = request.search
        assert search is not None
        if request.first_token_at is None:
            request.first_token_at = time.perf_counter()
        try:
            moves = search.advance(beam_logprobs(logits_rv, [line.sampler for line in unit.sequences]))
            if search.done:
                self._end_search(unit, search)
                return
            beams = []
            for index, (parent, token_id) in enumerate(moves):
                line = unit.sequences[parent]
                beam = Line(request, index, [*line.token_ids, token_id], None, line.n_computed)
                beam.sampler = line.sampler.fork(request.seed_of(index))
                beam.sampler.accept(token_id)
                beams.append(beam)
        except Exception as error:
            self.fail(request, error)
            return
        request.new_tokens += len(moves)
        for line, (parent, _) in zip(beams, moves, strict=True):
            table = unit.sequences[parent].table
            assert table is not None
            line.table, line.unit = self.blocks.fork(table), unit
        for line in unit.sequences:
            self.scheduler.close_table(line)
        unit.sequences = beams

    def _end_search(self, unit: Unit, search: BeamSearch) -> None:
        request = unit.request
        if not search.finished:
            raise DanluError("the search found no answer: its rules admit no token")
        completions = []
        for hypothesis in search.finished[: request.params.n]:
            stopped = hypothesis.token_ids[-1] in search.stop_ids
            ids = hypothesis.token_ids[:-1] if stopped else hypothesis.token_ids
            stream = self.stream_for(request)
            text, stop_text = "", None
            if stream is not None:
                text = "".join(map(stream.push, ids))
                text += stream.finish()
                stop_text = stream.stop_text
            ended = stopped and not unit.sequences[0].sampler.forces_end(len(hypothesis.token_ids))
            reason: FinishReason = "stop" if ended or stop_text is not None else "length"
            completions.append(Completion(text, ids, reason, stop_text=stop_text))
        self.scheduler.remove(unit)
        self._end_request(request, completions)

    def _observe(self, piece: Piece, logits_rv: Tensor) -> None:
        """Log probabilities of the tokens of a prompt."""
        line, request = piece.sequence, piece.sequence.request
        end = line.n_computed
        first = max(end - piece.n, request.observed)
        if first >= len(request.prompt_ids) or request.prompt_logprobs is None:
            return
        targets = request.prompt_ids[first + 1 : end + 1]  # position i says what follows it
        n = len(targets)
        request.prompt_logprobs += logprobs_of(logits_rv[:n], targets, request.params.prompt_logprobs or 0)
        request.observed = end

    def _pool(self, pieces: Sequence[Piece], hidden_rd: Tensor) -> None:
        """Hidden states of texts that are embedded."""
        row = 0
        for piece in pieces:
            line, request = piece.sequence, piece.sequence.request
            rows_rd = hidden_rd[row : row + piece.n_rows]
            row += piece.n_rows
            line.n_computed += piece.n
            assert line.table is not None
            self.blocks.commit(line.table, line.token_ids, line.n_computed)
            if request.observes and piece.n_rows:
                total_d = rows_rd.sum(dim=0)
                request.pooled = total_d if request.pooled is None else request.pooled + total_d
                request.observed = max(request.observed, line.n_computed)
            if piece.completes:
                pooled = request.pooled
                request.pooled = rows_rd[-1].clone() if pooled is None else pooled / len(request.prompt_ids)
                self._end(line, "stop")
