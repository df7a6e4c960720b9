"""Encoder-decoders in the engine: answers depend on source, parameters and seed alone, whatever else runs."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from encoder_decoders import END, FAMILIES, FIRST, LETTERS, PAD, LetterTokenizer, encoder_decoder
from tokenizers import decoders, models, pre_tokenizers

from danlu.adapters.config import AdapterShape
from danlu.adapters.lora import attach
from danlu.adapters.peft_folder import save_adapter
from danlu.engine.config import SamplingParams
from danlu.engine.engine import Engine
from danlu.engine.engine_config import EngineConfig
from danlu.engine.request import Event, Generation
from danlu.engine.text_stream import TextStream
from danlu.engine.torch_runner import TorchRunner
from danlu.engine.verbs import generate
from danlu.engine.verbs_config import GenerateConfig
from danlu.errors import DanluError
from danlu.models.encoder_decoder import EncoderDecoder
from danlu.models.load import load_model
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.tokenizer.train import train_on
from tiny_t5 import t5_folder

TOKENIZER: Any = LetterTokenizer()
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
TEXTS = ["ab", "thequickbrownfox", "zzzzzzz", "b", "jumpsoverthelazydogandrunsaway", "thelazydog"]
DEMANDS: dict[str, Any] = {
    "forced_bos_token_id": FIRST, "forced_eos_token_id": END, "no_repeat_ngram_size": 2, "min_length": 5,
}  # fmt: skip


def model_of(family: str = "t5", *, demands: bool = False, **options: Any) -> EncoderDecoder:
    """Its answers differ, and end at different lengths."""
    model = encoder_decoder({**FAMILIES[family], "vocab_size": LETTERS, "tie_embeddings": False, **options}, seed=7)
    model.generation_config = dict(DEMANDS) if demands else {}
    return model


class Runner(TorchRunner):
    """A cache of few blocks, and a count of what is run."""

    def __init__(self, model: EncoderDecoder, n_blocks: int) -> None:
        self.n_blocks, self.tokens_run = n_blocks, 0
        super().__init__(model, block_size=4)

    def block_bytes(self, group: int) -> int:
        return (1 << 20) // self.n_blocks

    def run(self, batch: Any) -> torch.Tensor:
        self.tokens_run += len(batch.ids_t)
        return super().run(batch)


def engine(model: EncoderDecoder, n_blocks: int | None = None, **options: Any) -> Engine:
    runner: Any = model if n_blocks is None else Runner(model, n_blocks)
    options |= {} if n_blocks is None else {"kv_memory": 1}
    return Engine(runner, EngineConfig(**{"max_running": 8, "step_tokens": 64, **options}), TOKENIZER)


def run(engine: Engine) -> Iterator[Event]:
    while engine.has_work:
        yield from engine.step()
        engine.check()


def outcome(generation: Generation) -> list[Any]:
    """All of it that has to be equal, log probabilities but for rounding."""
    return [(c.text, c.token_ids, c.finish_reason, c.stop_text, c.stop_token is None) for c in generation.completions]


def logprobs(generation: Generation) -> list[float]:
    return [one.logprob for completion in generation.completions for one in completion.logprobs or ()]


def random_requests(seed: int, n: int) -> list[tuple[str, SamplingParams]]:
    random_ = random.Random(seed)
    found = []
    for number in range(n):
        text = random_.choice([*TEXTS, "".join(random_.choices("abcdefgh", k=random_.randrange(1, 25)))])
        kinds: list[dict[str, Any]] = [
            {}, {}, {"n": 3}, {"best_of": 3}, {"temperature": 0.0}, {"temperature": 0.0, "beams": 3, "n": 2},
        ]  # fmt: skip
        options = {"temperature": 1.0, **random_.choice(kinds)}
        if "beams" not in options:
            options["logprobs"] = random_.choice([None, 1])
        stop = random_.choice([(), ("e", "ab")])
        found.append((text, SamplingParams(seed=number, max_new_tokens=random_.randrange(1, 24), stop=stop, **options)))
    return found


def alone(model: EncoderDecoder, text: str, params: SamplingParams) -> Generation:
    with engine(model) as e:
        return e.generate([text], params)[0]


def written(model: EncoderDecoder, text: str, n: int) -> list[int]:
    """The likeliest tokens, by the model without a cache and without an engine."""
    source, answer = torch.tensor([TOKENIZER.encode_for_encoder(text)[0]]), [PAD]
    with torch.inference_mode():
        for _ in range(n):
            answer.append(int(model(source, torch.tensor([answer]))[0, -1].argmax()))
    return answer[1:]


@pytest.mark.parametrize("family", FAMILIES)
def test_sources_of_any_length_in_one_engine(family: str) -> None:
    model = model_of(family)
    params = replace(GREEDY, ignore_eos=True)
    expected = [written(model, text, 12) for text in TEXTS]
    assert len(set(map(tuple, expected))) == len(TEXTS), "the model is too quiet to tell sources apart"
    for options in ({}, {"step_tokens": 8}, {"kv_dtype": "fp32", "block_size": 1}, {"draft": "ngram"}):
        with engine(model, **options) as e:
            found = e.generate(TEXTS, params)
            e.check()
        assert [generation.completions[0].token_ids for generation in found] == expected
        assert [g.prompt_ids for g in found] == [TOKENIZER.encode_for_encoder(text)[0] for text in TEXTS]
        assert [g.stats.prompt_tokens for g in found] == [len(text) + 1 for text in TEXTS]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("demands", [False, True])
def test_neighbours_budgets_guesses_and_few_blocks_change_nothing(family: str, demands: bool) -> None:
    model = model_of(family, demands=demands)
    requests = random_requests(1, 14)
    expected = [alone(model, *request) for request in requests]
    preemptions = 0
    for e in (
        engine(model),
        engine(model, max_running=4, step_tokens=4),
        engine(model, 14, prefix_cache=False),
        engine(model, 14, step_tokens=8),
        engine(model, 20, draft="ngram"),
    ):
        ids = [e.submit(*request) for request in requests]
        found = {event.request_id: event.generation for event in run(e) if event.generation is not None}
        for request_id, generation in zip(ids, expected, strict=True):
            assert outcome(found[request_id]) == outcome(generation)
            assert logprobs(found[request_id]) == pytest.approx(logprobs(generation), abs=1e-4)
        assert e.stats.blocks_used == 0
        preemptions += e.stats.preemptions
    assert preemptions > 0
    if demands:
        for generation in expected:
            for completion in generation.completions:
                pairs = list(itertools.pairwise([PAD, *completion.token_ids]))
                assert len(set(pairs)) == len(pairs)
                assert completion.token_ids[:1] in ([FIRST], [])  # where there is room for the end alone


@pytest.mark.parametrize("family", FAMILIES)
def test_a_guess_does_not_get_round_a_forced_end(family: str) -> None:
    model = model_of(family)
    model.generation_config = {"forced_eos_token_id": END}
    found = []
    for draft in ("none", "ngram"):
        with engine(model, draft=draft) as e:
            found.append([outcome(generation) for generation in e.generate(TEXTS, GREEDY)])
            assert (e.stats.accepted > 0) == (draft == "ngram")
    assert found[0] == found[1]
    assert any(len(token_ids) == 11 for ((_, token_ids, *_),) in found[0])


@pytest.mark.parametrize("seed", range(4))
def test_a_storm_leaks_nothing_and_harms_nobody(seed: int) -> None:
    random_ = random.Random(seed)
    model = model_of(random_.choice(list(FAMILIES)), demands=random_.random() < 0.5)
    e = engine(
        model, random_.randrange(12, 40), max_running=random_.randrange(3, 8), draft=random_.choice(["none", "ngram"])
    )
    todo = random_requests(seed, 20)
    submitted: dict[str, tuple[str, SamplingParams]] = {}
    aborted: set[str] = set()
    done: dict[str, Generation] = {}
    while todo or e.has_work:
        for _ in range(random_.randrange(4)):
            if todo:
                request = todo.pop()
                submitted[e.submit(*request)] = request
        if submitted and random_.random() < 0.15:
            aborted.add(one := random_.choice(list(submitted)))
            e.abort(one)
            e.check()
        for event in e.step():
            if event.generation is not None:
                done[event.request_id] = event.generation
        e.check()
    assert done.keys() == submitted.keys()
    assert (e.stats.running, e.stats.waiting, e.stats.blocks_used) == (0, 0, 0)
    for request_id, generation in done.items():
        assert generation.error is None
        if any(completion.finish_reason == "abort" for completion in generation.completions):
            assert request_id in aborted
        else:
            assert outcome(generation) == outcome(alone(model, *submitted[request_id]))


def test_blocks_are_shared_by_equal_sources_alone() -> None:
    """Where all answers are forced to be the same, their log probabilities tell what they were written about."""
    model = model_of()
    params = replace(GREEDY, allowed_tokens=(7,), ignore_eos=True, logprobs=0, max_new_tokens=16)
    for text, n_run in (("one", 4), ("two", 16)):
        e = engine(model, 40)
        e.generate(["one"], params)
        request = e.prepare(text, params)
        request.units[0].sequences[0].token_ids += [7] * 12  # as after a preemption
        assert isinstance(e.runner, Runner)
        before = e.runner.tokens_run
        e.enqueue(request)
        (generation,) = [event.generation for event in run(e) if event.generation is not None]
        assert logprobs(generation) == pytest.approx(logprobs(alone(model, text, params))[12:], abs=1e-5)
        assert e.runner.tokens_run - before == n_run


def test_answers_to_one_source_share_it_and_draw_for_themselves() -> None:
    model = model_of()
    encoded: list[torch.Size] = []
    model.encoder.layers[0].register_forward_hook(lambda _, args, __: encoded.append(args[0].shape))
    params = SamplingParams(seed=5, n=4, max_new_tokens=12)
    with engine(model) as e:
        (several,) = e.generate(["thequickbrownfox"], params)
        assert encoded == [(1, 17, 32)]
        assert len({completion.text for completion in several.completions}) == 4
        (first,) = e.generate(["thequickbrownfox"], replace(params, n=1))
        assert outcome(first) == outcome(several)[:1]
        (best,) = e.generate(["thequickbrownfox"], replace(params, n=2, best_of=4, logprobs=0))
    texts = [completion.text for completion in best.completions]
    assert len(texts) == 2
    assert set(texts) <= {completion.text for completion in several.completions}


def test_a_step_does_not_begin_more_than_its_budget() -> None:
    """Or answers that are being written would wait for all encoders."""
    model = model_of()
    encoded: list[int] = []
    model.encoder.layers[0].register_forward_hook(lambda _, args, __: encoded.append(args[0].shape[1]))
    with engine(model, step_tokens=40) as e:
        e.submit("a", replace(GREEDY, max_new_tokens=20, ignore_eos=True), request_id="running")
        e.step()
        for _ in range(6):
            e.submit("b" * 19, replace(GREEDY, max_new_tokens=1))
        while e.has_work:
            before = len(encoded)
            events = e.step()
            assert "running" in {event.request_id for event in events}
            assert len(encoded) - before <= 2
            if len(encoded) == 7:
                break


def test_events_are_the_answer_as_it_grows_and_abort_ends_it() -> None:
    model = model_of()
    with engine(model) as e:
        events = list(e.stream("thelazydog", replace(GREEDY, stop=("zz",), logprobs=1)))
        generation = events[-1].generation
        assert generation is not None
        (answer,) = generation.completions
        assert "".join(event.text for event in events) == answer.text
        assert [i for event in events for i in event.token_ids] == answer.token_ids
        assert len(events) > 3
        request_id = e.submit("thelazydog", replace(GREEDY, ignore_eos=True))
        e.step()
        e.abort(request_id)
        (last,) = [event for event in run(e) if event.generation is not None]
        assert (last.finish_reason, e.stats.blocks_used) == ("abort", 0)


def test_a_source_is_text_or_its_tokens() -> None:
    with engine(model_of()) as e:
        text, ids = e.generate(["thelazydog", TOKENIZER.encode_for_encoder("thelazydog")[0]], GREEDY)
    assert outcome(text) == outcome(ids)


def words() -> Tokenizer:
    return train_on([f"def f{i}(x): return x + {i}" for i in range(100)], 300)


def test_a_structure_holds_behind_the_token_that_a_model_forces() -> None:
    tokenizer = words()
    model = model_of(vocab_size=300)
    first = tokenizer.pad_id
    model.generation_config = {"forced_bos_token_id": first, "min_length": 30}
    params = SamplingParams(temperature=0, max_new_tokens=20, choice=("return x", "def f1"))
    with Engine(model, tokenizer=tokenizer) as e:
        (generation,) = e.generate(["def f1(x)"], params)
        (banned,) = e.generate(["def f1(x)"], replace(params, choice=(), banned_tokens=(first,)))
    (answer,) = generation.completions
    assert answer.text in ("return x", "def f1")
    assert answer.token_ids[0] == first
    assert banned.completions[0].token_ids[0] == first


def test_text_begins_as_the_tokenizer_decodes_it() -> None:
    """SentencePiece puts a space in front of a text, which is no part of it."""
    built = tokenizers.Tokenizer(
        models.Unigram([(text, -n) for n, text in enumerate(("<pad>", "</s>", "<unk>", "▁", "▁one", "▁two", "s"))], 2)
    )
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.decoder = decoders.Metaspace()
    built.add_special_tokens(["<pad>", "</s>"])
    tokenizer = Tokenizer(json.loads(built.to_str()), {"eos_token": "</s>"})
    for ids in ([4, 6, 5], [0, 4, 5], [6, 4], [3, 4], [5, 5, 1]):
        stream = TextStream(tokenizer, begins_text=True)
        assert "".join(map(stream.push, ids)) == tokenizer.decode(ids, skip_special=True)
    params = replace(GREEDY, allowed_tokens=(4, 5), ignore_eos=True)
    with Engine(model_of(), tokenizer=tokenizer) as e:
        (answer,) = e.generate(["two ones"], params)[0].completions
    assert answer.text == tokenizer.decode(answer.token_ids)


def test_relative_positions_go_on_as_far_as_is_wanted() -> None:
    model, params = model_of(context=16), replace(GREEDY, max_new_tokens=40, ignore_eos=True)
    for context, n in ((None, 16), (41, 40), (9, 9)):
        with engine(model, context=context) as e:
            assert len(e.generate(["a" * 30], params)[0].completions[0].token_ids) == n
    learned = model_of("bart", context=16)
    for context, n in ((None, 16), (41, 16), (9, 9)):
        with engine(learned, context=context) as e:
            assert len(e.generate(["a" * 15], params)[0].completions[0].token_ids) == n


def test_weights_may_change_between_requests() -> None:
    model = model_of()
    with engine(model) as e:
        e.generate(["thelazydog"], GREEDY)
        other = encoder_decoder({**FAMILIES["t5"], "vocab_size": LETTERS, "tie_embeddings": False}, seed=8)
        e.update(other)
        assert outcome(e.generate(["thelazydog"], GREEDY)[0]) == outcome(alone(other, "thelazydog", GREEDY))


def test_an_adapter_is_merged_or_runs_in_memory(tmp_path: Path) -> None:
    tokenizer = words()
    torch.manual_seed(0)
    base, folder = tmp_path / "base", tmp_path / "adapter"
    t5_folder(base, tokenizer)
    model: EncoderDecoder = load_model(base, EncoderDecoder)
    params = replace(GREEDY, ignore_eos=True)
    with Engine(model, tokenizer=tokenizer) as e:
        plain = outcome(e.generate(["def f1(x)"], params)[0])
        attach(model, AdapterShape(rank=4))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        save_adapter(model, folder, base, tokenizer)
        e.update(model)
        adapted = outcome(e.generate(["def f1(x)"], params)[0])
    assert adapted != plain
    with Engine(folder, EngineConfig(device="cpu", precision="fp32")) as e:
        assert outcome(e.generate(["def f1(x)"], params)[0]) == adapted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": "native"}, "kernels=native: .* it is an encoder-decoder"),
        ({"weights": "int8"}, "weights=int8: .* it is an encoder-decoder"),
        ({"draft_model": Path("small")}, "draft_model: "),
    ],
)
def test_engines_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DanluError, match=message):
        engine(model_of(), **options)


def test_what_only_one_stack_does_is_refused_by_name(tmp_path: Path) -> None:
    with engine(model_of()) as e:
        with pytest.raises(DanluError, match="score: an encoder-decoder"):
            e.score(["a"])
        with pytest.raises(DanluError, match="embed: an encoder-decoder"):
            e.embed(["a"])
        with pytest.raises(DanluError, match="prompt_logprobs: an encoder-decoder"):
            e.submit("a", replace(GREEDY, prompt_logprobs=0))
        with pytest.raises(DanluError, match="adapters of encoder-decoders"):
            e.load_adapter("name", tmp_path)
        assert not e.has_work


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt: is empty; an encoder needs"),
        ([3, LETTERS], "outside the model's vocabulary of 29"),
        ([3, 2.5], "no token id"),
        ("a" * 64, "has 65 tokens; the model has positions for 64; shorten it"),
    ],
)
def test_sources_that_cannot_be_read(prompt: str | Sequence[int], message: str) -> None:
    with engine(model_of("bart")) as e, pytest.raises(DanluError, match=message):
        e.submit(prompt, GREEDY)
    with Engine(model_of()) as e, pytest.raises(DanluError, match="no tokenizer; give token ids"):
        e.submit("text", GREEDY)


def test_the_verb_offers_what_the_engine_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    t5_folder(tmp_path, words())
    wish = GenerateConfig(model=tmp_path, prompt="def f1(x)", max_new_tokens=6, seed=1, n=2, logprobs=1, device="cpu")
    texts = generate(wish)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == texts
    assert len(set(texts)) == 2
    assert all(len(row["logprobs"]) == len(row["token_ids"]) for row in rows)
    (chosen,) = generate(replace(wish, n=1, logprobs=None, choice=("yes", "no")))
    assert chosen in ("yes", "no")
    with pytest.raises(DanluError, match="it is an encoder-decoder"):
        generate(replace(wish, kernels="native"))
