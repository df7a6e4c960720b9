"""A model in a process of its own: what it is asked, what it answers, and how it ends."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.engine.config import SamplingParams
from danlu.engine.engine import Engine
from danlu.engine.engine_config import EngineConfig
from danlu.engine.request import prompt_ids
from danlu.errors import DanluError
from danlu.server import protocol
from danlu.server.protocol import ChatPrompt, TextPrompt, TokenPrompt
from danlu.server.remote import RemoteModel, WorkerFailed

GREEDY = SamplingParams(max_new_tokens=8, temperature=0.0)
CONFIG = EngineConfig(kv_memory=16)

Work = Callable[[RemoteModel], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def with_model(model_folder: Path) -> Iterator[Callable[[Work], None]]:
    """Does some work with the tiny model, which is in one process for all that leave it as it was."""
    with asyncio.Runner() as runner:
        model = runner.run(RemoteModel.start("tiny", str(model_folder), CONFIG))
        yield lambda work: runner.run(work(model))
        runner.run(model.stop())


async def idle(model: RemoteModel) -> None:
    """No request holds a block, and the accounts are right."""
    for _ in range(100):
        stats = await model.ask("check")
        if stats["running"] == stats["waiting"] == stats["blocks_used"] == 0:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(stats)


def test_it_answers_as_the_engine_does(model_folder: Path, with_model: Callable[[Work], None]) -> None:
    params = dataclasses.replace(GREEDY, n=2, temperature=0.7, seed=3, logprobs=2, prompt_logprobs=1)
    with Engine(model_folder, CONFIG) as engine:
        (expected,) = engine.generate(["def f"], params)
        assert engine.tokenizer is not None
        ids_of_prompt = prompt_ids(engine.tokenizer, "def f")

    async def work(model: RemoteModel) -> None:
        texts = ["", ""]
        ids: list[list[int]] = [[], []]
        logprobs: list[list[float]] = [[], []]
        ends = {}
        async with model.generate(TextPrompt("def f"), params) as stream:
            assert stream.prompt_tokens == len(ids_of_prompt)
            async for piece in stream:
                texts[piece.index] += piece.text
                ids[piece.index] += piece.token_ids
                logprobs[piece.index] += [one.logprob for one in piece.logprobs or ()]
                if piece.finish_reason is not None:
                    ends[piece.index] = piece.finish_reason
        for index, completion in enumerate(expected.completions):
            assert texts[index] == completion.text
            assert ids[index] == completion.token_ids
            assert completion.logprobs is not None
            assert logprobs[index] == pytest.approx([one.logprob for one in completion.logprobs], abs=1e-5)
            assert ends[index] == completion.finish_reason
        assert stream.end is not None
        assert stream.end["completion_tokens"] == 16
        assert len(stream.end["prompt_logprobs"]) == len(ids_of_prompt)
        await idle(model)

    with_model(work)


def test_who_leaves_aborts_whenever_that_is(with_model: Callable[[Work], None]) -> None:
    long = dataclasses.replace(GREEDY, max_new_tokens=3000)

    async def work(model: RemoteModel) -> None:
        async with model.generate(TextPrompt("def f"), long) as stream:
            async for _ in stream:
                break
        await idle(model)

        async def one() -> None:
            async with model.generate(TextPrompt("def f" * 100), long) as stream:
                async for _ in stream:
                    pass

        for delay in (0, 0.0005, 0.002, 0.01, 0.05):  # before, while and after it is accepted
            task = asyncio.create_task(one())
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await idle(model)
        assert not model._streams
        assert not model._results

    with_model(work)


def test_what_can_never_run_is_refused_and_harms_nobody(with_model: Callable[[Work], None]) -> None:
    async def work(model: RemoteModel) -> None:
        running = asyncio.create_task(whole(model, TextPrompt("def f"), dataclasses.replace(GREEDY, max_new_tokens=50)))
        for prompt, params, told in (
            (TextPrompt("a" * 9000), GREEDY, "context"),
            (TokenPrompt([]), GREEDY, "empty"),
            (TokenPrompt([99999]), GREEDY, "vocabulary"),
            (TextPrompt("a"), dataclasses.replace(GREEDY, logit_bias={99999: 1.0}), "logit_bias"),
            (TextPrompt("a"), dataclasses.replace(GREEDY, regex="foo**"), "regex"),
            (TextPrompt("a"), dataclasses.replace(GREEDY, json_schema={"$ref": "#"}), "json_schema"),
            (ChatPrompt([{"role": "nobody", "content": "Hi"}]), GREEDY, "nobody"),
        ):
            with pytest.raises(DanluError, match=told):
                await whole(model, prompt, params)
        assert len(await running) > 10
        await idle(model)

    with_model(work)


async def whole(model: RemoteModel, prompt: protocol.Prompt, params: SamplingParams) -> str:
    """The text of one answer."""
    async with model.generate(prompt, params) as stream:
        return "".join([piece.text async for piece in stream])


def test_the_prompts_tokens(model_folder: Path, with_model: Callable[[Work], None]) -> None:
    from danlu.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(model_folder)
    messages = [{"role": "user", "content": "Hi <|im_end|>"}]

    async def tokens(model: RemoteModel, prompt: protocol.Prompt) -> list[int]:
        ids: list[int] = await model.ask("tokenize", prompt=protocol.pack_prompt(prompt))
        return ids

    async def work(model: RemoteModel) -> None:
        asked = tokenizer.encode_chat(messages, add_generation_prompt=True)
        assert await tokens(model, ChatPrompt(messages)) == asked
        begun = [*messages, {"role": "assistant", "content": "Sure"}]
        assert await tokens(model, ChatPrompt(begun, continue_last=True)) == asked + tokenizer.encode("Sure")
        prefix, middle, suffix = map(tokenizer.id_of, ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"))
        filled = await tokens(model, TextPrompt("def f", "return x"))
        assert filled == [
            tokenizer.bos_id,
            prefix,
            *tokenizer.encode("def f"),
            suffix,
            *tokenizer.encode("return x"),
            middle,
        ]
        assert await model.ask("detokenize", ids=tokenizer.encode("丹炉")) == "丹炉"

    with_model(work)


def test_a_process_that_is_killed_fails_its_requests_and_is_told(model_folder: Path) -> None:
    async def run() -> None:
        model = await RemoteModel.start("tiny", str(model_folder), CONFIG)
        exits = []
        model.on_exit = lambda: exits.append(True)
        answering = asyncio.create_task(
            whole(model, TextPrompt("def f"), dataclasses.replace(GREEDY, max_new_tokens=4000))
        )
        await asyncio.sleep(0.2)
        os.kill(model.pid, signal.SIGKILL)
        with pytest.raises(WorkerFailed):
            await answering
        await model.stop()
        assert exits == [True]
        with pytest.raises(WorkerFailed):
            await model.ask("check")

    asyncio.run(run())


def test_the_process_ends_with_its_socket_whatever_it_does(model_folder: Path) -> None:
    async def run() -> None:
        model = await RemoteModel.start("tiny", str(model_folder), CONFIG)
        for number in (signal.SIGINT, signal.SIGTERM):  # these are for the server, which shares its terminal
            os.kill(model.pid, number)
        assert await model.ask("check")
        answering = asyncio.create_task(
            whole(model, TextPrompt("def f"), dataclasses.replace(GREEDY, max_new_tokens=4000))
        )
        await asyncio.sleep(0.1)
        model._writer.transport.abort()  # as when the server dies
        assert await asyncio.wait_for(model._process.wait(), 2) == 0
        with pytest.raises(WorkerFailed):
            await answering

    asyncio.run(run())


def test_what_is_no_model_is_told_to_the_user(tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="no such model"):
        asyncio.run(RemoteModel.start("x", str(tmp_path / "nowhere"), CONFIG))


@given(
    st.builds(
        SamplingParams,
        max_new_tokens=st.integers(1, 100),
        logit_bias=st.dictionaries(st.integers(0, 100), st.floats(-100, 100)),
        stop=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)).map(tuple),
        json_schema=st.none() | st.just({"type": ["string", "null"]}),
        choice=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)).map(tuple),
    )
)
def test_parameters_arrive_as_they_were_sent(params: SamplingParams) -> None:
    import json

    packed = json.loads(protocol.pack({"params": protocol.pack_params(params)})[protocol.HEADER.size :])["params"]
    assert protocol.unpack_params(packed) == params
