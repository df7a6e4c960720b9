"""`danlu generate` and `danlu chat`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from danlu import console
from danlu.adapters.open import open_adapted
from danlu.adapters.peft_config import is_adapter_folder
from danlu.config import validate
from danlu.engine.config import SamplingParams
from danlu.engine.engine import Engine
from danlu.engine.request import Generation
from danlu.engine.verbs_config import ChatConfig, GenerateConfig
from danlu.errors import DanluError
from danlu.formats.card import card_if_any
from danlu.hardware import DTYPES, pick_device, pick_precision
from danlu.hub.pull import with_models
from danlu.models.load import Model, load_model
from danlu.tokenizer.tokenizer import Tokenizer

Message = dict[str, str]
M = TypeVar("M", bound=Model)

COMMANDS = "/reset forgets the conversation, /system TEXT sets the system message, /exit or Ctrl-D leaves"


def open_model(folder: Path, device: str, precision: str, kind: type[M]) -> tuple[M, Tokenizer]:
    """A model and its tokenizer, ready to run; an adapter folder is merged into its base.

    Raises:
        DanluError: the folder is missing, incomplete or of another kind.
    """
    _require_model(folder)
    place = pick_device(device)
    dtype = DTYPES[pick_precision(precision, place)]
    if is_adapter_folder(folder):
        return open_adapted(folder, kind, device=place, dtype=dtype, merged=True)
    return load_model(folder, kind, device=place, dtype=dtype), Tokenizer.load(folder)


def _require_model(path: Path) -> None:
    card = card_if_any(path) if path.is_dir() else None
    if card is not None and card.kind not in ("model", "adapter"):
        raise DanluError(f"{path}: is a {card.kind} folder; expected a model folder")


def generate(config: GenerateConfig) -> list[str]:
    """Continue one prompt, streamed to standard output, or each prompt of a file; returns the answers.

    An encoder-decoder (T5, BART) reads the prompt and answers it.

    Raises:
        DanluError: no prompt, a prompt that does not fit the model, or a folder that is not a model.
    """
    config = with_models(validate(config), "model")
    prompts = _read_prompts(config)
    params = [_with_own_seed(config, i) for i in range(len(prompts))]
    _require_model(config.model)
    with Engine(config.model, config) as engine:
        if not config.json and config.prompts_file is None and config.n == 1:
            pieces = []
            for event in engine.stream(prompts[0], config):
                pieces.append(event.text)
                _show(event.text)
                _raise_if_failed(event.generation)
            _show("\n")
            return ["".join(pieces)]
        with console.progress("generating", len(prompts), "prompts") as advance:
            generations = engine.generate(prompts, params, progress=advance)
    for generation in generations:
        _raise_if_failed(generation)
    for prompt, generation in zip(prompts, generations, strict=True):
        for completion in generation.completions:
            row = {"prompt": prompt, **dataclasses.asdict(completion)}
            if row["logprobs"] is None:
                del row["logprobs"]
            if generation.prompt_logprobs is not None:
                row["prompt_logprobs"] = [one and dataclasses.asdict(one) for one in generation.prompt_logprobs]
            print(json.dumps(row, ensure_ascii=False), flush=True)
    return [completion.text for generation in generations for completion in generation.completions]


def _raise_if_failed(generation: Generation | None) -> None:
    if generation is not None and generation.error is not None:
        raise DanluError(generation.error)


def _read_prompts(config: GenerateConfig) -> list[str]:
    if config.prompt is not None:
        return [config.prompt]
    if config.prompts_file is not None:
        return list(_prompts_of(config.prompts_file))
    if sys.stdin.isatty():
        raise DanluError("nothing to continue: give --prompt TEXT, --prompts-file FILE, or text on standard input")
    try:
        return [sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")]
    except UnicodeDecodeError as error:
        raise DanluError(f"standard input: is not UTF-8 text (byte {error.start})") from error


def _prompts_of(path: Path) -> Iterator[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DanluError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DanluError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    if not any(map(str.strip, lines)):
        raise DanluError(f"{path}: holds no prompts; write one JSON text a line")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DanluError(f"{path}:{number}: is not valid JSON ({error}); put the text in quotes") from error
        prompt = row.get("prompt") if isinstance(row, dict) else row
        if not isinstance(prompt, str):
            raise DanluError(f'{path}:{number}: expected a JSON text or {{"prompt": text}}')
        yield prompt


def chat(config: ChatConfig) -> list[Message]:
    """Talk to a model: reads lines, streams answers, until the input ends or ``/exit``. Returns the conversation.

    At a terminal Ctrl-C stops the answer and keeps what was said so far; elsewhere lines are read from standard input.

    Raises:
        DanluError: the folder is not a model, or has no chat template.
    """
    config = with_models(validate(config), "model")
    _require_model(config.model)
    with Engine(config.model, config) as engine:
        return _converse(engine, config)


def _converse(engine: Engine, config: ChatConfig) -> list[Message]:
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    system, messages = config.system, _opening(config.system)
    tokenizer.encode_chat([*messages, {"role": "user", "content": ""}], add_generation_prompt=True)  # has a template?
    card = card_if_any(config.model)
    if card is not None and card.verb == "pretrain":
        console.warn(f"{config.model} has never seen a conversation; make it a chat model with: danlu finetune")
    console.note(f"Say something. Ctrl-C stops an answer; {COMMANDS}.")
    answers = 0
    for line in _lines():
        command, _, rest = line.strip().partition(" ")
        if not command:
            continue
        if command == "/exit":
            break
        if command in ("/reset", "/system"):
            system = rest.strip() or None if command == "/system" else system
            messages = _opening(system)
            console.note("A new conversation begins.")
        elif command.startswith("/"):
            console.warn(f"there is no command {command}; {COMMANDS}")
        else:
            try:
                asked = [*messages, {"role": "user", "content": line}]
                room = min(config.max_new_tokens, engine.max_len // 4)
                asked, prompt, dropped = fit_context(tokenizer, asked, engine.max_len - room)
            except DanluError as error:
                console.warn(str(error))
                continue
            if dropped:
                console.note(
                    f"The conversation outgrew the model's context; its {dropped} oldest messages are forgotten."
                )
            if answer := _answer(engine, prompt, _with_own_seed(config, answers)):
                messages = [*asked, {"role": "assistant", "content": answer}]
            answers += 1
    return messages


def fit_context(tokenizer: Tokenizer, messages: list[Message], max_tokens: int) -> tuple[list[Message], list[int], int]:
    """The newest messages that fit, from a user's message on and with the system message kept.

    Returns:
        The messages, the tokens of the prompt they make, and how many messages were dropped.

    Raises:
        DanluError: the last message alone is too long.
    """
    system = [m for m in messages[:1] if m["role"] == "system"]
    turns = messages[len(system) :]
    starts = [i for i, message in enumerate(turns) if message["role"] == "user"]
    for start in starts:
        kept = [*system, *turns[start:]]
        ids = tokenizer.encode_chat(kept, add_generation_prompt=True)
        if len(ids) <= max_tokens:
            return kept, ids, start
    raise DanluError(f"the message takes {len(ids)} tokens and {max_tokens} fit the model's context; shorten it")


def _answer(engine: Engine, prompt: list[int], params: SamplingParams) -> str:
    """Stream one answer; Ctrl-C ends it where it is."""
    pieces: list[str] = []
    events = engine.stream(prompt, params)
    try:
        for event in events:
            pieces.append(event.text)
            _show(event.text)
            _raise_if_failed(event.generation)
    except KeyboardInterrupt:
        console.note("\n(stopped)")
    finally:
        events.close()
    _show("\n")
    return "".join(pieces)


def _opening(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


def _lines() -> Iterator[str]:
    """Lines of the user until the end of input. At a terminal with line editing; Ctrl-C there only clears the line."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        import readline  # noqa: F401 (gives input() history and editing)
    while True:
        try:
            if at_terminal:
                yield input("> ")
            elif line := sys.stdin.buffer.readline():
                yield line.decode("utf-8", errors="replace").rstrip("\r\n")
            else:
                return
        except KeyboardInterrupt:
            console.note("\n(Ctrl-D or /exit leaves)")
        except EOFError:
            _show("\n")
            return


def _with_own_seed(params: SamplingParams, number: int) -> SamplingParams:
    """Parameters whose draws differ from those of the other answers of the same run."""
    return params if params.seed is None else dataclasses.replace(params, seed=(params.seed + number) % 2**63)


_CONTROL = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\t\n"}


def _show(text: str) -> None:
    """Print at once. A terminal gets no control characters: what a model writes must not steer it."""
    sys.stdout.write(text.translate(_CONTROL) if sys.stdout.isatty() else text)
    sys.stdout.flush()
