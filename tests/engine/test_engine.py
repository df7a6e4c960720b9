"""The engine over a runner that notices every wrong block: answers never depend on what else runs, or on how."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_runner import BOS, STOP, ByteTokenizer, ToyRunner, greedy, logits_of, reference_values, toy_config

from danlu.engine.config import SamplingParams
from danlu.engine.engine import Engine
from danlu.engine.engine_config import EngineConfig
from danlu.engine.request import Event, Generation
from danlu.errors import DanluError, Problems

TOKENIZER: Any = ByteTokenizer()
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
SHAPES = {"full": toy_config(), "mixed": toy_config(6), "windowed": toy_config(6, full=False)}


def engine(shape: str = "full", runner: ToyRunner | None = None, **options: Any) -> Engine:
    config = EngineConfig(**{"max_running": 8, "step_tokens": 32, **options})
    return Engine(runner or ToyRunner(SHAPES[shape]), config, TOKENIZER)


def small(n_blocks: int, shape: str = "full", **options: Any) -> Engine:
    """An engine whose cache has so many blocks; a block of the toy has 1 KiB, so less than a MiB."""

    class Small(ToyRunner):
        def block_bytes(self, group: int) -> int:
            return (1 << 20) // n_blocks // len(self.groups)

    return engine(shape, Small(SHAPES[shape]), kv_memory=1, **options)


def outcome(generation: Generation) -> list[Any]:
    return [(c.text, c.token_ids, c.finish_reason, c.logprobs) for c in generation.completions]


def run(engine: Engine) -> Iterator[Event]:
    while engine.has_work:
        yield from engine.step()
        engine.check()


def nothing_leaked(engine: Engine) -> bool:
    engine.check()
    stats = engine.stats
    return (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)


def random_requests(seed: int, n: int, **limits: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of several lengths, many of which begin alike."""
    random_ = random.Random(seed)
    stems = [[BOS, *random_.choices(range(97, 123), k=k)] for k in (3, 9, 20)]
    found = []
    for number in range(n):
        ids = [*random_.choice(stems), *random_.choices(range(97, 123), k=random_.randrange(0, 30))]
        several = random_.choice([{}, {}, {"n": 3}, {"n": 1, "best_of": 2}, {"prompt_logprobs": 1}])
        params = SamplingParams(
            temperature=random_.choice([0.0, 1.0]),
            seed=number,
            max_new_tokens=random_.randrange(1, limits.get("longest", 20)),
            stop=random_.choice([(), ("e", "ab")]),
            logprobs=random_.choice([None, 1]),
            **several,
        )
        found.append((ids, params))
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_is_the_likeliest_token_each_time(shape: str) -> None:
    prompts = [[BOS, *range(97, 97 + n)] for n in (0, 3, 4, 17, 25)]
    with engine(shape) as e:
        for prompt, generation in zip(prompts, e.generate(prompts, replace(GREEDY, ignore_eos=True)), strict=True):
            assert generation.completions[0].token_ids == greedy(SHAPES[shape], prompt, 12)
        assert nothing_leaked(e)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_neighbours_budgets_and_few_blocks_change_nothing(shape: str, prefix_cache: bool) -> None:
    requests = random_requests(1, 10)
    alone = []
    for ids, params in requests:
        with engine(shape, max_running=4, step_tokens=512) as e:
            alone.append(outcome(e.generate([ids], params)[0]))
    preemptions = 0
    for e in (
        engine(shape, prefix_cache=prefix_cache),
        engine(shape, prefix_cache=prefix_cache, max_running=3, step_tokens=3),
        small(24, shape, prefix_cache=prefix_cache, step_tokens=8),
        small(30, shape, prefix_cache=prefix_cache, draft="ngram"),
    ):
        ids = [e.submit(*request) for request in requests]
        found = {event.request_id: event.generation for event in run(e) if event.generation is not None}
        assert [outcome(found[i]) for i in ids] == alone
        assert nothing_leaked(e)
        preemptions += e.stats.preemptions
        assert (e.stats.cached_tokens > 0) == prefix_cache
    assert preemptions > 0 or shape == "windowed"  # where who is admitted has all it will need


@pytest.mark.parametrize("seed", range(8))
def test_a_storm_leaks_nothing_and_harms_nobody(seed: int) -> None:
    """Submits, aborts, errors and preemptions in any order; who is not aborted gets the answer it gets alone."""
    random_ = random.Random(seed)
    shape = random_.choice(list(SHAPES))
    poison = 65  # a token whose logits are NaN
    e = small(
        random_.randrange(24, 60), shape, max_running=random_.randrange(3, 8), step_tokens=random_.randrange(8, 40)
    )
    runner = e.runner
    assert isinstance(runner, ToyRunner)
    runner.broken.add(poison)
    todo = random_requests(seed, 25, longest=25)
    submitted: dict[str, tuple[list[int], SamplingParams]] = {}
    aborted: set[str] = set()
    done: dict[str, Generation] = {}
    while todo or e.has_work:
        for _ in range(random_.randrange(4)):
            if todo:
                ids, params = todo.pop()
                if random_.random() < 0.2:
                    ids = [*ids, poison]
                submitted[e.submit(ids, params)] = (ids, params)
        if submitted and random_.random() < 0.15:
            aborted.add(one := random_.choice(list(submitted)))
            e.abort(one)
            e.check()
        for event in e.step():
            if event.generation is not None:
                assert event.request_id not in done
                done[event.request_id] = event.generation
        e.check()
    assert nothing_leaked(e)
    assert done.keys() == submitted.keys()
    errors = 0
    for request_id, generation in done.items():
        reasons = {completion.finish_reason for completion in generation.completions}
        assert "abort" not in reasons or request_id in aborted
        if "abort" in reasons:
            continue
        with engine(shape) as fresh:
            fresh.runner.broken = runner.broken  # type: ignore[attr-defined]
            expected = fresh.generate([submitted[request_id][0]], submitted[request_id][1])[0]
        assert generation.error == expected.error
        if generation.error is None:
            assert outcome(generation) == outcome(expected)
        else:
            errors += 1
            assert "not a number" in generation.error
    assert errors


def test_a_thousand_submits_at_once() -> None:
    e = engine(max_running=32, step_tokens=256)
    prompt = [BOS, *b"the same"]
    ids = [e.submit([*prompt, 97 + i % 26], replace(GREEDY, max_new_tokens=2)) for i in range(1000)]
    done = [event.request_id for event in e.step() if event.generation is not None]
    while e.has_work:
        done += [event.request_id for event in e.step() if event.generation is not None]
    assert sorted(done) == sorted(ids)
    assert nothing_leaked(e)
    assert e.stats.cached_tokens > 900 * 8


def test_a_long_prompt_does_not_hold_up_running_streams() -> None:
    runner = ToyRunner(toy_config(context=1024))
    e = Engine(runner, EngineConfig(max_running=4, step_tokens=16), TOKENIZER)
    e.submit([BOS], replace(GREEDY, max_new_tokens=60, ignore_eos=True), request_id="short")
    e.step()
    e.submit([BOS] * 400, replace(GREEDY, max_new_tokens=2, ignore_eos=True), request_id="long")
    for _ in range(20):
        events = e.step()
        assert [event.request_id for event in events] == ["short"]
    assert max(runner.tokens_run) == 16


def test_a_cached_prompt_is_not_run_again() -> None:
    runner = ToyRunner()
    e = engine(runner=runner)
    prompt = [BOS, *b"twenty-nine tokens in this one"]
    first = e.generate([prompt], GREEDY)[0]
    n = sum(runner.tokens_run)
    second = e.generate([prompt], GREEDY)[0]
    assert outcome(first) == outcome(second)
    assert second.stats.cached_tokens == (len(prompt) - 1) // 4 * 4
    assert sum(runner.tokens_run) - n == n - second.stats.cached_tokens


def test_several_answers_share_one_prefill_and_each_has_its_seed() -> None:
    runner = ToyRunner()
    e = engine(runner=runner, prefix_cache=False)
    prompt = [BOS, *b"a prompt of several blocks"]
    params = SamplingParams(seed=3, n=4, max_new_tokens=8, ignore_eos=True, stop_ids=())
    generation = e.generate([prompt], params)[0]
    assert sum(runner.tokens_run) == len(prompt) + 4 * 7
    assert len({c.text for c in generation.completions}) == 4
    alone = e.generate([prompt], replace(params, n=1))[0]
    assert outcome(alone) == outcome(generation)[:1]
    assert nothing_leaked(e)


def test_best_of_keeps_the_most_likely() -> None:
    e = engine()
    params = SamplingParams(seed=3, n=5, max_new_tokens=8, logprobs=0, ignore_eos=True)
    every = e.generate([[BOS, 97]], params)[0].completions
    best = e.generate([[BOS, 97]], replace(params, n=2, best_of=5, logprobs=None))[0].completions

    def mean(completion: Any) -> float:
        return float(sum(one.logprob for one in completion.logprobs) / len(completion.logprobs))

    expected = sorted(every, key=mean, reverse=True)[:2]
    assert [c.token_ids for c in best] == [c.token_ids for c in expected]
    assert best[0].logprobs is None


def test_the_events_of_a_request_add_up_to_its_generation() -> None:
    e = engine()
    params = SamplingParams(seed=1, n=3, max_new_tokens=30, stop=("q", "xyz"), logprobs=1)
    request_id = e.submit([BOS, 97], params)
    events = list(run(e))
    generation = events[-1].generation
    assert generation is not None
    for index, completion in enumerate(generation.completions):
        mine = [event for event in events if event.index == index]
        assert "".join(event.text for event in mine) == completion.text
        assert [i for event in mine for i in event.token_ids] == completion.token_ids
        assert [one for event in mine for one in event.logprobs or ()] == completion.logprobs
        assert [event.finish_reason for event in mine][:-1] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == completion.finish_reason
    assert {event.request_id for event in events} == {request_id}
    assert sum(event.generation is not None for event in events) == 1
    assert generation.stats.new_tokens >= sum(len(c.token_ids) for c in generation.completions)
    assert generation.stats.first_token_seconds is not None


def test_ends_of_answers() -> None:
    e = engine()
    prompt = [BOS, 97]
    plain = e.generate([prompt], replace(GREEDY, ignore_eos=True, max_new_tokens=8))[0].completions[0]
    assert (plain.finish_reason, len(plain.token_ids)) == ("length", 8)
    stopped = e.generate([prompt], replace(GREEDY, stop_ids=(7, plain.token_ids[3])))[0].completions[0]
    assert (stopped.finish_reason, stopped.token_ids) == (
        "stop",
        plain.token_ids[: plain.token_ids.index(plain.token_ids[3])],
    )
    full = e.generate([[BOS] * 125], replace(GREEDY, ignore_eos=True, max_new_tokens=99))[0].completions[0]
    assert (full.finish_reason, len(full.token_ids)) == ("length", 3)


def test_abort_in_the_middle_of_a_prompt_frees_at_once() -> None:
    e = engine(step_tokens=8)
    e.submit([BOS] * 60, GREEDY, request_id="a")
    e.step()
    assert e.stats.blocks_used > 0
    e.abort("a")
    e.abort("a")
    e.abort("nobody")
    assert nothing_leaked(e)
    (event,) = e.step()
    assert event.finish_reason == "abort"
    assert event.generation is not None
    assert event.generation.completions[0].token_ids == []
    assert not e.has_work


def test_close_ends_what_runs_and_waits() -> None:
    e = engine(max_running=2)
    ids = {e.submit([BOS, 97 + i], replace(GREEDY, ignore_eos=True, max_new_tokens=50)) for i in range(5)}
    for _ in range(3):
        e.step()
    e.close()
    e.close()
    events = e.step()
    assert {event.request_id for event in events} == ids
    assert {event.finish_reason for event in events} == {"abort"}
    assert not e.has_work
    assert e.step() == []
    with pytest.raises(DanluError, match="closed"):
        e.submit([BOS], GREEDY)


def test_who_stops_to_listen_aborts_and_others_get_their_events() -> None:
    e = engine()
    other = e.submit([BOS, 98], replace(GREEDY, max_new_tokens=4, ignore_eos=True))
    stream = e.stream([BOS, 97], replace(GREEDY, max_new_tokens=50, ignore_eos=True))
    second = e.stream([BOS, 99], replace(GREEDY, max_new_tokens=3, ignore_eos=True))
    texts = [next(stream).text, next(second).text, next(stream).text]
    assert len(list(second)) == 2
    stream.close()
    assert nothing_leaked(e)
    assert len(texts) == 3
    events = list(run(e))
    assert {event.request_id for event in events} == {other}
    assert len(events) == 4


def test_prompts_and_scores_have_log_probabilities() -> None:
    prompts = [[BOS, *b"some text of a few blocks"], [BOS], [BOS, 97]]
    for e in (engine(step_tokens=8), engine("mixed")):
        for _ in range(2):  # the second time the prompt is known, and must be looked at all the same
            for prompt, found in zip(prompts, e.score(prompts), strict=True):
                values = reference_values(e.runner.config, prompt)
                assert found[0] is None
                for value, token_id, one in zip(values, prompt[1:], found[1:], strict=False):
                    assert one is not None
                    expected = torch.from_numpy(logits_of(value)).log_softmax(-1)[token_id]
                    assert one.logprob == pytest.approx(float(expected), abs=1e-5)
                assert len(found) == len(prompt)
        generation = e.generate([prompts[0]], replace(GREEDY, prompt_logprobs=0))[0]
        assert generation.prompt_logprobs == e.score(prompts[:1])[0]
        assert nothing_leaked(e)


def test_embeddings_are_means_or_last_states() -> None:
    prompts = [[BOS, *b"some text of a few blocks"], [BOS]]
    for e in (engine(step_tokens=8), engine("windowed")):
        e.generate(prompts[:1], GREEDY)  # known prompts embed alike
        values = [torch.tensor(reference_values(e.runner.config, prompt)) / (2**31 - 1) for prompt in prompts]
        torch.testing.assert_close(e.embed(prompts)[:, 0], torch.stack([v.mean() for v in values]))
        torch.testing.assert_close(e.embed(prompts, "last")[:, 0], torch.stack([v[-1] for v in values]))
        assert e.embed([]).shape == (0, 8)
        assert nothing_leaked(e)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "is empty"),
        ([BOS] * 128, {}, "has 128 tokens, the model's context 128"),
        ([BOS, 258], {}, "outside the model's vocabulary of 258"),
        ([-1], {}, "outside the model's vocabulary"),
        (["a"], {}, "no token id"),
        ([BOS], {"adapter": "poet"}, "'poet'"),
        ([BOS], {"request_id": "taken"}, "'taken' is running"),
    ],
)
def test_what_can_never_run_is_refused(prompt: Any, options: dict[str, Any], message: str) -> None:
    e = engine()
    e.submit([BOS], GREEDY, request_id="taken")
    with pytest.raises(DanluError, match=message):
        e.submit(prompt, GREEDY, **options)
    assert e.stats.waiting == 1


def test_what_the_cache_cannot_hold_is_refused() -> None:
    e = small(10)
    assert e.max_len == 40
    with pytest.raises(DanluError, match="40 fit the cache"):
        e.submit([BOS] * 40, GREEDY)
    assert len(e.generate([[BOS] * 39], GREEDY)[0].completions[0].token_ids) == 1
    with pytest.raises(DanluError, match="prompt 2: has 50 tokens"):
        e.generate([[BOS], [BOS] * 50], GREEDY)
    assert nothing_leaked(e)
    with pytest.raises(DanluError, match="beams"):
        e.submit([BOS] * 20, replace(GREEDY, beams=4, max_new_tokens=20))
    with pytest.raises(DanluError, match="kv_memory"):
        small(1)
    with pytest.raises(Problems, match="step_tokens"):
        engine(max_running=64, step_tokens=32)


def test_text_needs_a_tokenizer() -> None:
    e = Engine(ToyRunner(), EngineConfig())
    assert e.generate([[BOS]], GREEDY)[0].completions[0].text == ""
    for prompt, params in (("text", GREEDY), ([BOS], replace(GREEDY, stop=("x",)))):
        with pytest.raises(DanluError, match="tokenizer"):
            e.submit(prompt, params)


def test_an_error_while_running_ends_who_ran() -> None:
    class Breaks(ToyRunner):
        fail = False

        def _values(self, batch: Any) -> list[int]:
            if self.fail:
                self.fail = False
                raise RuntimeError("out of memory")
            return super()._values(batch)

    runner = Breaks()
    e = engine(runner=runner, max_running=1)
    first, second = e.submit([BOS] * 9, GREEDY), e.submit([BOS] * 9, GREEDY)
    runner.fail = True
    (event,) = e.step()
    assert (event.request_id, event.finish_reason) == (first, "error")
    assert event.generation is not None
    assert "out of memory" in str(event.generation.error)
    found = {event.request_id: event.generation for event in run(e) if event.generation is not None}
    with engine() as fresh:
        assert outcome(found[second]) == outcome(fresh.generate([[BOS] * 9], GREEDY)[0])


def test_progress_counts_every_prompt() -> None:
    e = engine()
    seen: list[int] = []
    assert e.generate([], GREEDY) == []
    e.generate([[BOS]] * 3, [GREEDY] * 3, progress=seen.append)
    assert seen == [1, 1, 1]
    with pytest.raises(DanluError, match="3 prompts and 1 sets"):
        e.generate([[BOS]] * 3, [GREEDY])


def test_guessed_tokens_change_nothing_and_save_steps() -> None:
    """A model that repeats its prompt, so that guesses are right."""

    class Copies(ToyRunner):
        def run(self, batch: Any) -> Any:
            super().run(batch)
            rows = torch.zeros(len(batch.logits_at), 258)
            for row, t in zip(rows, batch.logits_at, strict=True):
                row[97 + (int(batch.ids_t[t]) - 96) % 26] = 9.0
            return rows

    prompt = [BOS, *range(97, 123), 97, 98]
    plain, guessed = (Engine(Copies(), EngineConfig(draft=draft), TOKENIZER) for draft in ("none", "ngram"))
    for temperature in (0.0, 0.7):
        params = SamplingParams(temperature=temperature, seed=1, max_new_tokens=40, ignore_eos=True)
        one, two = plain.generate([prompt], params)[0], guessed.generate([prompt], params)[0]
        assert outcome(one) == outcome(two)
        assert two.stats.accepted > 0
    assert guessed.stats.steps < plain.stats.steps * 0.8
    assert nothing_leaked(guessed)


def test_beams_are_found_whatever_else_runs() -> None:
    requests = [
        ([BOS, 97, 98], replace(GREEDY, beams=3, n=2, max_new_tokens=10)),
        ([BOS, *b"another, longer prompt"], replace(GREEDY, beams=2, max_new_tokens=14, length_penalty=0.5)),
    ]
    for shape in SHAPES:
        alone = []
        for ids, params in requests:
            with engine(shape) as e:
                alone.append(outcome(e.generate([ids], params)[0]))
                assert nothing_leaked(e)
        assert [len(one) for one in alone] == [2, 1]
        preemptions = 0
        for e in (engine(shape, step_tokens=8), small(26, shape, prefix_cache=False)):
            for request in random_requests(5, 6):
                e.submit(*request)
            ids = [e.submit(*request) for request in requests]
            for request in random_requests(6, 3):
                e.submit(*request)
            found = {event.request_id: event.generation for event in run(e) if event.generation is not None}
            assert [outcome(found[i]) for i in ids] == alone
            assert nothing_leaked(e)
            preemptions += e.stats.preemptions
        assert preemptions > 0 or shape == "windowed"


def test_the_stop_token_is_not_told() -> None:
    e = engine()
    assert STOP in TOKENIZER.stop_ids
    for number in range(40):
        generation = e.generate([[BOS, number]], SamplingParams(seed=number, max_new_tokens=100))[0].completions[0]
        assert STOP not in generation.token_ids
        if generation.finish_reason == "stop":
            return
    pytest.fail("no answer ended by itself")
