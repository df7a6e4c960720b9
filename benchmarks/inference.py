"""Inference beside the fast engines on a CPU: `python benchmarks/inference.py` (`pip install '.[bench]'`).

SmolLM2-135M-Instruct Q4_1, greedy, danlu beside llama.cpp, OpenVINO GenAI and, as a slow reference, transformers, as
far as they are installed. A table for each task: decoding, prefill, sixteen requests at once, a prompt whose beginning
is cached, the start of a process, memory, speculation. One JSON line ends the output.

Every engine lives in a process of its own, which is stopped while another is measured, and gets the same token ids in
the same round (A B C A B C, median of the rounds). "danlu x" is how many times better danlu does than the row's engine,
the median of the ratios within a round. Shares are of what this machine reads and multiplies, measured in the same run
before and after: 96 MB read by the same threads against the bytes that a token takes (weights as stored, keys and
values as 2-byte numbers), and the best matrix product against the FLOPs of the prompt.

llama.cpp runs the requests as one batch of many sequences, which is what its server does without HTTP in between.
Nothing else should run on the machine.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from comparison import comparison_parser, parse_comparison
from inference_peers import IMPORTS
from inference_tasks import NEW, PROMPT, TASKS, Contestant, Task, Texts
from inference_worker import PeerFailed

from danlu import hardware
from danlu.formats.gguf_file import GGUFFile
from danlu.models.load import read_config
from danlu.tokenizer.tokenizer import Tokenizer

Rounds = dict[str, list[dict[str, float]]]
"""Figures of each contestant in each round."""

READ_BYTES = 96 * 10**6


@dataclass(frozen=True)
class Work:
    """What a token costs at least.

    Attributes:
        bytes_per_token: read to decode one, averaged over an answer of the decode task.
        flops_per_token: of the prompt of the prefill task, averaged over its tokens.
    """

    bytes_per_token: float
    flops_per_token: float


def work_of(model: Path) -> Work:
    """From the shapes of the file. Its head is the embedding: read whole for a new token, not run over a prompt."""
    config, infos = read_config(model), GGUFFile(model).infos
    kv_bytes = 2 * 2 * config.n_layers * config.n_kv_heads * config.head_dim
    body = sum(torch.Size(info.shape).numel() for name, info in infos.items() if name != "token_embd.weight")
    attention = 4 * config.n_layers * config.n_heads * config.head_dim * PROMPT / 2
    weights = sum(info.n_bytes for info in infos.values())
    return Work(weights + kv_bytes * (PROMPT + NEW / 2), 2 * body + attention)


def read_bandwidth() -> float:
    """Bytes a second of the best of many sums over 96 MB."""
    numbers = torch.ones(READ_BYTES // 4)
    best = 0.0
    for _ in range(50):
        start = time.perf_counter()
        numbers.sum()
        best = max(best, READ_BYTES / (time.perf_counter() - start))
    return best


def measure_limits() -> dict[str, float]:
    """Bytes and FLOPs a second of this machine now."""
    device = torch.device("cpu")
    hardware.matmul_peak.cache_clear()
    dtype = hardware.DTYPES[hardware.pick_precision("auto", device)]
    return {"bandwidth": read_bandwidth(), "matmul": hardware.matmul_peak(dtype, device)}


def measure(name: str, contestants: list[Contestant], texts: Texts, rounds: int, skipped: dict[str, str]) -> Rounds:
    """The task in turns; who fails it is left out of it."""
    task = TASKS[name]
    running = [contestant for contestant in contestants if contestant.engine in task.engines]
    found: Rounds = {contestant.name: [] for contestant in running}
    for _ in range(min(rounds, task.rounds or rounds)):
        prompts = task.prompts(texts)
        for contestant in list(running):
            try:
                found[contestant.name].append(task.measure(contestant, prompts))
            except PeerFailed as error:
                contestant.close()
                running.remove(contestant)
                del found[contestant.name]
                skipped[f"{name}: {contestant.name}"] = str(error)
                print(f"{name}: {contestant.name} is left out: {error}", file=sys.stderr)
    return found


def table(task: Task, rounds: Rounds, work: Work, limits: dict[str, float]) -> dict[str, dict[str, float]]:
    """Print and return medians, ratios and shares."""
    found: dict[str, dict[str, float]] = {}
    for name, figures in rounds.items():
        row = {key: statistics.median(one[key] for one in figures) for key in figures[0]}
        compared = next(iter(row))
        if name != "danlu" and "danlu" in rounds:
            ratios = [a[compared] / b[compared] for a, b in zip(rounds["danlu"], figures, strict=True)]
            row["danlu x"] = statistics.median(ratios if task.more_is_better else [1 / ratio for ratio in ratios])
        if task.limit == "bandwidth":
            row["share of bandwidth"] = row[compared] * work.bytes_per_token / limits["bandwidth"]
        elif task.limit == "matmul":
            row["share of peak"] = row[compared] * work.flops_per_token / limits["matmul"]
        found[name] = row
    columns = list(dict.fromkeys(key for row in found.values() for key in row))
    print(f"\n{task.what}\n{'':24}" + "".join(f"{column:>20}" for column in columns))
    for name, row in found.items():
        print(f"{name:<24}" + "".join(f"{row[key]:20.4g}" if key in row else " " * 20 for key in columns))
    return found


def installed(python: str, engine: str) -> str | None:
    """The version of an engine's library in an environment; None if it is not there."""
    distribution = {"danlu": "danlu", "llama.cpp": "llama-cpp-python", "openvino": "openvino-genai"}.get(engine, engine)
    code = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    done = subprocess.run([python, "-c", code, distribution], capture_output=True, text=True)
    return done.stdout.strip() or None


def main() -> None:
    """Measure, print the tables and one JSON line."""
    meaning = "an engine of another environment, as another build of llama.cpp: llama.cpp=/path/bin/python"
    given = parse_comparison(comparison_parser(__doc__, TASKS, IMPORTS, "--also", meaning), TASKS, IMPORTS)
    torch.set_num_threads(given.threads)
    model = given.model

    skipped: dict[str, str] = {}
    contestants, versions = [], {}
    for name, engine, python in [
        *((engine, engine, sys.executable) for engine in given.peers),
        *((f"{engine} ({i})", engine, python) for i, (engine, python) in enumerate(given.elsewhere, 2)),
    ]:
        if version := installed(python, engine):
            contestants.append(Contestant(name, engine, python, model, given.threads))
            versions[name] = version
        else:
            skipped[name] = "not installed"
            print(f"{name} is left out: not installed (pip install '.[bench]')", file=sys.stderr)

    texts, work = Texts(Tokenizer.load(model)), work_of(model)
    try:
        before = measure_limits()
        measured = {name: measure(name, contestants, texts, given.rounds, skipped) for name in given.only}
        idle = {contestant.name: contestant.idle_cores for contestant in contestants}
    finally:
        for contestant in contestants:
            contestant.close()
    after = measure_limits()
    limits = {name: max(before[name], after[name]) for name in before}
    print(
        f"\nthis machine reads {limits['bandwidth'] / 1e9:.1f} GB/s, multiplies {limits['matmul'] / 1e9:.0f} GFLOP/s;"
    )
    print(f"a decoded token reads {work.bytes_per_token / 1e6:.1f} MB, one of the prompt takes", end=" ")
    print(f"{work.flops_per_token / 1e6:.0f} MFLOP; cores busy while idle: {idle}")
    result = {
        "benchmark": "inference", "model": model.name, "cpu": platform.machine(), "threads": given.threads,
        "rounds": given.rounds, "torch": torch.__version__, "versions": versions, "limits": limits,
        "bytes_per_token": work.bytes_per_token, "flops_per_token": work.flops_per_token, "idle_cores": idle,
        "skipped": skipped,
    }  # fmt: skip
    for name, rounds in measured.items():
        result[name] = table(TASKS[name], rounds, work, limits)
    print(f"\n{json.dumps(result)}")


if __name__ == "__main__":
    main()
