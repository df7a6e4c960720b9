"""The engines that `benchmarks/inference.py` compares, each in a process of its own that stays alive.

`python benchmarks/inference_peers.py PEER SETTINGS`, with the arguments of :class:`Peer` as JSON, opens the model,
prints one JSON line, and from then on answers each JSON line on standard input with one on standard output:
``{"prompts": [[id, ...], ...], "new_tokens": 200, "cached": 0}`` is answered with the new tokens of every prompt, the
seconds until the first of them and until the last. All prompts are handed over at once; decoding is greedy and goes on
past the end of an answer. ``{}`` is answered with the largest memory so far. The process ends with its input.

Only the standard library and the engine itself are imported, so that a peer can run in another environment than
danlu's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol, TextIO

Prompts = list[list[int]]

CACHE_MB = 256
"""Of danlu's cache, which is taken when the model is opened, as `danlu serve` does: 11,000 tokens, more than any task
has at once. llama.cpp takes what its slots can hold at once, too."""


class Peer(Protocol):
    """An engine with the model open.

    Args:
        model: the GGUF file.
        threads: that compute.
        streams: sequences that run at once, at most.
        length: tokens of one sequence, at most.
        drafts: speculate with n-grams of the prompt.
    """

    def __init__(self, model: str, threads: int, streams: int, length: int, drafts: bool) -> None: ...

    def complete(self, prompts: Prompts, new_tokens: int, cached: int) -> tuple[Prompts, float]:
        """The new tokens of each prompt, and the clock at the first of them. The last call has left ``cached`` tokens
        of the prompt behind, which may be taken from the cache."""


class Danlu:
    """This package."""

    def __init__(self, model: str, threads: int, streams: int, length: int, drafts: bool) -> None:
        import torch

        from danlu.engine.engine import Engine
        from danlu.engine.engine_config import EngineConfig

        torch.set_num_threads(threads)
        config = EngineConfig(
            max_running=streams, context=length, draft="ngram" if drafts else "none",
            kv_memory=CACHE_MB, kv_reserve=True,
        )  # fmt: skip
        self.engine = Engine(model, config)

    def complete(self, prompts: Prompts, new_tokens: int, cached: int) -> tuple[Prompts, float]:
        from danlu.engine.config import SamplingParams

        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, temperature=0.0)
        submitted = {self.engine.submit(prompt, params): time.perf_counter() for prompt in prompts}
        found = {}
        while self.engine.has_work:
            for event in self.engine.step():
                if event.generation is not None:
                    if event.generation.error:
                        raise RuntimeError(event.generation.error)
                    found[event.request_id] = event.generation
        first = min(at + (found[name].stats.first_token_seconds or 0.0) for name, at in submitted.items())
        return [found[name].completions[0].token_ids for name in submitted], first


class LlamaCpp:
    """llama.cpp's own batches of many sequences, as its server runs them, but with no HTTP and no sampler around."""

    BATCH = 2048  # the server's default

    def __init__(self, model: str, threads: int, streams: int, length: int, drafts: bool) -> None:
        import llama_cpp
        import numpy as np

        self.lib, self.np = llama_cpp, np
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp does not open this file")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = streams * length, streams
        settings.n_batch, settings.n_threads, settings.n_threads_batch = self.BATCH, threads, threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(self.BATCH, 0, 1)

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Run (id, position, sequence, logits wanted) of at most BATCH tokens."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if status := self.lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")

    def argmax(self, row: int) -> int:
        """The most likely token after the row of the last batch."""
        logits = self.lib.llama_get_logits_ith(self.context, row)
        return int(self.np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())

    def complete(self, prompts: Prompts, new_tokens: int, cached: int) -> tuple[Prompts, float]:
        self.lib.llama_memory_seq_rm(self.memory, -1, cached, -1)
        waiting = [
            (token, at, sequence, at == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for at, token in enumerate(prompt)
            if at >= cached
        ]
        found: Prompts = [[] for _ in prompts]
        first = 0.0
        for start in range(0, len(waiting), self.BATCH):
            piece = waiting[start : start + self.BATCH]
            self.decode(piece)
            for row, (_, _, sequence, wanted) in enumerate(piece):
                if wanted:
                    found[sequence].append(self.argmax(row))
                    first = first or time.perf_counter()
        for n in range(1, new_tokens):
            self.decode([(found[s][-1], len(prompt) + n - 1, s, True) for s, prompt in enumerate(prompts)])
            for sequence in range(len(prompts)):
                found[sequence].append(self.argmax(sequence))
        return found, first


class LlamaCppLookup:
    """llama-cpp-python's prompt lookup, one sequence."""

    def __init__(self, model: str, threads: int, streams: int, length: int, drafts: bool) -> None:
        from llama_cpp import Llama
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        draft = LlamaPromptLookupDecoding(num_pred_tokens=10)
        self.model = Llama(
            model, n_ctx=length, n_threads=threads, n_threads_batch=threads, draft_model=draft, logits_all=True,
            verbose=False,
        )  # fmt: skip

    def complete(self, prompts: Prompts, new_tokens: int, cached: int) -> tuple[Prompts, float]:
        [prompt] = prompts
        found: list[int] = []
        first = 0.0
        for token in self.model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
            first = first or time.perf_counter()
            found.append(token)
            if len(found) == new_tokens:
                break
        return [found], first


class OpenVino:
    """OpenVINO GenAI's continuous batching, which reads the GGUF file too."""

    def __init__(self, model: str, threads: int, streams: int, length: int, drafts: bool) -> None:
        import numpy as np
        import openvino as ov
        import openvino_genai as genai

        self.np, self.ov, self.genai, self.drafts = np, ov, genai, drafts
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size, scheduler.enable_prefix_caching = 1, True
        properties: dict[str, object] = {"INFERENCE_NUM_THREADS": threads}
        if drafts:
            properties["prompt_lookup"] = True
        self.pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)

    def complete(self, prompts: Prompts, new_tokens: int, cached: int) -> tuple[Prompts, float]:
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = new_tokens, False, True
        if self.drafts:
            config.num_assistant_tokens, config.max_ngram_size = 10, 3
        handles = [
            self.pipeline.add_request(i, self.ov.Tensor(self.np.array([prompt], dtype=self.np.int64)), config)
            for i, prompt in enumerate(prompts)
        ]
        first = 0.0
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            if not first and any(handle.can_read() for handle in handles):
                first = time.perf_counter()
        return [list(handle.read_all()[0].generated_ids) for handle in handles], first


class Transformers:
    """transformers, weights dequantised when the file is opened: bf16 where the CPU computes it, else fp32."""

    def __init__(self, model: str, threads: int, streams: int, length: int, drafts: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        flags = Path("/proc/cpuinfo").read_text()
        dtype = torch.bfloat16 if "amx_bf16" in flags or "avx512_bf16" in flags else torch.float32
        folder, name = os.path.split(model)
        self.model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype).eval()

    def complete(self, prompts: Prompts, new_tokens: int, cached: int) -> tuple[Prompts, float]:
        clock = FirstToken()
        ids = self.torch.tensor(prompts)
        with self.torch.inference_mode():
            found = self.model.generate(
                ids, attention_mask=self.torch.ones_like(ids), streamer=clock, do_sample=False, pad_token_id=0,
                max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            )  # fmt: skip
        return found[:, ids.shape[1] :].tolist(), clock.first


class FirstToken:
    """A streamer of transformers that looks at the clock when the second thing comes; the first is the prompt."""

    def __init__(self) -> None:
        self.calls, self.first = 0, 0.0

    def put(self, _: object) -> None:
        self.calls += 1
        if self.calls == 2:
            self.first = time.perf_counter()

    def end(self) -> None: ...


START = {
    "danlu": (
        "import sys; from danlu.cli import main; sys.argv[1:1] = ['generate']; "
        "sys.argv += ['Hi', '--temperature', '0', '--max-new-tokens', '8']; main()"
    ),
    "llama.cpp": (
        "import sys; from llama_cpp import Llama; model = Llama(sys.argv[1], verbose=False); "
        "[print(piece['choices'][0]['text'], end='', flush=True) "
        "for piece in model.create_completion('Hi', max_tokens=8, temperature=0.0, stream=True)]"
    ),
    "openvino": (
        "import sys; from openvino_genai import LLMPipeline; "
        "LLMPipeline(sys.argv[1], 'CPU').generate('Hi', max_new_tokens=8, "
        "streamer=lambda text: print(text, end='', flush=True))"
    ),
}
"""Programs that continue "Hi" with the model named in their first argument and print each token as it comes."""

IMPORTS = {"danlu": "torch", "llama.cpp": "llama_cpp", "openvino": "openvino_genai", "transformers": "torch"}
"""The library whose import is taken off an engine's memory."""

PEERS: dict[str, type[Peer]] = {
    "danlu": Danlu,
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
    "transformers": Transformers,
}
DRAFTING: dict[str, type[Peer]] = {"danlu": Danlu, "llama.cpp": LlamaCppLookup, "openvino": OpenVino}


def peak_memory() -> int:
    """Largest resident set of this process, in bytes."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def answer(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    """What one line of the input is answered with."""
    if not request:
        return {"peak_memory": peak_memory()}
    start = time.perf_counter()
    tokens, first = peer.complete(request["prompts"], request["new_tokens"], request["cached"])
    return {"tokens": tokens, "seconds": time.perf_counter() - start, "first_seconds": first - start}


def own_stdout() -> TextIO:
    """Standard output for our lines alone; whatever a library prints goes to standard error."""
    ours = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return ours


def main() -> None:
    """Open the peer and answer until the input ends."""
    out = own_stdout()
    name, settings = sys.argv[1], json.loads(sys.argv[2])
    try:
        peer = (DRAFTING if settings["drafts"] else PEERS)[name](**settings)
        print(json.dumps({}), file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(peer, json.loads(line))), file=out, flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)
        raise


if __name__ == "__main__":
    main()
