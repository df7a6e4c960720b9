"""`danlu generate` and `danlu chat` as processes, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from danlu.config import validate
from danlu.engine.engine import Engine
from danlu.engine.generate import generate_text
from danlu.engine.sampling import SamplingParams
from danlu.engine.verbs import chat, fit_context, generate, open_model
from danlu.engine.verbs_config import ChatConfig, GenerateConfig
from danlu.errors import DanluError, Problems
from danlu.formats.card import Card
from danlu.models.causal_lm import CausalLM
from danlu.tokenizer.tokenizer import Tokenizer

GREEDY = ("--temperature", "0", "--precision", "fp32")


def danlu(*words: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "danlu", *map(str, words)]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=120, check=False)


def expected(folder: Path, prompt: str | list[int], n: int) -> str:
    model, tokenizer = open_model(folder, "cpu", "fp32", CausalLM)
    return generate_text(model, tokenizer, [prompt], SamplingParams(temperature=0, max_new_tokens=n))[0].text


def test_generate_continues_the_prompt(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = expected(model_folder, "def f(x):", 9)
    config = GenerateConfig(
        model=model_folder, prompt="def f(x):", max_new_tokens=9, temperature=0, precision="fp32", device="cpu"
    )
    assert generate(config) == [answer]
    assert capsys.readouterr().out == answer + "\n"
    piped = danlu("generate", model_folder, "--max-new-tokens", 9, *GREEDY, stdin=b"def f(x):\n")
    assert piped.returncode == 0, piped.stderr.decode()
    assert piped.stdout.decode() == answer + "\n"


def test_generate_answers_a_file_of_prompts_in_order(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"def f(x):"\n\n{"prompt": "丹炉"}\n"def f(x):"\n', encoding="utf-8")
    config = GenerateConfig(
        model=model_folder, prompts_file=path, max_new_tokens=6, temperature=1.0, seed=3, max_running=2
    )
    answers = generate(config)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["def f(x):", "丹炉", "def f(x):"]
    assert [row["text"] for row in rows] == answers
    assert [row["finish_reason"] for row in rows] == ["length"] * 3
    assert rows[0]["token_ids"] != rows[2]["token_ids"]  # the same prompt twice is two samples
    assert generate(config) == answers


def test_log_probabilities_of_the_prompt_are_told(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(GenerateConfig(model=model_folder, prompt="def f(x):", max_new_tokens=1, prompt_logprobs=1, json=True))
    row = json.loads(capsys.readouterr().out)
    with Engine(model_folder) as engine:
        wanted = engine.generate(["def f(x):"], SamplingParams(max_new_tokens=1, prompt_logprobs=1))[0].prompt_logprobs
    assert wanted is not None
    assert row["prompt_logprobs"][0] is None
    for told, one in zip(row["prompt_logprobs"][1:], wanted[1:], strict=True):
        assert one is not None
        assert (told["token_id"], told["logprob"]) == (one.token_id, one.logprob)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'"a"\nb\n', ":2: is not valid JSON"),
        (b'"a"\n{"text": "b"}\n', ":2: expected a JSON text or"),
        (b"3\n", ":1: expected a JSON text or"),
        (b"\n \n", "holds no prompts"),
        (b'"\xff"', "is not UTF-8 text"),
    ],
)
def test_broken_files_of_prompts_are_told(model_folder: Path, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(DanluError, match=message):
        generate(GenerateConfig(model=model_folder, prompts_file=path))


def test_what_is_not_a_model_is_told_by_name(model_folder: Path, tmp_path: Path) -> None:
    cases = {
        "missing": "no such model folder",
        "empty": "is not a model folder",
        "data": "is a data folder; expected a model folder",
        "gguf": "cut short or damaged",
        "gguf/m.gguf": "cut short or damaged",
        "half": "holds no weights; expected model.safetensors",
    }
    for name in ("empty", "data", "gguf", "half"):
        (tmp_path / name).mkdir()
    Card("data", "data build", "0", {}).save(tmp_path / "data")
    (tmp_path / "gguf" / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "half" / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    for name, message in cases.items():
        with pytest.raises(DanluError, match=message):
            generate(GenerateConfig(model=tmp_path / name, prompt="a"))
        with pytest.raises(DanluError, match=message):
            chat(ChatConfig(model=tmp_path / name))


def test_impossible_options_are_told_together(model_folder: Path) -> None:
    with pytest.raises(Problems) as error:
        validate(GenerateConfig(model=model_folder, top_p=0, min_p=2, max_new_tokens=0))
    assert len(error.value.problems) == 3
    with pytest.raises(Problems, match="prompt and prompts_file are both given"):
        validate(GenerateConfig(model=model_folder, prompt="a", prompts_file=Path("b")))
    with pytest.raises(DanluError, match=r"has \d+ tokens, the model's context 4096"):
        generate(GenerateConfig(model=model_folder, prompt="word " * 4000))


def test_chat_is_many_turns_through_the_template(model_folder: Path) -> None:
    lines = "hello\n\n/nonsense\n/system Be brief.\n丹炉?\nand then?\n/reset\nhello\n/exit\nnever read\n"
    done = danlu("chat", model_folder, "--max-new-tokens", 8, *GREEDY, "--top-p", 1, stdin=lines.encode())
    assert done.returncode == 0, done.stderr.decode()
    assert b"no command /nonsense" in done.stderr
    tokenizer = Tokenizer.load(model_folder)
    shown = ""
    for conversation in (["hello"], ["/", "丹炉?", "and then?"], ["/", "hello"]):
        messages = [{"role": "system", "content": "Be brief."}] if conversation[0] == "/" else []
        for text in conversation[len(messages) :]:
            messages.append({"role": "user", "content": text})
            prompt = tokenizer.encode_chat(messages, add_generation_prompt=True)
            messages.append({"role": "assistant", "content": expected(model_folder, prompt, 8)})
            shown += messages[-1]["content"] + "\n"
    assert done.stdout.decode() == shown


def test_ctrl_c_stops_the_answer_and_not_the_chat(model_folder: Path) -> None:
    command = [sys.executable, "-m", "danlu", "chat", str(model_folder), "--max-new-tokens", "4000", *GREEDY]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert process.stdout.read(1)  # the answer has begun, and was shown before it was complete
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(b"/exit\n", timeout=60)
    assert process.returncode == 0, err.decode()
    assert b"(stopped)" in err
    assert out.endswith(b"\n")


def test_a_long_conversation_forgets_its_oldest_turns(model_folder: Path) -> None:
    tokenizer = Tokenizer.load(model_folder)
    messages = [{"role": "system", "content": "Be brief."}]
    for i in range(6):
        messages += [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}]
    messages.append({"role": "user", "content": "last"})
    whole = len(tokenizer.encode_chat(messages, add_generation_prompt=True))
    assert fit_context(tokenizer, messages, whole)[2] == 0
    kept, ids, dropped = fit_context(tokenizer, messages, whole - 1)
    assert dropped == 2
    assert kept == messages[:1] + messages[3:]
    assert ids == tokenizer.encode_chat(kept, add_generation_prompt=True)
    assert len(ids) < whole
    shortest = len(tokenizer.encode_chat([messages[0], messages[-1]], add_generation_prompt=True))
    assert fit_context(tokenizer, messages, shortest)[0] == [messages[0], messages[-1]]
    with pytest.raises(DanluError, match="shorten it"):
        fit_context(tokenizer, messages, shortest - 1)


def test_chat_says_when_it_forgets_and_goes_on_after_a_message_that_is_too_long(model_folder: Path) -> None:
    lines = "one " * 1000 + "\n" + "two " * 1000 + "\n" + "three " * 5000 + "\nfour\n"
    done = danlu("chat", model_folder, "--max-new-tokens", 2, *GREEDY, stdin=lines.encode())
    assert done.returncode == 0, done.stderr.decode()
    assert b"forgotten" in done.stderr
    assert b"shorten it" in done.stderr
    assert b"Traceback" not in done.stderr


def test_generate_answers_with_an_encoder_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    from danlu.tokenizer.train import train_on

    tokenizer = train_on([f"def f{i}(x): return x + {i}" for i in range(200)], 300)
    tokenizer.save(tmp_path)
    config = T5Config(
        vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=tokenizer.pad_id
    )
    torch.manual_seed(0)  # others may write bytes that are no characters, which are not shown
    theirs = T5ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    wish = GenerateConfig(model=tmp_path, prompt="def f1(x)", temperature=0, max_new_tokens=8)
    (shown,) = generate(wish)
    assert capsys.readouterr().out == shown + "\n"
    ids = torch.tensor([tokenizer.encode_for_encoder("def f1(x)")[0]])
    expected = theirs.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=list(tokenizer.stop_ids))[0, 1:]
    assert shown == tokenizer.decode(expected.tolist(), skip_special=True)
    assert generate(dataclasses.replace(wish, json=True)) == [shown]
