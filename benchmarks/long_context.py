"""Long prompts in bounded memory: `python benchmarks/long_context.py`.

A small random Llama with YaRN reads prompts of growing length and writes 16 tokens, each length in its own process:
seconds, tokens per second, and the peak of the resident memory above what the imports take, beside what `danlu plan`
expects and beside the one score matrix (heads x tokens x tokens) that reading the prompt in one piece without a fused
kernel would hold. One JSON line ends the output.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import torch

from danlu.engine.config import SamplingParams
from danlu.engine.generate import generate_tokens
from danlu.hardware import peak_memory_bytes
from danlu.models.causal_lm import CausalLM
from danlu.nn.config import ModelConfig, Rope, RopeScaling
from danlu.planning.memory import inference


def small_llama(longest: int) -> ModelConfig:
    """4 layers of width 256, trained at 2,048 tokens as it were, and stretched."""
    yarn = RopeScaling("yarn", factor=longest / 2048, original_context=2048)
    return ModelConfig(8192, 4, 256, 4, 2, 64, 704, context=longest + 16, rope=Rope(scaling=yarn), tie_embeddings=True)


def measure(tokens: int, longest: int) -> dict[str, Any]:
    """One prompt, in this process."""
    import time

    torch.manual_seed(0)
    before = peak_memory_bytes(torch.device("cpu"))
    model = CausalLM(small_llama(longest)).eval()
    model.init_weights()
    prompt = torch.randint(0, 8192, (tokens,)).tolist()
    start = time.perf_counter()
    stream = generate_tokens(model, prompt, SamplingParams(max_new_tokens=16, temperature=0))
    first = next(stream)
    prefilled = time.perf_counter()
    answer = [first, *stream]
    done = time.perf_counter()
    planned = inference(model.config, model.num_parameters(), "FP32", tokens + 16)
    return {
        "tokens": tokens,
        "prefill_seconds": prefilled - start,
        "prefill_tokens_per_second": tokens / (prefilled - start),
        "decode_tokens_per_second": (len(answer) - 1) / (done - prefilled),
        "peak_bytes": peak_memory_bytes(torch.device("cpu")) - before,
        "planned_bytes": planned.total,
        "weights_and_cache_bytes": planned.weights + planned.kv_cache,
        "score_matrix_bytes": 4 * model.config.n_heads * tokens**2,
    }


def main() -> None:
    """Run the lengths and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    longest = max(given.lengths)
    if given.one:
        print(json.dumps(measure(given.one, longest)))
        return
    print(
        f"{'tokens':>8}{'prefill s':>11}{'tok/s':>9}{'decode tok/s':>14}{'peak MB':>9}{'planned':>9}{'one piece':>11}"
    )
    rows = []
    for tokens in given.lengths:
        command = [sys.executable, __file__, "--one", str(tokens), "--lengths", str(longest)]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"{row['tokens']:8}{row['prefill_seconds']:11.2f}{row['prefill_tokens_per_second']:9.0f}"
            f"{row['decode_tokens_per_second']:14.1f}{row['peak_bytes'] / 1e6:9.0f}{row['planned_bytes'] / 1e6:9.0f}"
            f"{row['score_matrix_bytes'] / 1e6:11.0f}"
        )
    print(json.dumps({"benchmark": "long_context", "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
